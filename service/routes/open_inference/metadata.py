"""What the server says of itself and of its model, as the protocol and Triton's clients read it.

Source: Open Inference Protocol; Triton's model configuration and repository extensions.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.engine.interface import EngineStatus, ModelInfo
from service.routes.open_inference.tensors import TensorSpec, input_specs, output_spec

SERVER_NAME = "cifar10-prediction-service"
EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "schedule_policy", "statistics")

_CONFIG_TYPES = {"BYTES": "TYPE_STRING", "UINT8": "TYPE_UINT8", "FP32": "TYPE_FP32"}


class ServerError(BaseModel):
    """Any error of the protocol; it says what to do."""

    error: str = Field(examples=["the model has no such output; its only one is 'probabilities'"])


class ServerMetadata(BaseModel):
    """Which server this is, and what it can do beside the protocol itself."""

    name: str
    version: str
    extensions: list[str] = Field(examples=[list(EXTENSIONS)])


class ServerLive(BaseModel):
    """Whether the server works, or is starting or draining."""

    live: bool


class ServerReady(BaseModel):
    """Whether an inference would be answered."""

    ready: bool


class ModelReady(BaseModel):
    """Whether an inference by this model would be answered."""

    name: str
    ready: bool


class TensorMetadata(BaseModel):
    """One tensor; -1 is the batch."""

    name: str = Field(examples=["pixels"])
    datatype: str = Field(examples=["UINT8"])
    shape: list[int] = Field(examples=[[-1, 3, 32, 32]])


class ModelMetadata(BaseModel):
    """The model's tensors; a request has one of the inputs."""

    name: str
    versions: list[str]
    platform: str = Field(examples=["openvino-int8"])
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


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
    count: int
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


class RepositoryEntry(BaseModel):
    """One model of the repository."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


def server_metadata(version: str) -> ServerMetadata:
    """Describe the server of this ``version``."""
    return ServerMetadata(name=SERVER_NAME, version=version, extensions=list(EXTENSIONS))


def repository_entry(model: ModelInfo, ready: bool) -> RepositoryEntry:
    """Describe the model as an entry of a repository."""
    if ready:
        return RepositoryEntry(name=model.name, version=model.version, state="READY", reason="")
    return RepositoryEntry(name=model.name, version=model.version, state="UNAVAILABLE", reason="the service is not ready")


def model_metadata(model: ModelInfo, runtime: str) -> ModelMetadata:
    """Describe the model that serves."""
    return ModelMetadata(
        name=model.name,
        versions=[model.version],
        platform=runtime,
        inputs=[_tensor(spec) for spec in input_specs(model).values()],
        outputs=[_tensor(output_spec(model))],
    )


def model_config(model: ModelInfo, status: EngineStatus) -> ModelConfig:
    """Describe the model as Triton's configuration does."""
    kind, _, index = status.device.partition(":")
    return ModelConfig(
        name=model.name,
        platform=status.runtime,
        backend=status.runtime.partition("-")[0],
        input=[ConfigInput(**_config(spec)) for spec in input_specs(model).values()],
        output=[ConfigTensor(**_config(output_spec(model)))],
        instance_group=[
            InstanceGroup(
                name=model.name,
                kind="KIND_GPU" if kind == "cuda" else "KIND_CPU",
                count=1,
                gpus=[int(index or 0)] if kind == "cuda" else [],
            )
        ],
    )


def _tensor(spec: TensorSpec) -> TensorMetadata:
    return TensorMetadata(name=spec.name, datatype=spec.datatype, shape=list(spec.shape))


def _config(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": _CONFIG_TYPES[spec.datatype], "dims": list(spec.shape)}
