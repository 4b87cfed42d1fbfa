"""``GET /health``, ``/health/ready``, ``/health/live`` and ``/labels``."""

from __future__ import annotations

import time

from fastapi import APIRouter, Response

from service import __version__
from service.engine.interface import ModelInfo
from service.routes.context import ServiceContext
from service.routes.openapi import problem_responses
from service.schemas import Health, Labels, Model

_RETRY_AFTER_S = "1"


def health_router(context: ServiceContext) -> APIRouter:
    """Declare the routes over ``context``; none of them waits for the engine."""
    router = APIRouter(tags=["health"])
    unhealthy: dict[int | str, dict[str, object]] = {503: {"model": Health, "description": "starting, draining or failed"}}

    def report(response: Response, healthy: bool) -> Health:
        state, status = context.state()
        refuse_unless(healthy, response)
        return Health(
            status=state,
            version=__version__,
            model=None if status.model is None else describe(status.model),
            device=status.device,
            runtime=status.runtime,
            queue_depth=status.queue_depth,
            uptime_s=round(time.monotonic() - context.started, 3),
            **({"detail": status.detail} if status.detail else {}),
        )

    @router.get(
        "/health", responses=unhealthy, response_model_exclude_unset=True, summary="Whether a prediction would be answered"
    )
    async def health(response: Response) -> Health:
        return report(response, context.is_ready())

    @router.get(
        "/health/ready", responses=unhealthy, response_model_exclude_unset=True, summary="The same, for readiness probes"
    )
    async def ready(response: Response) -> Health:
        return report(response, context.is_ready())

    @router.get(
        "/health/live",
        responses=unhealthy,
        response_model_exclude_unset=True,
        summary="Whether the process works, or is starting or draining",
    )
    async def live(response: Response) -> Health:
        return report(response, context.is_live())

    @router.get(
        "/labels",
        tags=["predict"],
        responses=problem_responses(503),
        summary="The class names, in the order of the network's outputs",
    )
    async def labels() -> Labels:
        model = context.model()
        return Labels(labels=list(model.class_names), model=describe(model))

    return router


def refuse_unless(healthy: bool, response: Response) -> bool:
    """Make ``response`` a 503 unless ``healthy``, which is returned; it is never cached."""
    if not healthy:
        response.status_code = 503
        response.headers["Retry-After"] = _RETRY_AFTER_S
    response.headers["Cache-Control"] = "no-store"
    return healthy


def describe(model: ModelInfo) -> Model:
    """Return what answers say of a model."""
    return Model(name=model.name, version=model.version)
