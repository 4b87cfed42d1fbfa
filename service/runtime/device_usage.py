"""How much of the GPU is in use. Torch is imported only where it runs the model already."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """Memory used by all processes together and in all; ``utilization`` is 0 to 1, None where NVML cannot be asked."""

    used_bytes: int
    total_bytes: int
    utilization: float | None


def device_is_measured(device: str) -> bool:
    """Whether ``measure_device`` knows this kind of device."""
    return device.startswith("cuda")


def measure_device(device: str) -> DeviceUsage:
    """Ask the driver for memory and NVML for the share of its last sampling period in which a kernel ran."""
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    try:
        utilization = torch.cuda.utilization(device) / 100
    except Exception:  # nvidia-ml-py is missing, whose own error classes come with it, or the driver refuses
        utilization = None
    return DeviceUsage(total_bytes - free_bytes, total_bytes, utilization)
