"""Class activation maps: against torch's own gradients, and against what they claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.model.architectures import MODELS, Architecture, ModelConfig
from service.model.checkpoint import Checkpoint
from service.model.class_activation import ClassActivation, resize_map
from service.model.layers import Convolution, Layers, Linear, MaxPool, Mean
from service.model.network import model_from_checkpoint
from tests.support.tiny_network import tiny_checkpoint, tiny_images
from training.data.augment import normalise
from training.step.network import build_model, weights_of


def expected_heatmap(
    checkpoint: Checkpoint, image: NDArray[np.uint8], label: int | None, stages: list[int]
) -> NDArray[np.float32]:
    """Give the heatmap by autograd on the network of ``service.model.network``."""
    depths = checkpoint.metadata.config.depths
    return heatmap_of(checkpoint, image, label, [f"stages.{stage}.{depths[stage] - 1}.relu2" for stage in stages])


def heatmap_of(checkpoint: Checkpoint, image: NDArray[np.uint8], label: int | None, names: list[str]) -> NDArray[np.float32]:
    """The same for the modules of these names."""
    network = model_from_checkpoint(checkpoint)
    shown: list[torch.Tensor] = []
    for name in names:
        network.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: shown.append(output))
    logits = network(normalise(torch.from_numpy(image[None]), checkpoint.metadata.input))[0]
    label = int(logits.argmax()) if label is None else label
    gradients = torch.autograd.grad(logits[label] - logits.mean(), shown)
    total = np.zeros(image.shape[1:], np.float32)
    for activation, gradient in zip(shown, gradients, strict=True):
        evidence = (activation * gradient)[0].sum(0).clamp(min=0).detach().numpy()
        total += resize_map(evidence, image.shape[1]) / max(evidence.max(), 1e-30)
    return total / max(total.max(), 1e-30)  # type: ignore[no-any-return]  # numpy's scalar division


def test_equals_autograd(checkpoint: Checkpoint, sample_images: NDArray[np.uint8]) -> None:
    """The heatmap is activations times gradients at the stages before the last, for the best class and for another."""
    maps = ClassActivation(checkpoint)
    for image in sample_images[::8]:
        for label in (None, 3):
            heatmap = maps.heatmap(image, label)[1]
            # A ReLU's input that is 0 but for rounding lets a gradient through here and not there.
            np.testing.assert_allclose(heatmap, expected_heatmap(checkpoint, image, label, [0, 1, 2]), atol=5e-3)


def test_default_class_is_the_likeliest(checkpoint: Checkpoint, sample_images: NDArray[np.uint8]) -> None:
    """Without a class, the map is that of the class the network in float32 finds likeliest."""
    network, maps = model_from_checkpoint(checkpoint), ClassActivation(checkpoint)
    with torch.inference_mode():
        best = network(normalise(torch.from_numpy(sample_images), checkpoint.metadata.input)).argmax(1)
    assert [maps.heatmap(image)[0] for image in sample_images[:10]] == best[:10].tolist()


def test_zero_to_one(checkpoint: Checkpoint, sample_images: NDArray[np.uint8]) -> None:
    """A map has the image's size and the range 0..1, with a 1 in it unless nothing speaks for the class."""
    maps = ClassActivation(checkpoint)
    for label in range(len(checkpoint.metadata.class_names)):
        heatmap = maps.heatmap(sample_images[0], label)[1]
        assert heatmap.shape == (32, 32)
        assert heatmap.dtype == np.float32
        assert heatmap.min() >= 0
        assert heatmap.max() in (0, 1)


@pytest.mark.parametrize(("widths", "stages"), [((8,), [0]), ((8, 16), [0, 1]), ((8, 16, 24), [0, 1, 2])])
def test_shallower_networks(
    checkpoint: Checkpoint, sample_images: NDArray[np.uint8], widths: tuple[int, ...], stages: list[int]
) -> None:
    """A network with fewer stages shows all whose maps have at least 4 pixels a side."""
    torch.manual_seed(0)
    config = ModelConfig(num_classes=10, widths=widths, depths=(1,) * len(widths))
    metadata = checkpoint.metadata.model_copy(update={"config": config})
    small = Checkpoint(weights_of(build_model("resnet18", config)), metadata, "0" * 12)
    heatmap = ClassActivation(small).heatmap(sample_images[0])[1]
    np.testing.assert_allclose(heatmap, expected_heatmap(small, sample_images[0], None, stages), atol=1e-4)


def test_equals_autograd_through_max_pooling() -> None:
    """The network of torchvision, too: with 64 pixels its stages have 16, 8 and 4 pixels a side, and 2."""
    checkpoint = tiny_checkpoint(
        architecture="resnet18-imagenet", size=64, calibrated=False, widths=(8, 8, 16, 24), depths=(1, 1, 2, 1)
    )
    names = [f"layer{stage + 1}.{depth - 1}.relu2" for stage, depth in enumerate((1, 1, 2))]
    for image in tiny_images(64, 3):
        heatmap = ClassActivation(checkpoint).heatmap(image)[1]
        np.testing.assert_allclose(heatmap, heatmap_of(checkpoint, image, None, names), atol=5e-3)


def test_equals_autograd_without_residual_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a plain chain of convolutions the last one of each resolution is shown."""

    def chain(config: ModelConfig) -> Layers:
        return (
            Convolution("a", 3, 8, kernel=3, pad=1, bias=True, relu="a_relu"),
            Convolution("b", 8, 8, kernel=3, pad=1, norm="b_norm", relu="b_relu"),
            Convolution("c", 8, 16, kernel=3, stride=2, pad=1, norm="c_norm", relu="c_relu"),
            MaxPool("pool", kernel=4, stride=4, pad=0),
            Mean("mean"),
            Linear("head", 16, config.num_classes),
        )

    monkeypatch.setitem(MODELS, "chain", Architecture(chain))
    checkpoint = tiny_checkpoint(architecture="chain", calibrated=False)
    for image in tiny_images(count=3):
        heatmap = ClassActivation(checkpoint).heatmap(image)[1]
        np.testing.assert_allclose(heatmap, heatmap_of(checkpoint, image, None, ["b_relu", "c_relu"]), atol=5e-3)


@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture_is_explained(architecture: str) -> None:
    """A map has the image's size and the range 0..1."""
    heatmap = ClassActivation(tiny_checkpoint(architecture=architecture, size=64, calibrated=False)).heatmap(
        tiny_images(64)[0]
    )[1]
    assert heatmap.shape == (64, 64)
    assert heatmap.min() >= 0
    assert heatmap.max() == 1


def test_resize_puts_places_on_their_pixels() -> None:
    """Place i of 4 lies on pixel 8 i of 32; between two places the map is their mixture, beyond the last it is constant."""
    grid = np.arange(16, dtype=np.float32).reshape(4, 4)
    resized = resize_map(grid, 32)
    np.testing.assert_array_equal(resized[::8, ::8], grid)
    assert resized[4, 0] == (grid[0, 0] + grid[1, 0]) / 2
    assert resized[0, 2] == 0.75 * grid[0, 0] + 0.25 * grid[0, 1]
    assert (resized[24:, 24:] == grid[3, 3]).all()
