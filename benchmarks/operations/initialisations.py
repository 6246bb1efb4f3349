"""Growing: what the new units' first values bring, against random ones with zero readers."""

from __future__ import annotations

from collections.abc import Mapping

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

from neuroexapt import Widen, apply, map_axes
from neuroexapt.measure import growth_directions


def nothing(_moment: Moment) -> None:
    """The model trains on as it is: what growing itself brings."""


def zero_out(at: str, by: int) -> Change:
    """Random makers, zero readers."""
    return lambda moment: apply(
        moment.model, Widen(at, by=by), moment.args, optimizer=moment.optimizer
    )


def split(at: str, by: int) -> Change:
    """Copies of old units, readers shared out."""
    return lambda moment: apply(
        moment.model, Widen(at, by=by, init="split"), moment.args, optimizer=moment.optimizer
    )


def informed(at: str, by: int, kind: str) -> Change:
    """Makers chosen by data, zero readers."""

    def change(moment: Moment) -> None:
        axes = map_axes(moment.model, moment.args)
        moment.model.train()
        rows = growth_directions(moment.model, loss_fn, moment.batches, axes, at, by, kind)
        edit = Widen(at, by=by, rows=rows)
        apply(moment.model, edit, moment.args, optimizer=moment.optimizer)

    return change


def arms(at: str, by: int) -> Mapping[str, Change]:
    """Every initialisation at one place."""
    return {
        "random, zero out": zero_out(at, by),
        "candidates": informed(at, by, "candidates"),
        "gradient": informed(at, by, "gradient"),
        "split": split(at, by),
        "no growth": nothing,
    }


STARVED_MLP = Task("digits", lambda: mlp(8), before=300, after=300, rate=5e-3)
PLACES: tuple[tuple[str, Task, str, int], ...] = (
    ("digits, MLP, first layer", STARVED_MLP, "1", 8),
    ("digits, MLP, second layer", STARVED_MLP, "3", 8),
    ("digits, CNN, first stage", DIGITS_CNN, "features.0", 4),
    ("digits, CNN, second stage", DIGITS_CNN, "features.4", 6),
    ("CIFAR-10, CNN, first stage", CIFAR_CNN, "features.0", 6),
    ("CIFAR-10, CNN, second stage", CIFAR_CNN, "features.4", 6),
)


ABOUT = """
`Widen` at six places of networks that are too narrow, each with five arms:

- *random, zero out*: `Widen(at, by=n)`, random makers and zero readers;
- *candidates*: `rows=growth_directions(..., "candidates")`, the best of 16 times as many random
  units;
- *gradient*: `rows=growth_directions(..., "gradient")`, the directions of the missing update;
- *split*: `Widen(at, by=n, init="split")`, copies whose readers share out;
- *no growth*: the network trains on as it is.

What we take from it: growing is worth more than how the new units start. The arms that look at
data win clearly at one or two places in six, lose clearly at one, and make no clear difference at
the others; splitting wins where no batch norm follows, and not elsewhere. So the default is the
plain one, which needs no data and works at every width; the others are a choice.
"""


def section() -> Section:
    """The part of the page on growth."""
    return Section(
        "Growth: the new units' first values",
        ABOUT,
        tuple(Setting(name, task, arms(at, by)) for name, task, at, by in PLACES),
    )
