"""The JSON of an inference, as pydantic models: the source of its OpenAPI documentation, and of nothing else."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class RequestParameters(BaseModel):
    """Options of a request; others are ignored."""

    timeout: int = Field(0, ge=0, description="deadline in microseconds, at most the server's own; 0 for the server's own")
    binary_data_output: bool = Field(False, description="the output as binary data, unless the output itself says otherwise")


class InputParameters(BaseModel):
    """Options of an input."""

    binary_data_size: int | None = Field(None, ge=0, description="bytes of this input's data behind the JSON, in place of data")


class RequestInput(BaseModel):
    """The images: encoded ones under ``image``, or their pixels under ``pixels``."""

    name: Literal["image", "pixels"]
    shape: list[int] = Field(description="[N] for image; [N, 3, 32, 32] for pixels: RGB, channels first")
    datatype: Literal["BYTES", "UINT8"] = Field(description="BYTES for image, UINT8 for pixels")
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(None, description="each image in base64; or whole numbers 0 to 255, flat or nested as shape")


class OutputParameters(BaseModel):
    """Options of an output."""

    classification: int = Field(
        0, ge=0, description="that many likeliest classes of each image as value:index:label; 0 for all"
    )
    binary_data: bool | None = Field(None, description="the output as binary data behind the JSON")


class RequestedOutput(BaseModel):
    """How the output shall come back."""

    name: Literal["probabilities"]
    parameters: OutputParameters | None = None


class InferenceRequest(BaseModel):
    """One or several images, in one input."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "42",
                    "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["iVBORw0KGgoAAAANSUhEUg..."]}],
                    "outputs": [{"name": "probabilities", "parameters": {"classification": 3}}],
                }
            ]
        }
    )

    id: str | None = Field(None, description="comes back in the response")
    parameters: RequestParameters | None = None
    inputs: list[RequestInput] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] | None = Field(None, max_length=1)


class ResponseOutputParameters(BaseModel):
    """Where the data is when it is not in the JSON."""

    binary_data_size: int


class ResponseOutput(BaseModel):
    """The tensor: FP32 [N, classes], or BYTES [N, k] for a classification."""

    name: Literal["probabilities"]
    datatype: Literal["FP32", "BYTES"]
    shape: list[int] = Field(examples=[[1, 3]])
    parameters: ResponseOutputParameters | None = None
    data: list[float] | list[str] | None = Field(None, examples=[["0.973100:3:cat", "0.014400:5:dog", "0.004100:4:deer"]])


class InferenceResponse(BaseModel):
    """What the model found."""

    id: str | None = Field(None, description="that of the request")
    model_name: str = Field(examples=["resnet18-cifar10"])
    model_version: str = Field(examples=["3f9a1c0b7e52"])
    outputs: list[ResponseOutput]
