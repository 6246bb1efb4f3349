"""Line charts as inline SVG, drawn by hand: no script, no font, no network.

Every line differs by dash as well as colour, every mutation by shape as well as colour, so a chart
also reads in print and to eyes that see no colour. Colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from neuroexapt.record.story import Point
from neuroexapt.record.wording import escape, figure

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, BOTTOM, TOP = 58, 24, 40, 12
LANE = 13
LANES = 4
MOST_DOTS = 80
# Beyond these a diverged or vanished value would overflow the arithmetic of the axis.
FARTHEST, FINEST = 1e300, 1e-12
DASHES = ("", "7 4", "2 4", "9 3 2 3")
OUTCOMES = {
    "kept": ("kept", "", "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z"),
    "rolled_back": ("rolled back", "5 3", "M-4.5-4.5H4.5V4.5H-4.5Z"),
    "refused": ("refused", "1.5 3", "M0-5.5L5.5 4.5H-5.5Z"),
    "pending": ("no verdict yet", "1 6", "M0-6L6 0L0 6L-6 0Z"),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One named curve; ``rank`` 0 is the evolved model, 1, 2, ... are baselines."""

    name: str
    points: Sequence[Point]
    rank: int = 0

    @property
    def measured(self) -> list[Point]:
        """The points that have a value."""
        return [point for point in self.points if point.value is not None]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One mutation: a vertical line at its step, with a shape for its outcome on top."""

    step: float
    outcome: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What to draw.

    ``write`` words the values on the axis, ``tell`` those in tooltips. ``stepped``: a value holds
    until the next point, and the axis begins at zero.
    """

    title: str
    lines: Sequence[Line]
    marks: Sequence[Mark]
    write: Callable[[float], str]
    tell: Callable[[object], str] = figure
    stepped: bool = False


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The drawing area: data ranges to SVG units, y downwards."""

    steps: tuple[float, float]
    values: tuple[float, float]
    top: float

    def x(self, step: float) -> float:
        return LEFT + _part(step, self.steps) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - _part(_near(value), self.values) * (HEIGHT - BOTTOM - self.top)


def draw(chart: Chart) -> str:
    """The chart as an HTML figure, or a sentence where nothing was measured.

    Example:
        >>> line = Line(name="evolved", points=[Point(0, 2.3), Point(100, 0.4)])
        >>> "<svg" in draw(Chart(title="Loss", lines=[line], marks=[], write=str))
        True
        >>> "not measured" in draw(Chart(title="Loss", lines=[], marks=[], write=str))
        True
    """
    title = escape(chart.title)
    lines = [line for line in chart.lines if line.measured]
    if not lines:
        body = '<p class="soft">not measured</p>'
        return f'<figure class="chart"><figcaption>{title}</figcaption>{body}</figure>'
    lanes = _lanes(chart.marks, _steps(lines, chart.marks))
    frame = _frame(chart, lines, lanes)
    parts = [*_grid(frame, chart.write), *_marks(frame, chart.marks, lanes)]
    for line in sorted(lines, key=lambda line: -line.rank):
        parts += _line(frame, line, chart)
    return (
        f'<figure class="chart"><figcaption>{title}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_spoken(chart, lines)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def legend(names: Sequence[str], outcomes: Sequence[str]) -> str:
    """One list that explains the lines (in order of rank) and the marks of all charts.

    Example:
        >>> legend(["evolved"], ["kept"]).count("<li>")
        2
    """
    items = []
    for rank, name in enumerate(names):
        stroke = f'<path class="{_class(rank)}" d="M2 9H38"{_dash(DASHES[rank % len(DASHES)])}/>'
        items.append(f"<li>{_swatch(stroke, 40)}{escape(name)}</li>")
    for outcome in outcomes:
        word, dash, shape = OUTCOMES[outcome]
        stroke = f'<path class="mark {outcome}" d="M9 14V26"{_dash(dash)}/>'
        figure_ = f'<path class="shape {outcome}" transform="translate(9 8)" d="{shape}"/>'
        items.append(f"<li>{_swatch(stroke + figure_, 18, 26)}{escape(word)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def badge(outcome: str) -> str:
    """The shape and the word of an outcome, as they stand in the charts."""
    word, _, shape = OUTCOMES[outcome]
    drawn = f'<path class="shape {outcome}" transform="translate(8 8)" d="{shape}"/>'
    return f'<span class="badge {outcome}">{_swatch(drawn, 16, 16)}{escape(word)}</span>'


def _swatch(drawn: str, width: int, height: int = 18) -> str:
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {box} aria-hidden="true" class="swatch">{drawn}</svg>'


def _part(value: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return (value - low) / (high - low)


def _steps(lines: Sequence[Line], marks: Sequence[Mark]) -> tuple[float, float]:
    steps = [point.step for line in lines for point in line.points]
    steps += [mark.step for mark in marks]
    low, high = min(steps), max(steps)
    return (low, high) if high > low else (low - 1, high + 1)


def _frame(chart: Chart, lines: Sequence[Line], lanes: Sequence[int]) -> _Frame:
    top = TOP + LANE * (max(lanes, default=-1) + 1)
    return _Frame(steps=_steps(lines, chart.marks), values=_range(lines, chart.stepped), top=top)


def _range(lines: Sequence[Line], from_zero: bool) -> tuple[float, float]:
    ends = [v for line in lines for point in line.measured for v in _reach(point)]
    values = [_near(value) for value in ends]
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    room = max(0.06 * (high - low) or 0.1 * abs(high) or 1.0, FINEST)
    return (low if from_zero else low - room), high + room


def _near(value: float) -> float:
    return max(-FARTHEST, min(FARTHEST, value))


def _reach(point: Point) -> tuple[float, float]:
    value, error = point.value or 0.0, point.error or 0.0
    return value - error, value + error


def _ticks(ends: tuple[float, float], most: int) -> list[float]:
    """Round numbers inside the range: multiples of 1, 2 or 5 times a power of ten."""
    low, high = ends
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _grid(frame: _Frame, write: Callable[[float], str]) -> Iterator[str]:
    for value in _ticks(frame.values, 6):
        y = frame.y(value)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 7}" y="{y + 4.5:.1f}" text-anchor="end">'
        yield f"{escape(write(round(value, 12)))}</text>"
    floor = HEIGHT - BOTTOM
    for step in _ticks(frame.steps, 6):
        x = frame.x(step)
        yield f'<path class="grid" d="M{x:.1f} {floor}v5"/>'
        yield f'<text x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{figure(step)}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>'
    yield f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">optimizer step</text>'


def _lanes(marks: Sequence[Mark], steps: tuple[float, float]) -> list[int]:
    """A row for each mark's shape, so that neighbours do not cover each other."""
    taken = [-math.inf] * LANES
    lanes = []
    for mark in sorted(marks, key=lambda mark: mark.step):
        x = LEFT + _part(mark.step, steps) * (WIDTH - LEFT - RIGHT)
        free = (lane for lane in range(LANES) if x - taken[lane] > LANE)
        lane = next(free, taken.index(min(taken)))
        taken[lane] = x
        lanes.append(lane)
    return lanes


def _marks(frame: _Frame, marks: Sequence[Mark], lanes: Sequence[int]) -> Iterator[str]:
    ordered = sorted(marks, key=lambda mark: mark.step)
    for mark, lane in zip(ordered, lanes, strict=True):
        word, dash, shape = OUTCOMES[mark.outcome]
        x, y = frame.x(mark.step), TOP + LANE * lane - 2
        place = f'transform="translate({x:.1f} {y:.1f})"'
        yield f'<g class="event"><title>{escape(f"{mark.label}: {word}")} '
        yield f"(step {figure(mark.step)})</title>"
        yield f'<path class="mark {mark.outcome}" d="M{x:.1f} {y:.1f}V{HEIGHT - BOTTOM}"'
        yield f'{_dash(dash)}/><path class="shape {mark.outcome}" {place} d="{shape}"/></g>'


def _line(frame: _Frame, line: Line, chart: Chart) -> Iterator[str]:
    for run in _runs(line.points):
        yield _band(frame, run)
        path = _path(frame, run, chart.stepped)
        yield f'<path class="{_class(line.rank)}" d="{path}"'
        yield f"{_dash(DASHES[line.rank % len(DASHES)])}/>"
    if len(line.measured) <= MOST_DOTS:
        for point in line.measured:
            yield _dot(frame, point, line, chart.tell)


def _runs(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The stretches without a gap: a line never bridges what was not measured."""
    run: list[Point] = []
    for point in points:
        if point.value is not None:
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _path(frame: _Frame, run: Sequence[Point], stepped: bool) -> str:
    spots = [(frame.x(point.step), frame.y(point.value or 0.0)) for point in run]
    (x, y), rest = spots[0], spots[1:]
    # The first point joined to itself: a stretch of one point then shows as a round dot.
    path = f"M{x:.1f} {y:.1f}L{x:.1f} {y:.1f}"
    for x, y in rest:
        path += f"H{x:.1f}V{y:.1f}" if stepped else f"L{x:.1f} {y:.1f}"
    return path


def _band(frame: _Frame, run: Sequence[Point]) -> str:
    """One standard error on both sides, where every point of the stretch has one."""
    if len(run) < 2 or any(point.error is None for point in run):
        return ""
    above = [f"{frame.x(p.step):.1f} {frame.y(_reach(p)[1]):.1f}" for p in run]
    below = [f"{frame.x(p.step):.1f} {frame.y(_reach(p)[0]):.1f}" for p in reversed(run)]
    return f'<path class="band" d="M{"L".join(above + below)}Z"/>'


def _dot(frame: _Frame, point: Point, line: Line, tell: Callable[[object], str]) -> str:
    x, y = frame.x(point.step), frame.y(point.value or 0.0)
    error = "" if point.error is None else f" ± {figure(point.error, 2)}"
    tip = f"{line.name}, step {figure(point.step)}: {tell(point.value)}{error}"
    kind = f"dot d{min(line.rank, 3)}"
    spot = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
    return f"{spot}<title>{escape(tip)}</title></circle>"


def _class(rank: int) -> str:
    return f"line l{min(rank, 3)}"


def _dash(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


def _spoken(chart: Chart, lines: Sequence[Line]) -> str:
    """The chart in words, for those who hear the page."""
    said = [f"{chart.title} over optimizer steps"]
    for line in lines:
        first, last = line.measured[0], line.measured[-1]
        ends = [f"{chart.tell(p.value)} at step {figure(p.step)}" for p in (first, last)]
        said.append(f"{line.name}: from {ends[0]} to {ends[1]}")
    if chart.marks:
        said.append(f"mutations marked: {len(chart.marks)}")
    return escape(". ".join(said))
