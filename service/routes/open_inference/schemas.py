"""The JSON of the protocol as pydantic models: they check requests, make metadata, and document both.

Sources: Open Inference Protocol; Triton's extensions for binary data, classification, schedule policy (``timeout``),
model configuration, model repository and statistics.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from service.engine.interface import ModelInfo
from service.schemas import EXAMPLE_IMAGE

_INFERENCE: dict[str, Any] = {
    "id": "42",
    "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [EXAMPLE_IMAGE]}],
    "outputs": [{"name": "probabilities", "parameters": {"classification": 2}}],
}


class ServerError(BaseModel):
    """Any error of the protocol; it says what to do."""

    error: str = Field(examples=["there is no model of this name; the one here is 'resnet18-cifar10'"])


class ServerMetadata(BaseModel):
    """The server, and what it can do beyond the protocol itself."""

    name: str = "cifar10-prediction-service"
    version: str
    extensions: list[str] = ["binary_tensor_data", "classification", "model_configuration", "schedule_policy", "statistics"]


class Probe(BaseModel):
    """What is answered with 503 unless it is so."""

    @property
    def is_so(self) -> bool:
        """Whether all of it is so."""
        return False not in vars(self).values()


class ServerLive(Probe):
    """Whether the server works, or is starting or draining."""

    live: bool


class ServerReady(Probe):
    """Whether an inference would be answered."""

    ready: bool


class ModelReady(Probe):
    """Whether an inference by this model would be answered."""

    ready: bool
    name: str


class RepositoryEntry(BaseModel):
    """One model of the repository."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = ""


class Tensor(BaseModel):
    """One tensor; -1 is the batch."""

    name: str = Field(examples=["pixels"])
    datatype: str = Field(examples=["UINT8"])
    shape: list[int] = Field(examples=[[-1, 3, 32, 32]])


class ModelMetadata(BaseModel):
    """The model's tensors; a request has one of the inputs."""

    name: str
    versions: list[str]
    platform: str = Field(examples=["openvino-int8"])
    inputs: list[Tensor]
    outputs: list[Tensor]


class ConfigTensor(BaseModel):
    """One tensor; -1 is the batch."""

    name: str
    data_type: str = Field(examples=["TYPE_UINT8"])
    dims: list[int] = Field(examples=[[-1, 3, 32, 32]])


class ConfigInput(ConfigTensor):
    """An input; each is optional because a request has one of them."""

    optional: Literal[True] = True


class InstanceGroup(BaseModel):
    """Where the model runs."""

    name: str
    kind: Literal["KIND_CPU", "KIND_GPU"]
    count: int = 1
    gpus: list[int]


class ModelConfig(BaseModel):
    """The model's configuration, as far as it has a meaning here.

    ``max_batch_size`` is 0, which says that ``dims`` are whole shapes: Triton has no other way to write a shape of [N], and
    its perf_analyzer takes none.
    """

    name: str
    platform: str
    backend: str
    max_batch_size: Literal[0] = 0
    input: list[ConfigInput]
    output: list[ConfigTensor]
    instance_group: list[InstanceGroup]


class DurationStatistic(BaseModel):
    """Number of events and their time in all."""

    count: int
    ns: int = Field(description="nanoseconds")


class InferenceStatistics(BaseModel):
    """Where the time of requests went."""

    success: DurationStatistic
    fail: DurationStatistic
    queue: DurationStatistic
    compute_input: DurationStatistic
    compute_infer: DurationStatistic
    compute_output: DurationStatistic
    cache_hit: DurationStatistic
    cache_miss: DurationStatistic


class ModelStatistics(BaseModel):
    """One model's numbers since the service started, those of versions that it served before included."""

    name: str
    version: str = Field(description="the version's hexadecimal digits as a decimal number", examples=["69931839847996"])
    last_inference: int = Field(description="milliseconds since 1970, 0 before the first")
    inference_count: int = Field(description="images that were answered")
    execution_count: int = Field(description="batches that ran on the device")
    inference_stats: InferenceStatistics


class StatisticsResponse(BaseModel):
    """The statistics of every model that was asked for: one."""

    model_stats: list[ModelStatistics]


class _Checked(BaseModel):
    """A part of a request: no value is converted, members that are not listed are ignored."""

    model_config = ConfigDict(strict=True)


class _TensorParameters(_Checked):
    @model_validator(mode="before")
    @classmethod
    def _refuse_shared_memory(cls, value: Any) -> Any:
        if isinstance(value, dict) and "shared_memory_region" in value:
            raise PydanticCustomError("shared_memory", "shared memory is not available; send and take data in the bodies")
        return value


class RequestParameters(_Checked):
    """Options of a request; others are ignored."""

    timeout: int | None = Field(None, ge=0, description="deadline in microseconds, at most the server's own; 0 for that")
    binary_data_output: bool | None = Field(None, description="outputs as binary data, unless an output itself says otherwise")


class InputParameters(_TensorParameters):
    """Options of an input."""

    binary_data_size: int | None = Field(None, ge=0, description="bytes of this input's data after the JSON, instead of data")


class RequestInput(_Checked):
    """The images: encoded ones under ``image``, or their pixels under ``pixels``."""

    name: Literal["image", "pixels"]
    shape: list[int] = Field(max_length=8, description="[N] for image; [N, 3, 32, 32] for pixels: RGB, channels first")
    datatype: Literal["BYTES", "UINT8"] = Field(description="BYTES for image, UINT8 for pixels")
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(None, description="each image in base64; or whole numbers 0 to 255, flat or nested as shape")


class OutputParameters(_TensorParameters):
    """Options of an output."""

    classification: int | None = Field(
        None, ge=0, description="that many likeliest classes of each image as value:index:label; 0 for the tensor itself"
    )
    binary_data: bool | None = Field(None, description="the output as binary data after the JSON")


class RequestedOutput(_Checked):
    """How an output shall be sent."""

    name: Literal["probabilities", "typicality"]
    parameters: OutputParameters = OutputParameters(classification=None, binary_data=None)


class InferenceRequest(_Checked):
    """One or several images, in one input. Without ``outputs`` all are sent."""

    model_config = ConfigDict(json_schema_extra={"examples": [_INFERENCE]})

    id: str | None = Field(None, description="is sent back in the response")
    parameters: RequestParameters | None = None
    inputs: list[RequestInput] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] | None = Field(None, max_length=16)


class ResponseOutputParameters(BaseModel):
    """Size of the data that is not in the JSON."""

    binary_data_size: int


class ResponseOutput(BaseModel):
    """A tensor: probabilities FP32 [N, classes], as a classification BYTES [N, k]; typicality FP32 [N]."""

    name: Literal["probabilities", "typicality"]
    datatype: Literal["FP32", "BYTES"]
    shape: list[int] = Field(examples=[[1, 2]])
    parameters: ResponseOutputParameters | None = None
    data: list[float] | list[str] | None = Field(None, examples=[["0.973100:0:cat", "0.014400:1:dog"]])


class InferenceResponse(BaseModel):
    """What the model found."""

    id: str | None = Field(None, description="that of the request")
    model_name: str = Field(examples=["resnet18-cifar10"])
    model_version: str = Field(examples=["3f9a1c0b7e52"])
    outputs: list[ResponseOutput]


@lru_cache
def model_inputs(model: ModelInfo) -> list[Tensor]:
    """Return the inputs, of which a request has one: encoded images, or their pixels as the network takes them."""
    size = model.input.size
    return [
        Tensor(name="image", datatype="BYTES", shape=[-1]),
        Tensor(name="pixels", datatype="UINT8", shape=[-1, 3, size, size]),
    ]


@lru_cache
def model_outputs(model: ModelInfo) -> list[Tensor]:
    """Return the outputs: a calibrated probability for each class, and the typicality of a model that has it."""
    outputs = [Tensor(name="probabilities", datatype="FP32", shape=[-1, len(model.class_names)])]
    if model.unknown_threshold is not None:
        outputs.append(Tensor(name="typicality", datatype="FP32", shape=[-1]))
    return outputs
