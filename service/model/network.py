"""The network: a ResNet-18 for 32x32 images, its configuration, and the registry of architectures.

Owns: layers, their initialisation, and the way between a network and a checkpoint's weights. Does not know: HTTP,
training, devices.

Basic blocks with identity shortcuts follow He et al., "Deep Residual Learning for Image Recognition" (2016), section 3;
the stem is one narrow 3x3 convolution because the images are small, and every stage halves the resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.model.checkpoint import Checkpoint, CheckpointError, check_shapes


@dataclass(frozen=True)
class ModelConfig:
    """Everything that rebuilds the network; stored in every checkpoint.

    ``widths`` are the channels of the stages, ``depths`` the blocks in each; the first block of a stage halves the
    resolution.
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
        if min(self.num_classes, self.in_channels, self.stem_width, *self.widths, *self.depths) < 1:
            raise ValueError("every size in a model config must be at least 1")


class BasicBlock(nn.Module):
    """conv-norm-ReLU-conv-norm, plus the shortcut, ReLU (He et al. 2016, figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.projection: nn.Module = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        )
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride), any float dtype."""
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu2(y + self.projection(x))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class ResNet18(nn.Module):
    """The CIFAR variant of ResNet-18: 11,154,890 parameters and 135.15 M mult-adds for ten classes at 32x32."""

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        self.stem = nn.Sequential(
            nn.Conv2d(config.in_channels, config.stem_width, 3, padding=1),
            nn.BatchNorm2d(config.stem_width),
            nn.ReLU(inplace=True),
        )
        width = config.stem_width
        stages = []
        for stage_width, depth in zip(config.widths, config.depths, strict=True):
            blocks = [BasicBlock(width, stage_width, stride=2)]
            blocks += [BasicBlock(stage_width, stage_width, stride=1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            width = stage_width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(width, config.num_classes, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming fan-out for every convolution before a ReLU (He et al. 2015, equation 14); PyTorch's own for the head."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and name != "head":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Give logits, float (N, num_classes), for normalised images, float (N, in_channels, H, W)."""
        return self.head(self.pool(self.stages(self.stem(x)))).flatten(1)  # type: ignore[no-any-return]  # as above


MODELS: dict[str, Callable[[ModelConfig], nn.Module]] = {"resnet18": ResNet18}


def build_model(architecture: str, config: ModelConfig) -> nn.Module:
    """Build an untrained network; raise ValueError when the architecture is not in ``MODELS``."""
    if architecture not in MODELS:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(sorted(MODELS))}")
    return MODELS[architecture](config)


def weights_of(model: nn.Module) -> dict[str, NDArray[Any]]:
    """Give the weights as ``save_checkpoint`` takes them: float32 numpy arrays by name, batch-norm counters left out."""
    return {
        name: value.detach().float().cpu().numpy()
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def config_dict(config: ModelConfig) -> dict[str, Any]:
    """Give the config as checkpoint metadata stores it; ``ModelConfig(**...)`` takes it back."""
    return asdict(config)


def model_from_checkpoint(checkpoint: Checkpoint) -> nn.Module:
    """Rebuild the network in float32 on the CPU, in eval mode.

    Raises CheckpointError when the architecture is unknown or a weight is missing, unexpected or of another shape.
    """
    metadata = checkpoint.metadata
    try:
        config: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in metadata.config.items()
        }
        model = build_model(metadata.architecture, ModelConfig(**config))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's architecture cannot be built: {error}") from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {name: shape for name, shape in expected.items() if not name.endswith("num_batches_tracked")}
    check_shapes(checkpoint.weights, expected)
    weights = {name: torch.from_numpy(value.astype(np.float32)) for name, value in checkpoint.weights.items()}
    model.load_state_dict(weights, strict=False)  # strictly checked above; only the counters are absent
    return model.eval()
