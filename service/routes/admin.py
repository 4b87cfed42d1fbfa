"""``POST /admin/reload`` and ``POST /admin/rollback`` of the model, with a key of their own."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from service.routes.context import ServiceContext
from service.web.access import ApiKeys, check_key

logger = logging.getLogger(__name__)


def admin_router(context: ServiceContext) -> APIRouter:
    """Declare the routes over ``context``; each is answered with 202 before it is done, and there are none without a key."""
    router = APIRouter(prefix="/admin", tags=["admin"])
    keys = ApiKeys(context.settings.admin_key.get_secret_value())
    change_model = context.change_model
    if change_model is None or not keys.required:
        return router

    def ask_for(action: str, request: Request) -> Response:
        check_key(keys, request.scope)
        logger.info("admin action=%s", action)
        change_model(action)
        return JSONResponse({"action": action, "detail": "asked for; GET /health says what came of it"}, 202)

    @router.post("/reload", status_code=202, summary="Check the checkpoint file now; needs the admin key")
    async def reload_model(request: Request) -> Response:
        return ask_for("reload", request)

    @router.post("/rollback", status_code=202, summary="Serve the model before this one again; needs the admin key")
    async def roll_back_model(request: Request) -> Response:
        return ask_for("rollback", request)

    return router
