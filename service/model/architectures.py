"""The architectures, each a function from a configuration to layers, and the layers of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.model.checkpoint import Checkpoint, CheckpointError, check_shapes
from service.model.images import InputSpec
from service.model.layers import Convolution, Layers, Linear, MaxPool, Mean, Residual, weight_shapes


@dataclass(frozen=True)
class ModelConfig:
    """Everything that rebuilds the network; stored in every checkpoint.

    ``widths`` are the channels of the stages, ``depths`` the blocks in each.
    """

    num_classes: int = 10
    in_channels: int = 3
    stem_width: int = 32
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)

    def __post_init__(self) -> None:
        """Raise ValueError for a network that cannot be built."""
        if len(self.widths) != len(self.depths) or not self.widths:
            raise ValueError(f"widths {self.widths} and depths {self.depths} must be of one length, at least 1")
        sizes = (self.num_classes, self.in_channels, self.stem_width, *self.widths, *self.depths)
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise ValueError("every size in a model config must be a whole number of at least 1")


def resnet18(config: ModelConfig) -> Layers:
    """The CIFAR variant of ResNet-18: 11,154,890 parameters and 135.15 M mult-adds for ten classes at 32x32.

    Basic blocks with identity shortcuts follow He et al., "Deep Residual Learning for Image Recognition" (2016), section 3.
    The stem is one narrow 3x3 convolution because the images are small. Every stage halves the resolution.
    """
    width = config.stem_width
    stem = Convolution("stem.0", config.in_channels, width, kernel=3, pad=1, bias=True, norm="stem.1", relu="stem.2")
    blocks = []
    for stage, (stage_width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        for block in range(depth):
            stride, name = 2 if block == 0 else 1, f"stages.{stage}.{block}"
            projection = Convolution(f"{name}.projection", width, stage_width, kernel=1, stride=stride)
            blocks.append(_basic_block(name, projection, norm=f"{name}.norm"))
            width = stage_width
    return (stem, *blocks, Mean("pool"), Linear("head", width, config.num_classes, as_convolution=True))


def resnet18_imagenet(config: ModelConfig) -> Layers:
    """``torchvision.models.resnet18`` with its names of weights: 11,689,512 parameters for the 1,000 classes of ImageNet.

    The network of He et al. (2016), table 1: a 7x7 convolution and max pooling, each halving the resolution, then stages
    of which all but the first halve it.
    """
    width = config.stem_width
    stem = Convolution("conv1", config.in_channels, width, kernel=7, stride=2, pad=3, norm="bn1", relu="relu")
    blocks = []
    for stage, (stage_width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        for block in range(depth):
            stride, name = 2 if block == 0 and stage > 0 else 1, f"layer{stage + 1}.{block}"
            shortcut = f"{name}.downsample"
            projection = Convolution(f"{shortcut}.0", width, stage_width, kernel=1, stride=stride, norm=f"{shortcut}.1")
            blocks.append(_basic_block(name, projection, norm=f"{name}.bn"))
            width = stage_width
    pool = MaxPool("maxpool", kernel=3, stride=2, pad=1)
    return (stem, pool, *blocks, Mean("avgpool"), Linear("fc", width, config.num_classes))


def _basic_block(name: str, projection: Convolution, norm: str) -> Residual:
    """conv-norm-ReLU-conv-norm, plus the shortcut, ReLU (He et al. 2016, figure 2).

    ``projection`` has the block's widths and stride. It is the shortcut where it changes the shape. ``norm`` begins the
    names of both norms.
    """
    width, out_width, stride = projection.in_channels, projection.out_channels, projection.stride
    body = (
        Convolution(f"{name}.conv1", width, out_width, kernel=3, stride=stride, pad=1, norm=f"{norm}1", relu=f"{name}.relu1"),
        Convolution(f"{name}.conv2", out_width, out_width, kernel=3, pad=1, norm=f"{norm}2"),
    )
    return Residual(body, () if stride == 1 and width == out_width else (projection,), f"{name}.relu2")


@dataclass(frozen=True)
class Architecture:
    """How a configuration becomes layers, and the usual configuration and input of such a network.

    The layers begin with a ``Convolution`` and end in a ``Mean`` and a ``Linear``, the head.
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
    """The layers of an architecture; raises ValueError when it is not in ``MODELS``."""
    if architecture not in MODELS:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(sorted(MODELS))}")
    return MODELS[architecture].layers(config)


def layers_of(checkpoint: Checkpoint) -> Layers:
    """The layers of a checkpoint's network, to which its weights are known to fit.

    Raises CheckpointError when the architecture is unknown, a weight is missing, unexpected or of another shape, or the
    typicality is of another number of features.
    """
    metadata = checkpoint.metadata
    try:
        config: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in metadata.config.items()
        }
        layers = layers_for(metadata.architecture, ModelConfig(**config))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's architecture cannot be built: {error}") from error
    check_shapes(checkpoint.weights, weight_shapes(layers))
    head, fitted = layers[-1], checkpoint.typicality
    assert isinstance(head, Linear), "a network ends in its head"
    if fitted is not None and fitted.centre.size != head.in_features:
        raise CheckpointError(
            f"the typicality is of {fitted.centre.size} features and the network has {head.in_features};"
            " save the checkpoint again"
        )
    return layers
