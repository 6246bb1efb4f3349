"""Operators that read or write positions named by index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neuroexapt.capture import TensorRef
from neuroexapt.couple.marks import Dims, Label
from neuroexapt.couple.numbering import indexed
from neuroexapt.couple.rules_pointwise import broadcast
from neuroexapt.couple.site import Site, rule

_BY_NUMBER = "positions taken by an index tensor"
_MASKS = (torch.bool, torch.uint8)


@rule("aten.gather")
def gather(site: Site) -> list[Dims]:
    """``out[i, j] = x[index[i, j], j]``: the dimension named is read by number."""
    x, dim, index = site.call.args[:3]
    if not x.shape:
        return [site.dims(index)]
    indexed(site, x, dim, index, _BY_NUMBER)
    _beside(site, index, x, dim)
    labels = list(site.labels(x))
    labels[dim] = frozenset()
    site.set_labels(site.call.outputs[0], labels)
    return [site.dims(index)]


def _hold(site: Site, x: TensorRef, dim: int) -> None:
    site.pin(site.axis(x, dim), _BY_NUMBER)


def _beside(site: Site, index: TensorRef, x: TensorRef, dim: int) -> None:
    """The other dimensions of an index tensor of x's rank go position by position with x's."""
    for place in range(len(x.shape)):
        if place == dim % len(x.shape):
            continue
        mine, theirs = site.axis(index, place), site.axis(x, place)
        if mine.size == theirs.size:
            site.same(mine, theirs)
        else:
            site.pin(mine, "the first positions of another tensor")
            site.pin(theirs, "its first positions are taken")


@rule("aten.index_select")
def index_select(site: Site) -> list[Dims]:
    """Positions of one dimension by number: the others pass."""
    x, dim, index = site.call.args[:3]
    if not x.shape:
        return [()]
    indexed(site, x, dim, index, _BY_NUMBER)
    dims, labels = list(site.dims(x)), list(site.labels(x))
    dims[dim] = site.axis(index, 0) if index.shape else site.fixed(1, _BY_NUMBER)
    labels[dim] = frozenset()
    _taken(site, x, labels)
    return [tuple(dims)]


def _taken(site: Site, x: TensorRef, labels: Sequence[frozenset[Label]]) -> None:
    """Rows taken out of a parameter by the data are still a parameter's."""
    out = site.call.outputs[0]
    site.set_labels(out, labels)
    if site.is_parameter(x):
        site.draft.taken.add(out)


@rule(
    "aten.scatter",
    "aten.scatter_",
    "aten.scatter_add",
    "aten.scatter_add_",
    "aten.scatter_reduce",
    "aten.scatter_reduce_",
)
def scatter(site: Site) -> list[Dims]:
    """``out[index[i, j], j] = src[i, j]``: the dimension named is written by number."""
    x, dim, index, *rest = site.call.args
    if not x.shape:
        return [()]
    indexed(site, x, dim, index, _BY_NUMBER)
    _beside(site, index, x, dim)
    written = site.axis(index, dim)
    for src in (ref for ref in rest if isinstance(ref, TensorRef)):
        for place in range(len(src.shape)):
            if src.shape[place] == index.shape[place]:
                site.same(site.axis(src, place), site.axis(index, place))
            else:
                site.pin(site.axis(src, place), "its first positions are taken")
                site.pin(site.axis(index, place), "the first positions of another tensor")
    site.mix(written, "scatter")
    return [site.dims(x)]


@rule(
    "aten.index_add",
    "aten.index_add_",
    "aten.index_copy",
    "aten.index_copy_",
    "aten.index_fill",
    "aten.index_fill_",
    "aten.index_reduce",
    "aten.index_reduce_",
)
def index_write(site: Site) -> list[Dims]:
    """``out[index[i]] = source[i]`` along one dimension: it is written by number, others pass."""
    x, dim, index, source = site.call.args[:4]
    if not x.shape:
        return [()]
    _hold(site, x, dim)
    written = site.axis(index, 0) if index.shape else site.fixed(1, _BY_NUMBER)
    site.mix(written, "scatter")
    if isinstance(source, TensorRef) and source.shape:
        for place, axis in enumerate(site.dims(source)):
            here = place == dim % len(x.shape)
            site.same(axis, written if here else site.axis(x, place))
    return [site.dims(x)]


@dataclass(frozen=True)
class _Slots:
    """The dimensions of ``x[indices]``: those that pass, and where those made stand among them."""

    passing: list[int]
    front: int
    indices: list[TensorRef]

    @property
    def masks(self) -> list[TensorRef]:
        return [ref for ref in self.indices if ref.dtype in _MASKS]

    @property
    def numbers(self) -> list[TensorRef]:
        return [ref for ref in self.indices if ref.dtype not in _MASKS]

    def made(self, hits: int) -> tuple[int, ...]:
        """The sizes that the index tensors make, where a mask has so many hits."""
        counted = [(hits,)] if self.masks else []
        return tuple(torch.broadcast_shapes(*counted, *(ref.shape for ref in self.numbers)))


def _slots(x: TensorRef, indices: Sequence[TensorRef | None]) -> _Slots:
    """Read advanced indexing: a mask takes as many dimensions as it has, an index one.

    What they make stands where the first of them stood, or in front if they are apart.
    """
    passing, first, place = [], 0, 0
    entries = [number for number, entry in enumerate(indices) if entry is not None]
    for number, entry in enumerate(indices):
        if number == entries[0]:
            first = place
        covered = len(entry.shape) if entry is not None and entry.dtype in _MASKS else 1
        passing += [place] if entry is None else []
        place += covered
    together = entries == list(range(entries[0], entries[0] + len(entries)))
    passing += range(place, len(x.shape))
    front = sum(dim < first for dim in passing) if together else 0
    return _Slots(passing, front, [entry for entry in indices if entry is not None])


def _axes(site: Site, x: TensorRef, slots: _Slots, hits: int) -> Dims:
    """The axes of ``x[indices]``; what is read by number keeps its positions."""
    taken = [dim for dim in range(len(x.shape)) if dim not in slots.passing]
    named = slots.indices if len(slots.indices) == len(taken) else [None] * len(taken)
    for dim, ref in zip(taken, named, strict=True):
        indexed(site, x, dim, ref, _BY_NUMBER)
    for mask in slots.masks:
        for axis in site.dims(mask):
            site.pin(axis, "a mask by position")
    for table in filter(site.is_weight, slots.numbers):
        for axis in site.dims(table):
            site.pin(axis, "a table of numbers")
    made = broadcast(site, slots.numbers, slots.made(hits))
    if slots.masks:
        site.mix(made[-1], "choice")
    axes = [site.axis(x, dim) for dim in slots.passing]
    return (*axes[: slots.front], *made, *axes[slots.front :])


@rule("aten.index", "aten._unsafe_index")
def index(site: Site) -> list[Dims]:
    """Advanced indexing: indexed dimensions are read by number, the others pass."""
    x, indices = site.call.args[:2]
    slots, out = _slots(x, indices), site.call.outputs[0]
    dims = _axes(site, x, slots, _hits(slots, out))
    made = len(dims) - len(slots.passing)
    labels = [site.labels(x)[dim] for dim in slots.passing]
    labels[slots.front : slots.front] = [frozenset()] * made
    _taken(site, x, labels)
    return [dims]


def _hits(slots: _Slots, shaped: TensorRef) -> int:
    """How many hits a mask had, from the shape of what was read or written."""
    rank = len(slots.made(1)) + len(slots.passing)
    after = len(slots.passing) - slots.front
    if not slots.masks or len(shaped.shape) < after + 1 or len(shaped.shape) > rank:
        return 1
    return shaped.shape[len(shaped.shape) - after - 1]


@rule("aten.index_put", "aten.index_put_", "aten._unsafe_index_put", "aten._index_put_impl_")
def index_put(site: Site) -> list[Dims]:
    """``x[indices] = values``: written by number; the other dimensions go with x's."""
    x, indices, values = site.call.args[:3]
    slots = _slots(x, indices)
    if _fills(slots, values):
        return [_filled(site, x, slots.masks[0], values)]
    hits = _hits(slots, values)
    dims = _axes(site, x, slots, hits)
    passing = {site.axis(x, dim) for dim in slots.passing}
    for axis in dims:
        if axis not in passing:
            site.mix(axis, "scatter")  # what is written twice has no defined value
            if slots.masks:
                site.pin(axis, "the hits of a mask, in order")
    for place in range(-len(values.shape), 0):
        if values.shape[place] == dims[place].size:
            site.same(site.axis(values, place), dims[place])
        else:
            site.pin(site.axis(values, place), "a single position broadcast over many")
    return [site.dims(x)]


def _fills(slots: _Slots, values: TensorRef) -> bool:
    """Whether one value, or one row for all hits, is written to a mask of the first dimensions."""
    alone = len(slots.indices) == len(slots.masks) == 1 and slots.front == 0
    rank = len(slots.passing)
    return alone and (len(values.shape) <= rank or values.shape[-1 - rank] == 1)


def _filled(site: Site, x: TensorRef, mask: TensorRef, values: TensorRef) -> Dims:
    for place, axis in enumerate(site.dims(mask)):
        site.same(axis, site.axis(x, place))
    return broadcast(site, [x, values], x.shape)


@rule("aten.take", "aten.put", "aten.put_", "aten.masked_select", "aten.segment_reduce")
def by_place(site: Site) -> list[Dims]:
    """Positions of the whole tensor, counted through: all of them stay as they are."""
    for ref in site.call.inputs:
        for axis in site.dims(ref):
            site.pin(axis, _BY_NUMBER)
    out = site.call.outputs[0]
    if out in site.call.inputs:
        return [site.dims(out)]
    return [tuple(site.chosen(size) for size in out.shape)]


@rule("aten.masked_scatter", "aten.masked_scatter_")
def masked_scatter(site: Site) -> list[Dims]:
    """The entries of a source, in order, to where a mask is set.

    Trailing dimensions along which the mask only repeats go position by position.
    """
    x, mask, source = site.call.inputs[:3]
    dims = broadcast(site, [x, mask], site.call.outputs[0].shape)
    repeated = site.draft.repeated.get(mask, frozenset())
    free = 0
    while free < min(len(mask.shape), len(source.shape)) and (
        len(mask.shape) - 1 - free in repeated and source.shape[-1 - free] == dims[-1 - free].size
    ):
        free += 1
        site.same(site.axis(source, -free), dims[-free])
    for ref in (x, mask, source):
        for axis in site.dims(ref)[: len(ref.shape) - free]:
            site.pin(axis, "filled in order")
    return [dims]


@rule("aten.nonzero", "aten.nonzero_static", "aten.argwhere")
def nonzero(site: Site) -> list[Dims]:
    """The places of the hits, one a row: a number for each dimension."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    for axis in site.dims(x):
        site.mix(axis, "choice")
    site.numbers(out, site.dims(x))
    return [(site.chosen(out.shape[0]), site.fixed(out.shape[1], "a number of dimensions"))]


@rule("aten.repeat_interleave")
def repeat_interleave(site: Site) -> list[Dims]:
    """How often each position is to be repeated -> the positions, repeated."""
    repeats, out = site.call.inputs[0], site.call.outputs[0]
    for axis in site.dims(repeats):
        site.pin(axis, "positions repeated by number")
    return [tuple(site.chosen(size) for size in out.shape)]
