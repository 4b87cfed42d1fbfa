"""Which device a run uses, and what it is called, for people who compare times."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import torch


def find_device(name: str) -> torch.device:
    """Return the device called ``name``, now what "cuda" alone means; raise ValueError when there is no such device here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; give cpu, cuda or cuda:N")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"there is no device {name!r}; torch finds {torch.cuda.device_count()} CUDA devices")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the GPU's name, or the processor's with the number of threads that torch uses."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        name = next(line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
