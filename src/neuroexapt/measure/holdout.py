"""The loss on batches the model does not train on: the judge of every change."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from neuroexapt.capture.interrupts import breathe
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import (
    Batch,
    HoldoutScore,
    LossFn,
    batch_size_of,
    scalar_loss,
    undisturbed,
)
from neuroexapt.measure.mode import live_norms, measuring


def evaluate(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Batch], *, fresh: bool = False
) -> HoldoutScore:
    """Mean loss per sample in eval mode, with its standard error.

    Batches are weighted by their size. The error takes batches as independent draws:
    sqrt(n / (n - 1) * sum w_b^2 (loss_b - loss)^2) with w_b the share of samples of batch b.
    A loss that is not finite is passed on as it is: divergence is a result.

    Invariant: as `undisturbed`; each module's own train/eval flag comes back, also of those that
    the user had frozen in eval mode.

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of the batch.
        batches: batches as `batch_size_of` reads them.
        fresh: batch norms by the statistics of each batch, see `measuring`: for a model in the
            middle of its training.

    Raises:
        MeasureError: no batch, an unreadable batch, or a loss that is no scalar.

    Example:
        >>> batches = [torch.ones(3, 2), torch.zeros(1, 2)]
        >>> score = evaluate(nn.Dropout(), lambda model, x: model(x).mean(), batches)
        >>> score.loss, score.samples, score.per_batch
        (0.75, 4, (1.0, 0.0))
    """
    losses: list[float] = []
    sizes: list[int] = []
    with undisturbed(model), torch.no_grad():
        norms = live_norms(model) if fresh else []
        for batch in batches:
            breathe()
            sizes.append(batch_size_of(batch))
            measuring(model, sizes[-1], norms)
            losses.append(scalar_loss(loss_fn(model, batch)).item())
    if sum(sizes) == 0:
        raise MeasureError(
            "evaluate",
            seen=f"{len(sizes)} batches without a sample",
            needed="at least one sample",
            next_step="pass a list of batches; an iterator is empty after its first use",
        )
    return _score(losses, sizes)


def _score(losses: list[float], sizes: list[int]) -> HoldoutScore:
    total, count = sum(sizes), len(sizes)
    mean = math.fsum(size * loss for size, loss in zip(sizes, losses, strict=True)) / total
    error = None
    if count > 1:
        away = (size / total * (loss - mean) for size, loss in zip(sizes, losses, strict=True))
        error = math.sqrt(count / (count - 1) * sum(part * part for part in away))
    return HoldoutScore(mean, error, total, tuple(losses))
