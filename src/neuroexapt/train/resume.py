"""What the evolver remembers besides the model itself, and how a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from neuroexapt.errors import CheckpointError
from neuroexapt.guard import Trial
from neuroexapt.measure import HoldoutScore
from neuroexapt.plan import State
from neuroexapt.train.attempt import Pending
from neuroexapt.train.judge import Judge
from neuroexapt.train.meter import Meter

if TYPE_CHECKING:
    from neuroexapt.train.chronicle import Chronicle


def chronicle_state(chronicle: Chronicle) -> dict[str, Any]:
    """Where the journal stands; its events too if no file holds them."""
    journal = chronicle.journal
    return {
        "epoch": chronicle.epoch_number,
        "step": chronicle.step,
        "proposals": chronicle.proposals,
        "seq": journal.seq,
        "structure": chronicle.structure,
        "events": journal.events if journal.path is None else [],
    }


def restore_chronicle(
    chronicle: Chronicle, state: Mapping[str, Any], plan: Mapping[str, Any]
) -> None:
    """Go on where the journal stood: later events are of a past that did not happen."""
    chronicle.epoch_number, chronicle.step = state["epoch"], state["step"]
    chronicle.proposals, chronicle.structure = state["proposals"], state["structure"]
    chronicle.journal.go_back(state["seq"], state["events"], plan=plan)


def run_state(state: State, judge: Judge, meter: Meter, pending: Pending | None) -> dict[str, Any]:
    """What the controller remembers, what was measured last, what was used so far."""
    trial = None if pending is None else (pending.number, pending.parameters, pending.since)
    return {
        "state": state,
        "score": judge.kept,
        "judging": judge.count,
        "meter": (meter.training, meter.own),
        "pending": trial,
    }


def restore_run(
    state: Mapping[str, Any], judge: Judge, meter: Meter, trial: Trial | None
) -> Pending | None:
    """Put back what :func:`run_state` told; the trial under way, if there is one."""
    judge.kept, judge.count = state["score"], state["judging"]
    meter.training, meter.own = state["meter"]
    if trial is None:
        return None
    number, parameters, since = state["pending"]
    return Pending(number, trial, parameters, since)


def checked_state(state: Mapping[str, Any], fresh: State) -> State:
    """The controller's state, of a run that began as this one.

    Raises:
        CheckpointError: it began with another model.
    """
    saved, score = state["state"], state["score"]
    if not isinstance(saved, State) or not isinstance(score, HoldoutScore | None):
        raise _unlike(
            f"a {type(saved).__name__} and a {type(score).__name__}", "State, HoldoutScore"
        )
    begun = saved.start_parameters, saved.start_flops
    if begun != (fresh.start_parameters, fresh.start_flops):
        raise _unlike(
            f"{begun[0]} parameters and {begun[1]} FLOPs at the start",
            f"{fresh.start_parameters} and {fresh.start_flops}, as the factory builds it",
        )
    return saved


def _unlike(seen: str, needed: str) -> CheckpointError:
    return CheckpointError(
        "evolver",
        seen=seen,
        needed=needed,
        next_step="build the evolver in the factory, on the model as it was at first",
    )
