"""What dropout adds to the loss in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from torch import nn

from neuroexapt.measure.base import (
    Batch,
    LossFn,
    Reading,
    batch_size_of,
    scalar_loss,
    undisturbed,
)
from neuroexapt.measure.mode import measuring

_KINDS = {
    "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout",
    "StochasticDepth",
}  # fmt: skip


def chance_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that drops at random, by its path: it has a probability ``p``.

    Example:
        >>> list(chance_modules(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1))))
        ['1']
    """
    return {path: m for path, m in model.named_modules() if type(m).__name__ in _KINDS}


def read_chance(model: nn.Module, loss_fn: LossFn, batches: Sequence[Batch]) -> Reading:
    """Loss with dropout minus loss without, all else in evaluation mode; in nats.

    Its error is the standard error over batches of the paired difference; None for one batch.
    The masks are drawn from the model's own random states, which come back.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5))
        >>> batches = [torch.ones(4, 2), torch.ones(4, 2)]
        >>> reading = read_chance(model, lambda model, x: (model(x) - 1).square().mean(), batches)
        >>> reading.value, reading.samples
        (1.0, 2)
    """
    modules = chance_modules(model).values()
    differences = []
    with undisturbed(model), torch.no_grad():
        measuring(model, min(map(batch_size_of, batches)))
        for batch in batches:
            losses = []
            for dropping in (True, False):
                for module in modules:
                    module.train(dropping)
                losses.append(scalar_loss(loss_fn(model, batch)).item())
            differences.append(losses[0] - losses[1])
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Reading("chance", "model", fmean(differences), "nats", error, len(differences))
