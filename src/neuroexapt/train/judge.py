"""The held-out loss of a model over time, always on the same batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from statistics import stdev

from torch import nn

from neuroexapt.measure import Batch, HoldoutScore, LossFn, evaluate


class Judge:
    """Measures, and says how far a change of the loss is noise.

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        holdout: re-iterable batches.

    Attributes:
        count: how many of them are used; None for all.
        kept: the score of the model that the next change will be compared with.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, holdout: Iterable[Batch]) -> None:
        self.model, self.loss_fn, self.holdout = model, loss_fn, holdout
        self.count: int | None = None
        self.kept: HoldoutScore | None = None

    def score(self) -> HoldoutScore:
        """The held-out loss of the model as it is, with statistics as fresh as its weights."""
        batches = itertools.islice(self.holdout, self.count)
        return evaluate(self.model, self.loss_fn, batches, fresh=True)

    def error(self, score: HoldoutScore) -> float:
        """Standard error of the change since the kept score; of the score if there is none.

        Both are means over the same samples, so that their difference is known much better than
        either of them.
        """
        if self.kept is None or len(self.kept.per_batch) != len(score.per_batch):
            return score.error or 0.0
        pairs = zip(score.per_batch, self.kept.per_batch, strict=True)
        changes = [now - then for now, then in pairs]
        return stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0

    def step(self) -> float:
        """By how much the loss of the model as it is differs from the kept one."""
        return self.score().loss - (self.kept.loss if self.kept else 0.0)
