"""Operators that sum products over a common axis: matrix products and convolution."""

from __future__ import annotations

from collections.abc import Sequence

from neuroexapt.capture import TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Dims
from neuroexapt.couple.site import Site, place_of, rule


def _product(site: Site, left: TensorRef, right: TensorRef, batch: int) -> Dims:
    """(batch, m, k) x (batch, k, n): k is one axis, batch axes are, m and n pass."""
    for place in range(batch):
        site.same(site.axis(left, place), site.axis(right, place))
    inner = site.same(site.axis(left, -1), site.axis(right, -2))
    _mark(site, left, right, inner)
    dims = (*site.dims(left)[:-1], site.axis(right, -1))
    common = [site.labels(left)[place] | site.labels(right)[place] for place in range(batch)]
    labels = (*common, site.labels(left)[-2], site.labels(right)[-1])
    site.set_labels(site.call.outputs[0], labels)
    return dims


def _mark(site: Site, left: TensorRef, right: TensorRef, inner: Axis) -> None:
    """Which operand a new position of the summed axis can be silenced in."""
    if site.silences(right, -2):
        site.contract(right, [-2])
        if site.is_parameter(left):
            site.produce(left)
    elif site.silences(left, -1):
        site.contract(left, [-1])
        if site.is_parameter(right):
            site.produce(right)
    elif site.is_weight(left) or site.is_weight(right):
        site.mix(inner, "sum")
    else:
        site.mix(
            inner, "dot", left=site.labels(left)[-1], right=site.labels(right)[-2], scale="free"
        )


@rule("aten.mm", "aten._int_mm")
def mm(site: Site) -> list[Dims]:
    """(m, k) x (k, n) -> (m, n)."""
    left, right = site.call.inputs[:2]
    return [_product(site, left, right, batch=0)]


@rule("aten.bmm")
def bmm(site: Site) -> list[Dims]:
    """(b, m, k) x (b, k, n) -> (b, m, n)."""
    left, right = site.call.inputs[:2]
    return [_product(site, left, right, batch=1)]


@rule("aten.addmm", "aten.addmm_", "aten.baddbmm", "aten.baddbmm_")
def addmm(site: Site) -> list[Dims]:
    """bias + (b, m, k) x (b, k, n); the bias broadcasts from the right."""
    bias, left, right = site.call.inputs[:3]
    dims = _product(site, left, right, batch=len(left.shape) - 2)
    _bias(site, bias, dims)
    return [dims]


@rule("aten.addbmm", "aten.addbmm_")
def addbmm(site: Site) -> list[Dims]:
    """bias + the sum over b of (b, m, k) x (b, k, n)."""
    bias, left, right = site.call.inputs[:3]
    site.same(site.axis(left, 0), site.axis(right, 0))
    site.mix(site.axis(left, 0), "sum")
    _mark(site, left, right, site.same(site.axis(left, 2), site.axis(right, 1)))
    dims = (site.axis(left, 1), site.axis(right, 2))
    site.set_labels(site.call.outputs[0], (site.labels(left)[1], site.labels(right)[2]))
    _bias(site, bias, dims)
    return [dims]


@rule("aten.addr", "aten.addr_")
def addr(site: Site) -> list[Dims]:
    """bias + (m) times (n), every pair."""
    bias, left, right = site.call.inputs[:3]
    dims = (site.axis(left, 0), site.axis(right, 0))
    site.set_labels(site.call.outputs[0], (site.labels(left)[0], site.labels(right)[0]))
    _bias(site, bias, dims)
    return [dims]


def _bias(site: Site, bias: TensorRef, dims: Sequence[Axis]) -> None:
    for place in range(-len(bias.shape), 0):
        if bias.shape[place] == dims[place].size:
            site.same(site.axis(bias, place), dims[place])
            site.role(bias, place, "elementwise", "zero")
        else:
            site.pin(site.axis(bias, place), "a single position broadcast over many")
    _add_bias_label(site, bias)


def _add_bias_label(site: Site, bias: TensorRef) -> None:
    out = site.call.outputs[0]
    labels = list(site.labels(out))
    for place in range(-len(bias.shape), 0):
        labels[place] |= site.labels(bias)[place]
    site.set_labels(out, labels)


@rule("aten.mv", "aten.addmv", "aten.addmv_")
def mv(site: Site) -> list[Dims]:
    """(m, k) x (k) -> (m)."""
    *bias, matrix, vector = site.call.inputs
    inner = site.same(site.axis(matrix, -1), site.axis(vector, -1))
    if site.is_weight(matrix) and site.is_weight(vector):
        site.mix(inner, "sum")  # a number about the weights, as a step of the power method is
    elif site.silences(matrix, -1):
        site.contract(matrix, [-1])
    elif site.silences(vector, -1):
        site.contract(vector, [-1])
    else:
        site.mix(inner, "sum")
    dims = (site.axis(matrix, 0),)
    site.set_labels(site.call.outputs[0], site.labels(matrix)[:1])
    if bias:
        _bias(site, bias[0], dims)
    return [dims]


@rule("aten.dot", "aten.vdot")
def dot(site: Site) -> list[Dims]:
    """(k) x (k) -> ()."""
    left, right = site.call.inputs[:2]
    inner = site.same(site.axis(left, 0), site.axis(right, 0))
    site.mix(inner, "sum")
    return [()]


@rule("aten.linear")
def linear(site: Site) -> list[Dims]:
    """(..., k) with weight (n, k) and bias (n) -> (..., n)."""
    x, weight, *bias = site.call.inputs
    inner = site.same(site.axis(x, -1), site.axis(weight, -1))
    if site.silences(weight, -1):
        site.contract(weight, [-1])
    else:
        site.mix(inner, "sum")
    dims = (*site.dims(x)[:-1], site.axis(weight, 0))
    site.set_labels(site.call.outputs[0], (*site.labels(x)[:-1], site.labels(weight)[0]))
    if bias:
        _bias(site, bias[0], dims)
    return [dims]


@rule("aten.convolution", "aten._convolution", "aten.convolution_overrideable")
def convolution(site: Site) -> list[Dims]:
    """(N, g*i, ...) with weight (g*o, i, ...) -> (N, g*o, ...); transposed: (g*i, o, ...).

    Depthwise convolution is g = channels, i = 1: the product has one factor, the channel.
    """
    x, weight, *bias = site.call.inputs
    transposed, groups = bool(site.arg(6, "transposed", False)), int(site.arg(8, "groups", 1))
    batch, channels = site.dims(x)[:2] if len(x.shape) == len(weight.shape) else (None, None)
    if batch is None or channels is None:
        raise ValueError("convolution without a batch dimension")
    incoming, outgoing = _grouped(site, weight, channels, groups, transposed)
    site.same(channels, incoming)
    if not site.silences(weight, 0 if transposed else 1):
        site.mix(channels, "sum")
    spatial = [_along(site, x, weight, place) for place in range(len(x.shape) - 2)]
    out = site.call.outputs[0]
    dims = (batch, outgoing, *spatial)
    produced = site.labels(weight)[1 if transposed and groups == 1 else 0]
    if groups > 1:
        produced |= site.labels(x)[1]  # a group stays a group
    passing = [
        origin if axis is own else frozenset()
        for own, axis, origin in zip(site.dims(x)[2:], spatial, site.labels(x)[2:], strict=True)
    ]
    site.set_labels(out, (site.labels(x)[0], produced, *passing))
    if bias:
        _channel_bias(site, bias[0], outgoing)
    site.bind("in_channels", [channels])
    site.bind("out_channels", [outgoing])
    site.bind("kernel_size", site.dims(weight)[2:], is_tuple=True)
    return [dims]


def _along(site: Site, x: TensorRef, weight: TensorRef, place: int) -> Axis:
    """A direction in space, after the kernel has gone along it.

    A kernel of size 1 leaves it alone; one as long as the input sums over it, as a matrix does.
    """
    axis, kernel = site.axis(x, 2 + place), site.axis(weight, 2 + place)
    stride, padding, more = (
        _option(site, name, place) for name in ("stride", "padding", "output_padding")
    )
    size = site.call.outputs[0].shape[2 + place]
    if kernel.size == stride == 1 and padding == more == 0:
        site.pin(kernel, "a kernel size")
        return axis
    whole = kernel.size == axis.size and size == 1 and padding == 0
    if whole and not site.setting("transposed", False) and site.silences(weight, 2 + place):
        site.same(axis, kernel)
        site.role(weight, 2 + place, "consumer", "zero")
    else:
        site.pin(axis, "neighbours in space")
        site.pin(kernel, "a kernel size")
    return site.fixed(size, "a spatial size, computed from the input")


def _option(site: Site, name: str, place: int) -> int:
    given = site.setting(name)
    return int(given[place if len(given) > 1 else 0])


def _grouped(
    site: Site, weight: TensorRef, channels: Axis, groups: int, transposed: bool
) -> tuple[Axis, Axis]:
    """Input and output channel axes of a convolution, and the roles of its weight."""
    rows, columns = site.dims(weight)[:2]
    if groups == 1:
        site.role(weight, 0, "consumer" if transposed else "producer")
        site.role(weight, 1, "producer" if transposed else "consumer")
        return (rows, columns) if transposed else (columns, rows)
    group = site.free(groups)
    site.same(rows, algebra.product([group, site.free(rows.size // groups)]))
    per_group = algebra.factors(rows)
    outer = _leading(per_group, groups)
    other = algebra.product([*outer, columns])
    site.bind("groups", [algebra.product(outer)])
    # A group's rows are new as a whole; only the axis inside a group can be read by others.
    for number, part in enumerate(per_group):
        inside = transposed and number >= len(outer)
        site.role(weight, 0, "consumer" if inside else "producer", part=part)
    site.role(weight, 1, "producer" if transposed else "consumer")
    return (rows, other) if transposed else (other, rows)


def _leading(parts: Sequence[Axis], size: int) -> list[Axis]:
    """The leading factors whose product is ``size``."""
    leading: list[Axis] = []
    for part in parts:
        if size == 1:
            break
        leading.append(part)
        size //= part.size
    return leading


def _channel_bias(site: Site, bias: TensorRef, outgoing: Axis) -> None:
    site.same(site.axis(bias, 0), outgoing)
    site.role(bias, 0, "elementwise", "zero")
    out = site.call.outputs[0]
    labels = list(site.labels(out))
    labels[1] |= site.labels(bias)[0]
    site.set_labels(out, labels)


@rule("aten._trilinear")
def trilinear(site: Site) -> list[Dims]:
    """Three tensors with dimensions of 1 put in, multiplied, and summed over some dimensions."""
    operands, expanded, summed = site.call.args[:3], site.call.args[3:6], site.call.args[6]
    rank = len(operands[0].shape) + len(expanded[0])
    placed = [_spread(ref, added, rank) for ref, added in zip(operands, expanded, strict=True)]
    dims, labels = [], []
    for place in range(rank):
        met = [
            (ref, dim) for ref, at in zip(operands, placed, strict=True) if (dim := at[place]) >= 0
        ]
        for ref, dim in met[1:]:
            site.same(site.axis(*met[0]), site.axis(ref, dim))
        if place not in summed:
            dims.append(site.axis(*met[0]))
            labels.append(place_of(site.labels(ref)[dim] for ref, dim in met))
        elif not any(site.silences(ref, dim) for ref, dim in met):
            site.mix(site.axis(*met[0]), "sum")
    _trilinear_roles(site, operands, placed, summed)
    site.set_labels(site.call.outputs[0], labels)
    return [tuple(dims)]


def _spread(ref: TensorRef, added: Sequence[int], rank: int) -> list[int]:
    """For each dimension of the product the operand's own, or -1 where it has none."""
    own = iter(range(len(ref.shape)))
    return [-1 if place in added else next(own) for place in range(rank)]


def _trilinear_roles(
    site: Site, operands: Sequence[TensorRef], placed: Sequence[list[int]], summed: Sequence[int]
) -> None:
    for ref, at in zip(operands, placed, strict=True):
        if site.is_parameter(ref):
            site.contract(ref, [at[place] for place in summed if at[place] >= 0])


@rule("aten._cdist_forward", "aten._euclidean_dist")
def cdist(site: Site) -> list[Dims]:
    """(..., p, d) and (..., r, d) -> (..., p, r): distances over d, between all pairs."""
    left, right = site.call.inputs[:2]
    out = site.call.outputs[0]
    site.mix(site.same(site.axis(left, -1), site.axis(right, -1)), "distance")
    for ref in (left, right):
        site.role(ref, -2, "producer")
    batch = [
        _batch_axis(site, [left, right], place, out.shape[place])
        for place in range(-len(out.shape), -2)
    ]
    common = [
        place_of(site.labels(ref)[p] for ref in (left, right) if len(ref.shape) >= -p)
        for p in range(-len(out.shape), -2)
    ]
    site.set_labels(out, (*common, site.labels(left)[-2], site.labels(right)[-2]))
    return [(*batch, site.axis(left, -2), site.axis(right, -2))]


def _batch_axis(site: Site, refs: Sequence[TensorRef], place: int, size: int) -> Axis:
    met = [site.axis(ref, place) for ref in refs if len(ref.shape) >= -place]
    whole = [axis for axis in met if axis.size == size]
    for axis in met:
        if axis.size != size:
            site.pin(axis, "a single position broadcast over many")
        else:
            site.same(whole[0], axis)
    return whole[0]
