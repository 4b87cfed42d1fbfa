"""What has been inferred since the service started, in the JSON of Triton's statistics extension.

Every call of the engine counts as one request, also those of ``/predict`` and Hugging Face's dialect. Input is the decoding
of images; the time of the output is part of the computing.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from service.engine.interface import ModelInfo
from service.observability import metrics
from service.observability.shared_values import SharedValues


class DurationStatistic(BaseModel):
    """How often, and how long in all."""

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


def model_statistics(model: ModelInfo, values: SharedValues) -> StatisticsResponse:
    """Sum up what the processes have counted."""
    table = values.table()
    sums = table.sum(0)

    def histogram(metric: metrics.Metric) -> tuple[int, float]:
        """Return the number of observations and their sum."""
        *counts, total = metric.cells(sums)[0].tolist()
        return round(sum(counts)), total

    requests, queue_s = histogram(metrics.QUEUE_SECONDS)
    _, decode_s = histogram(metrics.DECODE_SECONDS)
    batches, _ = histogram(metrics.BATCH_IMAGES)
    images, _ = histogram(metrics.PREDICTION_SCORE)
    compute_s = float(sums[metrics.ANSWERED_COMPUTE_S])
    statistics = InferenceStatistics(
        success=_duration(requests, decode_s + queue_s + compute_s),
        fail=_duration(round(sums[metrics.FAILURES]), float(sums[metrics.FAILURE_S])),
        queue=_duration(requests, queue_s),
        compute_input=_duration(requests, decode_s),
        compute_infer=_duration(requests, compute_s),
        compute_output=_duration(requests, 0.0),
        cache_hit=_duration(0, 0.0),
        cache_miss=_duration(0, 0.0),
    )
    return StatisticsResponse(
        model_stats=[
            ModelStatistics(
                name=model.name,
                version=numeric_version(model),
                last_inference=round(table[:, metrics.LAST_ANSWER].max() * 1000),
                inference_count=images,
                execution_count=batches,
                inference_stats=statistics,
            )
        ]
    )


def numeric_version(model: ModelInfo) -> str:
    """Give the version as a decimal number: Triton's perf_analyzer reads it as one, and ends at any other text."""
    return str(int(model.version, 16))


def _duration(count: int, total_s: float) -> DurationStatistic:
    return DurationStatistic(count=count, ns=round(total_s * 1e9))
