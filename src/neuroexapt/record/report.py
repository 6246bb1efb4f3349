"""The report: the journal of a run as one HTML file that needs nothing else to be read."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroexapt.errors import RecordError
from neuroexapt.record.architecture import architecture
from neuroexapt.record.cards import OUTCOMES, badge, card, legend
from neuroexapt.record.compare import FIGURES, Figures, figures, recorded
from neuroexapt.record.evolution import Moment, drawing, read_moments
from neuroexapt.record.page import Cell, Html, Row, asset, document, facts, note, section, table
from neuroexapt.record.payload import Chart, charts, names, payload, spoken
from neuroexapt.record.story import Point, Story, mapping, mappings, read_story
from neuroexapt.record.wording import (
    MISSING,
    count,
    duration,
    escape,
    figure,
    number,
    percent,
    share,
    size,
    text,
    with_error,
)

ARROW = " → "
MOST_OPEN = 12
NO_SCRIPT = "Charts need scripts, which are off here; the numbers are in the table below."


def write_report(
    events: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str = "neuroexapt run",
    name: str = "evolved",
    against: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Path:
    """Writes the report of a run and returns its path.

    The file loads nothing, runs nothing but its own two scripts, and shows every text from the
    events as text. It appears whole or not at all: a report that stood there before stays until
    the new one is on disk. A run may be unfinished or empty; what no event holds is shown as not
    measured. Without scripts all numbers are still there, in tables.

    Args:
        events: what ``read_journal`` or ``Journal.events`` gives.
        path: the HTML file; missing parent folders are made.
        title: heading of the page.
        name: what the page calls this run.
        against: the events of other runs by name, drawn and listed beside this one.

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
    events = list(events)
    story = read_story(events, name)
    others = {key: read_story(found, key) for key, found in (against or {}).items()}
    moments = read_moments(events)
    page = _page(_Told(story=story, others=others, moments=moments), title)
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


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What the page is made from."""

    story: Story
    others: Mapping[str, Story]
    moments: Sequence[Moment]

    @functools.cached_property
    def charts(self) -> list[Chart]:
        return charts(self.story, self.others)


def _page(told: _Told, title: str) -> str:
    story = told.story
    run = text(story.start.get("run"), "not recorded")
    head = Html(f'<h1>{escape(title)}</h1><p class="soft">Run: {escape(run)}. {_state(story)}</p>')
    if story.empty:
        return document(title, head, note("This journal holds no events of a run yet."))
    runs = figures([story, *told.others.values()])
    beside = _comparison(runs)
    parts = [_summary(story), _charts(told), _architecture(told), _decisions(story)]
    parts += [_readings(story), _environment(story)]
    # What the run is compared with comes first, that there is nothing comes last.
    parts.insert(1 if len(runs) > 1 else -1, beside)
    drawn = [chart for chart in told.charts if chart.drawn]
    data = payload(drawn, story, drawing(told.moments))
    return document(title, head, Html("\n".join(parts)), data)


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
    told = [f"{story.tally(o)} {word}" for o, (word, _) in OUTCOMES.items() if o != "pending"]
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


def _comparison(runs: Sequence[Figures]) -> Html:
    shown = recorded(runs)
    if len(runs) < 2:
        rest = "" if "test_accuracy" in shown else f" The test set was {MISSING}."
        return section("Compared", note(f"This run is compared with no other.{rest}"))
    heads = ["figure", *(run.name for run in runs)]
    rows = [
        Row(cells=[FIGURES[name][0], *(_beside(run, runs[0], name) for run in runs)])
        for name in shown
    ]
    explain = note(f"Small: the difference to {runs[0].name}.")
    return section("Compared", table("Models compared", heads, rows), explain)


def _beside(run: Figures, first: Figures, name: str) -> Html:
    more = run.against(first, name)
    small = f'<span class="against">{escape(more)}</span>' if more else ""
    return Html(escape(run.told(name)) + small)


def _charts(told: _Told) -> Html:
    marks = [decision for decision in told.story.decisions if decision.step is not None]
    seen = [outcome for outcome in OUTCOMES if any(m.outcome == outcome for m in marks)]
    key = legend(names(told.story, told.others), seen)
    drawn = (chart for chart in told.charts if chart.drawn)
    plots = [_plot(chart, place, len(marks)) for place, chart in enumerate(drawn)]
    empty = [chart.title.lower() for chart in told.charts if not chart.drawn]
    explain = (
        "Each vertical line is a mutation at the step of its proposal; the shape on top is its "
        "verdict. Click one to see its card. Shaded: one standard error on both sides."
    )
    parts = [key, note(explain), Html(f'<div class="charts">{"".join(plots)}</div>')]
    if empty:
        parts.append(note(f"Not measured: {', '.join(empty)}."))
    return section("Over the run", *parts, _values(told.story))


def _plot(chart: Chart, place: int, marks: int) -> str:
    label = escape(spoken(chart, marks))
    box = f'<div class="plot" id="plot-{place}" role="img" aria-label="{label}">'
    off = f'<p class="soft noscript">{NO_SCRIPT}</p>'
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>{off}{box}</div>'
        "</figure>"
    )


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
    closed = len(story.decisions) > MOST_OPEN
    cards = "".join(card(d, place, closed=closed) for place, d in enumerate(story.decisions))
    seen = [outcome for outcome in OUTCOMES if story.tally(outcome)]
    boxes = "".join(
        f'<label><input type="checkbox" checked value="{o}"> {badge(o)} {story.tally(o)}</label>'
        for o in seen
    )
    choice = f'<fieldset class="filter" id="filter" hidden><legend>Show</legend>{boxes}</fieldset>'
    return section("Decisions", Html(f'{choice}<div class="cards">{cards}</div>'))


def _architecture(told: _Told) -> Html:
    before, after = mapping(told.story.start.get("model")), mapping(told.story.end.get("model"))
    moments = told.moments
    if not mappings(after.get("layers")) and len(moments) > 1:
        last = moments[-1]
        after = {"parameters": last.parameters, "layers": list(last.layers.values())}
    whole = architecture(before, after)
    if not moments:
        return section("Architecture", whole)
    head = "<summary>First and last architecture as a table</summary>"
    rest = Html(f"<details>{head}{whole}</details>")
    return section("Architecture", Html(asset("architecture.html")), rest)


def _readings(story: Story) -> Html:
    title = "Information in each layer"
    if not any(mappings(survey.get("readings")) for survey in story.surveys):
        return section(title, note(f"Readings of all layers were {MISSING}."))
    return section(title, Html(asset("readings.html")))


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
