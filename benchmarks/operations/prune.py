"""Pruning single weights: what a score brings against random, at equal share and training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil

from benchmarks.operations.data import Batch
from benchmarks.operations.task import (
    CIFAR_CNN,
    DIGITS_CNN,
    Change,
    Moment,
    Section,
    Setting,
    Task,
    loss_fn,
    mlp,
)

from neuroexapt import PruneWeights, apply
from neuroexapt.measure import weight_scores


def _prune(moment: Moment, edit: PruneWeights) -> None:
    apply(moment.model, edit, moment.args, optimizer=moment.optimizer)


def by_weights(share: float, score: str, scope: str = "global") -> Change:
    """A score of the weights alone."""
    return lambda moment: _prune(
        moment, PruneWeights("*", share=share, score=score, scope=scope, seed=moment.seed)
    )


def by_data(share: float, kind: str) -> Change:
    """A score measured on a few batches, in micro-batches."""

    def change(moment: Moment) -> None:
        moment.model.eval()  # as it is judged: batch norm with its running statistics
        parts = [part for batch in moment.batches for part in _micro(batch)]
        scores = weight_scores(moment.model, loss_fn, parts, kind=kind)
        _prune(moment, PruneWeights("*", share=share, scores=scores))

    return change


def _micro(batch: Batch) -> list[Batch]:
    images, labels = batch
    size = ceil(len(labels) / 4)
    return list(zip(images.split(size), labels.split(size), strict=True))


def arms(share: float) -> Mapping[str, Change]:
    """Every score at one share."""
    made: dict[str, Callable[[Moment], object]] = {
        "random": by_weights(share, "random", "layer"),
        "magnitude, global": by_weights(share, "magnitude"),
        "magnitude, by layer": by_weights(share, "magnitude", "layer"),
        "LAMP, global": by_weights(share, "lamp"),
        "Taylor, global": by_data(share, "taylor"),
        "Fisher, global": by_data(share, "fisher"),
        "no pruning": lambda moment: None,
    }
    return made


WIDE_MLP = Task("digits", lambda: mlp(48), before=300, after=300, rate=5e-3)
PLACES: tuple[tuple[str, Task, float], ...] = (
    ("digits, MLP, half of the weights", WIDE_MLP, 0.5),
    ("digits, MLP, 95 % of the weights", WIDE_MLP, 0.95),
    ("digits, CNN, half of the weights", DIGITS_CNN, 0.5),
    ("digits, CNN, 80 % of the weights", DIGITS_CNN, 0.8),
    ("CIFAR-10, CNN, half of the weights", CIFAR_CNN, 0.5),
    ("CIFAR-10, CNN, 80 % of the weights", CIFAR_CNN, 0.8),
)


def section() -> Section:
    """The part of the page on pruning."""
    return Section(
        "Pruning: which weights go",
        "`PruneWeights` on all weights of a model. *Random* takes the share in each layer. Taylor "
        "and Fisher are measured on four batches of 64 images that are not trained on.",
        tuple(Setting(name, task, arms(share)) for name, task, share in PLACES),
    )
