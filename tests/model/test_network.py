"""The network is the published one, layer by layer, and comes back from a checkpoint as it went in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchinfo
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from service.model.architectures import MODELS, Architecture, ModelConfig
from service.model.checkpoint import Checkpoint, CheckpointError, CheckpointMetadata, load_checkpoint, save_checkpoint
from service.model.layers import Convolution, Layers, Linear, MaxPool, Mean, Residual
from service.model.network import Network, model_from_checkpoint
from service.model.typicality import Typicality
from tests.support.tiny_network import tiny_checkpoint
from training.step.network import build_model, weights_of

TINY = ModelConfig(num_classes=3, stem_width=4, widths=(4, 8), depths=(1, 2))


def convolution(parameters: int, *shape: int) -> tuple[str, tuple[int, ...], int]:
    return ("Conv2d", shape, parameters)


def norm_and_relu(width: int, side: int) -> list[tuple[str, tuple[int, ...], int]]:
    return [("BatchNorm2d", (width, side, side), 2 * width), ("ReLU", (width, side, side), 0)]


def block(width: int, side: int, first: int, second: int, projection: int = 0) -> list[tuple[str, tuple[int, ...], int]]:
    """The rows of one block: two convolutions with their norms, a projection if it has one, and the ReLUs."""
    norm, relu = norm_and_relu(width, side)
    rows = [convolution(first, width, side, side), norm, relu, convolution(second, width, side, side), norm]
    if projection:
        rows.append(convolution(projection, width, side, side))
    return [*rows, relu]


# Layer, output for one image of 32x32, parameters: the whole network from the image to the ten logits.
ROWS = [
    convolution(896, 32, 32, 32),
    *norm_and_relu(32, 32),
    *block(64, 16, 18_432, 36_864, projection=2_048),
    *block(64, 16, 36_864, 36_864),
    *block(128, 8, 73_728, 147_456, projection=8_192),
    *block(128, 8, 147_456, 147_456),
    *block(256, 4, 294_912, 589_824, projection=32_768),
    *block(256, 4, 589_824, 589_824),
    *block(512, 2, 1_179_648, 2_359_296, projection=131_072),
    *block(512, 2, 2_359_296, 2_359_296),
    ("AdaptiveAvgPool2d", (512, 1, 1), 0),
    convolution(5_130, 10, 1, 1),
]


def test_every_layer_is_the_published_one() -> None:
    """The summary by torchinfo at (1, 3, 32, 32) has the table's rows, parameters and mult-adds."""
    summary = torchinfo.summary(build_model("resnet18", ModelConfig()), (1, 3, 32, 32), depth=9, verbose=0)
    leaves = [layer for layer in summary.summary_list if layer.is_leaf_layer and layer.class_name != "Identity"]
    assert [(layer.class_name, tuple(layer.output_size[1:]), layer.num_params) for layer in leaves] == ROWS
    assert all(layer.output_size[0] == 1 for layer in leaves)
    assert summary.total_params == summary.trainable_params == 11_154_890
    assert round(summary.total_mult_adds / 1e6, 2) == 135.15


def test_convolutions_are_shaped_as_the_table_says() -> None:
    """Biases, strides and paddings, which the numbers of parameters alone would not tell."""
    model = build_model("resnet18", ModelConfig())
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        size = 1 if name == "head" or name.endswith("projection") else 3
        halves = name.endswith((".0.conv1", "projection"))
        assert layer.kernel_size == (size, size), name
        assert layer.padding == (size // 2, size // 2), name
        assert layer.stride == ((2, 2) if halves else (1, 1)), name
        assert (layer.bias is not None) == (name in ("stem.0", "head")), name


def test_logits_have_one_column_a_class() -> None:
    """The network ends in (N, num_classes), for one image as for many."""
    model = build_model("resnet18", ModelConfig()).eval()
    for count in (1, 3):
        assert model(torch.zeros(count, 3, 32, 32)).shape == (count, 10)


@pytest.mark.parametrize("in_channels", [8, 4])
def test_a_block_adds_the_shortcut_before_its_last_relu(in_channels: int) -> None:
    """conv-norm-ReLU-conv-norm, plus the input (or its projection where the shape changes), then ReLU."""
    stride = 1 if in_channels == 8 else 2
    projection = Convolution("p", in_channels, 8, kernel=1, stride=stride)
    conv1 = Convolution("a", in_channels, 8, kernel=3, stride=stride, pad=1, norm="m", relu="r")
    conv2 = Convolution("b", 8, 8, kernel=3, pad=1, norm="n")
    block = Network((Residual((conv1, conv2), () if stride == 1 else (projection,), "s"),)).eval()
    weights = block.state_dict()
    with torch.no_grad():
        randomise_norms(block)
        x = torch.randn(2, in_channels, 6, 6)

        def normed(y: Tensor, norm: str) -> Tensor:
            mean, variance, gamma, beta = (
                weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
            )
            return F.batch_norm(y, mean, variance, gamma, beta)

        y = F.relu(normed(F.conv2d(x, weights["a.weight"], stride=stride, padding=1), "m"))
        y = normed(F.conv2d(y, weights["b.weight"], padding=1), "n")
        shortcut = x if stride == 1 else F.conv2d(x, weights["p.weight"], stride=2)
        torch.testing.assert_close(block(x.clone()), F.relu(y + shortcut).flatten(1))


def randomise_norms(model: nn.Module) -> None:
    """Give every batch norm statistics and weights as training leaves them, so that none is the identity."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(generator=generator)
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)


def test_the_imagenet_network_is_torchvisions() -> None:
    """The same names and shapes of weights, and for the same weights the same logits to the last bit."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    randomise_norms(theirs)
    ours = build_model("resnet18-imagenet", replace(MODELS["resnet18-imagenet"].config, num_classes=7)).eval()
    ours.load_state_dict(theirs.state_dict())
    for side in (64, 97, 224):
        images = torch.randn(2, 3, side, side)
        with torch.inference_mode():
            assert torch.equal(ours(images), theirs(images))


# Config


@pytest.mark.parametrize("num_classes", [1, 2, 3, 100])
def test_the_number_of_classes_is_a_parameter(num_classes: int) -> None:
    """A network for other classes differs in its head and nowhere else."""
    model = build_model("resnet18", ModelConfig(num_classes=num_classes))
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_149_760 + 513 * num_classes
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, num_classes)


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_images_of_other_sizes_pass(architecture: str, side: int) -> None:
    """The pool takes whatever the stages leave, so that the input size is the checkpoint's choice."""
    assert build_model(architecture, TINY).eval()(torch.zeros(2, 3, side, side)).shape == (2, 3)


@pytest.mark.parametrize(
    "values",
    [
        {"num_classes": 0},
        {"stem_width": 0},
        {"widths": (64,)},
        {"widths": (), "depths": ()},
        {"depths": (2, 2, 0, 2)},
        {"stem_width": 4.5},
        {"in_channels": 1},
    ],
)
def test_an_impossible_config_is_refused(values: dict[str, Any]) -> None:
    """A network that cannot be built fails where its config is made."""
    with pytest.raises(ValueError, match=r"must be of one length|at least 1|valid integer|or equal to 1|should be 3"):
        ModelConfig(**values)


def test_an_unknown_architecture_is_refused_by_name() -> None:
    """The message lists what there is."""
    with pytest.raises(ValueError, match=f"unknown architecture 'vit'; known: {', '.join(sorted(MODELS))}"):
        build_model("vit", ModelConfig())


STEM = Convolution("features.0", 3, 4, kernel=3, norm="features.1", relu="features.2")
ENDS = Mean("pool"), Linear("classifier", 4, 3)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((STEM, STEM, *ENDS), "two modules of the network are called 'features.0'"),
        ((STEM, replace(STEM, name="features.3", norm="features.4"), *ENDS), "'features.2'"),
        ((STEM, MaxPool("pool", 2, 2, 0), *ENDS), "'pool'"),
        ((MaxPool("first", 2, 2, 0), STEM, *ENDS), "odd has to begin with a Convolution"),
        ((STEM, Mean("pool"), Linear("hidden", 4, 4), ENDS[1]), "end in its only Mean and its only Linear"),
        ((STEM, ENDS[1]), "end in its only Mean"),
    ],
)
def test_an_architecture_that_a_runtime_cannot_have_is_refused(
    layers: Layers, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One name twice, other ends and hidden linear layers fail where the network is built, before they give other answers."""
    monkeypatch.setitem(MODELS, "odd", Architecture(lambda _config: layers))
    with pytest.raises(ValueError, match=message):
        build_model("odd", TINY)


# Into a checkpoint and back


def metadata(*, architecture: str = "resnet18", config: ModelConfig = TINY) -> CheckpointMetadata:
    """The metadata of a network of three classes, ``TINY`` unless another is described."""
    return CheckpointMetadata(name="tiny", architecture=architecture, config=config, class_names=("cat", "dog", "cow"))


@pytest.fixture
def stored(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A small network with batch-norm statistics, and where it is saved in float32."""
    torch.manual_seed(0)
    model = build_model("resnet18", TINY).eval()
    randomise_norms(model)
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, weights_of(model), metadata(), half=False)
    return model, path


def test_a_typicality_of_another_network_is_refused() -> None:
    """Its number of features is not that of the head: the error says both."""
    zeros = (np.zeros(shape, np.float32) for shape in (4, (2, 4), (3, 4), 3, 1))
    with pytest.raises(CheckpointError, match=r"typicality.centre is \(4,\), expected \(24,\)"):
        replace(tiny_checkpoint(), typicality=Typicality(*zeros))


@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_every_architecture_survives_a_round_trip(architecture: str, tmp_path: Path) -> None:
    """A network saved in full precision and rebuilt from the file alone gives the identical logits."""
    torch.manual_seed(0)
    model = build_model(architecture, TINY).eval()
    randomise_norms(model)
    save_checkpoint(tmp_path / "m.safetensors", weights_of(model), metadata(architecture=architecture), half=False)
    rebuilt = model_from_checkpoint(load_checkpoint(tmp_path / "m.safetensors"))
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(rebuilt(images), model(images))
    assert type(rebuilt) is type(model)


def test_half_precision_moves_logits_by_little(checkpoint: Checkpoint, sample_images: np.ndarray) -> None:
    """Weights rounded to float16 move no logit by more than half a percent of their range.

    A float16 weight is off by at most 2^-11 of its value; over 17 layers of independent errors that is about 0.2 %.
    """
    torch.manual_seed(0)
    exact = model_from_checkpoint(checkpoint)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.mul_(1 + torch.empty_like(parameter).uniform_(-1, 1) * 2**-11)  # off float16's grid again
    weights = weights_of(exact)
    rounded = model_from_checkpoint(replace(checkpoint, weights={n: w.astype(np.float16) for n, w in weights.items()}))
    images = torch.from_numpy(sample_images).float() / 128 - 1
    with torch.inference_mode():
        expected, actual = exact(images), rounded(images)
    assert not torch.equal(expected, actual)
    spread = (expected.max(1).values - expected.min(1).values).unsqueeze(1)
    assert ((actual - expected).abs() / spread).max() < 5e-3


def test_a_rebuilt_network_is_ready_to_predict(stored: tuple[nn.Module, Path]) -> None:
    """It is float32 on the CPU in eval mode, whatever precision the file is in, so that batches do not mix."""
    _model, path = stored
    checkpoint = load_checkpoint(path)
    rebuilt = model_from_checkpoint(
        replace(checkpoint, weights={n: w.astype(np.float16) for n, w in checkpoint.weights.items()})
    )
    assert not rebuilt.training
    assert {parameter.dtype for parameter in rebuilt.parameters()} == {torch.float32}
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(rebuilt(images)[:1], rebuilt(images[:1]))


def test_batch_norm_counters_are_left_out(stored: tuple[nn.Module, Path]) -> None:
    """A checkpoint holds what inference needs: weights and statistics, not how many batches training saw."""
    model, _path = stored
    names = set(weights_of(model))
    assert "stages.0.0.norm1.running_var" in names
    assert not any("num_batches_tracked" in name for name in names)
    assert names == {name for name in model.state_dict() if "num_batches_tracked" not in name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet18-imagenet"}, r"does not fit the architecture, .*missing conv1\.weight"),
        ({"config": replace(TINY, widths=(4, 16))}, r"does not fit the architecture, .*expected \(16"),
        ({"config": replace(TINY, depths=(1, 1))}, r"does not fit the architecture, .*: unexpected stages\.1\.1\."),
        ({"config": replace(TINY, depths=(1, 3))}, r"does not fit the architecture, .*: missing stages\.1\.2\."),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    stored: tuple[nn.Module, Path], changes: dict[str, Any], message: str
) -> None:
    """A checkpoint that describes another network than its weights are of is an error that says so."""
    checkpoint = load_checkpoint(stored[1])
    with pytest.raises(CheckpointError, match=message):
        replace(checkpoint, metadata=metadata(**changes))
