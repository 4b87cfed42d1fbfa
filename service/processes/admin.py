"""The admin actions over HTTP, on a loopback port of their own and with a key of their own: reload and roll back the model.

Owns: the process, its two routes, their key. Does not know: how it is done; the supervisor does it, on the signal for it.

The key is required because every page in a browser on the machine, and every local user, can reach a loopback port.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from service.errors import NotFound, Unauthorized
from service.processes.child import open_event_loop
from service.processes.http_server import HttpServer
from service.processes.process_state import supervisor_is_gone
from service.settings import Settings
from service.web.access import ApiKeys
from service.web.http_protocol import ConnectionLimits
from service.web.problems import error_response, install_problem_handlers

logger = logging.getLogger(__name__)

_SIGNALS = {"reload": signal.SIGHUP, "rollback": signal.SIGUSR1}
_MAX_CONNECTIONS = 16


def create_admin_app(keys: ApiKeys, send_signal: Callable[[signal.Signals], None]) -> FastAPI:
    """Make the application: ``POST /reload`` and ``POST /rollback``, each answered with 202 before it is done.

    ``send_signal`` brings the action's signal to the supervisor.
    """
    app = FastAPI(title="Admin actions", docs_url=None, redoc_url=None, openapi_url=None)
    install_problem_handlers(app)

    @app.post("/{action}")
    async def act(action: str, request: Request) -> Response:
        if not keys.allow(request.scope):
            return error_response(Unauthorized("send the admin key, as 'Authorization: Bearer KEY'"), request.scope)
        if action not in _SIGNALS:
            return error_response(NotFound(f"there is no such action; there are {' and '.join(_SIGNALS)}"), request.scope)
        logger.info("admin action=%s", action)
        send_signal(_SIGNALS[action])
        return JSONResponse({"action": action, "detail": "asked for; GET /health says what came of it"}, 202)

    return app


def run_admin(settings: Settings, listener: socket.socket) -> int:
    """Serve on ``listener`` until the supervisor is gone or ends this process; give the exit status."""
    keys = ApiKeys(settings.admin_key.get_secret_value())
    limits = ConnectionLimits(_MAX_CONNECTIONS, settings.header_timeout_s, settings.body_timeout_s)
    server = HttpServer(create_admin_app(keys, _signal_supervisor), limits, on_refusal=lambda code: None)
    with open_event_loop() as runner:
        runner.run(server.serve([listener]))
    return 0


def _signal_supervisor(number: signal.Signals) -> None:
    supervisor = multiprocessing.parent_process()
    if supervisor is not None and supervisor.pid is not None and not supervisor_is_gone():
        os.kill(supervisor.pid, number)
