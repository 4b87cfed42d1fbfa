"""``GET /metrics``: what all processes have counted, for Prometheus; any worker answers for all."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.observability.exposition import exposition
from service.observability.metrics import METRICS_PATH, Snapshot
from service.routes.context import ServiceContext


def metrics_router(context: ServiceContext) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["metrics"])
    text = {"schema": {"type": "string"}}

    @router.get(
        METRICS_PATH,
        summary="Counts and times of all processes, for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": text, "application/openmetrics-text": text}}},
    )
    async def metrics(request: Request) -> Response:
        state, engine = context.state()
        now = Snapshot(context.metrics, engine, state == "ready")
        body, content_type = exposition(now, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

    return router
