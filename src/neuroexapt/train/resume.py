"""What the evolver remembers besides the model itself, and how a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neuroexapt.errors import CheckpointError
from neuroexapt.guard import Trial
from neuroexapt.measure import HoldoutScore
from neuroexapt.plan import Decision, State, Verdict

if TYPE_CHECKING:
    from neuroexapt.train.chronicle import Chronicle


@dataclass(frozen=True)
class Epoch:
    """What happened at the end of an epoch.

    Attributes:
        number: the epoch, counted from 1.
        holdout: the held-out loss of the model as it goes into the next epoch.
        parameters: its number of parameters.
        verdict: the end of a trial, if one ended.
        decision: what was decided, if a change was considered. Its candidate is on trial, unless
            the edit was refused, which the journal tells.
        why: one sentence on why nothing was decided, else the decision's or verdict's.
    """

    number: int
    holdout: HoldoutScore
    parameters: int
    verdict: Verdict | None
    decision: Decision | None
    why: str


@dataclass(frozen=True)
class Pending:
    """A trial under way: its number in the journal and the parameters it added."""

    number: int
    trial: Trial
    parameters: int


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


def checked_state(state: Mapping[str, Any], fresh: State) -> tuple[State, HoldoutScore | None]:
    """The controller's state and the last score, of a run that began as this one.

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
    return saved, score


def _unlike(seen: str, needed: str) -> CheckpointError:
    return CheckpointError(
        "evolver",
        seen=seen,
        needed=needed,
        next_step="build the evolver in the factory, on the model as it was at first",
    )
