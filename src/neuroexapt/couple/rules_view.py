"""Diagonals, blocks, sliding windows, and copies with a part replaced."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from math import prod

from neuroexapt.capture import TensorRef, refs_in
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Dims
from neuroexapt.couple.site import Site, rule

Step = tuple[int, int]  # the size and the stride of a dimension

_BY_STRIDES = "seen by strides in memory"
_FAR = 2**20


def _square(site: Site, x: TensorRef) -> tuple[int, int, Axis]:
    """The two dimensions of a diagonal and its axis: one for both where it is the main one."""
    first, second = (int(site.setting(name)) % len(x.shape) for name in ("dim1", "dim2"))
    rows, columns = site.axis(x, first), site.axis(x, second)
    if site.setting("offset", 0) == 0 and rows.size == columns.size:
        return first, second, site.same(rows, columns)
    for axis in (rows, columns):
        site.pin(axis, "a diagonal by position")
    return first, second, site.fixed(0, "a diagonal by position")


@rule("aten.diagonal", "aten.diagonal_copy")
def diagonal(site: Site) -> list[Dims]:
    """Position i of two dimensions at once -> one dimension, at the end."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    first, second, axis = _square(site, x)
    if axis.size != out.shape[-1]:
        axis = site.fixed(out.shape[-1], "a diagonal by position")
    rest = [place for place in range(len(x.shape)) if place not in (first, second)]
    return [(*(site.axis(x, place) for place in rest), axis)]


@rule("aten.trace")
def trace(site: Site) -> list[Dims]:
    """The sum of the main diagonal."""
    x = site.call.inputs[0]
    if x.shape[0] != x.shape[1]:
        raise ValueError("the diagonal of a matrix that is not square")
    site.mix(site.same(site.axis(x, 0), site.axis(x, 1)), "sum")
    return [()]


@rule("aten.diag_embed")
def diag_embed(site: Site) -> list[Dims]:
    """The last dimension onto the diagonal of two."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    first, second = (int(site.setting(name)) % len(out.shape) for name in ("dim1", "dim2"))
    axis, dims = site.axis(x, -1), list(site.dims(x)[:-1])
    for place in sorted((first, second)):
        dims.insert(place, axis)
    if site.setting("offset", 0):
        site.pin(axis, "a diagonal by position")
        for place in (first, second):
            dims[place] = site.fixed(out.shape[place], "a diagonal by position")
    return [tuple(dims)]


@rule("aten.block_diag")
def block_diag(site: Site) -> list[Dims]:
    """Matrices along the diagonal: rows one after the other, columns one after the other."""
    blocks = list(refs_in(site.call.args[0]))
    if any(len(ref.shape) != 2 for ref in blocks):
        raise ValueError("blocks that are no matrices")
    columns = [[site.axis(ref, dim) for ref in blocks] for dim in range(2)]
    return [(algebra.concat(columns[0]), algebra.concat(columns[1]))]


@rule("aten.unfold", "aten.unfold_copy")
def sliding(site: Site) -> list[Dims]:
    """Windows along one dimension: their number takes its place, their size comes last."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    dim = int(site.setting("dimension")) % len(x.shape)
    site.pin(site.axis(x, dim), "neighbours in a window")
    dims = list(site.dims(x))
    dims[dim] = site.fixed(out.shape[dim], "a number of windows")
    return [(*dims, site.fixed(out.shape[-1], "a window's size"))]


@rule("aten.unfold_backward")
def overlap(site: Site) -> list[Dims]:
    """Windows added up where they overlap: the reverse of sliding."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    dim = int(site.setting("dim")) % len(out.shape)
    for place in (dim, -1):
        site.pin(site.axis(x, place), "neighbours in a window")
    dims = list(site.dims(x)[:-1])
    dims[dim] = site.fixed(out.shape[dim], "windows added up")
    return [tuple(dims)]


@rule("aten.slice_backward", "aten.select_backward")
def put_back(site: Site) -> list[Dims]:
    """A part put back into zeros of the whole, where a forward takes a gradient."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    dim = int(site.setting("dim")) % len(out.shape)
    dims = list(site.dims(x))
    if site.call.op == "aten.slice_backward":
        site.pin(dims.pop(dim), "a part put back by position")
    dims.insert(dim, site.fixed(out.shape[dim], "a part put back by position"))
    return [tuple(dims)]


@rule("aten.as_strided", "aten.as_strided_", "aten.as_strided_copy")
def as_strided(site: Site) -> list[Dims]:
    """A view by strides in memory: a dimension passes where all others stay clear of it.

    Overlapping chunks of a sequence leave the batch and the channels alone. Adaptive pooling
    to one position restores a channels-last layout with it, which moves nothing.
    """
    x, shape, strides = site.call.args[:3]
    old = list(zip(x.shape, x.strides, strict=False))
    new = list(zip(shape, strides, strict=True))
    if site.setting("storage_offset") is not None or len(old) != len(x.shape):
        passing = {}
    elif x.shape == tuple(shape) and all(
        a == b or a[0] == 1 for a, b in zip(old, new, strict=True)
    ):
        passing = {place: place for place in range(len(shape))}
    else:
        passing = _clear(old, new)
    for place, axis in enumerate(site.dims(x)):
        if place not in passing.values():
            site.pin(axis, _BY_STRIDES)
    return [
        tuple(
            site.axis(x, passing[place]) if place in passing else site.fixed(size, _BY_STRIDES)
            for place, size in enumerate(shape)
        )
    ]


def _clear(old: Sequence[Step], new: Sequence[Step]) -> dict[int, int]:
    """New dimensions that are old ones: the others read, within one position, its own memory."""
    alike = {
        place: old.index(step)
        for place, step in enumerate(new)
        if step[0] > 1 and step in old and new.count(step) == old.count(step) == 1
    }
    for count in range(len(alike), 0, -1):
        for some in itertools.combinations(alike, count):
            passing = {place: alike[place] for place in some}
            before = _offsets(old, passing.values())
            if before and _offsets(new, passing) <= before:
                return passing
    return {}


def _offsets(steps: Sequence[Step], without: Collection[int]) -> set[int]:
    """Where in memory the dimensions lead, without some of them; none where it is too far."""
    rest = [step for place, step in enumerate(steps) if place not in without]
    if prod(size for size, _ in rest) > _FAR:
        return set()
    found = {0}
    for size, stride in rest:
        found = {start + number * stride for start in found for number in range(size)}
    return found


@rule("aten.select_scatter", "aten.slice_scatter", "aten.diagonal_scatter")
def replaced(site: Site) -> list[Dims]:
    """A copy with a part replaced: what is replaced goes by position, the rest passes."""
    x, source = site.call.inputs[:2]
    named = {"aten.diagonal_scatter": ("dim1", "dim2")}.get(site.call.op, ("dim",))
    places = {int(site.setting(name)) % len(x.shape) for name in named}
    for place in places:
        site.pin(site.axis(x, place), "a part replaced by position")
    others = [axis for place, axis in enumerate(site.dims(x)) if place not in places]
    inner = list(site.dims(source))
    if site.call.op == "aten.slice_scatter":
        site.pin(inner.pop(min(places)), "a part replaced by position")
    if site.call.op == "aten.diagonal_scatter":
        site.pin(inner.pop(), "a part replaced by position")
    for mine, theirs in zip(others, inner, strict=True):
        site.same(mine, theirs)
    return [site.dims(x)]
