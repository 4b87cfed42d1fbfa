"""Convolutions with the bias, the shortcut and the ReLU that follow them in one cuDNN kernel, for inference on a GPU.

Owns: that one substitution. Does not know: graphs, batches. For a few images a GPU takes as long to begin a kernel as to run
it, so the network's time is the number of its kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from service.model.network import BasicBlock, ResNet18


class FusedConvReLU(nn.Module):
    """``relu(conv(x))`` of a convolution with bias."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) on a CUDA device as the convolution does."""
        return torch.cudnn_convolution_relu(x, self.conv.weight, self.conv.bias, *_geometry(self.conv))


class FusedBlock(nn.Module):
    """A ``BasicBlock`` whose norms are folded into its convolutions."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.conv1 = FusedConvReLU(block.conv1)
        self.conv2 = block.conv2
        self.projection = block.projection

    def forward(self, x: Tensor) -> Tensor:
        """See ``BasicBlock.forward``."""
        y, shortcut = self.conv1(x), self.projection(x)
        return torch.cudnn_convolution_add_relu(y, self.conv2.weight, shortcut, 1.0, self.conv2.bias, *_geometry(self.conv2))


def use_fused_convolutions(network: ResNet18) -> None:
    """Replace, in place, the stem and the blocks of a ``network`` whose norms are folded."""
    stem = network.stem[0]
    assert isinstance(stem, nn.Conv2d), "the network's own layers"
    network.stem = nn.Sequential(FusedConvReLU(stem))
    for stage in network.stages:
        assert isinstance(stage, nn.Sequential), "the network's own layers"
        for index, block in enumerate(stage):
            assert isinstance(block, BasicBlock), "the network's own layers"
            stage[index] = FusedBlock(block)


def _geometry(conv: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Give stride, padding, dilation and groups."""
    assert not isinstance(conv.padding, str), "the network's own layers"
    return conv.stride, conv.padding, conv.dilation, conv.groups
