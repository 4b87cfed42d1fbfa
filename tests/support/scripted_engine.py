"""An engine that answers by a script, and the real application over it on a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import uvicorn
from numpy.typing import NDArray

from service.engine.interface import Engine, EngineStatus, Finish, ModelInfo, Outcome, Prediction, Request, State
from service.errors import NotReady, ServiceError
from service.model.images import InputSpec
from service.observability.metrics import FIRST_WORKER, SUPERVISOR, Metrics, make_values
from service.processes.http_server import HttpServer
from service.routes.app import Application
from service.settings import load_settings
from service.web.http_protocol import HttpCarrier
from tests.support.fake_runner import OwnLoad

MODEL = ModelInfo("scripted", "0123456789ab", ("cat", "dog", "horse"), InputSpec())


class ScriptedEngine(Engine):
    """Answers every request by ``answer``: an outcome; None leaves it unanswered; an error in ``refuse`` is raised first.

    One in ``no_room`` is raised before anything is submitted.
    """

    state: State = "ready"
    model: ModelInfo | None = MODEL

    def __init__(self) -> None:
        super().__init__(OwnLoad(), max_batch_size=64, max_queue_images=1024, on_change=lambda: None)
        self.refuse: ServiceError | None = None
        self.no_room: ServiceError | None = None
        self.answer: Callable[[NDArray[np.uint8]], Outcome | None] = probabilities
        self.submitted: list[Request] = []
        self.cancelled: list[Request] = []  # by their clients or by their deadline

    def status(self) -> EngineStatus:
        """See ``Engine.status``."""
        return EngineStatus(self.state, self.model, "cpu", "script", len(self.submitted))

    def submit(
        self,
        images: NDArray[np.uint8],
        deadline: float,
        finish: Finish,
        explain: int | None = None,
        model: ModelInfo | None = None,
    ) -> Request:
        """See ``Engine.submit``."""
        if self.refuse is not None:
            raise self.refuse
        request = Request(images, deadline, finish, explain)
        self.submitted.append(request)
        self._requests.add(request)
        if (outcome := self.answer(images)) is not None:
            asyncio.get_running_loop().call_soon(self._requests.end, request.id, outcome)
        return request

    def check_room(self, images: int = 1) -> ModelInfo:
        """See ``Engine.check_room``."""
        if self.no_room is not None:
            raise self.no_room
        if self.model is None:
            raise NotReady("there is no model yet")
        return self.model

    def _begin(self, request: Request) -> None:
        raise NotImplementedError

    def _withdraw(self, request: Request) -> None:
        self.cancelled.append(request)


def probabilities(images: NDArray[np.uint8]) -> Prediction:
    """Three classes, the first by far the likeliest."""
    row = np.array([[0.7, 0.2, 0.1]], np.float32)
    return Prediction(np.repeat(row, len(images), 0), MODEL, 0.001, 0.002, len(images))


class ApplicationServer:
    """``Application`` over a ``ScriptedEngine`` in a thread, on a free port, while the ``with`` block runs.

    It is behind the service's own HTTP protocol; with ``asgi`` behind uvicorn's, as any ASGI application.
    """

    def __init__(self, *, asgi: bool = False, **settings: object) -> None:
        settings = {"header_timeout_s": 60, **settings}
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        self.engine = ScriptedEngine()
        self._is_asgi = asgi
        self._metrics = Metrics(make_values(workers=1), FIRST_WORKER)
        self.supervisor = self._metrics.values.facts(SUPERVISOR)
        self._settings = load_settings(arguments)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.address: tuple[str, int] = self._socket.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self._thread = threading.Thread(target=self._run, name="application-server")
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        """Start it."""
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Stop it and wait for its end."""
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join()
        self._socket.close()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._carrier.connections)

    def _run(self) -> None:
        async def serve() -> None:
            app = Application(self._settings, self.engine, metrics=self._metrics)
            self._loop = asyncio.get_running_loop()
            self._carrier = HttpCarrier(app.entry, self._settings, app.context.metrics)
            if self._is_asgi:
                asgi = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None))
                self._stop: Callable[[], None] = partial(setattr, asgi, "should_exit", True)
                serving = asgi.serve(sockets=[self._socket])
            else:
                server = HttpServer(self._carrier, self._socket, self._metrics.values, self._settings)
                self._stop, serving = server.stop, server.serve()
            self._ready.set()  # the socket listens already: whoever connects now is served in a moment
            await serving

        asyncio.run(serve())
