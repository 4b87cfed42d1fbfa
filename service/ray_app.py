"""The same application on a Ray cluster: each replica holds an engine of its own, Ray Serve places, watches and scales them.

``serve run service.ray_app:app`` takes the settings from its own environment, and as arguments how a replica is cut and how
many there may be: ``serve run service.ray_app:app gpus=0.25 max_replicas=8``. The address, TLS, connections and slow clients
are the business of Ray's proxy; what a setting says of those has no effect here. That proxy adds the X-Request-ID of an answer
a second time. ``/metrics`` and ``/health`` are those of the replica that happens to answer.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from service.engine.model_store import load_model
from service.model.checkpoint import load_checkpoint
from service.observability.logs import set_up_logs
from service.observability.metrics import FIRST_WORKER, Metrics, make_values
from service.processes.engine_process import IDLE_CHECK_S, make_engine
from service.routes.app import Application
from service.settings import Settings, SettingsError, load_settings

_HEALTH_CHECK_PERIOD_S = 2.0  # three checks in a row that fail make Ray replace a replica


class Scale(BaseModel):
    """How many replicas there may be, and what each reserves; 0.25 ``gpus`` put four replicas on one GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    cpus: int = Field(1, ge=1)
    gpus: float = Field(0.0, ge=0)


@serve.ingress()
class Replica:
    """One engine with its application; made, asked and ended by Ray on one event loop."""

    def __init__(self, settings: Settings) -> None:
        """Load the model, which must answer its known images; raise CheckpointError or RunnerError."""
        set_up_logs(settings)
        model = load_model(settings, load_checkpoint(settings.checkpoint))
        metrics = Metrics(make_values(workers=1), FIRST_WORKER)
        self._device_timeout_s = settings.device_timeout_s
        self._engine = make_engine(settings, model, metrics)
        self._application = Application(settings, self._engine, metrics=metrics)

    def __serve_build_asgi_app__(self) -> Application:
        """Give Ray what answers requests; see ``ray.serve.ingress``."""
        return self._application

    async def check_health(self) -> None:
        """Raise RuntimeError when the device hangs or fails known images; Ray asks this again and again."""
        self._engine.check_if_idle(IDLE_CHECK_S)
        if self._engine.longest_running_s > self._device_timeout_s:
            raise RuntimeError(f"the device hangs: a batch has run for {self._engine.longest_running_s:.1f} s")
        if (state := self._engine.state) != "ready":
            raise RuntimeError(f"the engine is {state}")

    def __del__(self) -> None:
        """End the engine's threads; Ray calls this once all that was sent here is answered."""
        self._engine.close()
        self._application.close()


def app(arguments: dict[str, Any]) -> serve.Application:
    """Make the Serve application from the settings in the environment and ``Scale`` in ``arguments``.

    Raises SettingsError, and pydantic's ValidationError for arguments.
    """
    scale = Scale.model_validate(arguments)
    settings = load_settings()
    if settings.tls_certificate is not None:
        raise SettingsError(
            "tls_certificate has no effect under Ray: give http_options ssl_certfile and ssl_keyfile to Ray Serve"
        )
    settings = settings.model_copy(
        update={
            "cpu_threads": settings.cpu_threads or scale.cpus,
            "decode_threads": settings.decode_threads or scale.cpus,
            "device": ("cuda" if scale.gpus else "cpu") if settings.device == "auto" else settings.device,
        }
    )
    # More than the engine takes, so that it is the engine that refuses, with a Retry-After computed from its backlog.
    most_requests = settings.max_queue_images + 4 * settings.max_batch_size
    deployment = serve.deployment(
        name="service",
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": settings.max_batch_size / 2,
        },
        max_ongoing_requests=most_requests,
        max_queued_requests=most_requests,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=settings.device_timeout_s,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        max_surge_percent=1,  # rounded up: an update starts one new replica before an old one ends
    )
    return deployment(Replica).bind(settings)
