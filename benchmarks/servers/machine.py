"""The machine and the versions that figures belong to.

Owns: what is said about them. Does not know: any figure.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from service.cpu import available_cores

_PACKAGES = ("fastapi", "httptools", "mosec", "numpy", "openvino", "pillow", "starlette", "torch", "uvicorn", "uvloop")


def describe_machine() -> dict[str, str]:
    """Give the processor, its cores at hand, the memory, the system, Python and the packages that matter."""
    facts = {
        "processor": f"{_processor()}, {available_cores()} cores",
        "memory": f"{_memory_gib():.0f} GiB",
        "system": f"Linux {platform.release()}",
        "Python": platform.python_version(),
    }
    return facts | {name: found for name in _PACKAGES if (found := _version(name))}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = set(facts.get("flags", "").split())
    extensions = [name for name in ("avx512f", "avx512_bf16", "avx512_vnni", "amx_int8") if name in flags]
    return f"{facts.get('model name', platform.machine())} ({', '.join(extensions) or 'no AVX-512'})"


def _memory_gib() -> float:
    kib = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return int(kib.split()[1]) / 2**20


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
