"""``POST /hf``: image classification as Hugging Face's inference clients ask for it.

The raw body or JSON with parameters; the answer is the bare list of classes.
Source: Hugging Face, "Inference Providers", task image-classification.
"""

from __future__ import annotations

import orjson

from service.answers import Options, best_classes
from service.engine.interface import Prediction
from service.errors import InvalidParameter, MalformedRequest, UnsupportedMediaType
from service.routes.classification import one_image_handler
from service.routes.context import ServiceContext
from service.routes.openapi import OF_A_PREDICTION, RAW
from service.routes.uploads import Upload, json_upload, media_type
from service.schemas import HuggingFaceRequest, ScoredLabel
from service.web.route import Route


def write_answer(prediction: Prediction, options: Options, filename: str | None) -> bytes:
    """Make the body of the answer: the classes, and none for an image that is not known and rejected.

    The dialect has no place for the file's name, or for a number that is not of a class.
    """
    if options.unknown == "reject" and prediction.known(0, options) is False:
        return b"[]"
    return orjson.dumps(best_classes(prediction.probabilities[0], prediction.model.class_names, options.top_k))


def hugging_face_upload(body: bytes, content_type: bytes | None) -> Upload:
    """Find the image in JSON, or in the body itself.

    The clients send bytes without a Content-Type, huggingface-hub 0.30 JSON too, and curl calls every body a form; so the body
    is the image unless its type says JSON or it begins as JSON, which no image does. Raises UnsupportedMediaType for a form.
    """
    kind = media_type(content_type)
    if kind == b"multipart/form-data":
        raise UnsupportedMediaType("send the image itself as the body, or in base64 within JSON; forms go to /predict")
    if kind != b"application/json" and not body.startswith(b"{"):
        return Upload(body)
    upload, parameters = json_upload(body, ("function_to_apply",))
    function = parameters.get("function_to_apply")
    if function is not None and not isinstance(function, str):
        raise MalformedRequest("'function_to_apply' must be a string")
    if function not in (None, "softmax"):
        raise InvalidParameter("'function_to_apply' can only be softmax here: scores are calibrated probabilities")
    return upload


def hugging_face_routes(context: ServiceContext) -> list[Route]:
    """Declare the route."""
    return [
        Route(
            "/hf",
            one_image_handler(context, hugging_face_upload, write_answer),
            operation_id="imageClassification",
            summary="Classify one image, for Hugging Face's clients",
            method="POST",
            tags=["hugging face"],
            description="The image is the body itself, or base64 in JSON. The `detail` of an error is under `error` too."
            " With `unknown=reject` the list is empty for an image that is not known.",
            request_model=HuggingFaceRequest,
            response_model=list[ScoredLabel],
            parameters=OF_A_PREDICTION,
            bodies=[RAW],
        )
    ]
