"""Events gathered into what the report tells: one decision per mutation, one curve per quantity.

Pure: no file, no clock. Nothing is filled in: a value that no event holds stays absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from neuroexapt.record.wording import number, text

Event = Mapping[str, Any]
VERDICTS = ("kept", "rolled_back", "refused")
PENDING = "pending"


class Point(NamedTuple):
    """A measured value at an optimizer step; ``None`` marks a gap. ``error``: standard error."""

    step: float
    value: float | None
    error: float | None = None


@dataclass(kw_only=True)
class Decision:
    """One proposed mutation and what became of it; a part that was not recorded is empty."""

    proposal: Event = field(default_factory=dict)
    applied: Event = field(default_factory=dict)
    verdict: Event = field(default_factory=dict)
    flops: float | None = None

    @property
    def realised(self) -> Event:
        """What the change came to; FLOPs as the epochs around it were measured."""
        found = mapping(self.verdict.get("realised"))
        return found if self.flops is None else {"flops": self.flops, **found}

    @property
    def outcome(self) -> str:
        """One of ``VERDICTS``, or ``PENDING`` while no known verdict is recorded."""
        word = self.verdict.get("verdict")
        return str(word) if word in VERDICTS else PENDING

    @property
    def step(self) -> float | None:
        """The step of the proposal, or else of the verdict."""
        found = number(self.proposal.get("step"))
        return number(self.verdict.get("step")) if found is None else found

    @property
    def why(self) -> object:
        """The reason of the verdict, or else of the proposal."""
        return self.verdict.get("why") or self.proposal.get("reason")

    @property
    def label(self) -> str:
        """What was changed where, for headings and tooltips."""
        event = self.proposal or self.applied or self.verdict
        kind = self.proposal.get("kind") or "Mutation"
        place = self.proposal.get("at")
        return f"#{event.get('id', '?')} {kind}" + (f" at {place}" if place else "")


@dataclass(kw_only=True)
class Story:
    """A run as the report shows it. Empty mappings and lists: not recorded."""

    name: str = "evolved"
    start: Event = field(default_factory=dict)
    end: Event = field(default_factory=dict)
    starts: int = 0
    epochs: list[Event] = field(default_factory=list)
    surveys: list[Event] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    baselines: list[Event] = field(default_factory=list)
    result: list[Event] = field(default_factory=list)
    parameters: list[Point] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.starts or self.end or self.epochs or self.decisions or self.baselines)

    @property
    def last(self) -> Event:
        """The last measured epoch."""
        return self.epochs[-1] if self.epochs else {}

    def tally(self, outcome: str) -> int:
        """How many decisions ended in this outcome."""
        return sum(decision.outcome == outcome for decision in self.decisions)

    def before(self, name: str) -> float | None:
        """A number of the model at the start: "parameters" or "flops"."""
        return number(mapping(self.start.get("model")).get(name))

    def after(self, name: str) -> float | None:
        """The same at the end of the run, or the last recorded one while unfinished."""
        found = number(mapping(self.end.get("model")).get(name))
        if found is None and name == "parameters" and self.parameters:
            # An edit since the last epoch has already changed this number.
            return self.parameters[-1].value
        return number(self.last.get(name)) if found is None else found

    def curve(self, name: str, error: str = "") -> list[Point]:
        """A quantity over the steps at which it was due, gaps included."""
        return curve(self.epochs, name, error)


def read_story(events: Iterable[Event], name: str = "evolved") -> Story:
    """Gathers the events of a run, which the report calls ``name``; unknown kinds are passed over.

    A run that was resumed has several starts: the first one describes the model before, an end
    counts only if no start follows it, and the last word on a step is the one that counts.

    Example:
        >>> story = read_story([
        ...     {"event": "proposal", "id": 0, "kind": "Widen", "at": "fc1", "step": 10},
        ...     {"event": "verdict", "id": 0, "verdict": "kept"},
        ... ])
        >>> story.decisions[0].label, story.tally("kept")
        ('#0 Widen at fc1', 1)
    """
    story = Story(name=name)
    events = list(events)
    epochs: dict[float, Event] = {}
    for event in events:
        kind = event.get("event")
        step = number(event.get("step"))
        if kind == "start":
            story.starts += 1
            story.start = story.start or event
            story.end = {}
        elif kind == "resume":
            story.starts += 1
            story.end = {}
        elif kind == "end":
            story.end = event
        elif kind == "epoch" and step is not None:
            epochs[step] = event
        elif kind == "survey":
            story.surveys.append(event)
        elif kind == "baseline":
            story.baselines.append(event)
        elif kind == "result":
            story.result = mappings(event.get("rows"))
        elif kind in ("proposal", "applied", "verdict"):
            _take(story.decisions, kind, event)
    story.epochs = [epochs[step] for step in sorted(epochs)]
    story.parameters = _parameters(story)
    _realise_flops(story, events)
    return story


def curve(events: Sequence[Event], name: str, error: str = "") -> list[Point]:
    """The points of one quantity; an event without a step gives none.

    Example:
        >>> curve([{"step": 10, "loss": 0.5}, {"step": 20, "loss": None}], "loss")
        [Point(step=10.0, value=0.5, error=None), Point(step=20.0, value=None, error=None)]
    """
    points = []
    for event in events:
        step = number(event.get("step"))
        if step is not None:
            points.append(Point(step, number(event.get(name)), number(event.get(error))))
    return points


def mapping(value: object) -> Event:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: object) -> list[Event]:
    """The mappings of a list, else an empty list."""
    items = value if isinstance(value, list | tuple) else ()
    return [item for item in items if isinstance(item, Mapping)]


def _take(decisions: list[Decision], kind: str, event: Event) -> None:
    decision = None
    if kind != "proposal":
        # From the newest: a resumed run may use an id again.
        same = (d for d in reversed(decisions) if _id(d) == event.get("id"))
        decision = next(same, None)
    if decision is None:
        decision = Decision()
        decisions.append(decision)
    setattr(decision, kind, event)


def _id(decision: Decision) -> object:
    return (decision.proposal or decision.applied or decision.verdict).get("id")


def _realise_flops(story: Story, events: Iterable[Event]) -> None:
    """The FLOPs of the first epoch with a change less those of the last one without it."""
    by_id = {text(decision.proposal.get("id")): decision for decision in story.decisions}
    last: float | None = None
    before: float | None = None
    waiting: Decision | None = None
    for event in events:
        kind, flops = event.get("event"), number(event.get("flops"))
        decision = by_id.get(text(event.get("id")))
        if kind == "applied":
            waiting, before = decision, last
        elif kind == "verdict" and decision is waiting and event.get("verdict") != "kept":
            waiting = None
        elif kind == "epoch":
            # A change by hand since then would be counted with it.
            if waiting and flops is not None and before is not None and "layers" not in event:
                waiting.flops = flops - before
            last, waiting = flops, None


def _parameters(story: Story) -> list[Point]:
    """Counts at each epoch and on both sides of each edit, so that the line jumps where it did."""
    points = story.curve("parameters")
    for decision in story.decisions:
        old = number(decision.applied.get("parameters_before"))
        new = number(decision.applied.get("parameters_after"))
        if decision.step is None or old is None or new is None:
            continue
        points += [Point(decision.step, old), Point(decision.step, new)]
        undone = number(decision.verdict.get("step"))
        if decision.outcome == "rolled_back" and undone is not None:
            points += [Point(undone, new), Point(undone, old)]
    return sorted(points, key=lambda point: point.step)
