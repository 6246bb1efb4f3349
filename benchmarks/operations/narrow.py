"""Shrinking: what the score, the repair of the readers and new statistics bring, against random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.operations.task import (
    Change,
    Moment,
    Section,
    Setting,
    SmallCnn,
    Task,
    loss_fn,
    mlp,
)
from torch import nn

from neuroexapt import Narrow, apply, map_axes
from neuroexapt.guard import reestimate
from neuroexapt.measure import reader_inputs, unit_scores

NORMS = ("random", "l1", "l2")
FROM_DATA = ("taylor", "fisher", "removal", "redundancy", "reconstruction")
REPAIRS = ("mean", "least squares", "statistics", "mean, statistics", "least squares, statistics")


def no_cut(_moment: Moment) -> None:
    """The model trains on as it is: what the removed units were worth."""


@dataclass(frozen=True)
class Cut:
    """Remove a share of every width.

    Attributes:
        score: one of ``NORMS`` and ``FROM_DATA``.
        repair: what is done for the readers, as in ``REPAIRS``; empty for nothing.
        share: of each width.
    """

    score: str
    repair: str = ""
    share: float = 0.5

    def __call__(self, moment: Moment) -> None:
        model, args = moment.model, moment.args
        axes = map_axes(model, args)
        scores, norm = {}, self.score
        if self.score in FROM_DATA:
            scores, norm = unit_scores(model, loss_fn, moment.batches, axes, self.score), "l2"
        means, products = {}, {}
        if "mean" in self.repair or "squares" in self.repair:
            fit = "squares" in self.repair
            given = reader_inputs(model, loss_fn, moment.batches, axes, products=fit)
            means, products = given.means, given.products
        edit = Narrow(
            "*",
            by=self.share,
            scores=scores,
            score=norm,
            seed=moment.seed,
            means=means,
            products=products,
        )
        apply(model, edit, args, optimizer=moment.optimizer)
        if "statistics" in self.repair:
            reestimate(model, loss_fn, moment.batches)


def arms(repairs: tuple[str, ...], share: float) -> Mapping[str, Change]:
    """Every score as it is and with all repairs; every repair for two of the scores."""
    found: dict[str, Change] = {"random": Cut("random", share=share)}
    for score in (*NORMS[1:], *FROM_DATA):
        found[score] = Cut(score, share=share)
    for score in ("random", "taylor"):
        for repair in repairs[:-1]:
            found[f"{score}; {repair}"] = Cut(score, repair, share)
    for score in (*NORMS, *FROM_DATA):
        found[f"{score}; {repairs[-1]}"] = Cut(score, repairs[-1], share)
    return {**found, "no cut": no_cut}


def _cnn(channels: int, widths: tuple[int, int, int]) -> Callable[[], nn.Module]:
    return lambda: SmallCnn(channels, widths)


DIGITS = Task("digits", _cnn(1, (12, 16, 24)), before=300, after=300, rate=5e-3)
CIFAR = Task("cifar10", _cnn(3, (12, 20, 32)), before=300, after=300, rate=5e-3)
WITHOUT_NORMS = ("mean", "least squares")


_ABOUT = """
`Narrow("*", by=0.5)`: half of every layer goes at once, in three networks. Scores and inputs are
measured on four batches of 64. The name of an arm is its score, then what was done besides:

- *mean*: `means=reader_inputs(...).means`, what went is given to the biases;
- *least squares*: `products=` as well, readers are fitted anew;
- *statistics*: `reestimate(...)`, batch norms are measured anew afterwards.

What we take from it: fitting the readers anew is worth more than the choice of the score. It takes
off most of the loss that a cut brings at once, and in the convolutional networks some hundred steps
of training mostly do not make up for leaving it out. Between scores alone little is clear: norms,
redundancy and reconstruction beat chance in the network without batch norm, scores from gradients
do not, and in the other two no score does by two standard errors. *Reconstruction* has the lowest
mean over all settings, so it is the default of `unit_scores`; `Narrow` alone has no data, and takes
*l2*. The mean alone helps at once beside batch norm; without one it made a random cut worse.
Statistics measured anew help at once, and training in batch norm's own mode does the same.
"""


def section() -> Section:
    """The part of the page on shrinking."""
    mlp_task = Task("digits", lambda: mlp(32), before=300, after=300, rate=5e-3)
    return Section(
        "Shrinking: which units, and what is done for those who read them",
        _ABOUT,
        (
            Setting("digits, MLP, half of each layer", mlp_task, arms(WITHOUT_NORMS, 0.5)),
            Setting("digits, CNN, half of each layer", DIGITS, arms(REPAIRS, 0.5)),
            Setting("CIFAR-10, CNN, half of each layer", CIFAR, arms(REPAIRS, 0.5)),
        ),
    )
