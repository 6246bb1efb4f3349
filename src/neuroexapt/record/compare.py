"""Runs beside each other: the figures of each, in the same words wherever they are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from neuroexapt.record.story import Event, Story, mappings
from neuroexapt.record.wording import (
    count,
    duration,
    number,
    percent,
    share,
    size,
    text,
    with_error,
)

NOT_EVOLVING = "n/a"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One model as it came out of a run; ``None`` where nothing was recorded.

    Attributes:
        name: of the run, or of the baseline inside one.
        values: by the names in :data:`FIGURES`.
        static: whether the model does not evolve at all.
    """

    name: str
    values: dict[str, float | None]
    static: bool = False

    def told(self, name: str) -> str:
        """One value in words."""
        if self.static and name in ("proposed", "kept", "rolled_back", "refused"):
            return NOT_EVOLVING
        if name == "holdout_loss":
            return with_error(self.values.get(name), self.values.get("holdout_error"))
        return FIGURES[name][1](self.values.get(name))

    def against(self, first: Figures, name: str) -> str:
        """How a value differs from the first run's, in percent or percentage points."""
        value, other = self.values.get(name), first.values.get(name)
        if name not in _COMPARED or value is None or other is None or self is first:
            return ""
        if name in ("test_accuracy", "holdout_accuracy"):
            return f"{100 * (value - other):+.2f} points"
        return share(other, value) or ""


FIGURES: dict[str, tuple[str, Callable[[object], str]]] = {
    "test_accuracy": ("test accuracy", percent),
    "holdout_loss": ("holdout loss", lambda value: with_error(value, None)),
    "holdout_accuracy": ("holdout accuracy", percent),
    "parameters": ("parameters", count),
    "flops": ("FLOPs", count),
    "memory_bytes": ("memory", size),
    "seconds": ("time", duration),
    "proposed": ("proposed", count),
    "kept": ("kept", count),
    "rolled_back": ("rolled back", count),
    "refused": ("refused", count),
}


_COMPARED = frozenset(FIGURES) - {"proposed", "kept", "rolled_back", "refused"}


def figures(stories: Sequence[Story]) -> list[Figures]:
    """The figures of runs and of the baselines within them, in that order.

    A ``result`` row goes to the run or baseline of its name; one that fits neither is a model of
    its own.

    Example:
        >>> from neuroexapt.record.story import read_story
        >>> run = read_story([{"event": "epoch", "step": 5, "holdout_loss": 0.25}], "mine")
        >>> figures([run])[0].told("holdout_loss")
        '0.25'
    """
    found: list[Figures] = []
    for story in stories:
        rows = {text(row.get("name"), ""): row for row in story.result}
        # The run's own row bears its name, or is the only one with counts.
        evolving = [name for name, row in rows.items() if number(row.get("proposed")) is not None]
        own = story.name if story.name in rows else evolving[0] if len(evolving) == 1 else ""
        found.append(Figures(name=story.name, values=_of_run(story, rows.pop(own, {}))))
        for baseline in story.baselines:
            name = text(baseline.get("name"), "baseline")
            values = _of_baseline(baseline, rows.pop(name, {}))
            name = name if len(stories) == 1 else f"{story.name}: {name}"
            found.append(Figures(name=name, values=values, static=True))
        for name, row in rows.items():
            static = "proposed" in row and row["proposed"] is None
            found.append(Figures(name=name or "no name", values=_of_row(row), static=static))
    return found


def recorded(runs: Sequence[Figures]) -> list[str]:
    """The names of the figures that at least one run has, in order."""
    return [name for name in FIGURES if any(run.values.get(name) is not None for run in runs)]


def as_data(runs: Sequence[Figures]) -> list[dict[str, Any]]:
    """The figures for programs."""
    return [{"name": run.name, **run.values} for run in runs]


def _of_run(story: Story, row: Event) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for name in ("holdout_loss", "holdout_accuracy", "memory_bytes"):
        points = [p.value for p in story.curve(name) if p.value is not None]
        values[name] = points[-1] if points else None
    errors = [p.error for p in story.curve("holdout_loss", "holdout_error") if p.value is not None]
    values["holdout_error"] = errors[-1] if errors else None
    values |= {name: story.after(name) for name in ("parameters", "flops")}
    values["seconds"] = number(story.end.get("seconds"))
    if story.starts or story.decisions:
        values["proposed"] = float(len(story.decisions))
        values |= {o: float(story.tally(o)) for o in ("kept", "rolled_back", "refused")}
    return values | {"test_accuracy": number(row.get("test_accuracy"))}


def _of_baseline(baseline: Event, row: Event) -> dict[str, float | None]:
    values = _of_row(row)
    last: Event = next(reversed(mappings(baseline.get("points"))), {})
    for name in ("holdout_loss", "holdout_error", "holdout_accuracy", "memory_bytes"):
        values[name] = number(last.get(name))
    for name in ("parameters", "flops"):
        values[name] = number(baseline.get(name)) if values[name] is None else values[name]
    return values


def _of_row(row: Event) -> dict[str, float | None]:
    return {name: number(row.get(name)) for name in FIGURES}
