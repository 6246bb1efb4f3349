"""Diagonals, blocks, sliding windows, and copies with a part replaced."""

from __future__ import annotations

from neuroexapt.capture import TensorRef, refs_in
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.site import Dims, Site, rule


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
    """A view by strides in memory: any position may land anywhere.

    Adaptive pooling to one position uses it to restore a channels-last layout: (N, C, 1, 1)
    with strides (C, 1, C, C), which moves nothing.
    """
    x, shape, strides = site.call.args[:3]
    channels = x.shape[1] if len(x.shape) > 1 else 0
    if tuple(shape) == x.shape and tuple(strides) == (channels, 1, channels, channels):
        return [site.dims(x)]
    for axis in site.dims(site.call.inputs[0]):
        site.pin(axis, "seen by strides in memory")
    return [tuple(site.fixed(n, "seen by strides in memory") for n in site.call.outputs[0].shape)]


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
