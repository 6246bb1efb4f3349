"""Regularisation by the gap between training and held-out loss, before any structure.

A model that does no better on what it trained on than on what it never saw is not held back by a
lack of regularisation: dropout then only adds noise. One that does much better needs more of it.
Of all signals this one had effects of several points of accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from neuroexapt.edit import AddRegularization
from neuroexapt.measure import Reading
from neuroexapt.plan.candidate import Candidate

# What the loss is expected to gain, as a share of what dropout adds to it in training.
_OF_CHANCE = 0.5
# ... and as a share of the gap that more regularisation would narrow.
_OF_GAP = 0.1
_NEW = 0.2
# Shares of the training loss: below the first nothing is overfitted, above the second it is.
_LITTLE, _MUCH = 0.1, 0.3
_DECAY = 0.01


@dataclass(frozen=True)
class Chance:
    """A module that drops at random: its path, its probability, ``"dropout"`` or depth."""

    path: str
    p: float
    kind: str = "dropout"


@dataclass(frozen=True)
class Fitting:
    """How training and held-out data are fitted.

    Attributes:
        gap: held-out minus training loss, both in evaluation mode.
        train: the training loss.
        chance: training loss with dropout minus without.
        dropouts: every module that drops at random.
        places: paths of hidden layers behind which dropout could go, the best place first.
    """

    gap: Reading
    train: float
    chance: Reading
    dropouts: tuple[Chance, ...]
    places: tuple[str, ...] = ()


def overfits(fitting: Fitting, significance: float, share: float = _MUCH) -> bool:
    """Whether the gap is more than its error explains, and a share of the training loss."""
    noise = significance * (fitting.gap.error or 0.0)
    return fitting.gap.value > max(noise, share * abs(fitting.train))


def regularisations(
    fitting: Fitting, significance: float, *, stalled: bool = False
) -> Iterator[Candidate]:
    """Less dropout where nothing is overfitted, more where it is.

    Less of it is watched. More of it, asked for only where the held-out loss has ``stalled``, goes
    on trial like any other change.
    """
    readings = (fitting.gap, fitting.chance)
    active = [one for one in fitting.dropouts if one.p > 0]
    gap = f"the held-out loss is {fitting.gap.value:+.4f} nats above the training loss"
    if not overfits(fitting, significance, _LITTLE):
        for share in (0.0, 0.5) if active else ():
            edits = [AddRegularization(one.path, one.kind, one.p * share) for one in active]
            gain = (1 - share) * _OF_CHANCE * max(0.0, fitting.chance.value)
            reason = (
                f"{gap}, which is no overfitting, and dropout adds {fitting.chance.value:.4f} "
                f"nats to it: to {share:.0%} of its strength"
            )
            found = _candidate(edits, gain, fitting.chance.error, readings, reason)
            yield replace(found, watched=True)
        return
    if not stalled or not overfits(fitting, significance):
        return
    gain, error = _OF_GAP * fitting.gap.value, _OF_GAP * (fitting.gap.error or 0.0)
    tell = f"{gap}, more than its error of {fitting.gap.error or 0.0:.4f} explains"
    weaker = [one for one in fitting.dropouts if one.p < 0.5]
    if weaker:
        edits = [AddRegularization(one.path, one.kind, _more(one.p)) for one in weaker]
        yield _candidate(edits, gain, error, readings, f"{tell}: stronger dropout")
    elif not fitting.dropouts and fitting.places:
        edits = [AddRegularization(fitting.places[0], "dropout", _NEW)]
        yield _candidate(edits, gain, error, readings, f"{tell}: dropout of {_NEW}")
    decay = AddRegularization("*", "weight_decay", _DECAY)
    yield _candidate([decay], gain / 2, error / 2, readings, f"{tell}: weight decay of {_DECAY}")


def _more(p: float) -> float:
    """A third of the way to dropping everything: 0 to 0.2, 0.2 to 0.33."""
    return _NEW if p == 0 else min(0.5, round(p + (1 - p) / 6, 3))


def _candidate(
    edits: list[AddRegularization],
    gain: float,
    error: float | None,
    readings: tuple[Reading, ...],
    reason: str,
) -> Candidate:
    first, *also = edits
    return Candidate(
        first, -gain, error or 0.0, 0, 0, readings, reason, also=tuple(also), first=True
    )
