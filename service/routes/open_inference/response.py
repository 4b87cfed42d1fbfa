"""An inference response: its JSON, and the tensor in it or behind it.

Source: Open Inference Protocol, "Inference Response JSON Object"; Triton's extensions for binary data and classification.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.engine.interface import ModelInfo, Prediction
from service.routes.open_inference import tensors
from service.routes.open_inference.request import InferRequest


def make_response(request: InferRequest, prediction: Prediction) -> tuple[bytes, int | None]:
    """Give the body, and the length of its JSON where binary data follows it."""
    probabilities, model = prediction.probabilities, prediction.model
    spec = tensors.output_spec(model)
    output: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": probabilities.shape}
    binary = b""
    if request.output.class_count:
        classes = classify_rows(probabilities, model, request.output.class_count)
        output |= {"datatype": "BYTES", "shape": (len(probabilities), request.output.class_count)}
        if request.output.binary:
            binary = tensors.write_bytes([text.encode() for text in classes])
        else:
            output["data"] = classes
    elif request.output.binary:
        binary = probabilities.astype("<f4", copy=False).tobytes()
    else:
        output["data"] = np.ascontiguousarray(probabilities).reshape(-1)
    if request.output.binary:
        output["parameters"] = {"binary_data_size": len(binary)}
    document: dict[str, Any] = {"id": request.id} if request.id else {}
    document |= {"model_name": model.name, "model_version": model.version, "outputs": [output]}
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return (header + binary, len(header)) if request.output.binary else (header, None)


def classify_rows(probabilities: NDArray[np.float32], model: ModelInfo, class_count: int) -> list[str]:
    """Give ``value:index:label`` for the ``class_count`` likeliest classes of each row, one row after the other."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :class_count]  # equal ones keep the order of the classes
    return [
        f"{probabilities[row, index]:.6f}:{index}:{model.class_names[index]}"
        for row, indices in enumerate(order.tolist())
        for index in indices
    ]
