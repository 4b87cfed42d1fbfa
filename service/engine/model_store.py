"""The checkpoint file and the models made of it: the first, each later one that proves itself, and the one before.

Models are loaded from a private copy, so that what was verified is what is served, however the file changes meanwhile.
"""

from __future__ import annotations

import base64
import errno
from dataclasses import replace

from service.engine.device_stream import LoadedModel
from service.engine.interface import ModelInfo
from service.engine.model_files import Decision, ModelFiles
from service.model.checkpoint import Checkpoint, CheckpointError, checkpoint_bytes, read_checkpoint, version_of
from service.model.class_activation import ClassActivation
from service.model.images import encode_png
from service.model.typicality import split_output
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions
from service.settings import Settings

_KNOWN_SHARE = 0.75  # of the serving model's known images, which a new one must label as that does

Signature = tuple[int, ...]


class ModelRefused(Exception):
    """A model that may not take over; the message says why and what to do."""


class ModelStore:
    """Loads models for one engine process, and decides which of them serves."""

    def __init__(self, settings: Settings, files: ModelFiles) -> None:
        """Load ``settings.checkpoint``, or what ``files`` say was decided by an earlier engine of this service."""
        self._settings = settings
        self._files = files
        self._tried: Signature | None = None
        self._serving: LoadedModel

    @property
    def refusal(self) -> str:
        """What was last refused or rolled back, and why; empty where the file is what serves."""
        return self._files.decision().refusal

    def open(self) -> LoadedModel:
        """Load the model that was accepted; at the first start of a service, the file.

        Raises CheckpointError, RunnerError or whatever a runtime raises.
        """
        decision = self._files.decision()
        if not decision.slots:
            decision = replace(decision, slots=(decision.free_slot,))
            self._keep(self._read_file(), *decision.slots)
        checkpoint = read_checkpoint(self._files.slot(decision.slots[0]).read_bytes(), self._settings.checkpoint)
        return self._accept(load_model(self._settings, checkpoint), decision)

    def has_new_file(self) -> bool:
        """Whether the checkpoint file has changed, or is gone, since it was last tried."""
        return self._signature() != self._tried

    def check(self, *, despite_rejection: bool = False) -> LoadedModel | None:
        """Load the file, warm it up, compare it with the model that serves and accept it.

        Returns None when it is the model that serves, or, unless ``despite_rejection``, one that was rejected before. Raises
        ModelRefused, after which nothing has changed and ``refusal`` says why.
        """
        decision, version = self._files.decision(), ""
        try:
            data = self._read_file()
            version = version_of(data)
            if version == self._serving.info.version:
                self._files.decide(replace(decision, refusal=""))
                return None
            if version in decision.rejected and not despite_rejection:
                return None
            self._keep(data, decision.free_slot)
            model = self._load_fitting(data, must_agree=True)
        except Exception as error:  # whatever the file, the memory or a runtime can cause: the service goes on as it was
            self._reject(version, error)
            raise ModelRefused(str(error) or type(error).__name__) from error
        others = tuple(rejected for rejected in decision.rejected if rejected != version)
        return self._accept(model, Decision((decision.free_slot, decision.slots[0]), others))

    def rollback(self) -> LoadedModel:
        """Load the model before the one that serves and accept it again; raise ModelRefused where that cannot be."""
        decision, version = self._files.decision(), self._serving.info.version
        if not (previous := decision.slots[1:]):
            raise ModelRefused("there is no model to roll back to")
        try:
            model = self._load_fitting(self._files.slot(*previous).read_bytes(), must_agree=False)
        except Exception as error:
            raise ModelRefused(f"the model before cannot be served: {error}") from error
        return self._accept(model, Decision(previous, (*decision.rejected, version), f"model {version} was rolled back"))

    def _accept(self, model: LoadedModel, decision: Decision) -> LoadedModel:
        self._files.decide(decision)
        self._serving = model
        return model

    def _read_file(self) -> bytes:
        self._tried = self._signature()
        return checkpoint_bytes(self._settings.checkpoint)

    def _keep(self, data: bytes, slot: int) -> None:
        """Copy what the file holds to ``slot``, or leave that empty."""
        path = self._files.slot(slot)
        try:
            path.write_bytes(data)
        except OSError as error:
            path.write_bytes(b"")
            advice = "; make room in the temporary folder, or set TMPDIR to another" if error.errno == errno.ENOSPC else ""
            raise CheckpointError(f"cannot copy {self._settings.checkpoint}: {error.strerror or error}{advice}") from error

    def _load_fitting(self, data: bytes, *, must_agree: bool) -> LoadedModel:
        """Load a model for the engine as it is; raise ModelRefused where the engine would have to be started again."""
        checkpoint = read_checkpoint(data, self._settings.checkpoint)
        _require_same_task(self._serving.info, ModelInfo.of(checkpoint))
        model = load_model(self._settings, checkpoint)
        try:
            if model.runner.streams != self._serving.runner.streams:
                raise ModelRefused("the cores at hand have changed since the start; restart the service to serve it")
            if must_agree:
                self._require_agreement(model)
        except Exception:
            model.runner.close()
            raise
        return model

    def _require_agreement(self, model: LoadedModel) -> None:
        """Require that a new model knows most of what the serving one's checkpoint brings as known."""
        known = self._serving.canary
        if known is None:
            return
        classes = known.probabilities.shape[1]
        labels = [int(split_output(model.runner.run(image[None]), classes)[0].argmax()) for image in known.images]
        same = sum(label == int(right) for label, right in zip(labels, known.probabilities.argmax(1), strict=True))
        if same < _KNOWN_SHARE * len(labels):
            raise ModelRefused(
                f"it labels {same} of the {len(labels)} known images as model {self._serving.info.version} does;"
                " it is worse, or made for something else; restart the service to serve it all the same"
            )

    def _signature(self) -> Signature:
        """What distinguishes one state of the file from another, without reading it; empty where there is none.

        Its time of change, unlike that of its content, cannot be set, and shows new permissions too.
        """
        try:
            status = self._settings.checkpoint.stat()
        except OSError:
            return ()
        return status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size

    def _reject(self, version: str, error: Exception) -> None:
        """Keep why the file is not served, for health, which shows no paths."""
        why = (str(error) or type(error).__name__).replace(str(self._settings.checkpoint), "the file")
        # What was short when it was loaded may be there the next time.
        lasting = (version,) if version and not isinstance(error.__cause__ or error, MemoryError | OSError) else ()
        decision = self._files.decision()
        refusal = f"a new checkpoint was refused: {why}"
        self._files.decide(replace(decision, rejected=(*decision.rejected, *lasting), refusal=refusal))


def load_model(settings: Settings, checkpoint: Checkpoint) -> LoadedModel:
    """Open a runner for ``checkpoint``, warmed up and verified; raise RunnerError where none can run it."""
    runner = open_runner(checkpoint, RunnerOptions.of(settings))
    info = replace(ModelInfo.of(checkpoint, settings.unknown_threshold), samples=_samples(checkpoint))
    return LoadedModel(runner, info, checkpoint.canary, ClassActivation(checkpoint))


def _require_same_task(serving: ModelInfo, new: ModelInfo) -> None:
    """Clients and images on their way count on these; another task needs a restart."""
    for what, old, now in (
        ("classes", serving.class_names, new.class_names),
        ("input size", serving.input.size, new.input.size),
        ("input fit", serving.input.fit, new.input.fit),
    ):
        if old != now:
            raise ModelRefused(f"its {what} differs from what is served; restart the service to serve it")


def _samples(checkpoint: Checkpoint) -> tuple[tuple[str, str], ...]:
    known, names = checkpoint.canary, checkpoint.metadata.class_names
    if known is None:
        return ()
    images = (base64.b64encode(encode_png(image)).decode() for image in known.images)
    return tuple(zip((names[label] for label in known.probabilities.argmax(1)), images, strict=True))
