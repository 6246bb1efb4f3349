"""Operators that sum products over a common axis: matrix products, convolution, attention."""

from __future__ import annotations

from collections.abc import Sequence

from neuroexapt.capture import TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.site import Dims, Label, Site, place_of, rule


def _product(site: Site, left: TensorRef, right: TensorRef, batch: int) -> Dims:
    """(batch, m, k) x (batch, k, n): k is one axis, batch axes are, m and n pass."""
    for place in range(batch):
        site.same(site.axis(left, place), site.axis(right, place))
    inner = site.same(site.axis(left, -1), site.axis(right, -2))
    _mark(site, left, right, inner)
    dims = (*site.dims(left)[:-1], site.axis(right, -1))
    site.set_labels(site.call.outputs[0], (*site.labels(left)[:-1], site.labels(right)[-1]))
    return dims


def _mark(site: Site, left: TensorRef, right: TensorRef, inner: Axis) -> None:
    """Which operand a new position of the summed axis can be silenced in."""
    if site.is_parameter(right):
        site.contract(right, [-2])
        if site.is_parameter(left):
            site.produce(left)
    elif site.is_parameter(left):
        site.contract(left, [-1])
    elif site.is_weight(left) or site.is_weight(right):
        site.mix(inner, "sum")
    else:
        site.mix(
            inner, "dot", left=site.labels(left)[-1], right=site.labels(right)[-2], scale="free"
        )


@rule("aten.mm")
def mm(site: Site) -> list[Dims]:
    """(m, k) x (k, n) -> (m, n)."""
    left, right = site.call.inputs[:2]
    return [_product(site, left, right, batch=0)]


@rule("aten.bmm")
def bmm(site: Site) -> list[Dims]:
    """(b, m, k) x (b, k, n) -> (b, m, n)."""
    left, right = site.call.inputs[:2]
    return [_product(site, left, right, batch=1)]


@rule("aten.addmm", "aten.baddbmm")
def addmm(site: Site) -> list[Dims]:
    """bias + (b, m, k) x (b, k, n); the bias broadcasts from the right."""
    bias, left, right = site.call.inputs[:3]
    dims = _product(site, left, right, batch=len(left.shape) - 2)
    _bias(site, bias, dims)
    return [dims]


def _bias(site: Site, bias: TensorRef, dims: Sequence[Axis]) -> None:
    for place in range(-len(bias.shape), 0):
        if bias.shape[place] == dims[place].size:
            site.same(site.axis(bias, place), dims[place])
            site.role(bias, place, "elementwise", "zero")
    _add_bias_label(site, bias)


def _add_bias_label(site: Site, bias: TensorRef) -> None:
    out = site.call.outputs[0]
    labels = list(site.labels(out))
    for place in range(-len(bias.shape), 0):
        labels[place] |= site.labels(bias)[place]
    site.set_labels(out, labels)


@rule("aten.mv", "aten.addmv")
def mv(site: Site) -> list[Dims]:
    """(m, k) x (k) -> (m)."""
    matrix, vector = site.call.inputs[-2:]
    inner = site.same(site.axis(matrix, -1), site.axis(vector, -1))
    if site.is_weight(matrix):
        site.contract(matrix, [-1])
    elif site.is_weight(vector):
        site.contract(vector, [-1])
    else:
        site.mix(inner, "sum")
    return [(site.axis(matrix, 0),)]


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
    site.same(site.axis(x, -1), site.axis(weight, -1))
    site.contract(weight, [-1])
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
    _kernel(site, weight)
    for axis in site.dims(x)[2:]:
        site.pin(axis, "neighbours in space")
    out = site.call.outputs[0]
    spatial = [site.fixed(n, "a spatial size, computed from the input") for n in out.shape[2:]]
    dims = (batch, outgoing, *spatial)
    produced = site.labels(weight)[1 if transposed and groups == 1 else 0]
    site.set_labels(out, (frozenset(), produced, *([frozenset()] * len(spatial))))
    if bias:
        _channel_bias(site, bias[0], outgoing)
    site.bind("in_channels", [channels])
    site.bind("out_channels", [outgoing])
    return [dims]


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


def _kernel(site: Site, weight: TensorRef) -> None:
    for axis in site.dims(weight)[2:]:
        site.pin(axis, "a kernel size")


def _channel_bias(site: Site, bias: TensorRef, outgoing: Axis) -> None:
    site.same(site.axis(bias, 0), outgoing)
    site.role(bias, 0, "elementwise", "zero")
    out = site.call.outputs[0]
    labels = list(site.labels(out))
    labels[1] |= site.labels(bias)[0]
    site.set_labels(out, labels)


@rule(
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "aten._scaled_dot_product_attention_math",
    "aten._scaled_dot_product_attention_math_for_mps",
    "aten.scaled_dot_product_attention",
)
def attention(site: Site) -> list[Dims]:
    """q (B, H, T, d), k (B, H, S, d), v (B, H, S, e) -> (B, H, T, e); scores sum over d."""
    query, key, value = site.call.inputs[:3]
    for place in range(len(query.shape) - 2):
        for other in (key, value):
            site.same(site.axis(query, place), site.axis(other, place))
    site.same(site.axis(key, -2), site.axis(value, -2))
    inner = site.same(site.axis(query, -1), site.axis(key, -1))
    scale = "free" if site.call.kwargs.get("scale") is not None else "inverse_sqrt"
    site.mix(inner, "dot", left=site.labels(query)[-1], right=site.labels(key)[-1], scale=scale)
    out, *rest = site.call.outputs
    labels: list[frozenset[Label]] = [frozenset()] * len(out.shape)
    labels[-3 % len(out.shape)] = place_of([site.labels(r)[-3] for r in (query, key, value)])
    labels[-1] = site.labels(value)[-1]
    site.set_labels(out, labels)
    dims = (*site.dims(query)[:-1], site.axis(value, -1))
    extra = [tuple(site.free(n) for n in r.shape) for r in rest]  # statistics, met by nobody
    return [dims, *extra]


@rule("aten.embedding")
def embedding(site: Site) -> list[Dims]:
    """Table (V, d), indices (...) -> (..., d); the rows are named by number."""
    table, indices = site.call.inputs[:2]
    site.pin(site.axis(table, 0), "rows taken by number (embedding table)")
    site.role(table, 1, "producer")
    nowhere: frozenset[Label] = frozenset()
    site.set_labels(site.call.outputs[0], (*[nowhere] * len(indices.shape), site.labels(table)[1]))
    return [(*site.dims(indices), site.axis(table, 1))]
