"""The network with the images of a batch as the last of three spatial axes, for training on a CPU with AMX.

oneDNN's bf16 convolutions fill a tile of AMX with pixels of one row, and the rows of the later stages have 8, 4 and 2. As
(1, C, H, W, N) every row is as long as the batch. On one core with AMX, a step of recipe `cpu` (batch 512) learns in 1.42 s
where products over the patches of 2x2 maps took 1.87 s, one of `quick` (batch 128) in 281 ms where they took 407; at a batch
of 16 the two were level, and plain convolutions slower. Without AMX neither gains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.cpu import has_any
from service.model.layers import Linear, MaxPool, in_order
from service.model.network import Network
from training.recipes import Recipe

_LEAST_BATCH = 16  # rows of a tile
_TILES = {"amx_bf16"}


class ImagesLastConv2d(nn.Conv2d):
    """The same values as ``nn.Conv2d``, with zero padding and one group, up to the order of summation."""

    def forward(self, input: Tensor) -> Tensor:  # nn.Conv2d's own name
        """Map float (1, C, H, W, N), or the network's own input (N, C, H, W), to (1, out_channels, rows, columns, N)."""
        if input.dim() == 4:
            input = input.permute(1, 2, 3, 0).unsqueeze(0).contiguous(memory_format=torch.channels_last_3d)
        padding = (int(self.padding[0]), int(self.padding[1]), 0)
        return F.conv3d(input, self.weight.unsqueeze(-1), self.bias, (*self.stride, 1), padding)


class ImagesLastPool(nn.AdaptiveAvgPool2d):
    """The mean over all pixels, which also turns back."""

    def forward(self, input: Tensor) -> Tensor:  # nn.AdaptiveAvgPool2d's own name
        """Map float (1, C, H, W, N) to (N, C, 1, 1)."""
        return input.mean((0, 2, 3)).t()[:, :, None, None]


_IMAGES_LAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: ImagesLastConv2d,
    nn.BatchNorm2d: nn.BatchNorm3d,
    nn.AdaptiveAvgPool2d: ImagesLastPool,
}


def use_images_last(model: Network) -> None:
    """Let every layer of ``model`` before its head keep the images last; parameters, names, input and output stay."""
    for layer in in_order(model.layers):
        if not isinstance(layer, Linear):
            for module in model.modules_of(layer):
                module.__class__ = _IMAGES_LAST.get(type(module), type(module))


def use_cpu_form(model: Network, recipe: Recipe) -> None:
    """Switch ``model`` to the layers that are fastest on this CPU; parameters and names stay.

    AMX gains by images last with batches that fill a tile, and small images, so a network without pooling.
    """
    pools = any(isinstance(layer, MaxPool) for layer in in_order(model.layers))
    if recipe.precision == "bf16" and has_any(_TILES) and recipe.batch_size >= _LEAST_BATCH and not pools:
        use_images_last(model)
