"""The architectures, each a function from a configuration to layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from service.model.images import InputSpec
from service.model.layers import Convolution, Layers, Linear, MaxPool, Mean, Residual

Size = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ModelConfig:
    """Everything that rebuilds the network; stored in every checkpoint.

    ``widths`` are the channels of the stages, ``depths`` the blocks in each. Images are decoded to three channels, RGB. Raises
    pydantic's ValidationError, a ValueError, for a network that cannot be built.
    """

    num_classes: Size = 10
    in_channels: Literal[3] = 3
    stem_width: Size = 32
    widths: Annotated[tuple[Size, ...], Field(min_length=1)] = (64, 128, 256, 512)
    depths: tuple[Size, ...] = (2, 2, 2, 2)

    def __post_init__(self) -> None:
        """Raise ValueError for stages without a width or a depth."""
        if len(self.widths) != len(self.depths):
            raise ValueError(f"widths {self.widths} and depths {self.depths} must be of one length")


def resnet18(config: ModelConfig) -> Layers:
    """The CIFAR variant of ResNet-18: 11,154,890 parameters and 135.15 M mult-adds for ten classes at 32x32.

    Basic blocks with identity shortcuts follow He et al., "Deep Residual Learning for Image Recognition" (2016), section 3.
    The stem is one narrow 3x3 convolution because the images are small. Every stage halves the resolution.
    """
    stem = Convolution(
        "stem.0", config.in_channels, config.stem_width, kernel=3, pad=1, bias=True, norm="stem.1", relu="stem.2"
    )
    blocks = _basic_blocks(config, "stages.{}.{}", 0, stride=2, norm="norm", projection="projection", projection_norm=None)
    return (stem, *blocks, Mean("pool"), Linear("head", config.widths[-1], config.num_classes, as_convolution=True))


def resnet18_imagenet(config: ModelConfig) -> Layers:
    """``torchvision.models.resnet18`` with its names of weights: 11,689,512 parameters for the 1,000 classes of ImageNet.

    The network of He et al. (2016), table 1: a 7x7 convolution and max pooling, each halving the resolution, then stages
    of which all but the first halve it.
    """
    stem = Convolution("conv1", config.in_channels, config.stem_width, 7, stride=2, pad=3, norm="bn1", relu="relu")
    pool = MaxPool("maxpool", kernel=3, stride=2, pad=1)
    downsample = {"projection": "downsample.0", "projection_norm": "downsample.1"}
    blocks = _basic_blocks(config, "layer{}.{}", 1, stride=1, norm="bn", **downsample)
    return (stem, pool, *blocks, Mean("avgpool"), Linear("fc", config.widths[-1], config.num_classes))


def _basic_blocks(
    config: ModelConfig, names: str, first: int, *, stride: int, norm: str, projection: str, projection_norm: str | None
) -> Iterator[Residual]:
    """The blocks of all stages: conv-norm-ReLU-conv-norm, plus the shortcut, ReLU (He et al. 2016, figure 2).

    ``names`` takes the number of the stage, from ``first`` on, and that of the block. ``stride`` is the first stage's; the
    others halve the resolution. The shortcut is a projection where it changes the shape. ``norm`` begins the names of both
    norms.
    """
    width = config.stem_width
    for stage, (out_width, depth) in enumerate(zip(config.widths, config.depths, strict=True), first):
        for block in range(depth):
            name = names.format(stage, block)
            body = (
                Convolution(f"{name}.conv1", width, out_width, 3, stride, pad=1, norm=f"{name}.{norm}1", relu=f"{name}.relu1"),
                Convolution(f"{name}.conv2", out_width, out_width, 3, pad=1, norm=f"{name}.{norm}2"),
            )
            its_norm = projection_norm and f"{name}.{projection_norm}"
            shortcut = Convolution(f"{name}.{projection}", width, out_width, 1, stride, norm=its_norm)
            yield Residual(body, () if stride == 1 and width == out_width else (shortcut,), f"{name}.relu2")
            width, stride = out_width, 1
        stride = 2


class Architecture(NamedTuple):
    """How a configuration becomes layers, and the usual configuration and input of such a network.

    The layers begin with a ``Convolution`` and end in their only ``Mean`` and their only ``Linear``, the head. Each has its own
    name, and so have the norms and ReLUs.
    """

    layers: Callable[[ModelConfig], Layers]
    config: ModelConfig = ModelConfig()
    input: InputSpec = InputSpec()


_IMAGENET = InputSpec(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
MODELS: dict[str, Architecture] = {
    "resnet18": Architecture(resnet18),
    "resnet18-imagenet": Architecture(resnet18_imagenet, ModelConfig(num_classes=1000, stem_width=64), _IMAGENET),
}


def layers_for(architecture: str, config: ModelConfig) -> Layers:
    """The layers of an architecture; raises ValueError when it is not in ``MODELS`` or has other ends than every network."""
    if architecture not in MODELS:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(sorted(MODELS))}")
    layers = MODELS[architecture].layers(config)
    kinds = [type(layer) for layer in layers]
    if kinds[0] is not Convolution or kinds[-2:] != [Mean, Linear] or {Mean, Linear} & {*kinds[:-2]}:
        raise ValueError(f"{architecture} has to begin with a Convolution and end in its only Mean and its only Linear")
    return layers
