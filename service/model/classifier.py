"""The network as it is served: normalisation, folded batch norms, calibrated probabilities, in torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from service.model.checkpoint import Calibration, Checkpoint
from service.model.network import BasicBlock, ResNet18, model_from_checkpoint


class Classifier(nn.Module):
    """uint8 images in, calibrated probabilities out: everything that runs on the device, in one module."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__()
        network = model_from_checkpoint(checkpoint)
        if isinstance(network, ResNet18):
            fold_batch_norms(network)
        self.network = network.to(dtype).to(memory_format=torch.channels_last)
        spec = checkpoint.metadata.input
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1) * 255)
        self.calibration = checkpoint.metadata.calibration
        self.dtype = dtype
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (N, 3, size, size) to float32 (N, num_classes), on the module's device."""
        x = ((images.float() - self.mean) / self.std).to(dtype=self.dtype, memory_format=torch.channels_last)
        return calibrated(self.network(x).float(), self.calibration).softmax(1)


def calibrated(logits: Tensor, calibration: Calibration) -> Tensor:
    """Put logits, float (N, num_classes), on the curve of ``calibration``; softmax makes calibrated probabilities of them."""
    centred = logits - logits.amax(1, keepdim=True)
    return centred / calibration.temperature + calibration.cubic * centred**3


def fold_batch_norms(network: ResNet18) -> None:
    """Fold every batch norm (running statistics) into the convolution before it, in place."""
    network.stem[0] = _folded(network.stem[0], network.stem[1])
    network.stem[1] = nn.Identity()
    for block in network.modules():
        if isinstance(block, BasicBlock):
            block.conv1 = _folded(block.conv1, block.norm1)
            block.conv2 = _folded(block.conv2, block.norm2)
            block.norm1 = block.norm2 = nn.Identity()  # type: ignore[assignment]  # swapped for good


def _folded(conv: nn.Module, norm: nn.Module) -> nn.Conv2d:
    assert isinstance(conv, nn.Conv2d), "the network's own layers"
    assert isinstance(norm, nn.BatchNorm2d), "the network's own layers"
    return fuse_conv_bn_eval(conv, norm)
