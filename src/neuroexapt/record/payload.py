"""What the page's script is given, as plain JSON: lines, marks, the drawing, readings per layer.

Every value is a finite number, text or null, and texts are only ever shown as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuroexapt.record.story import Event, Point, Story, curve, mappings
from neuroexapt.record.wording import figure, number, percent, size, text

# A run that diverged further than this would leave nothing else to see on a linear axis.
FARTHEST = 1e100


@dataclass(frozen=True, kw_only=True)
class Line:
    """One named curve; ``rank`` 0 is the run itself, 1, 2, ... what it is compared with."""

    name: str
    points: Sequence[Point]
    rank: int = 0

    @property
    def measured(self) -> list[Point]:
        """The points that have a value that can be drawn."""
        return [p for p in self.points if p.value is not None and abs(p.value) <= FARTHEST]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One quantity over optimizer steps.

    ``unit`` is ``""``, ``"%"`` (a fraction) or ``"B"`` (bytes). ``stepped``: a value holds until
    the next point, and the axis begins at zero.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    stepped: bool = False

    @property
    def drawn(self) -> list[Line]:
        """The lines with anything to draw."""
        return [line for line in self.lines if line.measured]


def charts(story: Story, others: Mapping[str, Story]) -> list[Chart]:
    """Loss, accuracy, parameters, FLOPs and memory of a run, its baselines and other runs."""
    return [
        Chart(title="Holdout loss", lines=_lines(story, others, "holdout_loss", "holdout_error")),
        Chart(title="Holdout accuracy", lines=_lines(story, others, "holdout_accuracy"), unit="%"),
        Chart(title="Parameters", lines=_lines(story, others, "parameters"), stepped=True),
        Chart(title="FLOPs per sample", lines=_lines(story, others, "flops"), stepped=True),
        Chart(title="Memory", lines=_lines(story, others, "memory_bytes"), unit="B", stepped=True),
    ]


def names(story: Story, others: Mapping[str, Story]) -> list[str]:
    """The lines' names by rank: the run, its baselines, the runs it is compared with."""
    return [story.name, *(text(b.get("name"), "baseline") for b in story.baselines), *others]


def spoken(chart: Chart, marks: int) -> str:
    """A chart in words, for those who hear the page."""
    tell = {"%": percent, "B": size}.get(chart.unit, figure)
    said = [f"{chart.title} over optimizer steps"]
    for line in chart.drawn:
        first, last = line.measured[0], line.measured[-1]
        ends = [f"{tell(p.value)} at step {figure(p.step)}" for p in (first, last)]
        said.append(f"{line.name}: from {ends[0]} to {ends[1]}")
    if marks:
        said.append(f"mutations marked: {marks}")
    return ". ".join(said)


def payload(drawn: Sequence[Chart], story: Story, drawing: Mapping[str, Any]) -> str:
    """Everything the script needs as JSON that is safe inside a ``script`` element.

    Example:
        >>> "</script>" in payload([], Story(), {"moments": ["</script>"], "nodes": []})
        False
    """
    decisions = [
        {"step": d.step, "outcome": d.outcome, "label": d.label, "why": text(d.why, "")}
        for d in story.decisions
    ]
    told = {
        "charts": [_chart(chart) for chart in drawn],
        "decisions": decisions,
        "drawing": drawing,
        "signals": signals(story.surveys),
    }
    # Inside <script> only "<" can end or begin anything.
    return json.dumps(told, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def signals(surveys: Sequence[Event]) -> list[dict[str, Any]]:
    """Readings by signal: one row a layer, one column a survey; null where nothing was read.

    Example:
        >>> reading = {"signal": "rank", "at": "fc", "value": 3.5, "unit": "units"}
        >>> found = signals([{"epoch": 2, "step": 20, "readings": [reading]}])[0]
        >>> found["signal"], found["columns"], found["rows"]
        ('rank', [[2.0, 20.0]], [{'at': 'fc', 'values': [3.5], 'errors': [None]}])
    """
    found: dict[str, dict[str, Any]] = {}
    for column, survey in enumerate(surveys):
        for reading in mappings(survey.get("readings")):
            value = number(reading.get("value"))
            if value is None:
                continue
            name, at = text(reading.get("signal")), text(reading.get("at"), "(model)")
            unit = text(reading.get("unit"), "")
            signal = found.setdefault(name, {"signal": name, "unit": unit, "rows": {}})
            row = signal["rows"].setdefault(at, [(None, None)] * len(surveys))
            row[column] = (value, number(reading.get("error")))
    columns = [[number(s.get("epoch")), number(s.get("step"))] for s in surveys]
    for signal in found.values():
        signal["columns"] = columns
        signal["rows"] = [
            {"at": at, "values": [v for v, _ in row], "errors": [e for _, e in row]}
            for at, row in signal["rows"].items()
        ]
    return list(found.values())


def _lines(story: Story, others: Mapping[str, Story], name: str, error: str = "") -> list[Line]:
    own = story.parameters if name == "parameters" else story.curve(name, error)
    lines = [Line(name=story.name, points=own)]
    for baseline in story.baselines:
        title = text(baseline.get("name"), "baseline")
        lines.append(Line(name=title, points=_baseline(baseline, name, error), rank=len(lines)))
    for title, other in others.items():
        points = other.parameters if name == "parameters" else other.curve(name, error)
        lines.append(Line(name=title, points=points, rank=len(lines)))
    return lines


def _baseline(baseline: Event, name: str, error: str) -> list[Point]:
    """A baseline's curve; a size that it has once holds over all its steps."""
    points = curve(mappings(baseline.get("points")), name, error)
    level = number(baseline.get(name))
    if level is None or any(point.value is not None for point in points):
        return points
    steps = [point.step for point in points]
    return [Point(step, level) for step in (min(steps), max(steps))] if steps else []


def _chart(chart: Chart) -> dict[str, Any]:
    return {
        "unit": chart.unit,
        "stepped": chart.stepped,
        "lines": [
            {"name": line.name, "rank": line.rank, "points": [_point(p) for p in line.points]}
            for line in chart.drawn
        ],
    }


def _point(point: Point) -> list[float | None]:
    value = point.value if point.value is None or abs(point.value) <= FARTHEST else None
    if point.error is None or value is None or abs(point.error) > FARTHEST:
        return [point.step, value]
    return [point.step, value, point.error]
