"""Operators that regroup, reorder, join or cut dimensions without touching values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from neuroexapt.capture import TensorRef, refs_in
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Dims, Join, Label
from neuroexapt.couple.site import Site, place_of, rule

Origin = frozenset[Label]


@rule(
    "aten.view",
    "aten._unsafe_view",
    "aten.reshape",
    "aten._reshape_alias",
    "aten._reshape_copy",
    "aten.view_copy",
    "aten.unsqueeze",
    "aten.unsqueeze_",
    "aten.unsqueeze_copy",
    "aten.squeeze",
    "aten.squeeze_",
    "aten.squeeze_copy",
    "aten.flatten",
)
def view(site: Site) -> list[Dims]:
    """Row-major regrouping: ``(B, 12, H)`` seen as ``(B, 3, 4*H)`` makes 12 = 3*4."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    entering = list(zip(site.dims(x), site.labels(x), strict=True))
    blocks = list(_blocks(x.shape, out.shape))
    if any(
        1 in (*x.shape[old], *out.shape[new]) and x.shape[old] != out.shape[new]
        for old, new in blocks
    ):
        _pin_singles(site, entering)
    groups = [pair for old, new in blocks for pair in _seen(site, entering[old], out.shape[new])]
    site.set_labels(out, [origin for _, origin in groups])
    dims = tuple(axis for axis, _ in groups)
    if isinstance(site.fields.get("dim"), int):  # nn.Unflatten
        at = site.fields["dim"] % len(x.shape)
        count = len(site.fields.get("unflattened_size") or ())
        site.bind("unflattened_size", dims[at : at + count], is_tuple=True)
    return [dims]


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Cut two shapes into the shortest runs of dimensions that hold equally many positions."""
    old = new = 0
    while old < len(before) and new < len(after):
        start, left, right = (old, new), before[old], after[new]
        old, new = old + 1, new + 1
        while left != right:
            if left < right:
                left, old = left * before[old], old + 1
            else:
                right, new = right * after[new], new + 1
        yield slice(start[0], old), slice(start[1], new)
    yield slice(old, len(before)), slice(new, len(after))  # nothing, or sizes of 1


def _pin_singles(site: Site, entering: Sequence[tuple[Axis, Origin]]) -> None:
    """Beside a dimension of size 1 that comes or goes, which one it is cannot be told."""
    for axis, _ in entering:
        if axis.size == 1:
            site.pin(axis, "a single position that a view drops or adds")


def _seen(
    site: Site, entering: Sequence[tuple[Axis, Origin]], sizes: Sequence[int]
) -> Sequence[tuple[Axis, Origin]]:
    if tuple(axis.size for axis, _ in entering) == tuple(sizes):
        return entering
    try:
        return _regroup(site, entering, sizes)
    except algebra.Mismatch as mismatch:
        for axis, _ in entering:
            site.pin(axis, f"seen with another shape: {mismatch}")
        return [(site.fixed(n, "seen with another shape"), frozenset()) for n in sizes]


def _regroup(
    site: Site, entering: Sequence[tuple[Axis, Origin]], sizes: Sequence[int]
) -> list[tuple[Axis, Origin]]:
    rest = []
    for axis, origin in entering:
        for factor in algebra.factors(axis):
            if factor.size == 1:
                site.pin(factor, "a single position that a view drops or adds")
            else:
                rest.append((factor, origin))
    groups = []
    for size in sizes:
        if size == 1:
            groups.append((site.fixed(1, "a dimension of size 1"), frozenset[Label]()))
        else:
            groups.append(_take(rest, size))
    return groups


def _take(rest: list[tuple[Axis, Origin]], size: int) -> tuple[Axis, Origin]:
    """Take factors off the front of ``rest`` until their product is ``size``."""
    parts: list[Axis] = []
    origins: Origin = frozenset()
    while size != 1:
        if not rest:
            raise algebra.Mismatch(f"no positions left for {size}")
        factor, origin = rest.pop(0)
        if size % factor.size:
            factor, remainder = algebra.split(factor, size)
            rest.insert(0, (remainder, origin))
        parts.append(factor)
        origins |= origin
        size //= factor.size
    return algebra.product(parts), origins


@rule("aten.permute", "aten.permute_copy")
def permute(site: Site) -> list[Dims]:
    """Dimensions in another order."""
    return [_reordered(site, [int(d) for d in site.call.args[1]])]


@rule("aten.transpose", "aten.transpose_", "aten.transpose_copy", "aten.swapaxes")
def transpose(site: Site) -> list[Dims]:
    """Two dimensions exchanged."""
    order = list(range(len(site.call.inputs[0].shape)))
    first, second = site.call.args[1:3]
    order[first], order[second] = order[second], order[first]
    return [_reordered(site, order)]


@rule("aten.t", "aten.t_", "aten.t_copy", "aten.numpy_T", "aten.mT")
def t(site: Site) -> list[Dims]:
    """A matrix, or each matrix of a batch (``mT``), transposed."""
    rank = len(site.call.inputs[0].shape)
    batch = rank - 2 if site.call.op == "aten.mT" else 0
    return [_reordered(site, [*range(batch), *reversed(range(batch, rank))])]


def _reordered(site: Site, order: Sequence[int]) -> Dims:
    x, out = site.call.inputs[0], site.call.outputs[0]
    site.set_labels(out, [site.labels(x)[dim] for dim in order])
    return tuple(site.axis(x, dim) for dim in order)


@rule("aten.expand", "aten.expand_copy", "aten.expand_as", "aten.broadcast_to")
def expand(site: Site) -> list[Dims]:
    """Sizes of 1 repeated; the repeated dimension is new."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    added = len(out.shape) - len(x.shape)
    dims: list[Axis] = [site.free(n) for n in out.shape[:added]]
    repeated = set(range(added)) | {d + added for d in site.draft.repeated.get(x, ())}
    for place, size in enumerate(out.shape[added:]):
        axis = site.axis(x, place)
        dims.append(axis if axis.size == size else site.free(size))
        if axis.size != size:
            site.pin(axis, "a single position broadcast over many")
            repeated.add(place + added)
    site.set_labels(out, ((frozenset(),) * added) + site.labels(x))
    site.draft.repeated[out] = frozenset(repeated)
    return [tuple(dims)]


@rule("aten.repeat", "aten.tile")
def repeat(site: Site) -> list[Dims]:
    """The whole dimension r times in a row: r * n with r outside; a single position gives r."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    added = len(out.shape) - len(x.shape)
    dims: list[Axis] = [site.free(n) for n in out.shape[:added]]
    for axis, size in zip(site.dims(x), out.shape[added:], strict=True):
        if axis.size == size:
            dims.append(axis)
        elif axis.size == 1:
            site.pin(axis, "a single position broadcast over many")
            dims.append(site.free(size))
        else:
            dims.append(algebra.product([site.free(size // axis.size), axis]))
    site.set_labels(out, ((frozenset(),) * added) + site.labels(x))
    return [tuple(dims)]


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(site: Site) -> list[Dims]:
    """Segments in order along one dimension; the others are the same axes."""
    parts = [ref for ref in refs_in(site.call.args[0]) if ref.shape != (0,)]
    dim = int(site.arg(1, "dim", 0)) % len(parts[0].shape)
    dims = list(site.dims(parts[0]))
    for other in parts[1:]:
        for place, axis in enumerate(site.dims(other)):
            if place != dim:
                site.same(dims[place], axis)
    dims[dim] = algebra.concat([site.axis(ref, dim) for ref in parts])
    columns = [place_of(column) for column in zip(*map(site.labels, parts), strict=True)]
    columns[dim] = _joined(site, parts, dim, dims[dim])
    site.set_labels(site.call.outputs[0], columns)
    return [tuple(dims)]


def _joined(site: Site, parts: Sequence[TensorRef], dim: int, whole: Axis) -> Origin:
    """The labels of all parts, each with the segment that it makes."""
    joined, start = set[Label](), 0
    for ref in parts:
        size = ref.shape[dim]
        joined |= {label.then(Join(whole, start, size)) for label in site.labels(ref)[dim]}
        start += size
    return frozenset(joined)


@rule("aten.stack")
def stack(site: Site) -> list[Dims]:
    """Tensors of one shape along a new dimension."""
    parts = list(refs_in(site.call.args[0]))
    rank = len(parts[0].shape) + 1
    dim = int(site.arg(1, "dim", 0)) % rank
    for other in parts[1:]:
        for a, b in zip(site.dims(parts[0]), site.dims(other), strict=True):
            site.same(a, b)
    dims = list(site.dims(parts[0]))
    dims.insert(dim, site.fixed(len(parts), "a number of stacked tensors"))
    columns = [frozenset[Label]().union(*c) for c in zip(*map(site.labels, parts), strict=True)]
    columns.insert(dim, frozenset())
    site.set_labels(site.call.outputs[0], columns)
    return [tuple(dims)]


@rule("aten.constant_pad_nd", "aten.pad")
def pad(site: Site) -> list[Dims]:
    """New positions before and after; a negative amount cuts."""
    x, amounts = site.call.args[:2]
    if site.setting("mode", "constant") != "constant":
        raise ValueError("padding by values of the tensor itself")
    dims = list(site.dims(x))
    for pair in range(len(amounts) // 2):
        before, after = amounts[2 * pair], amounts[2 * pair + 1]
        place = len(dims) - 1 - pair
        if before or after:
            dims[place] = _padded(site, dims[place], before, after)
    site.set_labels(site.call.outputs[0], site.labels(x))
    return [tuple(dims)]


def _padded(site: Site, axis: Axis, before: int, after: int) -> Axis:
    if before < 0 or after < 0:
        site.pin(axis, "cut by a negative padding")
        return site.fixed(axis.size + before + after, "cut by a negative padding")
    front, back = (site.fixed(n, "an amount of padding") for n in (before, after))
    return algebra.concat([front, axis, back])


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(site: Site) -> list[Dims]:
    """(N, g*c, ...) -> (N, c*g, ...)."""
    x, groups = site.call.args[:2]
    group, inner = site.free(groups), site.free(x.shape[1] // groups)
    site.same(site.axis(x, 1), algebra.product([group, inner]))
    site.groups("groups", group)
    shuffled = algebra.product([inner, group])
    return [(site.axis(x, 0), shuffled, *site.dims(x)[2:])]
