"""``POST /view`` and ``POST /explain``: what the network sees of an image, and where it found what speaks for a class."""

from __future__ import annotations

from functools import partial

import orjson

from service.errors import InvalidParameter
from service.model.images import encode_png
from service.routes.classification import decode_only
from service.routes.context import ServiceContext
from service.routes.openapi import FORM, OF_A_REQUEST, PNG, RAW, parameter
from service.schemas import Heatmap, PredictRequest
from service.web.exchange import Exchange, Reply
from service.web.route import Route


async def _view(context: ServiceContext, exchange: Exchange) -> Reply:
    """Show an image as the network sees it.

    The PNG has the size of the network's input and holds the very pixels that a prediction starts from.
    """
    image, _ = await decode_only(context, exchange)
    return Reply(encode_png(image), content_type=b"image/png")


async def _explain(context: ServiceContext, exchange: Exchange) -> Reply:
    """Show where the network found what speaks for a class.

    A class activation map, made on demand beside the device; predictions do not wait for it.
    """
    class_names, label = context.model().class_names, exchange.scope.params.get("label")
    if label is not None and label not in class_names:
        raise InvalidParameter("the model has no class of this label; GET /labels lists those it has")
    image, filename = await decode_only(context, exchange)
    index = None if label is None else class_names.index(label)
    explanation = await context.engine.explain(image, index, exchange.deadline)
    answer = {
        "label": explanation.model.class_names[explanation.label],
        "heatmap": [[round(value, 3) for value in row] for row in explanation.heatmap.tolist()],
        "filename": filename,
        "model": {"name": explanation.model.name, "version": explanation.model.version},
    }
    return Reply(orjson.dumps(answer))


def explain_routes(context: ServiceContext) -> list[Route]:
    """Declare both routes."""
    label = parameter("label", "the class to explain, one of GET /labels; the likeliest one by default", type="string")
    post = partial(Route, method="POST", tags=["explain"], request_model=PredictRequest, bodies=[FORM, RAW])
    return [
        post("/view", partial(_view, context), responses={200: PNG}, parameters=OF_A_REQUEST),
        post("/explain", partial(_explain, context), response_model=Heatmap, parameters=[label, *OF_A_REQUEST]),
    ]
