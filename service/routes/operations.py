"""What those who run the service ask: health, metrics, labels, and another model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from service import __version__
from service.observability.exposition import exposition
from service.observability.metrics import METRICS_PATH, Snapshot
from service.routes.context import ServiceContext
from service.routes.openapi import problem_response
from service.schemas import Health, Labels, Samples
from service.web.access import ApiKeys
from service.web.exchange import Exchange, Headers, Reply
from service.web.route import Route, json_reply

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = b"1"


def operation_routes(context: ServiceContext) -> list[Route]:
    """Declare ``/health`` and below, ``/labels``, ``/samples``, ``/metrics`` and ``/admin``; none waits for the engine."""

    def report(is_healthy: Callable[[], bool], _: Exchange) -> Reply:
        state, status = context.state()
        uptime_s = round(time.monotonic() - context.started, 3)
        about = {"status": state, "version": __version__, "uptime_s": uptime_s, "detail": status.detail or None}
        content = Health.model_validate({**vars(status), **about})
        return probe_reply(content, healthy=is_healthy())

    made: dict[str, bytes] = {}  # metrics, by their Content-Type

    def metrics(exchange: Exchange) -> Reply:
        """Counts and times of all processes, for Prometheus."""
        state, engine = context.state()
        accept = (exchange.scope.header(b"accept") or b"").decode("latin-1")
        if not made:  # one text for all who ask in one iteration of the event loop: it takes 4 ms
            asyncio.get_running_loop().call_soon(made.clear)
        body, content_type = exposition(Snapshot(context.metrics, engine, state == "ready"), accept, made)
        return Reply(body, [(b"cache-control", b"no-store")], content_type.encode())

    def labels(_: Exchange) -> Reply:
        """The class names, in the order of the network's outputs."""
        model = context.model()
        return json_reply(Labels.model_validate({"labels": model.class_names, "model": model}))

    def samples(_: Exchange) -> Reply:
        """Images that the model knows, with their labels."""
        model = context.model()
        known = [{"label": label, "image": image} for label, image in model.samples]
        return json_reply(Samples.model_validate({"samples": known, "model": model}))

    unhealthy = {503: {"model": Health, "description": "starting, draining or failed"}}
    get = partial(Route, tags=["health"], response_model=Health, responses=unhealthy)
    of_model = partial(Route, tags=["health", "predict"], responses={503: problem_response(503)})
    ready, live = (partial(report, is_healthy) for is_healthy in (context.is_ready, context.is_live))
    text = {"schema": {"type": "string"}}
    texts = {200: {"content": {"text/plain": text, "application/openmetrics-text": text}}}
    return [
        get("/health", ready, operation_id="health", summary="Whether a prediction would be answered"),
        get("/health/ready", ready, operation_id="ready", summary="The same, for readiness probes"),
        get("/health/live", live, operation_id="live", summary="Whether the process works, or is starting or draining"),
        of_model("/labels", labels, response_model=Labels),
        of_model("/samples", samples, response_model=Samples),
        Route(METRICS_PATH, metrics, tags=["metrics"], response_class=Response, responses=texts),
        *_admin_routes(context),
    ]


def probe_reply(content: BaseModel, *, healthy: bool) -> Reply:
    """Make an answer of ``content`` without what has its default, a 503 unless ``healthy``; it is never cached."""
    headers: Headers = [(b"cache-control", b"no-store")]
    if not healthy:
        headers.append((b"retry-after", _RETRY_AFTER_S))
    return Reply(content.model_dump_json(exclude_defaults=True).encode(), headers, status=200 if healthy else 503)


def _admin_routes(context: ServiceContext) -> list[Route]:
    """Declare reload and rollback of the model; none without a key of their own.

    The key is checked where requests come in. They are answered with 202 before anything is done.
    """
    change_model = context.change_model
    if change_model is None or not ApiKeys(context.settings.admin_key.get_secret_value()).required:
        return []

    def ask_for(action: str, _: Exchange) -> Reply:
        logger.info("admin action=%s", action)
        change_model(action)
        answer = {"action": action, "detail": "asked for; GET /health says what came of it"}
        return Reply(orjson.dumps(answer), status=202)

    post = partial(Route, method="POST", tags=["admin"], status_code=202)
    summaries = {
        "reload": "Check the checkpoint file now, one that was refused or rolled back too; needs the admin key",
        "rollback": "Serve the model before this one again; needs the admin key",
    }
    return [
        post(f"/admin/{action}", partial(ask_for, action), operation_id=action, summary=summary)
        for action, summary in summaries.items()
    ]
