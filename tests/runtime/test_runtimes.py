"""Every runtime gives the network's own answers: batched, padded and quantised against eager float32, one by one."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray

from service.cpu import has_int8_dot_products
from service.model.architectures import MODELS
from service.model.checkpoint import Calibration, Checkpoint, CheckpointError
from service.model.classifier import Classifier, TypicalityTail, calibrated, folded_network
from service.model.typicality import Typicality
from service.runtime.open_runner import RUNTIMES as OPENERS
from service.runtime.open_runner import open_runner
from service.runtime.openvino_graph import build_graph, frame_pixel
from service.runtime.openvino_runner import shared_core
from service.runtime.runner import Runner, RunnerOptions
from tests.support.tiny_network import change, eager, tiny_checkpoint, tiny_images

Images = NDArray[np.uint8]
Probabilities = NDArray[np.float32]


@dataclass(frozen=True)
class Runtime:
    """A runtime under test and how far its answers may be from eager float32.

    ``noise`` bounds the error of the logits, centred on each image's mean, over all images, as a share of the logits
    themselves (root mean squares). ``sure`` is the distance of the two best probabilities beyond which the label must be
    the same. ``repeat`` bounds what another batch size may change of a probability, ``typicality`` the difference of a
    typicality to float32.
    """

    runtime: str
    precision: str
    noise: float
    sure: float
    repeat: float
    typicality: float
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.runtime}-{self.precision}"


# float32 differs by the order of summation only.
# bfloat16 rounds weights and activations to 2^-9 of their value, 0.11 % RMS each; through the 17 layers of the longest path
# that adds up in quadrature to 0.7 % when every layer passes it on undamped. Measured: 0.4 % to 1.7 %.
# Of the typicality of 3,000 test images, bfloat16 changed 0.002 on average and 0.03 at most, int8 0.007 and 0.05.
# int8 steps are max/127 for the weights of a channel and max/255 for activations; the error of a step is its length over
# sqrt(12), so with maxima of 4 and 10 times the RMS each adds about 1 % a layer, 6 % through the whole path. Measured:
# 1.2 % to 5.4 %. A wrong scale or a saturated layer gives several times as much.
_BOUNDS = {  # noise, sure, repeat, typicality
    "fp32": (1e-5, 1e-4, 1e-5, 2e-3),
    "bf16": (0.03, 0.05, 0.02, 0.03),
    "int8": (0.10, 0.30, 0.02, 0.06),
}
_ON_A_CPU = [
    Runtime(name, precision, *_BOUNDS[precision]) for name, opener in OPENERS.items() for precision in opener.precisions
]
RUNTIMES = [
    *_ON_A_CPU,
    # cuDNN's fast algorithms for float32 sum transformed values; TF32, which rounds to 2^-11 of a value, would be far above.
    pytest.param(
        Runtime("torch", "fp32", noise=1e-4, sure=1e-3, repeat=1e-4, typicality=2e-3, device="cuda"), marks=pytest.mark.gpu
    ),
    pytest.param(Runtime("torch", "bf16", *_BOUNDS["bf16"], device="cuda"), marks=pytest.mark.gpu),
]
OTHERS = MODELS.keys() - {"resnet18"}  # the other architectures than the service's own
SATURATES = "this processor's int8 products saturate at 16 bits, so nothing holds for them"
LARGEST = 6  # buckets 1, 2, 3, 4 and 6


@pytest.fixture(scope="module", params=RUNTIMES, ids=lambda runtime: f"{runtime.name}-{runtime.device}")
def runtime(request: pytest.FixtureRequest) -> Runtime:
    chosen: Runtime = request.param
    if chosen.precision == "int8" and not has_int8_dot_products():
        pytest.skip(SATURATES)
    return chosen


@pytest.fixture(scope="module")
def runner(runtime: Runtime, warm_checkpoint: Checkpoint) -> Iterator[Runner]:
    """The checkpoint in hand on one runtime, on two streams."""
    options = RunnerOptions(runtime.runtime, runtime.device, runtime.precision, threads=2, streams=2, max_batch_size=LARGEST)
    opened = open_runner(warm_checkpoint, options)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def warm_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in hand with a curve that no runtime can leave out unnoticed, and without known images."""
    calibration = checkpoint.metadata.calibration.model_copy(update={"temperature": 1.7, "cubic": 0.02})
    return replace(checkpoint, metadata=checkpoint.metadata.model_copy(update={"calibration": calibration}), canary=None)


@pytest.fixture(scope="module")
def expected(warm_checkpoint: Checkpoint, sample_images: Images) -> Probabilities:
    """What eager float32 answers, one image after the other: (40, 10)."""
    return eager(warm_checkpoint, sample_images)


@pytest.fixture(scope="module")
def expected_typicality(warm_checkpoint: Checkpoint, sample_images: Images) -> Probabilities:
    """The typicality of the images in float32: (40,)."""
    with torch.inference_mode():
        answers: Probabilities = Classifier(warm_checkpoint, torch.float32)(torch.from_numpy(sample_images)).numpy()
    return answers[:, -1]


def logits_of(probabilities: Probabilities) -> NDArray[np.float64]:
    """Logits centred on each image's mean, which is all that probabilities tell of them: float64 (N, num_classes)."""
    logits: NDArray[np.float64] = np.log(probabilities.astype(np.float64))
    centred: NDArray[np.float64] = logits - logits.mean(1, keepdims=True)
    return centred


def assert_close(actual: Probabilities, expected: Probabilities, runtime: Runtime) -> None:
    """Hold ``actual`` to the bounds of its runtime."""
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual.sum(1), 1, atol=1e-3)
    noise = np.linalg.norm(logits_of(actual) - logits_of(expected)) / np.linalg.norm(logits_of(expected))
    assert noise < runtime.noise
    best = np.sort(expected, 1)
    sure = best[:, -1] - best[:, -2] > runtime.sure
    np.testing.assert_array_equal(actual.argmax(1)[sure], expected.argmax(1)[sure])


def batched(runner: Runner, images: Images, size: int, stream: int = 0) -> Probabilities:
    return np.concatenate([runner.run(images[start : start + size], stream) for start in range(0, len(images), size)])


# Answers


@pytest.mark.parametrize("size", range(1, LARGEST + 1))
def test_batches_of_every_size_answer_as_eager_float32(
    runner: Runner,
    runtime: Runtime,
    sample_images: Images,
    expected: Probabilities,
    expected_typicality: Probabilities,
    size: int,
) -> None:
    """Full buckets, a size between buckets and the padded remainder at the end all give the network's own answers."""
    output = batched(runner, sample_images, size)
    assert_close(output[:, :-1], expected, runtime)
    np.testing.assert_allclose(output[:, -1], expected_typicality, atol=runtime.typicality)


def test_an_answer_does_not_depend_on_its_neighbours(runner: Runner, runtime: Runtime, sample_images: Images) -> None:
    """An image gets the same probabilities alone, in any place of a batch, and beside what an earlier batch left."""
    alone = batched(runner, sample_images, 1)
    for size in range(2, LARGEST + 1):
        rng = np.random.default_rng(size)
        chosen = rng.permutation(len(sample_images))[: size * 3]
        mixed = batched(runner, sample_images[chosen], size)
        assert np.abs(mixed - alone[chosen]).max() <= runtime.repeat


def test_equal_batches_get_equal_answers(runner: Runner, sample_images: Images) -> None:
    """The same batch on the same stream gives the identical numbers, whatever ran in between."""
    first = runner.run(sample_images[:5])
    runner.run(sample_images[10:16])
    np.testing.assert_array_equal(runner.run(sample_images[:5]), first)


def test_the_answer_belongs_to_the_caller(runner: Runner, sample_images: Images) -> None:
    """A later batch does not change what an earlier one gave, and the caller may write to it."""
    answer = runner.run(sample_images[:4])
    kept = answer.copy()
    runner.run(sample_images[4:8])
    np.testing.assert_array_equal(answer, kept)
    answer[:] = 0
    np.testing.assert_array_equal(runner.run(sample_images[:4]), kept)


def test_images_are_left_as_they_are(runner: Runner, sample_images: Images) -> None:
    """A batch is read, never written, and need not be contiguous."""
    images = sample_images[::3][:LARGEST]
    kept = images.copy()
    answer = runner.run(images)
    np.testing.assert_array_equal(images, kept)
    np.testing.assert_array_equal(runner.run(kept), answer)


def test_streams_run_beside_each_other_without_mixing(runner: Runner, runtime: Runtime, sample_images: Images) -> None:
    """Every stream called from its own thread at the same time gives the answers of its own images."""
    alone = batched(runner, sample_images, LARGEST)
    together = threading.Barrier(runner.streams)

    def run_all(stream: int) -> list[Probabilities]:
        together.wait(30)
        return [batched(runner, sample_images, LARGEST, stream) for _ in range(3)]

    with ThreadPoolExecutor(runner.streams) as pool:
        for answers in pool.map(run_all, range(runner.streams)):
            for answer in answers:
                assert np.abs(answer - alone).max() <= runtime.repeat


def test_a_runner_says_what_it_is(runner: Runner, runtime: Runtime) -> None:
    """Runtime, device, streams and buckets are those that were asked for."""
    assert runner.runtime == runtime.name
    assert runner.device == ("cuda:0" if runtime.device == "cuda" else "cpu")
    assert runner.buckets == (1, 2, 3, 4, 6)
    assert 1 <= runner.efficient_batch <= 6
    assert (runner.streams, runner.lone) == ((3, True) if runtime.runtime == "openvino" else (2, False))


# Networks of other shapes


@pytest.mark.parametrize("name", OPENERS)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"size": 17},
        {"size": 64, "widths": (16,), "depths": (3,)},
        {"num_classes": 100},
        {"widths": (8, 8, 8), "depths": (1, 1, 1)},
        *({"architecture": name, "size": size} for name in sorted(OTHERS) for size in (64, 97)),
    ],
)
def test_other_configs_are_served_too(name: str, values: dict[str, Any]) -> None:
    """Classes, input size, normalisation, widths and depths are the checkpoint's, in every runtime."""
    checkpoint = tiny_checkpoint(**values)
    images = tiny_images(checkpoint.metadata.input.size)
    opened = open_runner(checkpoint, RunnerOptions(name, "cpu", "fp32", threads=1, max_batch_size=4))
    np.testing.assert_allclose(batched(opened, images, 4), eager(checkpoint, images), atol=2e-6)
    opened.close()


@pytest.mark.parametrize("architecture", sorted(OTHERS))
def test_every_architecture_is_served_by_every_runtime(runtime: Runtime, architecture: str) -> None:
    """Whatever layers it has (max pooling, norms in shortcuts), within the bounds that hold for the service's network."""
    checkpoint = tiny_checkpoint(architecture=architecture, size=64, widths=(16, 24, 32), depths=(2, 1, 1))
    images = tiny_images(64, 12)
    options = RunnerOptions(runtime.runtime, runtime.device, runtime.precision, threads=1, streams=1, max_batch_size=LARGEST)
    opened = open_runner(checkpoint, options)
    assert_close(batched(opened, images, LARGEST), eager(checkpoint, images), runtime)
    opened.close()


def test_half_precision_weights_are_served_as_they_are_stored() -> None:
    """A checkpoint of float16 weights is computed in float32 from those very values."""
    checkpoint = tiny_checkpoint()
    halved = replace(checkpoint, weights={name: value.astype(np.float16) for name, value in checkpoint.weights.items()})
    for name in OPENERS:
        opened = open_runner(halved, RunnerOptions(name, "cpu", "fp32", threads=1, max_batch_size=2))
        np.testing.assert_allclose(batched(opened, tiny_images(), 2), eager(halved, tiny_images()), atol=2e-6)


_REPLACE_AND_SIGNAL = """
import gc, signal
from service.runtime.open_runner import RUNTIMES as OPENERS
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions
from tests.support.tiny_network import tiny_checkpoint

def open_one():
    return open_runner(tiny_checkpoint(), RunnerOptions("openvino", "cpu", "fp32", threads=1, max_batch_size=2))

runner = open_one()
for _ in range(2):
    new = open_one()
    runner.close()
    runner = new
runner.close()
del runner, new
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
signal.raise_signal(signal.SIGUSR1)
"""


def test_a_signal_is_heard_after_runners_were_replaced() -> None:
    """Models of OpenVINO that come and go, as when a checkpoint is replaced, leave a process that can take a signal."""
    done = subprocess.run([sys.executable, "-c", _REPLACE_AND_SIGNAL], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


# The int8 form


def rounding_to(step: float) -> Callable[..., torch.Tensor]:
    """A forward hook that rounds an output to 0..255 steps."""
    return lambda _module, _inputs, output: (output / step).round().clamp(0, 255) * step


def rounded_like_int8(checkpoint: Checkpoint, images: Images) -> Probabilities:
    """The int8 form by its definition, in eager float32 with every value rounded to what 8 bits hold.

    Weights, norms folded in, to 127 steps either side of 0 for each output channel, those of the stem after division by the
    standard deviation; the output of each ReLU to 255 steps up to its calibrated maximum; the frame around the image to the
    pixel nearest to the mean; the head as it is.
    """
    model = folded_network(checkpoint).requires_grad_(False)
    spec = checkpoint.metadata.input
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name != "head":
            divisor = std if name.startswith("stem") else torch.ones(1)
            step = (module.weight.data / divisor).abs().amax((1, 2, 3), keepdim=True) / 127
            module.weight.data = (module.weight.data / divisor / step).round() * step * divisor
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_hook(rounding_to(checkpoint.metadata.calibration.activation_max[name] / 255))
    stem = model.get_submodule("stem.0")
    assert isinstance(stem, torch.nn.Conv2d)
    stem.padding = (0, 0)
    framed = np.broadcast_to(frame_pixel(spec), (len(images), 3, spec.size + 2, spec.size + 2)).copy()
    framed[:, :, 1:-1, 1:-1] = images
    with torch.inference_mode():
        logits = model((torch.from_numpy(framed) / 255 - mean) / std)
        probabilities: Probabilities = calibrated(logits, checkpoint.metadata.calibration).softmax(1).numpy()
    return probabilities


def test_int8_rounds_as_defined() -> None:
    """Ranges, scales and rounding are those of the definition: what is left are values on the border of two steps."""
    if not has_int8_dot_products():
        pytest.skip("this processor has no int8 dot products")
    checkpoint, images = tiny_checkpoint(), tiny_images(count=64)
    options = RunnerOptions("openvino", precision="int8", threads=1, max_batch_size=64)
    actual, defined = open_runner(checkpoint, options).run(images), rounded_like_int8(checkpoint, images)
    noise = np.linalg.norm(logits_of(actual) - logits_of(defined)) / np.linalg.norm(logits_of(defined))
    # Measured 2e-7, and 1e-4 where a value lies on such a border; the int8 form itself is 1e-2 from float32.
    assert noise < 1e-3


@pytest.mark.parametrize("batch_last", [False, True])
def test_all_but_the_head_compute_in_int8(checkpoint: Checkpoint, batch_last: bool) -> None:
    """OpenVINO runs the stem, all 16 convolutions of the blocks and the 4 projections on 8-bit integers, so none falls back."""
    if not has_int8_dot_products():
        pytest.skip("this processor has no int8 dot products")
    graph = build_graph(checkpoint, "int8", batch_last=batch_last)
    compiled = shared_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    layers = [(fact["layerType"].astype(str), fact["runtimePrecision"].astype(str)) for fact in facts]
    assert [precision for layer, precision in layers if layer == "Convolution"] == ["u8"] * 21
    assert [precision for layer, precision in layers if layer.startswith("FullyConnected")] == ["f32"]  # head and typicality


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_last", [False, True])
def test_typicality_is_the_share_of_held_out_images_that_are_stranger(precision: str, batch_last: bool) -> None:
    """The graph counts them as torch does: all of them, none, and those between, for any length of the features."""
    checkpoint, images = tiny_checkpoint(), tiny_images()
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(shape).astype(np.float32) for shape in (24, (5, 24), (3, 24), 3, 1))
    fitted = Typicality(*arrays)
    with torch.inference_mode():
        classifier = Classifier(checkpoint, torch.float32)
        features = classifier.network.to_features((torch.from_numpy(images) - classifier.mean) / classifier.std)
        strangeness = TypicalityTail(fitted).strangeness(features).numpy().ravel()
    between = np.sort(strangeness)[2:4].mean(keepdims=True)
    for held_out in (strangeness.min() - 9, strangeness.max() + 9, between, np.linspace(-9, 9, 7)):
        known = replace(checkpoint, typicality=replace(fitted, strangeness=np.atleast_1d(held_out).astype(np.float32)))
        graph = build_graph(known, precision, batch_last=batch_last)
        compiled = shared_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        with torch.inference_mode():
            expected = Classifier(known, torch.float32)(torch.from_numpy(images))
        np.testing.assert_allclose(compiled(images)[0], expected, atol=1e-5)


@pytest.mark.parametrize("size", [32, 15, 8])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_both_forms_of_the_graph_answer_the_same(size: int, precision: str) -> None:
    """Maps that shrink to one pixel, odd sizes, strides and projections included."""
    if precision == "int8" and not has_int8_dot_products():
        pytest.skip(SATURATES)
    checkpoint = tiny_checkpoint(size=size, widths=(8, 8, 12, 16), depths=(1, 1, 1, 2))
    few, many = (
        shared_core().compile_model(
            build_graph(checkpoint, precision, batch_last=batch_last), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        for batch_last in (False, True)
    )
    images = tiny_images(few.input().partial_shape[2].get_length())
    np.testing.assert_allclose(many([images])[0], few([images])[0], atol=2e-6)


@pytest.mark.parametrize(("size", "axes"), [(64, {4, 5}), (65, {4})])
def test_images_that_are_large_keep_one_form(size: int, axes: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are long without it, nothing is compiled with the images last; the answers are those of the network."""
    compiled: list[int] = []

    def build(checkpoint: Checkpoint, precision: str, **form: bool) -> ov.Model:
        graph = build_graph(checkpoint, precision, **form)
        kernels = [node for node in graph.get_ops() if node.get_type_name() == "Convolution"]
        compiled.append(len(kernels[0].get_input_partial_shape(0)))
        return graph

    monkeypatch.setattr("service.runtime.openvino_runner.build_graph", build)
    checkpoint, images = tiny_checkpoint(size=size), tiny_images(size)
    runner = open_runner(checkpoint, RunnerOptions("openvino", precision="fp32", threads=1, max_batch_size=8))
    assert set(compiled) == axes
    np.testing.assert_allclose(runner.run(images), eager(checkpoint, images), atol=1e-5)


def test_a_layer_that_is_always_zero_is_quantised_too() -> None:
    """A dead ReLU, whose largest value is 0, does not turn into a division by zero."""
    checkpoint = tiny_checkpoint()
    weights = dict(checkpoint.weights)
    weights["stages.0.0.norm1.bias"] = weights["stages.0.0.norm1.bias"] - 100
    maxima = checkpoint.metadata.calibration.activation_max | {"stages.0.0.relu1": 0.0}
    calibration = checkpoint.metadata.calibration.model_copy(update={"activation_max": maxima})
    dead = change(replace(checkpoint, weights=weights), calibration=calibration)
    opened = open_runner(dead, RunnerOptions("openvino", precision="int8", threads=1, max_batch_size=4))
    assert np.abs(batched(opened, tiny_images(), 4) - eager(dead, tiny_images())).max() < 0.1


def test_int8_without_calibration_is_refused_by_the_layer() -> None:
    """A checkpoint that was not measured for int8 is not guessed at, wholly or for one layer."""
    options = RunnerOptions("openvino", precision="int8", threads=1, max_batch_size=1)
    with pytest.raises(CheckpointError, match=r"not calibrated for int8 at stem\.2; use precision 'fp32' or 'bf16'"):
        open_runner(tiny_checkpoint(calibrated=False), options)
    checkpoint = tiny_checkpoint()
    maxima = {name: value for name, value in checkpoint.metadata.calibration.activation_max.items() if "1.1.relu1" not in name}
    with pytest.raises(CheckpointError, match=r"not calibrated for int8 at stages\.1\.1\.relu1"):
        open_runner(change(checkpoint, calibration=Calibration(activation_max=maxima)), options)


# On a GPU


@pytest.mark.gpu
def test_graphs_read_each_batch_anew(warm_checkpoint: Checkpoint, sample_images: Images) -> None:
    """A captured graph computes what lies in its buffer now, not what lay there when it was captured or before."""
    opened = open_runner(warm_checkpoint, RunnerOptions("torch", "cuda", "fp32", max_batch_size=8))
    answers = [opened.run(sample_images[start : start + 3]) for start in range(0, 30, 3)]
    expected = eager(warm_checkpoint, sample_images[:30])
    assert np.abs(np.concatenate(answers) - expected).max() < 0.02
    opened.close()


@pytest.mark.gpu
def test_closing_gives_memory_back() -> None:
    """The buffers and graphs of a closed model are not left on the device."""
    opened = open_runner(tiny_checkpoint(), RunnerOptions("torch", "cuda", max_batch_size=64))
    held = torch.cuda.memory_allocated()
    opened.close()
    assert torch.cuda.memory_allocated() < held
