"""What every route works with, made once per worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from service.engine.interface import Engine, EngineStatus, ModelInfo, State
from service.errors import NotReady
from service.observability.kept_images import KeptImages
from service.observability.metrics import SUPERVISOR, Metrics
from service.routes.decoder import Decoder
from service.settings import Settings
from service.web.admission import AdmissionGate

_ITERATION_S = 0.001  # that requests start in; 4 ms gave photographs 0.88 of the rate at 16 connections
_BACK_OFF_S = 0.005  # a sixth of the time goes to refusals at most


@dataclass(frozen=True)
class ServiceContext:
    """What one worker has.

    ``change_model`` asks the supervisor for ``reload`` or ``rollback``; None where there is none. ``kept`` is None where no
    images are kept.
    """

    settings: Settings
    engine: Engine
    decoder: Decoder
    metrics: Metrics
    change_model: Callable[[str], None] | None = None
    kept: KeptImages | None = None
    gate: AdmissionGate = field(default_factory=lambda: AdmissionGate(_ITERATION_S, _BACK_OFF_S))
    started: float = field(default_factory=time.monotonic)

    def state(self) -> tuple[State, EngineStatus]:
        """Return the service's state, of engine and supervisor together, and the engine's own status."""
        status, supervisor = self.engine.status(), self.metrics.values.facts(SUPERVISOR)
        if supervisor.draining:
            return "draining", status
        if supervisor.engine_gave_up and status.state != "ready":
            return "failed", status
        return status.state, status

    def is_ready(self) -> bool:
        """Whether a prediction would be answered."""
        return self.state()[0] == "ready"

    def is_live(self) -> bool:
        """Whether the process works, or is starting or draining."""
        return self.state()[0] != "failed"

    def model(self) -> ModelInfo:
        """Return the model that serves now; raise NotReady before there is one."""
        model = self.engine.model
        if model is None:
            raise NotReady("the service is starting; retry shortly", retry_after_s=1)
        return model
