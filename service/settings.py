"""One frozen settings object, made once in ``__main__`` from flags and environment variables.

Every setting is a flag ``--<name>``, with hyphens or underscores, and a variable ``SERVICE_<NAME>``; the flag wins. An empty
variable counts as unset.

A variable that is nearly a setting's is a mistake and ends the start. Other unknown ones are left alone, since who runs the
service may not have set them: Kubernetes gives every pod SERVICE_SERVICE_HOST, SERVICE_PORT_8000_TCP and more for a Service
called "service", and SERVICE_A_PORT for one called "service-a".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

_OF_THE_CLIENT = "api_key"  # SERVICE_API_KEY is what ``python -m service predict`` sends
_OF_KUBERNETES = re.compile(r".*_(SERVICE_HOST|PORT(_.+)?)", re.IGNORECASE)  # "Discovering services", environment variables
_ORIGIN = re.compile(r"[A-Za-z][\w+.-]*://[^/\s]+")  # RFC 6454
_ALIKE = 0.75  # difflib's ratio; two letters that have changed places in a word of four

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "resnet18-cifar10.safetensors"


class SettingsError(Exception):
    """Settings that cannot be used; the message names each of them."""


class Settings(BaseSettings):
    """Serve a resident image classifier over HTTP, in batches. To classify files here: python -m service predict --help."""

    model_config = SettingsConfigDict(
        env_prefix="SERVICE_",
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        cli_prog_name="python -m service",
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="unset",
        cli_exit_on_error=False,
        cli_implicit_flags=True,
        validate_default=False,
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one and prints it")
    workers: int = Field(0, ge=0, le=256, description="HTTP worker processes; 0 chooses by the cores")
    checkpoint: Path = Field(DEFAULT_CHECKPOINT, description="the model to serve, a .safetensors file made by training")
    runtime: Literal["auto", "openvino", "torch"] = Field(
        "auto", description="what runs the model; auto takes the fastest here"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "int8", "bf16", "fp32"] = Field(
        "auto", description="arithmetic of the model; auto takes the fastest that keeps the accuracy"
    )
    unknown_threshold: float | None = Field(
        None, ge=0, le=1, description="an image of a smaller typicality is not known; the checkpoint's own unless set"
    )
    cpu_threads: int = Field(0, ge=0, le=1024, description="threads of the model on a CPU; 0 chooses by the cores")
    streams: int = Field(0, ge=0, le=64, description="batches that run concurrently, at most; 0 chooses by the runtime")
    max_batch_size: int = Field(64, ge=1, le=4096, description="most images in one forward pass")
    max_queue_images: int = Field(1024, ge=1, description="most images that wait; one more is refused with 429")
    queue_delay_ms: float = Field(0.0, ge=0, le=1000, description="how long an idle device waits for company; 0 never waits")
    request_timeout_s: float = Field(10.0, gt=0, description="deadline of a request over decode, queue and compute")
    # Heartbeats come four times a second, and a busy machine delays them.
    device_timeout_s: float = Field(
        20.0, ge=2, description="a batch that takes longer counts as a hung device; so does a process without a sign of life"
    )
    max_body_bytes: int = Field(16 * 2**20, ge=1, description="most bytes in a request body")
    max_image_pixels: int = Field(40_000_000, ge=1, description="most pixels of an image that are decoded, by its header")
    memory_budget_bytes: int = Field(
        0,
        ge=0,
        description="most memory for bodies and decoding in each worker; 0 takes a share of the machine's or container's",
    )
    max_images_per_request: int = Field(256, ge=1, description="most images in one /predict/batch or /v2 request")
    max_connections: int = Field(2048, ge=1, description="most connections that each worker holds open")
    header_timeout_s: float = Field(10.0, gt=0, description="how long a client may take to send a request's headers")
    keep_alive_s: float = Field(75.0, gt=0, description="how long a connection may wait for its next request")
    body_timeout_s: float = Field(60.0, gt=0, description="how long a client may take to send each MiB of a request's body")
    decode_threads: int = Field(
        0, ge=0, le=64, description="threads of each worker that decode large images; 0 chooses by the cores"
    )
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="comma-separated keys, one of which every request must carry; health and the pages' own files need none",
    )
    api_keys_file: Path | None = Field(None, description="file with such keys, one a line; read again when it changes")
    admin_key: SecretStr = Field(
        SecretStr(""), description="key for POST /admin/reload and POST /admin/rollback of the model; empty for no such routes"
    )
    rate_limit: str = Field(
        "", description="most requests of one API key, or of one address without keys, such as 100/second; empty for no limit"
    )
    rate_limit_storage: str = Field(
        "memory://", description="where they are counted; memory:// in each worker by itself, redis://host:6379 in all together"
    )
    tls_certificate: Path | None = Field(None, description="PEM file with the certificate chain; makes the service speak HTTPS")
    tls_key: Path | None = Field(None, description="PEM file with its key, where the certificate's file does not hold it")
    trusted_proxies: str = Field(
        "", description="comma-separated addresses and networks of proxies whose X-Forwarded-For or Forwarded is believed"
    )
    root_path: str = Field("", description="path under which a proxy shows the service, such as /classify")
    cors_origins: str = Field(
        "", description="comma-separated origins whose pages may call the service from a browser; * for any"
    )
    shutdown_grace_s: float = Field(2.0, ge=0, description="how long SIGTERM keeps serving so that load balancers notice")
    drain_timeout_s: float = Field(30.0, gt=0, description="how long a drain may take before what is left is failed")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line that is written")
    log_format: Literal["auto", "json", "text"] = Field("auto", description="auto writes text to a terminal and JSON elsewhere")
    access_log: bool = Field(False, description="one log line for each request")
    keep_folder: Path | None = Field(
        None,
        description="folder for images that the model is unsure of or does not know, to sort and train on; unset keeps none",
    )
    keep_below: float = Field(
        0.5, ge=0, le=1, description="an image with a best score below this is kept, and one that is not known"
    )
    keep_max_files: int = Field(10_000, ge=1, description="most images that are kept; the oldest go")
    keep_max_bytes: int = Field(2**30, ge=1, description="most bytes that they have together; the oldest go")
    otlp_endpoint: str = Field(
        "", description="where traces go, an OTLP/HTTP collector such as http://localhost:4318; empty for no traces"
    )

    @field_validator("runtime", "device", "precision", "log_level", "log_format", mode="before")
    @classmethod
    def _ignore_case(cls, value: object) -> object:
        return value.strip().lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        """Refuse settings that each are valid and together make no sense."""
        least = max(self.max_images_per_request, self.max_batch_size)
        if self.max_queue_images < least:
            raise ValueError(f"max_queue_images must be at least max_images_per_request and max_batch_size, here {least}")
        for origin in filter(None, map(str.strip, self.cors_origins.split(","))):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"cors_origins: {origin!r} is no origin; write it like https://example.org")
        if self.root_path.strip("/") and not self.root_path.startswith("/"):
            raise ValueError(f"root_path: {self.root_path!r} is no path; write it like /classify")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_endpoint: {self.otlp_endpoint!r} is no address; write it like http://localhost:4318")
        if 0 < self.memory_budget_bytes < self.max_body_bytes:
            raise ValueError(f"memory_budget_bytes must be 0 or at least max_body_bytes, here {self.max_body_bytes}")
        for name in ("api_keys", "admin_key"):
            keys = getattr(self, name).get_secret_value()
            if keys and not keys.replace(",", " ").strip():
                raise ValueError(f"{name} is set and holds no key; unset it, or set a key")
        return self


def choices(name: str) -> tuple[str, ...]:
    """Return the values that the setting ``name`` may have; nothing for one that is not a choice."""
    annotation = Settings.model_fields[name].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def load_settings(arguments: list[str] | None = None) -> Settings:
    """Read the environment and, when given, command-line arguments; raise SettingsError naming what is wrong."""
    problems = list(_misspelt_variables())
    settings: Settings | None = None
    try:
        settings = CliApp.run(Settings, cli_args=[_with_underscores(argument) for argument in arguments or []])
    except ValidationError as error:
        problems += [
            f"{name} (SERVICE_{name.upper()}): {item['msg']}, got {item['input']!r}"
            if (name := "_".join(map(str, item["loc"])))
            else item["msg"].removeprefix("Value error, ")
            for item in error.errors(include_url=False)
        ]
    except ValueError as error:  # what the command line is made of
        problems.append(_with_nearest(str(error).removeprefix("error parsing CLI: ")))
    if settings is None or problems:
        raise SettingsError("cannot start with these settings:\n  " + "\n  ".join(problems))
    return settings


def _with_underscores(argument: str) -> str:
    """Return a flag as it is declared, whether it was written with hyphens or with underscores."""
    flag, equals, value = argument.partition("=")
    no = "no-" if flag.startswith("--no-") else ""
    return f"--{no}{flag[2 + len(no) :].replace('-', '_')}{equals}{value}" if flag.startswith("--") else argument


def _with_nearest(problem: str) -> str:
    """Return what argparse says, with the flag or command that each unknown word in it may have been meant for."""
    known = ["predict", *(f"--{name.replace('_', '-')}" for name in Settings.model_fields)]
    words = problem.partition("unrecognized arguments: ")[2].replace("_", "-").split()
    near = [f" {match}" for word in words for match in get_close_matches(word.partition("=")[0], known, 1, _ALIKE)]
    return f"{problem}; {'did you mean' + ' and'.join(near) + '?' if near else 'see python -m service --help'}"


def _misspelt_variables() -> Iterator[str]:
    """Say of every variable that is nearly a setting's which one that is."""
    for variable in os.environ:
        prefix, name = variable[: len("SERVICE_")].upper(), variable[len("SERVICE_") :].lower()
        if (
            prefix != "SERVICE_"
            or name in Settings.model_fields
            or name == _OF_THE_CLIENT
            or _OF_KUBERNETES.fullmatch(variable)
        ):
            continue
        for near in get_close_matches(name, Settings.model_fields, 1, _ALIKE):
            yield f"{variable}: there is no such setting; did you mean SERVICE_{near.upper()}?"
