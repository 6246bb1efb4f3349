"""The architecture before and after, layer beside layer, with what changed marked."""

from __future__ import annotations

import re
from collections.abc import Sequence

from neuroexapt.record.evolution import merged
from neuroexapt.record.page import Cell, Html, Row, facts, note, safe, scroll, table
from neuroexapt.record.story import Event, mappings
from neuroexapt.record.wording import count, escape, number, text

UNCHANGED, CHANGED, ADDED, REMOVED = "unchanged", "changed", "added", "removed"
_SIGNS = {UNCHANGED: "=", CHANGED: "≠", ADDED: "+", REMOVED: "\N{MINUS SIGN}"}
_SHAPE = re.compile(r"\d+(x\d+)*")
_ABSENT = Html('<span class="soft">none</span>')


def architecture(before: Event, after: Event) -> Html:
    """Both models side by side, joined by layer name.

    A model or a list of layers that is not recorded is said to be so.

    Example:
        >>> old = {"class": "Net", "layers": [{"name": "fc", "type": "Linear", "shape": "4x8"}]}
        >>> new = {"class": "Net", "layers": [{"name": "fc", "type": "Linear", "shape": "6x8"}]}
        >>> "<mark>6</mark>" in architecture(old, new)
        True
    """
    head = facts([("before", _title(before)), ("after", _title(after))])
    old, new = _by_name(before), _by_name(after)
    if old and new:
        return Html(head + _compared(old, new))
    if not old and not new:
        return Html(head + note("The layers were not recorded."))
    # Comparing with nothing would call every layer removed or added.
    which, other = ("before", "after") if old else ("after", "before")
    return Html(
        head + note(f"The layers {other} were not recorded; {which}:") + _single(old or new)
    )


def status(old: Event | None, new: Event | None) -> str:
    """What became of a layer; type, shape and parameters decide."""
    if old is None:
        return ADDED
    if new is None:
        return REMOVED
    same = all(old.get(key) == new.get(key) for key in ("type", "shape", "parameters"))
    return UNCHANGED if same else CHANGED


def _title(model: Event) -> str:
    if not model:
        return "not recorded"
    sizes = f"{count(model.get('parameters'))} parameters, {count(model.get('flops'))} FLOPs"
    return f"{text(model.get('class'), 'class not recorded')}: {sizes}"


def _by_name(model: Event) -> dict[str, Event]:
    return {text(layer.get("name"), "(model)"): layer for layer in mappings(model.get("layers"))}


def _single(layers: dict[str, Event]) -> Html:
    most = _most(layers)
    rows = [Row(cells=[name, *_cells(layer, most)]) for name, layer in layers.items()]
    return table("Architecture", ["layer", "type", "shape", "parameters"], rows, texts=3)


def _compared(old: dict[str, Event], new: dict[str, Event]) -> Html:
    most = max(_most(old), _most(new))
    rows = (_row(name, old.get(name), new.get(name), most) for name in merged(list(old), list(new)))
    side = '<th scope="col" class="edge">type</th><th scope="col">shape</th>'
    side += '<th scope="col" class="num">parameters</th>'
    group = '<th scope="colgroup" colspan="3" class="edge">'
    head = '<tr><th scope="col" rowspan="2">layer</th><th scope="col" rowspan="2">change</th>'
    head += f"{group}before</th>{group}after</th></tr><tr>{side}{side}</tr>"
    body = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return scroll("Architecture before and after", body)


def _row(name: str, old: Event | None, new: Event | None, most: float) -> str:
    word = status(old, new)
    other = text(old.get("shape")) if old and new else ""
    sides = _side(_cells(old, most)) + _side(_cells(new, most, other))
    head = f'<th scope="row">{escape(name)}</th><td>{_SIGNS[word]} {word}</td>'
    return f'<tr class="{word}">{head}{sides}</tr>'


def _side(cells: Sequence[Cell]) -> str:
    kind, shape, size = map(safe, cells)
    return f'<td class="edge">{kind}</td><td>{shape}</td><td class="num">{size}</td>'


def _cells(layer: Event | None, most: float, other: str = "") -> list[Cell]:
    """Type, shape and parameters; ``other`` is the shape to compare with."""
    if layer is None:
        return [_ABSENT, "", ""]
    size = number(layer.get("parameters"))
    width = 100 * size / most if size and most else 0.0
    bar = f'<span class="bar" style="width:{width:.1f}%"></span>'
    parameters = Html(escape(count(layer.get("parameters"))) + bar)
    return [
        text(layer.get("type")),
        _shape(text(layer.get("shape"), "no weight"), other),
        parameters,
    ]


def _shape(shape: str, other: str) -> Html:
    """The shape with the sizes that differ from ``other`` marked."""
    if not _SHAPE.fullmatch(shape):
        return Html(escape(shape))
    sizes = shape.split("x")
    others = other.split("x") if _SHAPE.fullmatch(other) else sizes
    if len(others) != len(sizes):
        # Another number of axes: no size has a counterpart.
        others = []
    same = [k < len(others) and size == others[k] for k, size in enumerate(sizes)]
    parts = [s if fits else f"<mark>{s}</mark>" for s, fits in zip(sizes, same, strict=True)]
    return Html("&times;".join(parts))


def _most(layers: dict[str, Event]) -> float:
    return max((number(layer.get("parameters")) or 0.0 for layer in layers.values()), default=0.0)
