"""Operators that name positions by number, and operators that create tensors."""

from __future__ import annotations

from neuroexapt.capture import TensorRef, refs_in
from neuroexapt.couple.site import Dims, Site, rule


@rule("aten.roll", "aten.flip", "aten.sort", "aten.topk", "aten.argsort", "aten.kthvalue")
def ordered(site: Site) -> list[Dims]:
    """Positions change places: the dimensions named keep theirs."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    for place, axis in enumerate(site.dims(x)):
        if place in _moved(site, x):
            site.pin(axis, "positions change places")
    dims = tuple(
        axis if axis.size == size else site.fixed(size, "a number of chosen positions")
        for axis, size in zip(site.dims(x), out.shape, strict=True)
    )
    return [dims] * len(site.call.outputs)


def _moved(site: Site, x: TensorRef) -> set[int]:
    at = {"aten.flip": 1, "aten.sort": 1, "aten.argsort": 1}.get(site.call.op, 2)
    given = site.arg(at, "dims" if site.call.op in ("aten.roll", "aten.flip") else "dim")
    if isinstance(given, bool) or given is None:
        given = range(len(x.shape)) if site.call.op == "aten.roll" else [-1]
    listed = [given] if isinstance(given, int) else given or range(len(x.shape))
    return {int(dim) % len(x.shape) for dim in listed}


@rule("aten.tril", "aten.triu", "aten.tril_", "aten.triu_")
def triangle(site: Site) -> list[Dims]:
    """A triangle of the last two dimensions: which entry is kept goes by position."""
    x = site.call.inputs[0]
    for axis in site.dims(x)[-2:]:
        site.pin(axis, "a triangle by position")
    site.set_labels(site.call.outputs[0], site.labels(x))
    return [site.dims(x)]


@rule(
    "aten.index_select",
    "aten.gather",
    "aten.index_add",
    "aten.index_add_",
    "aten.scatter",
    "aten.scatter_",
    "aten.scatter_add",
    "aten.scatter_add_",
    "aten.index_copy",
    "aten.index_copy_",
    "aten.scatter_reduce",
    "aten.index_fill",
    "aten.index_fill_",
)
def by_number(site: Site) -> list[Dims]:
    """One dimension's positions are named by an index tensor; it keeps them."""
    x, dim = site.call.args[:2]
    out = site.call.outputs[0]
    dim %= max(len(x.shape), 1)
    site.pin(site.axis(x, dim), "positions taken by an index tensor")
    whole = "gather" in site.call.op or "scatter" in site.call.op
    for ref in site.call.inputs[1:]:
        for place, axis in enumerate(site.dims(ref)):
            if place == dim or len(ref.shape) != len(x.shape):
                site.pin(axis, "positions of an index tensor")
            elif whole or axis.size == x.shape[place]:
                site.same(axis, site.axis(x, place))
    dims = [
        axis if axis.size == size and place != dim else site.fixed(size, "chosen positions")
        for place, (axis, size) in enumerate(zip(site.dims(x), out.shape, strict=True))
    ]
    if out.shape == x.shape:
        dims[dim] = site.axis(x, dim)
    return [tuple(dims)]


@rule("aten.index", "aten._unsafe_index")
def index(site: Site) -> list[Dims]:
    """Advanced indexing: indexed dimensions keep their positions, the others pass."""
    x, indices = site.call.args[:2]
    places = [place for place, entry in enumerate(indices) if entry is not None]
    for place in places:
        site.pin(site.axis(x, place), "positions taken by an index tensor")
    return [_indexed_dims(site, x, places, site.call.outputs[0])]


def _indexed_dims(site: Site, x: TensorRef, places: list[int], out: TensorRef) -> Dims:
    passing = [axis for place, axis in enumerate(site.dims(x)) if place not in places]
    new = len(out.shape) - len(passing)
    adjacent = places == list(range(places[0], places[0] + len(places)))
    at = places[0] if adjacent else 0
    made = [site.fixed(n, "chosen positions") for n in out.shape[at : at + new]]
    dims = [*passing[:at], *made, *passing[at:]]
    if tuple(axis.size for axis in dims) != out.shape:
        return tuple(site.fixed(n, "chosen positions") for n in out.shape)
    return tuple(dims)


@rule("aten.index_put", "aten.index_put_", "aten._unsafe_index_put")
def index_put(site: Site) -> list[Dims]:
    """Writing by index: everything that is written keeps its positions."""
    for ref in refs_in((site.call.args[1], site.call.args[2])):
        for axis in site.dims(ref):
            site.pin(axis, "written by an index tensor")
    x = site.call.args[0]
    for place, entry in enumerate(site.call.args[1]):
        if entry is not None:
            site.pin(site.axis(x, place), "written by an index tensor")
    return [site.dims(x)]


@rule(
    "aten.empty",
    "aten.empty_strided",
    "aten.full",
    "aten.new_empty",
    "aten.new_empty_strided",
    "aten.new_full",
    "aten.new_ones",
    "aten.new_zeros",
    "aten.ones",
    "aten.rand",
    "aten.randint",
    "aten.randn",
    "aten.scalar_tensor",
    "aten.zeros",
    "aten.normal",
)
def create(site: Site) -> list[Dims]:
    """A tensor made from numbers alone; what it meets says which axes it has."""
    for ref in site.call.outputs:
        site.set_labels(ref, (frozenset(),) * len(ref.shape))
        site.draft.weights.add(ref)
    return [tuple(site.free(n) for n in ref.shape) for ref in site.call.outputs]


@rule("aten.arange", "aten.eye", "aten.linspace", "aten.logspace", "aten.randperm")
def count(site: Site) -> list[Dims]:
    """Values made from positions: another number of positions gives each another value."""
    result = create(site)
    return [tuple(site.fixed(axis.size, "values made by position") for axis in d) for d in result]
