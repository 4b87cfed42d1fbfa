"""What every route works with, made once per worker.

Owns: the bundle. Does not know: what routes do with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from service.engine.interface import Engine, EngineStatus, ModelInfo, State
from service.errors import NotReady, ServiceError
from service.observability.metrics import Metrics
from service.routes.decoder import Decoder
from service.settings import Settings
from service.web.access import ApiKeys
from service.web.turn_gate import TurnGate

_REQUESTS_PER_TURN = 32  # about 3 ms of work, answers included
_REST_S = 0.005  # up to 6,400 requests a second are refused at once


@dataclass(frozen=True)
class ServiceContext:
    """The parts of one worker; ``is_draining`` and ``gave_up`` say what the supervisor knows.

    ``change_model`` asks it for ``reload`` or ``rollback``; None where there is no supervisor.
    """

    settings: Settings
    engine: Engine
    decoder: Decoder
    api_keys: ApiKeys
    is_draining: Callable[[], bool]
    gave_up: Callable[[], bool]
    metrics: Metrics
    change_model: Callable[[str], None] | None = None
    turns: TurnGate = field(default_factory=lambda: TurnGate(_REQUESTS_PER_TURN, _REST_S))
    started: float = field(default_factory=time.monotonic)

    def state(self) -> tuple[State, EngineStatus]:
        """Give the service's state, the engine's seen together with the supervisor's, and the engine's own status."""
        status = self.engine.status()
        if self.is_draining():
            return "draining", status
        if self.gave_up() and status.state != "ready":
            return "failed", status
        return status.state, status

    def check_room(self) -> None:
        """Raise NotReady or Overloaded if the engine has no room for one image; whoever asks has passed ``turns``."""
        try:
            self.engine.check_room()
        except ServiceError:
            self.turns.rest()
            raise

    def model(self) -> ModelInfo:
        """Give the model that serves now; raise NotReady before there is one."""
        model = self.engine.status().model
        if model is None:
            raise NotReady("the service is starting; retry shortly", retry_after_s=1)
        return model
