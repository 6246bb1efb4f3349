"""The report: the journal of a run as one HTML file that needs nothing else to be read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuroexapt.errors import RecordError
from neuroexapt.record.architecture import architecture
from neuroexapt.record.cards import card, comparison
from neuroexapt.record.charts import OUTCOMES, Chart, Line, Mark, draw, legend
from neuroexapt.record.page import Cell, Html, Row, document, facts, note, section, table
from neuroexapt.record.story import Event, Point, Story, curve, mapping, mappings, read_story
from neuroexapt.record.wording import (
    MISSING,
    count,
    duration,
    escape,
    figure,
    number,
    percent,
    share,
    short,
    short_percent,
    size,
    text,
    with_error,
)

ARROW = " → "


def write_report(
    events: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str = "neuroexapt run",
) -> Path:
    """Writes the report of a run and returns its path.

    The file loads nothing and runs nothing, and every text from the events is escaped. It appears
    whole or not at all: a report that stood there before stays until the new one is on disk. A run
    may be unfinished or empty; what no event holds is shown as not measured.

    Args:
        events: what ``read_journal`` or ``Journal.events`` gives.
        path: the HTML file; missing parent folders are made.
        title: heading of the page.

    Raises:
        RecordError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_report([{"event": "start", "run": "demo"}], f"{folder}/report.html")
        ...     "demo" in path.read_text(encoding="utf-8")
        True
    """
    target = Path(path)
    page = _page(read_story(events), title)
    try:
        # JSON may hold half of a surrogate pair, which UTF-8 cannot write.
        _replace(target, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise RecordError(
            str(target),
            seen=str(error),
            needed="a file that can be written",
            next_step="choose another path or fix its permissions",
        ) from error
    return target


def _replace(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _page(story: Story, title: str) -> str:
    run = text(story.start.get("run"), "not recorded")
    head = Html(f'<h1>{escape(title)}</h1><p class="soft">Run: {escape(run)}. {_state(story)}</p>')
    if story.empty:
        return document(title, head, note("This journal holds no events of a run yet."))
    parts = [_summary(story), _comparison(story), _charts(story), _decisions(story)]
    parts += [_architecture(story), _environment(story)]
    return document(title, head, Html("\n".join(parts)))


def _state(story: Story) -> str:
    resumed = f", started {story.starts} times (resumed)" if story.starts > 1 else ""
    if story.end:
        return f"Finished{resumed}."
    step = number(story.last.get("step"))
    seen = "" if step is None else f" The last measured step is {count(step)}."
    return f"Unfinished{resumed}: the journal has no end of this run.{seen}"


def _summary(story: Story) -> Html:
    tiles = [
        ("Parameters", _sizes(story, "parameters")),
        ("FLOPs", _sizes(story, "flops")),
        ("Holdout loss", _holdout_loss(story)),
        ("Holdout accuracy", _holdout_accuracy(story)),
        ("Mutations", _mutations(story)),
        ("Time", _time(story)),
    ]
    items = (
        f'<div class="tile"><dt>{name}</dt><dd>{escape(main)}</dd><dd>{escape(more)}</dd></div>'
        for name, (main, more) in tiles
    )
    return Html(f'<dl class="tiles">{"".join(items)}</dl>')


def _sizes(story: Story, name: str) -> tuple[str, str]:
    before, after = story.before(name), story.after(name)
    limit = number(mapping(story.start.get("budget")).get(name if name == "flops" else "params"))
    told = "no limit set" if limit is None else f"limit {count(limit)}"
    ratio = share(before, after)
    so_far = "" if story.end else "so far, "
    changed = "" if ratio is None else f"{so_far}{ratio}; "
    return f"{count(before)}{ARROW}{count(after)}", changed + told


def _holdout_loss(story: Story) -> tuple[str, str]:
    first, last = _ends(story.curve("holdout_loss", "holdout_error"))
    if first is None or last is None:
        return MISSING, ""
    now = f"{figure(first.value)}{ARROW}{with_error(last.value, last.error)}"
    known = "± 1 standard error" if last.error is not None else "standard error not measured"
    return now, f"{_between(first, last)}; {known}"


def _holdout_accuracy(story: Story) -> tuple[str, str]:
    first, last = _ends(story.curve("holdout_accuracy"))
    if first is None or last is None:
        return MISSING, ""
    return f"{percent(first.value)}{ARROW}{percent(last.value)}", _between(first, last)


def _ends(points: Sequence[Point]) -> tuple[Point | None, Point | None]:
    measured = [point for point in points if point.value is not None]
    return (measured[0], measured[-1]) if measured else (None, None)


def _between(first: Point, last: Point) -> str:
    return f"step {count(first.step)} to {count(last.step)}"


def _mutations(story: Story) -> tuple[str, str]:
    told = [f"{story.tally(o)} {word}" for o, (word, _, _) in OUTCOMES.items() if o != "pending"]
    waiting = story.tally("pending")
    return f"{len(story.decisions)} proposed", ", ".join(
        told + ([f"{waiting} without verdict"] if waiting else [])
    )


def _time(story: Story) -> tuple[str, str]:
    total, extra = number(story.end.get("seconds")), number(story.end.get("overhead_seconds"))
    if extra is None:
        return duration(total), "measuring and editing: not measured"
    part = f" ({100 * extra / total:.1f}%)" if total else ""
    return duration(total), f"of it measuring and editing: {duration(extra)}{part}"


def _comparison(story: Story) -> Html:
    if story.result:
        return section("Compared with the static baseline", comparison(story.result))
    return section("Compared with the static baseline", note(f"The test set was {MISSING}."))


def _charts(story: Story) -> Html:
    marks = [
        Mark(step=decision.step, outcome=decision.outcome, label=decision.label)
        for decision in story.decisions
        if decision.step is not None
    ]
    names = ["evolved", *(_name(b) for b in story.baselines)]
    seen = [outcome for outcome in OUTCOMES if any(m.outcome == outcome for m in marks)]
    drawn = "".join(draw(chart) for chart in _drawings(story, marks))
    grid = Html(f'<div class="charts">{drawn}</div>')
    key = Html(legend(names, seen))
    explain = note(
        "Each vertical line is a mutation at the step of its proposal; the shape is its verdict. "
        "The shaded band is one standard error on both sides."
    )
    return section("Over the run", key, explain, grid, _values(story))


def _drawings(story: Story, marks: Sequence[Mark]) -> list[Chart]:
    loss = [Line(name="evolved", points=story.curve("holdout_loss", "holdout_error"))]
    accuracy = [Line(name="evolved", points=story.curve("holdout_accuracy"))]
    for rank, baseline in enumerate(story.baselines, start=1):
        points = mappings(baseline.get("points"))
        name = _name(baseline)
        loss.append(Line(name=name, points=curve(points, "holdout_loss"), rank=rank))
        accuracy.append(Line(name=name, points=curve(points, "holdout_accuracy"), rank=rank))
    memory = [Line(name="evolved", points=story.curve("memory_bytes"))]
    sizes = [Line(name="evolved", points=story.parameters), *_level(story, "parameters")]
    flops = [Line(name="evolved", points=story.curve("flops")), *_level(story, "flops")]
    return [
        Chart(title="Holdout loss", lines=loss, marks=marks, write=short),
        Chart(
            title="Holdout accuracy", lines=accuracy, marks=marks, write=short_percent, tell=percent
        ),
        Chart(title="Parameters", lines=sizes, marks=marks, write=short, stepped=True),
        Chart(title="FLOPs", lines=flops, marks=marks, write=short, stepped=True),
        Chart(title="Memory (bytes)", lines=memory, marks=marks, write=short, stepped=True),
    ]


def _level(story: Story, name: str) -> list[Line]:
    """A baseline's constant size, drawn over the steps at which the baseline was measured."""
    lines = []
    for rank, baseline in enumerate(story.baselines, start=1):
        value = number(baseline.get(name))
        steps = [point.step for point in curve(mappings(baseline.get("points")), "")]
        ends = (min(steps), max(steps)) if steps else ()
        lines.append(
            Line(name=_name(baseline), points=[Point(step, value) for step in ends], rank=rank)
        )
    return lines


def _name(baseline: Event) -> str:
    return text(baseline.get("name"), "baseline")


def _values(story: Story) -> Html:
    """All measured epochs as numbers, for those who cannot read a chart."""
    if not story.epochs:
        return note("No epoch was measured.")
    heads = ["epoch", "step", "holdout loss", "holdout accuracy", "parameters", "FLOPs", "memory"]
    rows = [
        Row(
            cells=[
                count(epoch.get("epoch")),
                count(epoch.get("step")),
                with_error(epoch.get("holdout_loss"), epoch.get("holdout_error")),
                percent(epoch.get("holdout_accuracy")),
                count(epoch.get("parameters")),
                count(epoch.get("flops")),
                size(epoch.get("memory_bytes")),
            ]
        )
        for epoch in story.epochs
    ]
    values = table("Every measured epoch", heads, rows, texts=0)
    return Html(f"<details><summary>Every measured epoch as numbers</summary>{values}</details>")


def _decisions(story: Story) -> Html:
    if not story.decisions:
        return section("Decisions", note("No mutation was proposed."))
    cards = "".join(card(decision) for decision in story.decisions)
    return section("Decisions", Html(f'<div class="cards">{cards}</div>'))


def _architecture(story: Story) -> Html:
    before, after = mapping(story.start.get("model")), mapping(story.end.get("model"))
    return section("Architecture before and after", architecture(before, after))


def _environment(story: Story) -> Html:
    groups = (("Environment", "environment"), ("Settings", "settings"), ("Budget", "budget"))
    parts = []
    for title, name in groups:
        found = mapping(story.start.get(name))
        missing = "no limit" if name == "budget" else "none"
        pairs: list[tuple[str, Cell]] = [(k, text(v, missing)) for k, v in found.items()]
        listed = facts(pairs) or note("not recorded")
        parts.append(f"<div><h3>{title}</h3>{listed}</div>")
    return section("Environment and settings", Html(f'<div class="pair">{"".join(parts)}</div>'))
