"""How much of the GPU is in use. Torch is imported only where it runs the model already."""

from __future__ import annotations

import math


def measure_device(device: str) -> tuple[int, int, float]:
    """Return the memory that all processes use together, all memory (bytes), and the share of time in which a kernel ran.

    That share, 0 to 1, is NVML's, of its last sampling period; NaN where NVML cannot be asked.
    """
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    try:
        utilization = torch.cuda.utilization(device) / 100
    except Exception:  # nvidia-ml-py is missing, whose own error classes come with it, or the driver refuses
        utilization = math.nan
    return total_bytes - free_bytes, total_bytes, utilization
