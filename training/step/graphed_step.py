"""A training step on a GPU as one CUDA graph: its thousand kernels cost the processor one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_WARM_UP_STEPS = 3  # libraries choose their kernels, and optimisers make their state, before a capture and never in it

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class GraphedStep:
    """Calls ``step(batch, targets)``, which updates ``model`` by ``optimizers``, as a graph; one for each form of its input.

    Rates are read anew at every call. What a call gives is overwritten by the next.
    """

    def __init__(self, step: Step, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self._step = step
        self._model = model
        self._optimizers = optimizers
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # the graphs never run at once, so they share their memory
        self._rates = [torch.zeros((), device="cuda") for _ in self._groups()]

    def __call__(self, batch: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Make one update; give what ``step`` gives."""
        form = (batch.shape, targets.shape, targets.dtype)
        if form not in self._graphs:
            self._graphs[form] = self._capture(batch.clone(), targets.clone())
        graph, static_batch, static_targets, loss, logits = self._graphs[form]
        static_batch.copy_(batch)
        static_targets.copy_(targets)
        for rate, group in zip(self._rates, self._groups(), strict=True):
            rate.fill_(group["lr"])
        graph.replay()
        return loss, logits

    def _capture(self, batch: Tensor, targets: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor, Tensor]:
        with self._rates_on_device(), self._unchanged():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP_STEPS):
                    self._step(batch, targets)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                loss, logits = self._step(batch, targets)
        return graph, batch, targets, loss, logits

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Let optimisers read their rates from where a replay finds them; a number would be part of the graph."""
        rates = [group["lr"] for group in self._groups()]
        for group, rate in zip(self._groups(), self._rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, number in zip(self._groups(), rates, strict=True):
                group["lr"] = number

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Put weights, statistics and momentum back to what they were; momentum that is new is zero."""
        # Detached: a clone that autograd knows of ties the parameter's gradient to this stream, which is not the graph's.
        before = {id(value): value.detach().clone() for value in self._state()}
        yield
        with torch.no_grad():
            for value in self._state():
                if id(value) in before:
                    value.copy_(before[id(value)])
                else:
                    value.zero_()

    def _state(self) -> Iterator[Tensor]:
        yield from self._model.state_dict(keep_vars=True).values()
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))
