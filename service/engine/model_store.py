"""The checkpoint file and the models made of it: the first, each later one that proves itself, and the one before.

Owns: when a file counts as new, what a new model must prove, which file an engine that is started again falls back to.
Does not know: batching, processes, HTTP.

Models are loaded from a private copy, so that what was verified is what is served, however the file changes meanwhile.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

from service.engine.interface import ModelInfo
from service.engine.local_engine import LoadedModel
from service.model.checkpoint import Canary, Checkpoint, CheckpointError, load_checkpoint
from service.model.class_activation import ClassActivation
from service.runtime.open_runner import check_canary, open_runner
from service.runtime.runner import Runner, RunnerError, RunnerOptions
from service.settings import Settings

logger = logging.getLogger(__name__)

_KNOWN_SHARE = 0.75  # of the serving model's known images, which a new one must label as that does

Signature = tuple[int, int, int]


class ModelRefused(Exception):
    """A checkpoint that is sound and yet may not take over; the message says why and what to do."""


class ModelStore:
    """Loads ``settings.checkpoint`` for one engine process; ``folder`` outlives the engine, not the service."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._candidate = folder / "candidate.safetensors"
        self._serving = folder / "serving.safetensors"
        self._previous = folder / "previous.safetensors"
        self._rolled_back = folder / "rolled-back"
        self._tried: Signature | None = None
        self._known: Canary | None = None
        self.refusal = ""

    def open(self) -> LoadedModel:
        """Load the checkpoint, or what an earlier engine of this service served where the file is not good any more.

        Raises CheckpointError or RunnerError.
        """
        try:
            checkpoint = self._read()
            if self._rolled_back.exists() and self._rolled_back.read_text() == checkpoint.version:
                raise ModelRefused(f"model {checkpoint.version} was rolled back")
            model = self._make(checkpoint)
        except (CheckpointError, RunnerError, ModelRefused) as error:
            if not self._serving.exists():
                raise
            self._refuse(error)
            checkpoint = load_checkpoint(self._serving)
            model = self._make(checkpoint)
        else:
            os.replace(self._candidate, self._serving)
        self._known = checkpoint.canary
        return model

    def has_new_file(self) -> bool:
        """Whether the checkpoint file is another than the one that was last tried."""
        signature = self._signature()
        return signature is not None and signature != self._tried

    def load_beside(self, current: LoadedModel) -> LoadedModel | None:
        """Load the file as it is now, warm it up and compare it with ``current``; None when it is the same model.

        Raises CheckpointError, RunnerError or ModelRefused, after which nothing has changed and ``refusal`` says why.
        """
        try:
            checkpoint = self._read()
            if checkpoint.version == current.info.version:
                self.refusal = ""
                return None
            _require_same_task(current.info, info_of(checkpoint))
            model = self._make(checkpoint)
            try:
                self._require_agreement(model.runner, current)
            except ModelRefused:
                model.runner.close()
                raise
        except (CheckpointError, RunnerError, ModelRefused) as error:
            self._refuse(error)
            raise
        try:
            os.replace(self._serving, self._previous)
            os.replace(self._candidate, self._serving)
        except OSError:  # the new model serves all the same; only an engine that is started again will not know it
            logger.exception("the copy of the checkpoint was not kept")
        self._known = checkpoint.canary
        self.refusal = ""
        return model

    def roll_back(self, current: LoadedModel) -> None:
        """Note that the model before ``current`` serves again, so that an engine that is started again does the same."""
        try:
            self._rolled_back.write_text(current.info.version)
            os.replace(self._previous, self._serving)
            self._known = load_checkpoint(self._serving).canary
        except (OSError, CheckpointError):
            logger.exception("the rollback was not noted; it ends with this engine")
        self.refusal = f"model {current.info.version} was rolled back"

    def _read(self) -> Checkpoint:
        """Copy the file and load the copy."""
        path = self._settings.checkpoint
        self._tried = self._signature()
        try:
            shutil.copyfile(path, self._candidate)
        except FileNotFoundError as error:
            raise CheckpointError(f"there is no checkpoint at {path}; train one with 'python -m training train'") from error
        except OSError as error:
            raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
        return load_checkpoint(self._candidate)

    def _make(self, checkpoint: Checkpoint) -> LoadedModel:
        runner = open_runner(checkpoint, runner_options(self._settings))
        known = replace(checkpoint, weights={})  # its answers are checked again later; the weights are on the device now
        return LoadedModel(runner, info_of(checkpoint), lambda stream: check_canary(runner, known, stream), _maps(checkpoint))

    def _require_agreement(self, runner: Runner, current: LoadedModel) -> None:
        """Require that a new model knows most of what the serving one's checkpoint brings as known."""
        if self._known is None:
            return
        labels = [int(runner.run(image[None]).argmax()) for image in self._known.images]
        same = sum(label == int(known) for label, known in zip(labels, self._known.probabilities.argmax(1), strict=True))
        if same < _KNOWN_SHARE * len(labels):
            raise ModelRefused(
                f"it labels {same} of the {len(labels)} known images as model {current.info.version} does;"
                " it is worse, or made for something else; restart the service to serve it all the same"
            )

    def _signature(self) -> Signature | None:
        """What tells one state of the file from another, without reading it."""
        try:
            status = self._settings.checkpoint.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _refuse(self, error: Exception) -> None:
        """Log why the file is not served, and keep it for health, which shows no paths."""
        logger.error("checkpoint refused: %s", error)
        told = str(error).replace(str(self._candidate), "the file").replace(str(self._settings.checkpoint), "the file")
        self.refusal = f"a new checkpoint was refused: {told}"


def runner_options(settings: Settings) -> RunnerOptions:
    """Give what the settings say of the runner."""
    return RunnerOptions(
        runtime=settings.runtime,
        device=settings.device,
        precision=settings.precision,
        threads=settings.cpu_threads,
        streams=settings.streams,
        max_batch_size=settings.max_batch_size,
    )


def info_of(checkpoint: Checkpoint) -> ModelInfo:
    """Give what answers say of a checkpoint's model."""
    metadata = checkpoint.metadata
    return ModelInfo(metadata.name, checkpoint.version, metadata.class_names, metadata.input)


def _require_same_task(serving: ModelInfo, new: ModelInfo) -> None:
    """Clients and images on their way count on these; another task needs a restart."""
    for what, old, now in (
        ("name", serving.name, new.name),
        ("classes", serving.class_names, new.class_names),
        ("input size", serving.input.size, new.input.size),
        ("input fit", serving.input.fit, new.input.fit),
    ):
        if old != now:
            raise ModelRefused(f"its {what} differs from what is served; restart the service to serve it")


def _maps(checkpoint: Checkpoint) -> ClassActivation | None:
    try:
        return ClassActivation(checkpoint)
    except CheckpointError as error:
        logger.warning("answers are not explained: %s", error)
        return None
