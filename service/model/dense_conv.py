"""A convolution over a tiny map as one matrix product from every input to every output, for inference on a CPU.

Owns: that one substitution. Does not know: the network it is put into.

Over 2x2 pixels a padded 3x3 kernel reaches every input from every output, so the product wastes nothing, while oneDNN's bf16
convolution takes several times as long. Measured with two threads, in the same process, images/s of the whole network:

    batch                     1       8      16      32      64
    convolutions            185     869   1,266   1,644   2,054
    these products          201   1,173   1,932   2,858   3,848
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.model.taps import all_taps

MAX_OUTPUT_PIXELS = 4


class DenseConv2d(nn.Module):
    """The same values as the convolution it is made of, up to rounding, for maps of one height and width."""

    def __init__(self, conv: nn.Conv2d, height: int, width: int) -> None:
        """Take the weights of ``conv``, 3x3 with padding 1, for inputs (N, in_channels, height, width)."""
        super().__init__()
        taps = torch.from_numpy(all_taps(conv.weight.detach().float().cpu().numpy(), height, width, conv.stride[0]))
        rows, columns = taps.shape[1:3]
        weight = taps.permute(1, 2, 0, 4, 5, 3).to(conv.weight)  # both sides in channels_last order
        self._shape = (conv.out_channels, rows, columns)
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight.reshape(rows * columns * conv.out_channels, -1))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().repeat(rows * columns))

    def forward(self, input: Tensor) -> Tensor:  # nn.Conv2d's own name
        """Map float (N, in_channels, height, width) to (N, out_channels, rows, columns), both channels_last."""
        channels, rows, columns = self._shape
        flat = F.linear(input.permute(0, 2, 3, 1).reshape(len(input), -1), self.weight, self.bias)
        return flat.view(len(input), rows, columns, channels).permute(0, 3, 1, 2)


def use_dense_convolutions(network: nn.Module, example: Tensor) -> None:
    """Replace, in place, every 3x3 convolution of ``network`` whose output is tiny for inputs of the shape of ``example``."""
    maps: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        maps[module] = (inputs[0].shape[-2:], output.shape[-2:])

    hooks = [module.register_forward_hook(note) for module in network.modules() if is_plain_3x3(module)]
    with torch.inference_mode():
        network(example)
    for hook in hooks:
        hook.remove()
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child in maps and maps[child][1].numel() <= MAX_OUTPUT_PIXELS:
                setattr(parent, name, DenseConv2d(child, *maps[child][0]))


def is_plain_3x3(module: nn.Module) -> bool:
    """Whether ``module`` is a 3x3 convolution with padding 1, one group and one stride for both directions."""
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        return False
    plain = module.kernel_size == (3, 3) and module.padding == (1, 1) and module.dilation == (1, 1) and module.groups == 1
    return plain and module.stride[0] == module.stride[1]
