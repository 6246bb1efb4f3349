"""Operators that take a part of a dimension: one position, a segment, every n-th."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neuroexapt.capture import TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Dims, Label, Pick
from neuroexapt.couple.site import Site, rule

Origin = frozenset[Label]
EQUAL_PARTS = (2, 3, 4)  # a slice that is one of so few equal parts is taken as such


def picked(labels: Sequence[Origin], axis: Axis, start: int, stop: int) -> list[Origin]:
    """The labels narrowed to positions start..stop of an axis."""
    pick = Pick(axis, start, stop)
    return [frozenset(label.then(pick) for label in origin) for origin in labels]


@rule("aten.select", "aten.select_copy")
def select(site: Site) -> list[Dims]:
    """One position of a dimension, by number: that dimension keeps its positions."""
    x, dim, index = site.call.args[:3]
    dim %= len(x.shape)
    _set_selected(site, x, dim, index % x.shape[dim], site.call.outputs[0])
    return [tuple(a for place, a in enumerate(site.dims(x)) if place != dim)]


@rule("aten.unbind", "aten.unbind_copy")
def unbind(site: Site) -> list[Dims]:
    """Every position of a dimension, each as a tensor."""
    x = site.call.args[0]
    dim = int(site.arg(1, "dim", 0)) % len(x.shape)
    for index, out in enumerate(site.call.outputs):
        _set_selected(site, x, dim, index, out)
    return [tuple(a for place, a in enumerate(site.dims(x)) if place != dim)] * x.shape[dim]


def _set_selected(site: Site, x: TensorRef, dim: int, index: int, out: TensorRef) -> None:
    axis = site.axis(x, dim)
    site.pin(axis, "a position taken by number")
    labels = picked(site.labels(x), axis, index, index + 1)
    site.set_labels(out, [label for place, label in enumerate(labels) if place != dim])


@rule("aten.slice", "aten.slice_copy", "aten.narrow")
def slice_(site: Site) -> list[Dims]:
    """Positions start..stop of a dimension: a cut at both ends."""
    x, out = site.call.args[0], site.call.outputs[0]
    dim = int(site.arg(1, "dim", 0)) % len(x.shape)
    size = x.shape[dim]
    if site.call.op == "aten.narrow":
        start, length = int(site.setting("start")), int(site.setting("length"))
        start, step = start if start >= 0 else start + size, 1
        stop = start + length
    else:
        start, stop, step = slice(
            site.arg(2, "start"), _stop(site), site.arg(4, "step", 1)
        ).indices(size)
    if (start, stop, step) == (0, size, 1):
        site.set_labels(out, site.labels(x))
        return [site.dims(x)]
    if step != 1:
        return [_every(site, x, dim, (start, step), out)]
    return [_part(site, x, dim, start, stop, out)]


def _every(site: Site, x: TensorRef, dim: int, places: tuple[int, int], out: TensorRef) -> Dims:
    """Every n-th position: of n * m the outer factor, where the whole dimension is covered."""
    (start, step), axis = places, site.axis(x, dim)
    if start < step and axis.size % step == 0 and out.shape[dim] * step == axis.size:
        try:
            outer, inner = algebra.split(axis, axis.size // step)
        except algebra.Mismatch:
            pass  # segments or factors that do not fit
        else:
            site.pin(inner, "every n-th position taken")
            site.set_labels(out, picked(site.labels(x), inner, start, start + 1))
            return _replaced(site, x, dim, outer)
    site.pin(axis, "every n-th position taken")
    return _replaced(site, x, dim, site.fixed(out.shape[dim], "every n-th position"))


def _stop(site: Site) -> Any:
    return site.arg(3, "end")


def _replaced(site: Site, x: TensorRef, dim: int, axis: Axis) -> Dims:
    dims = list(site.dims(x))
    dims[dim] = axis
    return tuple(dims)


def _part(site: Site, x: TensorRef, dim: int, start: int, stop: int, out: TensorRef) -> Dims:
    """One segment of a dimension; equal parts share their positions."""
    axis, size = site.axis(x, dim), stop - start
    count = axis.size // size if size and axis.size % size == 0 else 0
    if count in EQUAL_PARTS and start % size == 0:
        try:
            outer, inner = algebra.split(axis, count)
        except algebra.Mismatch:
            pass  # segments of unlike sizes inside: cut by position below
        else:
            site.pin(outer, "a number of equal parts")
            site.set_labels(out, picked(site.labels(x), outer, start // size, start // size + 1))
            return _replaced(site, x, dim, inner)
    return _segment(site, x, dim, start, stop, out)


def _segment(site: Site, x: TensorRef, dim: int, start: int, stop: int, out: TensorRef) -> Dims:
    axis = site.axis(x, dim)
    try:
        pieces = algebra.cut(axis, [start, stop])
    except algebra.Mismatch as mismatch:
        site.pin(axis, f"cut inside: {mismatch}")
        return _replaced(site, x, dim, site.fixed(stop - start, "cut inside"))
    inside, position = [], 0
    for piece in pieces:
        if start <= position < stop:
            inside.append(piece)
        position += piece.size
    labels = list(site.labels(x))
    labels[dim] = picked([labels[dim]], axis, start, stop)[0]
    site.set_labels(out, labels)
    return _replaced(site, x, dim, algebra.concat(inside))


@rule(
    "aten.split",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.unsafe_split",
    "aten.unsafe_split_with_sizes",
    "aten.tensor_split",
    "aten.split_copy",
    "aten.split_with_sizes_copy",
    "aten.unsafe_chunk",
)
def split(site: Site) -> list[Dims]:
    """Consecutive segments; segments of one size are taken to be of one size for ever."""
    x = site.call.args[0]
    dim = int(site.arg(2, "dim", 0)) % len(x.shape)
    start, result = 0, []
    for out in site.call.outputs:
        stop = start + out.shape[dim]
        if len(site.call.outputs) > 1 and len({o.shape[dim] for o in site.call.outputs}) == 1:
            result.append(_equal_part(site, x, dim, start, stop, out))
        elif len(site.call.outputs) == 1:
            site.set_labels(out, site.labels(x))
            result.append(site.dims(x))
        else:
            result.append(_segment(site, x, dim, start, stop, out))
        start = stop
    return result


def _equal_part(site: Site, x: TensorRef, dim: int, start: int, stop: int, out: TensorRef) -> Dims:
    axis, size = site.axis(x, dim), stop - start
    try:
        outer, inner = algebra.split(axis, axis.size // size)
    except algebra.Mismatch:
        return _segment(site, x, dim, start, stop, out)
    site.pin(outer, "a number of equal parts")
    site.set_labels(out, picked(site.labels(x), outer, start // size, stop // size))
    return _replaced(site, x, dim, inner)
