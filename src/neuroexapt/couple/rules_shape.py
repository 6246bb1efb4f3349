"""Operators that regroup, reorder, join or cut dimensions without touching values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neuroexapt.capture import TensorRef, refs_in
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.site import Dims, Label, Site, rule

Origin = frozenset[Label]
EQUAL_PARTS = (2, 3, 4)  # a slice that is one of so few equal parts is taken as such


@rule(
    "aten.view",
    "aten._unsafe_view",
    "aten.reshape",
    "aten._reshape_alias",
    "aten._reshape_copy",
    "aten.view_copy",
    "aten.unsqueeze",
    "aten.unsqueeze_",
    "aten.squeeze",
    "aten.squeeze_",
    "aten.flatten",
)
def view(site: Site) -> list[Dims]:
    """Row-major regrouping: ``(B, 12, H)`` seen as ``(B, 3, 4*H)`` makes 12 = 3*4."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    lead, rest = _unchanged(x.shape, out.shape)
    inside = slice(lead, len(x.shape) - rest)
    entering = list(zip(site.dims(x), site.labels(x), strict=True))
    if 1 in (*x.shape[inside], *out.shape[lead : len(out.shape) - rest]):
        _pin_singles(site, entering)
    try:
        groups = _regroup(site, entering[inside], out.shape[lead : len(out.shape) - rest])
    except algebra.Mismatch as mismatch:
        for axis, _ in entering[inside]:
            site.pin(axis, f"seen with another shape: {mismatch}")
        sizes = out.shape[lead : len(out.shape) - rest]
        groups = [(site.fixed(n, "seen with another shape"), frozenset()) for n in sizes]
    groups = [*entering[:lead], *groups, *entering[inside.stop :]]
    site.set_labels(out, [origin for _, origin in groups])
    dims = tuple(axis for axis, _ in groups)
    if isinstance(site.fields.get("dim"), int):  # nn.Unflatten
        at = site.fields["dim"] % len(x.shape)
        count = len(site.fields.get("unflattened_size") or ())
        site.bind("unflattened_size", dims[at : at + count], is_tuple=True)
    return [dims]


def _pin_singles(site: Site, entering: Sequence[tuple[Axis, Origin]]) -> None:
    """Beside a dimension of size 1 that comes or goes, which one it is cannot be told."""
    for axis, _ in entering:
        if axis.size == 1:
            site.pin(axis, "a single position that a view drops or adds")


def _unchanged(before: Sequence[int], after: Sequence[int]) -> tuple[int, int]:
    """How many dimensions at the front and at the back stay as they are."""
    shorter = min(len(before), len(after))
    lead = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    left = shorter - lead
    rest = next((i for i in range(left) if before[-1 - i] != after[-1 - i]), left)
    return lead, rest


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
    """A matrix transposed."""
    return [_reordered(site, list(reversed(range(len(site.call.inputs[0].shape)))))]


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
        repeated |= {place + added} if axis.size != size else set()
    site.set_labels(out, ((frozenset(),) * added) + site.labels(x))
    site.draft.repeated[out] = frozenset(repeated)
    return [tuple(dims)]


@rule("aten.repeat", "aten.tile")
def repeat(site: Site) -> list[Dims]:
    """The whole dimension r times in a row: r * n with r outside."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    added = len(out.shape) - len(x.shape)
    dims: list[Axis] = [site.free(n) for n in out.shape[:added]]
    for axis, size in zip(site.dims(x), out.shape[added:], strict=True):
        times = size // axis.size if axis.size else 1
        outer = site.fixed(times, "a number of repetitions")
        dims.append(axis if times == 1 else algebra.product([outer, axis]))
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
    columns = zip(*(site.labels(ref) for ref in parts), strict=True)
    site.set_labels(site.call.outputs[0], [frozenset().union(*column) for column in columns])
    return [tuple(dims)]


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


def picked(labels: Sequence[Origin], axis: Axis, start: int, stop: int) -> list[Origin]:
    """The labels narrowed to positions start..stop of an axis."""
    pick = (axis, start, stop)
    return [
        frozenset(Label(label.name, label.dim, (*label.picks, pick)) for label in origin)
        for origin in labels
    ]


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
        start, stop, step = site.call.args[2], site.call.args[2] + site.call.args[3], 1
    else:
        start, stop, step = slice(
            site.arg(2, "start"), _stop(site), site.arg(4, "step", 1)
        ).indices(size)
    if (start, stop, step) == (0, size, 1):
        site.set_labels(out, site.labels(x))
        return [site.dims(x)]
    if step != 1:
        site.pin(site.axis(x, dim), "every n-th position taken")
        return [_replaced(site, x, dim, site.fixed(out.shape[dim], "every n-th position"))]
    return [_part(site, x, dim, start, stop, out)]


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


@rule("aten.constant_pad_nd", "aten.pad")
def pad(site: Site) -> list[Dims]:
    """New positions before and after; a negative amount cuts."""
    x, amounts = site.call.args[:2]
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
