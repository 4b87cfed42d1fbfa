"""One run in several processes, as torchrun starts them: data parallel, the same steps as in one process.

Every process draws the augmentation of the whole batch and takes its share, batch norms see the whole batch, and gradients
are averaged, so that the number of processes changes a run by rounding only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.errors import RunError
from training.step.synced_norm import total, use_synced_norms

_PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass(frozen=True)
class Parallel:
    """This process among ``world_size``; without arguments it is the only one."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and shows what is written and shown once."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """Return this process's part of a batch; raise RunError when it cannot be divided evenly."""
        if batch_size % self.world_size:
            raise RunError(
                f"a batch of {batch_size} cannot be divided among {self.world_size} processes; start a number that divides it"
            )
        each = batch_size // self.world_size
        return slice(self.rank * each, (self.rank + 1) * each)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process; every process must ask."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag))  # on the CPU, over gloo: waits for the other processes and not for their GPUs
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over all processes; every process must ask."""
        return values if self.world_size == 1 else total(values)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.any(False)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process through the block before the others: it downloads, they find what it left."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def distribute(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return what to call instead of ``model`` in a training step; ``model`` itself keeps the parameters and names."""
        if self.world_size == 1:
            return model
        use_synced_norms(model, device)
        return DistributedDataParallel(model, broadcast_buffers=False)


@contextmanager
def open_parallel(device: torch.device) -> Iterator[tuple[Parallel, torch.device]]:
    """Join the processes that torchrun started; give this one's place and its own device of the kind of ``device``.

    Outside torchrun this is the only process, on ``device``. Raises RunError when there are too few GPUs.
    """
    if "LOCAL_RANK" not in os.environ:
        yield Parallel(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise RunError(f"there are {torch.cuda.device_count()} GPUs; start at most as many processes with --nproc-per-node")
        torch.cuda.set_device(device)
    if sys.platform == "linux":  # killed with torchrun, lest it writes into the folder of the run that follows
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Parallel(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
