"""What ``/v2`` says of the server, of the model, and of what has been inferred since the service started.

Of the latter as Triton's statistics extension has it: every call of the engine counts as one request, also those of
``/predict`` and Hugging Face's dialect. Input is the decoding of images; the time of the output is part of the computing.
"""

from __future__ import annotations

from typing import Any

from service import __version__
from service.engine.interface import ModelInfo
from service.observability import metrics
from service.routes.context import ServiceContext
from service.routes.open_inference import schemas as s


def server_metadata(_: ServiceContext) -> s.ServerMetadata:
    """Which server this is, and its extensions."""
    return s.ServerMetadata(version=__version__)


def server_live(context: ServiceContext) -> s.ServerLive:
    """Whether the server works, or is starting or draining."""
    return s.ServerLive(live=context.is_live())


def server_ready(context: ServiceContext) -> s.ServerReady:
    """Whether an inference would be answered."""
    return s.ServerReady(ready=context.is_ready())


def model_ready(context: ServiceContext, model: ModelInfo) -> s.ModelReady:
    """Whether an inference by this model would be answered."""
    return s.ModelReady(ready=context.is_ready(), name=model.name)


def repository_index(context: ServiceContext) -> list[s.RepositoryEntry]:
    """The models: one."""
    model = context.model()
    entry = s.RepositoryEntry(name=model.name, version=model.version, state="READY")
    if not context.is_ready():
        entry.state, entry.reason = "UNAVAILABLE", "the service is not ready"
    return [entry]


def model_metadata(context: ServiceContext, model: ModelInfo) -> s.ModelMetadata:
    """The model's tensors."""
    inputs, outputs, runtime = s.model_inputs(model), s.model_outputs(model), context.engine.status().runtime
    return s.ModelMetadata(name=model.name, versions=[model.version], platform=runtime, inputs=inputs, outputs=outputs)


def model_config(context: ServiceContext, model: ModelInfo) -> s.ModelConfig:
    """The model's configuration, as Triton gives it."""
    status = context.engine.status()
    kind, _, index = status.device.partition(":")
    gpus = [int(index or 0)] if kind == "cuda" else []
    return s.ModelConfig(
        name=model.name,
        platform=status.runtime,
        backend=status.runtime.partition("-")[0],
        input=[s.ConfigInput(**_config(tensor)) for tensor in s.model_inputs(model)],
        output=[s.ConfigTensor(**_config(tensor)) for tensor in s.model_outputs(model)],
        instance_group=[s.InstanceGroup(name=model.name, kind="KIND_GPU" if gpus else "KIND_CPU", gpus=gpus)],
    )


def _config(tensor: s.Tensor) -> dict[str, Any]:
    datatype = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    return {"name": tensor.name, "data_type": f"TYPE_{datatype}", "dims": tensor.shape}


def all_statistics(context: ServiceContext) -> s.StatisticsResponse:
    """What has been inferred by all models: one."""
    return statistics(context, context.model())


def statistics(context: ServiceContext, model: ModelInfo) -> s.StatisticsResponse:
    """What has been inferred since the service started."""
    table = context.metrics.values.table()
    sums = table.sum(0)

    def histogram(metric: metrics.Metric) -> tuple[int, float]:
        """Return the number of observations and their sum."""
        *counts, total = metric.cells(sums)[0].tolist()
        return round(sum(counts)), total

    requests, queue_s = histogram(metrics.QUEUE_SECONDS)
    decode_s, compute_s = histogram(metrics.DECODE_SECONDS)[1], float(sums[metrics.ANSWERED_COMPUTE_S])
    durations = {
        "success": (requests, decode_s + queue_s + compute_s),
        "fail": (round(sums[metrics.FAILURES]), float(sums[metrics.FAILURE_S])),
        "queue": (requests, queue_s),
        "compute_input": (requests, decode_s),
        "compute_infer": (requests, compute_s),
        "compute_output": (requests, 0.0),
        "cache_hit": (0, 0.0),
        "cache_miss": (0, 0.0),
    }
    counted = s.ModelStatistics(
        name=model.name,
        version=numeric_version(model),
        last_inference=round(table[:, metrics.LAST_ANSWER].max() * 1000),
        inference_count=histogram(metrics.PREDICTION_SCORE)[0],
        execution_count=histogram(metrics.BATCH_IMAGES)[0],
        inference_stats=s.InferenceStatistics(
            **{name: s.DurationStatistic(count=count, ns=round(total_s * 1e9)) for name, (count, total_s) in durations.items()}
        ),
    )
    return s.StatisticsResponse(model_stats=[counted])


def numeric_version(model: ModelInfo) -> str:
    """Return the version as a decimal number: Triton's perf_analyzer reads it as one, and ends at any other text."""
    return str(int(model.version, 16))
