"""When to change, what to change, what to keep: pure functions of the state and what was measured.

Signals propose and order; a measured held-out loss decides. A change is judged against where
the loss would have gone without it, inside the noise of the trajectory, at the price of what
it saves or costs. What an edit of a kind really brought corrects the next prediction of that
kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, isfinite, log
from statistics import fmean

from neuroexapt.edit import Narrow
from neuroexapt.measure import plateau_slope
from neuroexapt.plan.budget import Limits, Settings
from neuroexapt.plan.candidate import Candidate
from neuroexapt.plan.curve import WANDER, Point, worth_of_speed

_TREND_POINTS = 5  # held-out losses that the expectation is drawn through
_MAX_CORRECTION = 8.0
_YOUNG = 5  # epochs in which what has grown is not judged by what it is worth
# What is left at the end of a run of what an edit does at once, until its own trials tell:
# most of the loss that removed units cost comes back in further training.
_LASTING = {"Narrow": 0.3}
_TRIES = 2  # times the same change may fail before it is left alone


@dataclass(frozen=True)
class Running:
    """A trial under way.

    Attributes:
        candidate: what was changed.
        epoch: the epoch after which it was changed.
        expected: where the held-out loss would be without it when it is judged.
        noise: standard deviation of that expectation.
    """

    candidate: Candidate
    epoch: int
    expected: float
    noise: float


@dataclass(frozen=True)
class State:
    """All that the controller remembers.

    Attributes:
        start_parameters: parameters of the starting model.
        start_flops: FLOPs of the starting model.
        epoch: the last epoch observed.
        points: held-out losses of models that were kept.
        trial: the change on trial, if any.
        rested: the epoch at which the last trial was taken back; 0 if none was.
        correction: per kind, realised change over predicted change, smoothed.
        failed: per candidate, how often it was rolled back or refused.
        fruitless: decisions in a row that brought nothing.
        pressure: decisions in a row that found a limit exceeded; the price doubles with each.
        grown: places that grew and were kept, with the epoch after which they did.
        compute_bound: whether the run ends when its computing is used up, so that cheaper steps are
            more steps.
        start_loss: held-out loss of the starting model before training, as far as it was looked at.
    """

    start_parameters: int
    start_flops: int
    epoch: int = 0
    points: tuple[Point, ...] = ()
    trial: Running | None = None
    rested: int = 0
    correction: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    fruitless: int = 0
    pressure: int = 0
    grown: Mapping[str, int] = field(default_factory=dict)
    compute_bound: bool = False
    start_loss: float | None = None


@dataclass(frozen=True)
class Decision:
    """The candidate to try, or None for nothing, and why.

    ``utility`` and ``runner_up`` are in nats; doing nothing has utility 0.
    """

    candidate: Candidate | None
    why: str
    utility: float = 0.0
    runner_up: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The end of a trial: kept or not, why, and what it did to the loss."""

    kept: bool
    why: str
    realised: float


def observed(state: State, point: Point) -> State:
    """The state after one more held-out loss."""
    return replace(state, epoch=point.epoch, points=(*state.points, point))


def expectation(points: Sequence[Point]) -> tuple[float, float]:
    """The loss of the next epoch if nothing changes, and the noise of such a loss.

    The end of a line through the last losses (their logarithms, while these are positive),
    held between the lowest and the highest of the last three: one lucky epoch is no promise, and a
    steep fall does not go on. The noise is the larger of the scatter around the line and three
    times the sampling error: two runs from one model part by two to four of these.

    Example:
        >>> points = [Point(e, loss, 0.01) for e, loss in enumerate([1.0, 0.5, 0.25])]
        >>> tuple(round(value, 3) for value in expectation(points))
        (0.25, 0.03)
    """
    losses = [point.loss for point in points[-_TREND_POINTS:]]
    last = points[-1]
    wander = WANDER * last.error
    if len(losses) < 3 or not all(map(isfinite, losses)):
        return last.loss, wander
    positive = min(losses) > 0
    trend = plateau_slope([log(loss) for loss in losses] if positive else losses)
    middle = fmean(log(loss) if positive else loss for loss in losses)
    end = middle + trend.slope * (len(losses) - 1) / 2
    fitted = exp(end) if positive else end
    expected = min(max(fitted, min(losses[-3:])), max(losses[-3:]))
    scatter = trend.residual * (expected if positive else 1.0)
    return expected, max(scatter, wander)


def wants_change(state: State, settings: Settings) -> tuple[bool, str]:
    """Whether this is a moment for a change, and if not, why not."""
    epoch = state.epoch
    if state.trial is not None:
        return False, "a change is on trial"
    if len(state.points) < 2:
        return False, "fewer than two held-out losses so far"
    if _progress(state, settings) >= settings.until:
        return False, f"the last {1 - settings.until:.0%} of the run is for training alone"
    if state.rested and epoch - state.rested < settings.cool_down:
        return False, "resting after the last change"
    if state.fruitless >= settings.patience:
        return False, f"{state.fruitless} decisions in a row brought nothing"
    return True, "ready"


def _progress(state: State, settings: Settings) -> float:
    """Share of the run that is done; 0 if its length is not known."""
    known = state.points[-1].progress if state.points else None
    if known is not None:
        return known
    return state.epoch / settings.epochs if settings.epochs is not None else 0.0


def price(state: State, settings: Settings) -> float:
    """Nats that all parameters of the starting model are worth at present."""
    return settings.worth * 2.0**state.pressure


def choose(
    state: State,
    settings: Settings,
    limits: Limits,
    candidates: Sequence[Candidate],
    now: tuple[int, int],
    *,
    again: bool = False,
) -> tuple[State, Decision]:
    """The candidate of highest utility, if it beats doing nothing.

    Args:
        state: what is remembered.
        settings: price and the rest.
        limits: growth must not break those that hold.
        candidates: from :func:`~neuroexapt.plan.propose.propose`.
        now: present parameters and FLOPs.
        again: the last choice of this moment was refused: no further pressure is due.
    """
    if not again:
        state = replace(state, pressure=state.pressure + 1 if limits.excess(*now) > 0 else 0)
    rated = ranked(state, settings, limits, candidates, now)
    runner = f"{rated[1][1].key} ({rated[1][0]:+.4f} nats)" if len(rated) > 1 else None
    if not rated or rated[0][0] <= 0:
        best = f"the best was {rated[0][1].key} ({rated[0][0]:+.4f})" if rated else "none is left"
        why = f"no candidate beats doing nothing: {best}"
        return replace(state, fruitless=state.fruitless + 1), Decision(None, why, runner_up=runner)
    worth, candidate = rated[0]
    over = limits.excess(*now)
    pressure = f"; the limit is exceeded by {over:.0%}" if over else ""
    return state, Decision(candidate, candidate.reason + pressure, worth, runner)


def ranked(
    state: State,
    settings: Settings,
    limits: Limits,
    candidates: Sequence[Candidate],
    now: tuple[int, int],
) -> list[tuple[float, Candidate]]:
    """The candidates that are allowed, with their utilities, the best first.

    Those that come first whatever their utility do so while it is above that of doing nothing.
    """
    rated = [
        (utility(state, settings, limits, c, now), c)
        for c in candidates
        if _allowed(state, limits, c, now)
    ]
    return sorted(rated, key=lambda pair: (not (pair[1].first and pair[0] > 0), -pair[0]))


def utility(
    state: State,
    settings: Settings,
    limits: Limits,
    candidate: Candidate,
    now: tuple[int, int],
) -> float:
    """Expected benefit in nats: lower loss, more steps, and the price of what is saved.

    U = -c * loss + :func:`speed` - price * :func:`share`, with c the correction that earlier edits
    of the kind taught; an expected gain must first cover its own error.
    """
    loss = candidate.loss * _correction(state, candidate.kind)
    if loss < 0:
        loss = min(0.0, loss + candidate.error)
    saved = price(state, settings) * share(state, limits, candidate)
    return -loss + speed(state, candidate, now) - saved


def speed(state: State, candidate: Candidate, now: tuple[int, int]) -> float:
    """Nats that cheaper steps are worth where computing is what ends the run, else 0."""
    if not state.compute_bound or not candidate.flops or now[1] <= 0:
        return 0.0
    return worth_of_speed(state.points, 1 + candidate.flops / now[1], state.start_loss)


def share(state: State, limits: Limits, candidate: Candidate) -> float:
    """Change of size as a share of the starting model: of what is limited, else of parameters."""
    parameters = candidate.parameters / max(1, state.start_parameters)
    flops = candidate.flops / max(1, state.start_flops)
    if limits.flops is None:
        return parameters
    return flops if limits.parameters is None else parameters + flops


def is_young(state: State, place: str) -> bool:
    """Whether a place grew so lately that its new units are worth little yet, having begun silent.

    Example:
        >>> state = State(1, 1, epoch=7, grown={"fc.out": 5})
        >>> is_young(state, "fc.out"), is_young(state, "head.out")
        (True, False)
    """
    return any(
        (place == name or place.startswith(f"{name}.")) and state.epoch - epoch < _YOUNG
        for name, epoch in state.grown.items()
    )


def _allowed(state: State, limits: Limits, candidate: Candidate, now: tuple[int, int]) -> bool:
    grows = candidate.parameters > 0 or candidate.flops > 0
    after = now[0] + candidate.parameters, now[1] + candidate.flops
    # While a limit is exceeded its price holds growth down; a limit that holds is never broken.
    if grows and limits.excess(*after) > 0 and limits.excess(*now) == 0:
        return False
    if any(isinstance(e, Narrow) and is_young(state, e.place) for e in candidate.edits):
        return False
    return state.failed.get(candidate.key, 0) < _TRIES


def started(state: State, candidate: Candidate) -> State:
    """The state once a candidate is on trial."""
    expected, noise = expectation(state.points)
    running = Running(candidate, state.epoch, expected, noise)
    return replace(state, trial=running)


def settled(state: State) -> State:
    """The state after a change that keeps the function and can be undone at any time.

    It needs no trial: what it does to the gap is measured at every decision.
    """
    return replace(state, fruitless=0)


def bearable(
    state: State,
    settings: Settings,
    limits: Limits,
    candidate: Candidate,
    now: tuple[int, int],
    step: float,
) -> Verdict:
    """The first check of a change, before any training: the step it makes in the held-out loss.

    The same weights are measured on the same data before and after, so the noise of the
    trajectory is not in it; a step within that noise, or within what the change is worth, will
    be trained away. ``now``: parameters and FLOPs before it.
    """
    noise = WANDER * state.points[-1].error
    saved = price(state, settings) * share(state, limits, candidate)
    allowed = noise + max(0.0, speed(state, candidate, now)) - saved
    why = f"the held-out loss stepped by {step:+.4f} nats at once, {allowed:+.4f} allowed"
    return Verdict(isfinite(step) and step <= allowed, why, step)


def refused(state: State, candidate: Candidate, *, for_good: bool) -> State:
    """The state after a candidate was not put on trial.

    ``for_good``: it could not be applied, and never will; else it failed its first check, which
    another day may turn out otherwise.
    """
    failures = _TRIES if for_good else state.failed.get(candidate.key, 0) + 1
    failed = {**state.failed, candidate.key: failures}
    return replace(state, failed=failed, fruitless=state.fruitless + 1)


def judge(state: State, settings: Settings, limits: Limits) -> tuple[State, Verdict] | None:
    """The verdict on the change on trial; None while it is too early.

    Kept unless the held-out loss is worse than expected by more than the noise and the price of
    what the change saves (or, with the other sign, adds).
    """
    trial, last = state.trial, state.points[-1]
    if trial is None or last.epoch - trial.epoch < settings.trial_epochs:
        return None
    realised = last.loss - trial.expected
    size = share(state, limits, trial.candidate)
    allowed = settings.significance * trial.noise - price(state, settings) * size
    kept = isfinite(last.loss) and realised <= allowed
    why = (
        f"held-out loss {last.loss:.4f} where {trial.expected:.4f} was expected without the "
        f"change: {realised:+.4f} nats against {allowed:+.4f} allowed "
        f"(noise {trial.noise:.4f}, size {size:+.1%})"
    )
    return _ended(state, trial, realised, kept), Verdict(kept, why, realised)


def _ended(state: State, trial: Running, realised: float, kept: bool) -> State:
    candidate = trial.candidate
    failed = dict(state.failed)
    if not kept:
        failed[candidate.key] = failed.get(candidate.key, 0) + 1
    return replace(
        state,
        # The loss of a change taken back is not that of the model that goes on.
        points=state.points if kept else state.points[:-1],
        trial=None,
        # Each roll-back costs the training of its trial: train on before the next one.
        rested=state.rested if kept else state.epoch,
        correction={**state.correction, candidate.kind: _corrected(state, trial, realised)},
        failed=failed,
        fruitless=0 if kept else state.fruitless + 1,
        grown={**state.grown, **(_growing(candidate, state.epoch) if kept else {})},
    )


def _growing(candidate: Candidate, epoch: int) -> dict[str, int]:
    return {e.place: epoch for e in candidate.edits} if candidate.parameters > 0 else {}


def _correction(state: State, kind: str) -> float:
    return state.correction.get(kind, _LASTING.get(kind, 1.0))


def _corrected(state: State, trial: Running, realised: float) -> float:
    """Half of the old correction and half of what this trial showed, within bounds."""
    old = _correction(state, trial.candidate.kind)
    predicted = trial.candidate.loss
    if not isfinite(realised) or abs(predicted) <= trial.noise:
        return old  # the prediction drowns in noise: nothing to learn
    ratio = min(max(realised / predicted, 0.0), _MAX_CORRECTION)
    return 0.5 * old + 0.5 * ratio
