"""This project's own application in the other layout: no engine process, a model on one thread in every worker.

A worker that dies takes its model along, and the queue's bound holds for each worker by itself; what is measured is whether
that would at least be faster.
"""

from __future__ import annotations

import os
import socket
import sys

import uvicorn
import uvloop

from service.cpu import available_cores
from service.engine.local_engine import LocalEngine
from service.engine.model_store import load_model
from service.model.checkpoint import load_checkpoint
from service.routes.app import create_app
from service.settings import Settings, load_settings
from service.web.http_protocol import ConnectionLimits, bounded_protocol


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Run one worker."""
    engine = LocalEngine(load_model(settings, load_checkpoint(settings.checkpoint)))
    limits = ConnectionLimits(settings.max_connections, settings.header_timeout_s, settings.body_timeout_s)
    app = create_app(settings, engine)
    protocol = bounded_protocol(limits, lambda code: None, app.direct)
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, http=protocol)
    await uvicorn.Server(config).serve(sockets=[listener])


def main() -> None:
    """Fork a worker for every core but the first, and be that one."""
    settings = load_settings(["--cpu_threads=1", *sys.argv[1:]])
    listener = socket.create_server((settings.host, settings.port), backlog=4096)
    listener.setblocking(False)
    for _ in range(available_cores() - 1):
        if os.fork() == 0:
            break
    uvloop.run(serve(settings, listener))


if __name__ == "__main__":
    main()
