"""``POST /admin/reload`` and ``POST /admin/rollback`` of the model, with a key of their own."""

from __future__ import annotations

import logging

import orjson

from service.routes.context import ServiceContext
from service.web.access import ApiKeys
from service.web.exchange import Exchange, Handler
from service.web.framework import DocumentedRoute
from service.web.reply import Reply

logger = logging.getLogger(__name__)


def admin_routes(context: ServiceContext) -> list[DocumentedRoute]:
    """Declare the routes over ``context``; each is answered with 202 before it is done, and there are none without a key."""
    keys = ApiKeys(context.settings.admin_key.get_secret_value())
    change_model = context.change_model
    if change_model is None or not keys.required:
        return []

    def ask_for(action: str) -> Handler:
        def handle(exchange: Exchange) -> None:
            keys.caller(exchange.scope)
            logger.info("admin action=%s", action)
            change_model(action)
            answer = {"action": action, "detail": "asked for; GET /health says what came of it"}
            exchange.answer(Reply(orjson.dumps(answer), status=202))

        return handle

    return [
        DocumentedRoute(f"/admin/{action}", ask_for(action), name=action, tags=["admin"], status_code=202, summary=summary)
        for action, summary in (
            ("reload", "Check the checkpoint file now, one that was refused or rolled back too; needs the admin key"),
            ("rollback", "Serve the model before this one again; needs the admin key"),
        )
    ]
