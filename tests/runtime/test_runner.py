"""Which runtime serves a checkpoint, what is refused, and what a model has to answer before it is used."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.cpu import has_int8_dot_products
from service.model.checkpoint import Canary, Checkpoint
from service.runtime import open_runner as open_runner_module
from service.runtime.open_runner import check_canary, check_output, open_runner, warm_up
from service.runtime.runner import Runner, RunnerError, RunnerOptions, buckets_up_to
from service.settings import choices
from tests.support.tiny_network import eager, tiny_checkpoint, tiny_images

Images = NDArray[np.uint8]
Probabilities = NDArray[np.float32]
every_runtime = pytest.mark.parametrize("name", open_runner_module.RUNTIMES)

# Choices


def test_the_settings_offer_every_runtime() -> None:
    """The setting's choices are the registered runtimes, and ``auto``."""
    assert choices("runtime") == ("auto", *open_runner_module.RUNTIMES)


def test_auto_precision_follows_checkpoint_and_processor() -> None:
    """Int8 where the checkpoint is calibrated and the processor adds up in 32 bits, a float form otherwise."""
    options = RunnerOptions("openvino", threads=1, max_batch_size=1)
    best = {"openvino-int8"} if has_int8_dot_products() else {"openvino-bf16", "openvino-fp32"}
    assert open_runner(tiny_checkpoint(), options).runtime in best
    assert open_runner(tiny_checkpoint(calibrated=False), options).runtime in ("openvino-bf16", "openvino-fp32")
    assert open_runner(tiny_checkpoint(), replace(options, runtime="torch", device="cpu")).runtime in (
        "torch-bf16",
        "torch-fp32",
    )


@pytest.mark.gpu
def test_auto_on_a_machine_with_cuda_is_torch() -> None:
    """A GPU is taken where there is one, in bfloat16 and with two streams."""
    opened = open_runner(tiny_checkpoint(), RunnerOptions(max_batch_size=4))
    assert (opened.runtime, opened.device, opened.streams) == ("torch-bf16", "cuda:0", 2)
    opened.close()


# Choices that cannot be met


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RunnerOptions("openvino", device="cuda"), "'openvino' runs on the CPU; use runtime 'torch'"),
        (RunnerOptions("openvino", device="cuda:1"), "'openvino' runs on the CPU; use runtime 'torch'"),
        (RunnerOptions("torch", precision="int8"), "'torch' has no int8 form; use runtime 'openvino'"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(options: RunnerOptions, message: str) -> None:
    """The message names the choice and what to choose instead."""
    with pytest.raises(RunnerError, match=message):
        open_runner(tiny_checkpoint(), options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_cuda_that_is_not_there_is_refused(name: str) -> None:
    """Asking for a GPU never ends silently on the CPU."""
    with pytest.raises(RunnerError, match="device 'cuda:0' was asked for and torch finds no CUDA device"):
        open_runner(tiny_checkpoint(), RunnerOptions(name, device="cuda:0"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_auto_on_a_machine_without_cuda_is_openvino() -> None:
    """The fastest runtime for a CPU is chosen where there is nothing else."""
    opened = open_runner(tiny_checkpoint(), RunnerOptions(threads=1, max_batch_size=1))
    assert opened.runtime.startswith("openvino-")
    assert opened.device == "cpu"


@every_runtime
def test_weights_that_give_no_probabilities_are_refused(name: str) -> None:
    """A network that answers NaN never gets ready."""
    checkpoint = tiny_checkpoint()
    weights = dict(checkpoint.weights) | {"head.bias": np.full(3, np.nan, np.float32)}
    with pytest.raises(RunnerError, match="do not sum to 1; the weights are damaged"):
        open_runner(replace(checkpoint, weights=weights), RunnerOptions(name, "cpu", "fp32", threads=1, max_batch_size=1))


# Buckets


@given(st.integers(1, 4096))
def test_buckets_end_at_the_largest_batch(max_batch_size: int) -> None:
    """Buckets ascend from 1, no step more than doubles, and the last is the largest batch itself."""
    buckets = buckets_up_to(max_batch_size)
    assert buckets[0] == 1
    assert buckets[-1] == max_batch_size
    assert all(small < large <= 2 * small for small, large in pairwise(buckets))


# Warm-up and the known images


class RecordingRunner(Runner):
    """A runner that answers whatever ``answer`` makes of the images, and remembers what it was asked."""

    def __init__(self, answer: Any, streams: int = 1, max_batch_size: int = 4) -> None:
        super().__init__(RunnerOptions(streams=streams, max_batch_size=max_batch_size), "cpu", "recording", max_batch_size)
        self.answer = answer
        self.asked: list[tuple[int, int]] = []
        self.closed = False

    def run(self, images: Images, stream: int = 0) -> Probabilities:
        self.asked.append((stream, len(images)))
        probabilities: Probabilities = self.answer(images)
        return probabilities

    def close(self) -> None:
        self.closed = True


def first_class(images: Images) -> Probabilities:
    """Sure of class 0, whatever it sees."""
    return np.tile(np.array([0.8, 0.1, 0.1], np.float32), (len(images), 1))


def known_images(probabilities: list[list[float]]) -> Canary:
    """These answers to random images."""
    return Canary(tiny_images(count=len(probabilities)), np.array(probabilities, np.float32))


def with_canary(probabilities: list[list[float]]) -> Checkpoint:
    """A checkpoint that knows these answers to random images."""
    return replace(tiny_checkpoint(), canary=known_images(probabilities))


def test_warm_up_runs_every_stream_at_every_bucket() -> None:
    """No request is the first at its batch size on any stream."""
    runner = RecordingRunner(first_class, streams=2)
    warm_up(runner, tiny_checkpoint())
    for stream in range(2):
        assert [asked for asked in runner.asked if asked[0] == stream] == [(stream, bucket) for bucket in (1, 2, 3, 4)]
    assert len(runner.asked) == 8


def test_known_images_are_asked_on_every_stream_in_batches() -> None:
    """More known images than the largest batch are asked in parts, and each stream has to know them."""
    runner = RecordingRunner(first_class, streams=2, max_batch_size=2)
    warm_up(runner, with_canary([[0.8, 0.1, 0.1]] * 5))
    assert [asked for asked in runner.asked if asked[0] == 1] == [(1, 1), (1, 2), (1, 2), (1, 2), (1, 1)]


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]], "answers 1 of 2 known images wrongly and is off by up to 0.700"),
        ([[0.5, 0.3, 0.2]], "answers 0 of 1 known images wrongly and is off by up to 0.300"),
        ([[float("nan")] * 3], "is off by up to nan"),
    ],
)
def test_a_wrong_answer_to_a_known_image_is_refused(known: list[list[float]], message: str) -> None:
    """Another label, the same label with another probability, and an answer that cannot be compared all fail."""
    with pytest.raises(RunnerError, match=message):
        check_canary(RecordingRunner(first_class), known_images(known))


def test_rounding_of_a_known_answer_is_let_pass() -> None:
    """What int8 moves where the network is sure is within the tolerance; no known images, nothing to check."""
    check_canary(RecordingRunner(first_class), with_canary([[0.7, 0.2, 0.1]]).canary)
    unasked = RecordingRunner(first_class)
    check_canary(unasked, tiny_checkpoint().canary)
    assert not unasked.asked


@every_runtime
def test_every_runtime_is_held_to_the_known_images(name: str) -> None:
    """The real network passes with its own answers, and with those of another network it never gets ready."""
    checkpoint, options = tiny_checkpoint(), RunnerOptions(name, "cpu", "fp32", threads=1, max_batch_size=4)
    answers = eager(checkpoint, tiny_images())
    open_runner(replace(checkpoint, canary=Canary(tiny_images(), answers)), options).close()
    shifted = np.roll(answers, 1, axis=1)
    with pytest.raises(RunnerError, match="known images wrongly"):
        open_runner(replace(checkpoint, canary=Canary(tiny_images(), shifted)), options)


def test_a_runner_that_fails_its_warm_up_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's memory is given back when a model does not come up."""
    failing = RecordingRunner(lambda images: np.zeros((len(images), 3), np.float32))
    monkeypatch.setitem(open_runner_module.RUNTIMES, "recording", open_runner_module.Runtime(lambda *_: failing, ()))
    with pytest.raises(RunnerError, match="do not sum to 1"):
        open_runner(tiny_checkpoint(), RunnerOptions("recording"))
    assert failing.closed


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (np.full((2, 3), 1 / 3), r"gave \(2, 3\) for 3 images of 3 classes"),
        (np.full((3, 4), 1 / 4), r"gave \(3, 4\) for 3 images of 3 classes"),
        (np.full((3, 3), 0.5), "do not sum to 1"),
        (np.full((3, 3), np.nan), "do not sum to 1"),
        (np.array([[1 / 3] * 3, [np.inf, 0, 0], [1 / 3] * 3]), "do not sum to 1"),
    ],
)
def test_what_is_no_distribution_is_refused(probabilities: NDArray[np.float32], message: str) -> None:
    """A wrong shape and numbers that are no probabilities are told apart."""
    with pytest.raises(RunnerError, match=message):
        check_output(probabilities.astype(np.float32), 3, 3)
