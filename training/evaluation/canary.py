"""Known images with their answers, stored in the checkpoint for the service to check itself with."""

from __future__ import annotations

import torch
from torch import Tensor

from service.model.checkpoint import Canary

CANARY_IMAGES = 8
# Another runtime or precision moves a probability; where the network is this sure, the class stays the same.
_LEAST_MARGIN = 0.5


def choose_canary(images: Tensor, probabilities: Tensor, count: int = CANARY_IMAGES) -> Canary | None:
    """Return the images that the network is surest of, ``count`` at most, taken from its classes in turn.

    ``images`` is uint8 (N, 3, size, size), ``probabilities`` float32 (N, num_classes), from the network in float32. A
    network that is sure of none has no canary: None.
    """
    probabilities = probabilities.float().cpu()
    best = probabilities.topk(2, dim=1)
    margin = best.values[:, 0] - best.values[:, 1]
    order = margin.argsort(descending=True, stable=True)
    order = order[margin[order] >= _LEAST_MARGIN]
    if not len(order):
        return None
    predicted = best.indices[order, 0]
    # How many images of the same class come before each: 0 for the surest of every class, then 1, ...
    turn = torch.stack([(predicted[:position] == label).sum() for position, label in enumerate(predicted)])
    chosen = order[turn.argsort(stable=True)[:count]]
    return Canary(images[chosen.to(images.device)].cpu().numpy(), probabilities[chosen].numpy())
