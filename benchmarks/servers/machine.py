"""The machine, the commit and the versions that figures belong to."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from service.cpu import available_cores

_PACKAGES = ("fastapi", "httptools", "mosec", "numpy", "openvino", "pillow", "starlette", "torch", "uvicorn", "uvloop")


def describe_machine() -> dict[str, str]:
    """Return commit, processor, cores at hand, memory, load, system, Python and packages; ``name`` is for a file."""
    model, extensions = _processor()
    short = re.sub(r"\(.*?\)|@.*|\bcpu\b|\bprocessor\b|\d+-core", "", model.lower()).split()
    best = [name.rpartition("_")[2] for name in extensions if name in ("amx_int8", "avx512_vnni")][-1:]
    facts = {
        "name": "-".join([*short, *("amx" if name == "int8" else name for name in best), f"{available_cores()}-cores"]),
        "commit": _commit(),
        "processor": f"{model} ({', '.join(extensions) or 'no AVX-512'}), {available_cores()} cores",
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
        "memory": f"{_memory_gib():.0f} GiB",
        "system": f"Linux {platform.release()}",
        "Python": platform.python_version(),
    }
    return facts | {name: found for name in _PACKAGES if (found := _version(name))}


def _processor() -> tuple[str, list[str]]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = set(facts.get("flags", "").split())
    extensions: list[str] = [name for name in ("avx512f", "avx512_bf16", "avx512_vnni", "amx_int8") if name in flags]
    return facts.get("model name", platform.machine()), extensions


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _memory_gib() -> float:
    kib = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return int(kib.split()[1]) / 2**20


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
