"""What has been inferred since the service started, as Triton's statistics extension has it.

Every call of the engine counts as one request, also those of ``/predict`` and Hugging Face's dialect. Input is the decoding
of images; the time of the output is part of the computing.
"""

from __future__ import annotations

from service.engine.interface import ModelInfo
from service.observability import metrics
from service.routes.context import ServiceContext
from service.routes.open_inference.schemas import (
    DurationStatistic,
    InferenceStatistics,
    ModelStatistics,
    StatisticsResponse,
)


def all_statistics(context: ServiceContext) -> StatisticsResponse:
    """What has been inferred by all models: one."""
    return statistics(context, context.model())


def statistics(context: ServiceContext, model: ModelInfo) -> StatisticsResponse:
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
    counted = ModelStatistics(
        name=model.name,
        version=numeric_version(model),
        last_inference=round(table[:, metrics.LAST_ANSWER].max() * 1000),
        inference_count=histogram(metrics.PREDICTION_SCORE)[0],
        execution_count=histogram(metrics.BATCH_IMAGES)[0],
        inference_stats=InferenceStatistics(
            **{name: DurationStatistic(count=count, ns=round(total_s * 1e9)) for name, (count, total_s) in durations.items()}
        ),
    )
    return StatisticsResponse(model_stats=[counted])


def numeric_version(model: ModelInfo) -> str:
    """Return the version as a decimal number: Triton's perf_analyzer reads it as one, and ends at any other text."""
    return str(int(model.version, 16))
