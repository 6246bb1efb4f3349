"""Derive every decision of a run again, from its journal alone, and compare.

Decisions are pure functions of a state and of what was measured (:mod:`neuroexapt.plan`). The
journal's ``plan`` events hold each call of them: its name, what was measured, and what came out.
A replay begins with the state of the ``start`` event, makes the same calls, and needs neither data
nor model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from neuroexapt import plan
from neuroexapt.edit import Edit, Reader, Writer
from neuroexapt.errors import CheckpointError, RecordError
from neuroexapt.plan import Candidate, Limits, Settings, State
from neuroexapt.record.saving import kinds

_CLOSE = 1e-9  # two machines may differ in the last bits of an exponential
_MEASURED = ("scores", "rows", "means", "products")


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    Attributes:
        calls: how many calls were made again.
        decisions: how many of them chose a change or ended a trial.
        difference: the first one that came out otherwise, in a sentence; None if there is none.
    """

    calls: int
    decisions: int
    difference: str | None


def start_data(state: State, settings: Settings, limits: Limits) -> dict[str, Any]:
    """What a replay begins with, as data for a ``start`` or ``resume`` event."""
    writer = Writer(kinds())
    return {
        "state": writer.data(state, "state"),
        "settings": writer.data(settings, "settings"),
        "limits": writer.data(limits, "limits"),
    }


def call_data(name: str, given: Mapping[str, Any], outcome: Any) -> dict[str, Any]:
    """One call as data: a candidate without what its scores were computed from."""
    writer = Writer(kinds())
    return {
        "call": name,
        "given": {key: writer.data(_light(value), key) for key, value in given.items()},
        "outcome": writer.data(_light(outcome), "outcome"),
    }


def _light(value: Any) -> Any:
    """A value without the readings and scores of candidates, which no decision reads."""
    if isinstance(value, Candidate):
        first, *also = (replace(edit, **_defaults(edit)) for edit in value.edits)
        return replace(value, edit=first, also=tuple(also), readings=())
    if isinstance(value, (list, tuple)):
        return type(value)([_light(item) for item in value])
    if isinstance(value, plan.Decision) and value.candidate is not None:
        return replace(value, candidate=_light(value.candidate))
    return value


def _defaults(edit: Edit) -> dict[str, Any]:
    """The fields that were measured, as they are when nothing was."""
    found = {}
    for field in fields(edit):
        if field.name in _MEASURED and field.default is not MISSING:
            found[field.name] = field.default
        elif field.name in _MEASURED and field.default_factory is not MISSING:
            found[field.name] = field.default_factory()
    return found


def replay(events: Sequence[Mapping[str, Any]]) -> Replay:
    """Make every decision of a journal again.

    Args:
        events: from :func:`neuroexapt.record.read_journal`.

    Raises:
        RecordError: the journal has no ``start`` with what a replay begins with, or an event is
            not as it was written.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from neuroexapt import Evolver
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> evolver = Evolver(model, optimizer, loss_fn=lambda m, x: m(x).square().mean(),
        ...                   holdout=list(torch.ones(16, 4).split(4)))
        >>> for _ in range(4):
        ...     end = evolver.end_epoch()
        >>> replay(evolver.journal.events).difference is None
        True
    """
    try:
        return _replay(events)
    except CheckpointError as error:
        raise RecordError(
            error.place, seen=error.seen, needed=error.needed, next_step=error.next_step
        ) from error


def _replay(events: Sequence[Mapping[str, Any]]) -> Replay:
    course: _Course | None = None
    calls = decisions = 0
    for event in events:
        place = f"event {event.get('seq')} ({event['event']})"
        if event["event"] in ("start", "resume") and "plan" in event:
            course = _begun(event["plan"], place, course)
        for number, call in enumerate(_calls(event)):
            if course is None:
                raise _unreadable(place, "a call before the state it begins with")
            said = course.again(call, f"{place}, call {number + 1}")
            calls += 1
            decisions += call.get("call") in ("choose", "judge", "bearable", "refused")
            if said:
                return Replay(calls, decisions, said)
    if course is None:
        raise _unreadable("the journal", "no start event with a plan")
    return Replay(calls, decisions, None)


def _calls(event: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    calls = event.get("calls", []) if event["event"] == "plan" else []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _unreadable(f"event {event.get('seq')}", "calls that are no list of objects")
    yield from calls


def _begun(data: Any, place: str, before: _Course | None) -> _Course:
    """The course from a start; from a resume on, the state is the one that was reached."""
    reader = Reader(kinds())
    if not isinstance(data, dict):
        raise _unreadable(place, "a plan that is no object")
    state, settings, limits = (
        reader.value(data.get(name), f"{place}.{name}") for name in ("state", "settings", "limits")
    )
    for value, kind in ((state, State), (settings, Settings), (limits, Limits)):
        if not isinstance(value, kind):
            raise _unreadable(place, f"a {type(value).__name__} for {kind.__name__}")
    return _Course(state if before is None else before.state, settings, limits)


@dataclass
class _Course:
    """The state of the controller, as the calls so far have left it."""

    state: State
    settings: Settings
    limits: Limits

    def again(self, call: Mapping[str, Any], place: str) -> str | None:
        """Make one call; what came out otherwise, in a sentence."""
        name, reader = str(call.get("call")), Reader(kinds())
        function = getattr(plan, name, None) if name in _FUNCTIONS else None
        given = call.get("given")
        if function is None or not isinstance(given, dict):
            raise _unreadable(place, f"the call {name!r}"[:100])
        known = {"state": self.state, "settings": self.settings, "limits": self.limits}
        values = {key: reader.value(data, f"{place}.{key}") for key, data in given.items()}
        wanted = inspect.signature(function).parameters
        values.update((key, value) for key, value in known.items() if key in wanted)
        try:
            outcome = self._kept(function(**values))
        except Exception as error:  # values of a damaged journal may raise anything
            raise _unreadable(place, f"{type(error).__name__}: {str(error)[:200]}") from error
        derived = Writer(kinds()).data(_light(outcome), "outcome")
        path = _first_difference(derived, call.get("outcome"))
        if path is None:
            return None
        at, ours, theirs = path
        return f"{place}: {name}{at} is {_short(theirs)} in the journal, {_short(ours)} derived"

    def _kept(self, outcome: Any) -> Any:
        """Take over a new state; what is left is compared."""
        if isinstance(outcome, State):
            self.state = outcome
            return None
        if isinstance(outcome, tuple) and outcome and isinstance(outcome[0], State):
            self.state = outcome[0]
            return outcome[1] if len(outcome) == 2 else outcome[1:]
        return outcome


_FUNCTIONS = frozenset(name for name in plan.__all__ if inspect.isfunction(getattr(plan, name)))


def outcome_of(result: Any) -> Any:
    """What of a call's result is compared: all but the state."""
    return _Course(State(0, 0), Settings(), Limits())._kept(result)


def _first_difference(ours: Any, theirs: Any, at: str = "") -> tuple[str, Any, Any] | None:
    numbers = (int, float)
    if isinstance(ours, numbers) and isinstance(theirs, numbers):
        close = abs(ours - theirs) <= _CLOSE * max(1.0, abs(ours), abs(theirs))
        return None if close and type(ours) is type(theirs) else (at, ours, theirs)
    if type(ours) is not type(theirs):
        return at, ours, theirs
    if isinstance(ours, dict):
        for key in dict.fromkeys([*ours, *theirs]):
            if key not in ours or key not in theirs:
                return f"{at}.{key}", ours.get(key), theirs.get(key)
            found = _first_difference(ours[key], theirs[key], f"{at}.{key}")
            if found:
                return found
        return None
    if isinstance(ours, list):
        if len(ours) != len(theirs):
            return at, ours, theirs
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            found = _first_difference(*pair, f"{at}[{number}]")
            if found:
                return found
        return None
    return None if ours == theirs else (at, ours, theirs)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _unreadable(place: str, seen: str) -> RecordError:
    return RecordError(
        place,
        seen=seen,
        needed="a journal with plan events, as this version writes it",
        next_step="replay journals of an Evolver; one that was changed by hand is no record",
    )
