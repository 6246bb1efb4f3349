"""Operators that reorder, rank or choose positions, and those for which their order matters."""

from __future__ import annotations

from neuroexapt.capture import TensorRef
from neuroexapt.couple.marks import Dims
from neuroexapt.couple.numbering import counted
from neuroexapt.couple.site import Site, rule


@rule("aten.roll", "aten.flip", "aten.rot90")
def moved(site: Site) -> list[Dims]:
    """Positions change places: the dimensions named keep theirs."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    named = site.setting("dims") or range(len(x.shape))
    places = {int(dim) % len(x.shape) for dim in named}
    for place in places:
        site.pin(site.axis(x, place), "positions change places")
    return [
        tuple(
            site.fixed(size, "positions change places") if place in places else axis
            for place, (axis, size) in enumerate(zip(site.dims(x), out.shape, strict=True))
        )
    ]


@rule("aten.sort", "aten.argsort", "aten.msort")
def sort(site: Site) -> list[Dims]:
    """Positions are ranked along one dimension."""
    x = site.call.inputs[0]
    dim = 0 if site.call.op == "aten.msort" else int(site.setting("dim", -1))
    dims = list(site.dims(x))
    if dims:
        site.pin(dims[dim], "positions change places")
    return [tuple(dims)] * len(site.call.outputs)


@rule("aten.tril", "aten.triu", "aten.tril_", "aten.triu_")
def triangle(site: Site) -> list[Dims]:
    """A triangle of the last two dimensions: which entry is kept goes by position."""
    x = site.call.inputs[0]
    for axis in site.dims(x)[-2:]:
        site.pin(axis, "a triangle by position")
    return [site.dims(x)]


@rule("aten.topk")
def topk(site: Site) -> list[Dims]:
    """The k largest along one dimension, and their numbers."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    if not x.shape:
        return [()] * len(site.call.outputs)
    dim = int(site.setting("dim", -1)) % len(x.shape)
    site.mix(site.axis(x, dim), "topk")
    site.at_least(site.axis(x, dim), out.shape[dim])
    dims = list(site.dims(x))
    dims[dim] = site.fixed(out.shape[dim], "a number of chosen positions")
    site.numbers(site.call.outputs[1], [site.axis(x, dim)])
    return [tuple(dims)] * len(site.call.outputs)


@rule("aten.cumsum", "aten.cumsum_", "aten.cumprod", "aten.cumprod_", "aten.logcumsumexp")
def running(site: Site) -> list[Dims]:
    """Every position depends on those before it."""
    x = site.call.inputs[0]
    if site.call.op == "aten.cumsum" and x in site.draft.counts:
        # Where the rows of each position begin, once they are sorted by position.
        site.draft.counts[site.call.outputs[0]] = site.draft.counts[x]
    else:
        _order_matters(site, x)
    return [site.dims(x)]


@rule("aten.cummax", "aten.cummin")
def running_extreme(site: Site) -> list[Dims]:
    """The largest until now, and its number."""
    x = site.call.inputs[0]
    _order_matters(site, x)
    return [site.dims(x)] * len(site.call.outputs)


def _order_matters(site: Site, x: TensorRef) -> None:
    if x.shape:
        site.pin(site.axis(x, int(site.setting("dim"))), "an order that matters")


@rule("aten.bucketize", "aten.searchsorted")
def bucketize(site: Site) -> list[Dims]:
    """Between which of some sorted values each value lies."""
    edges = site.setting("boundaries") or site.setting("sorted_sequence")
    x = site.setting("self")
    site.pin(site.axis(edges, -1), "an order that matters")
    if not isinstance(x, TensorRef):
        return [()]
    for place in range(len(edges.shape) - 1):
        site.same(site.axis(edges, place), site.axis(x, place))
    for ref in site.call.inputs:
        if ref not in (edges, x):  # the order of an unsorted sequence
            site.pin(site.axis(ref, -1), "an order that matters")
            for place in range(len(ref.shape) - 1):
                site.same(site.axis(ref, place), site.axis(edges, place))
    return [site.dims(x)]


@rule("aten.isin")
def isin(site: Site) -> list[Dims]:
    """Whether each value is among some others."""
    elements, among = site.call.args[:2]
    if isinstance(among, TensorRef):
        for axis in site.dims(among):
            site.mix(axis, "choice")
    return [site.dims(elements) if isinstance(elements, TensorRef) else ()]


@rule("aten.histc", "aten.bincount", "aten._unique2", "aten.unique_dim", "aten.unique_consecutive")
def tally(site: Site) -> list[Dims]:
    """Values counted or listed: every position of the inputs may matter to every count."""
    each = counted(site) if site.call.op in ("aten.histc", "aten.bincount") else None
    for ref in site.call.inputs:
        for axis in (*site.dims(ref), *site.draft.numbering.get(ref, ())):
            if each is None:
                site.pin(axis, "values counted")
    if each is not None:
        site.draft.counts[site.call.outputs[0]] = each
        return [(each,)]
    return [tuple(site.chosen(size) for size in ref.shape) for ref in site.call.outputs]


@rule("aten.multinomial")
def multinomial(site: Site) -> list[Dims]:
    """Numbers drawn with the probabilities along the last dimension."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    site.mix(site.axis(x, -1), "multinomial")
    site.numbers(out, [site.axis(x, -1)])
    return [(*site.dims(x)[:-1], site.fixed(out.shape[-1], "a number of draws"))]


@rule("aten._pack_padded_sequence")
def pack(site: Site) -> list[Dims]:
    """(T, B, ...) and lengths -> (all steps, ...) and the batch size of each step."""
    x, lengths = site.call.inputs[:2]
    for axis in (*site.dims(x)[:2], *site.dims(lengths)):
        site.pin(axis, "sequences by their lengths")
    data, sizes = site.call.outputs
    return [(site.chosen(data.shape[0]), *site.dims(x)[2:]), (site.chosen(sizes.shape[0]),)]


@rule("aten._pad_packed_sequence")
def unpack(site: Site) -> list[Dims]:
    """(all steps, ...) and the batch size of each step -> (T, B, ...) and lengths."""
    data, sizes = site.call.inputs[:2]
    for axis in (site.axis(data, 0), site.axis(sizes, 0)):
        site.pin(axis, "sequences by their lengths")
    out, lengths = site.call.outputs
    steps = [site.fixed(size, "sequences by their lengths") for size in out.shape[:2]]
    batch = [site.fixed(size, "sequences by their lengths") for size in lengths.shape]
    return [(*steps, *site.dims(data)[1:]), tuple(batch)]
