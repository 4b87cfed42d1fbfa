"""``POST /predict`` and ``POST /predict/batch``."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import orjson

from service.answers import Options, check_top_k
from service.engine.interface import Prediction
from service.errors import ServiceError
from service.routes.classification import classify, one_image_handler
from service.routes.context import ServiceContext
from service.routes.openapi import FORM, FORM_OF_SEVERAL, OF_A_PREDICTION, RAW, TIMING_HEADERS
from service.routes.uploads import Upload, form_files, one_upload, text_options
from service.schemas import Answer, BatchAnswer, PredictRequest
from service.web.body import read_body
from service.web.exchange import Exchange, Reply
from service.web.route import Route


def write_answer(prediction: Prediction, options: Options, filename: str | None) -> bytes:
    """Make the body of the answer."""
    return orjson.dumps(prediction.answer(0, options, filename))


async def _predict_batch(context: ServiceContext, exchange: Exchange) -> Reply:
    """Classify several images.

    One entry for each `file` part, in the order sent; one bad file never fails its neighbours.
    """
    limit = context.settings.max_images_per_request
    uploads = await read_body(exchange, form_files, exchange.scope.header(b"content-type"), limit)
    options = uploads[0].options.joined(text_options(exchange.scope.params))
    check_top_k(options.top_k, len(context.model().class_names))
    slots = context.decoder.slots()

    async def entry(upload: Upload) -> dict[str, Any]:
        try:
            done = await classify(context, exchange, upload.data, slots=slots)
            return done.prediction.answer(0, options, upload.filename)
        except ServiceError as error:
            exchange.record.refusals.append(error.code)
            return {"filename": upload.filename, "error": {"status": error.status, "code": error.code, "detail": error.detail}}

    return Reply(orjson.dumps({"results": await asyncio.gather(*map(entry, uploads))}))


def predict_routes(context: ServiceContext) -> list[Route]:
    """Declare both routes."""
    post = partial(Route, method="POST", tags=["predict"], parameters=OF_A_PREDICTION)
    return [
        post(
            "/predict",
            one_image_handler(context, one_upload, write_answer),
            operation_id="predict",
            summary="Classify one image",
            description="A form's `file` part, the image itself (`image/*`, `application/octet-stream`), or base64 in JSON.",
            request_model=PredictRequest,
            response_model=Answer,
            responses=TIMING_HEADERS,
            bodies=[FORM, RAW],
        ),
        post("/predict/batch", partial(_predict_batch, context), response_model=BatchAnswer, bodies=[FORM_OF_SEVERAL]),
    ]
