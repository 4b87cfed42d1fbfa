"""A convolution over a tiny map as one matrix product over its patches.

For outputs of 2x2 pixels oneDNN's bf16 kernels, forward and backward, take five to six times as long as the product of
the same size (512 channels, batch 256, one core with AMX: 193 ms against 32 ms); the last stage was half of a training step.
From 4x4 outputs on, the copies of the patches cost more than they save.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_OUTPUT_PIXELS = 9


class PatchConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1 and no bias; the same values as ``nn.Conv2d`` up to the order of summation."""

    def forward(self, input: Tensor) -> Tensor:  # nn.Conv2d's own name
        """Map float (N, in_channels, H, W) to (N, out_channels, ceil(H/stride), ceil(W/stride)), both channels_last."""
        stride = self.stride[0]
        count, channels, height, width = input.shape
        rows, columns = -(-height // stride), -(-width // stride)
        if rows * columns > MAX_OUTPUT_PIXELS:
            return super().forward(input)
        weight = self.weight
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
        padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        patches = torch.cat(
            [padded[:, y : y + height : stride, x : x + width : stride] for y in range(3) for x in range(3)], dim=-1
        )
        filters = weight.permute(0, 2, 3, 1).reshape(self.out_channels, 9 * channels)
        product = patches.view(-1, 9 * channels) @ filters.t()
        return product.view(count, rows, columns, self.out_channels).permute(0, 3, 1, 2)


def use_patch_convolutions(model: nn.Module) -> None:
    """Let every convolution of ``model`` that can take its patches at once do so; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_plain_3x3(module) and module.bias is None:
            module.__class__ = PatchConv2d


def _is_plain_3x3(conv: nn.Conv2d) -> bool:
    """Whether ``conv`` is 3x3 with zero padding of 1, one group and one stride for both directions."""
    if conv.padding_mode != "zeros" or conv.stride[0] != conv.stride[1]:
        return False
    return conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1
