"""Operators that work position by position: dimensions of equal place are the same axis."""

from __future__ import annotations

from collections.abc import Sequence

from neuroexapt.capture import TensorRef
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Dims, Label
from neuroexapt.couple.site import Site, rule

ADDITIVE = {"aten.add", "aten.add_", "aten.sub", "aten.sub_", "aten.rsub"}
SQUARES = {"aten.mul", "aten.pow", "aten.square"}

# Operators that are pointwise without carrying torch's tag for it.
UNTAGGED = (
    "aten.abs_",
    "aten.alias",
    "aten.alias_copy",
    "aten.bernoulli",
    "aten.bernoulli_",
    "aten.cauchy_",
    "aten.clone",
    "aten.complex",
    "aten._conj",
    "aten._conj_copy",
    "aten._conj_physical",
    "aten.copy",
    "aten.copy_",
    "aten.copysign_",
    "aten.detach",
    "aten.detach_",
    "aten.detach_copy",
    "aten.dropout",
    "aten.empty_like",
    "aten.eq_",
    "aten.exponential_",
    "aten.fake_quantize_per_tensor_affine_cachemask",
    "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "aten.fill",
    "aten.fill_",
    "aten.floor_divide",
    "aten.floor_divide_",
    "aten.full_like",
    "aten.gcd_",
    "aten.ge_",
    "aten.gelu_",
    "aten.geometric_",
    "aten.gt_",
    "aten.hardsigmoid",
    "aten.hardsigmoid_",
    "aten.hardswish",
    "aten.hardswish_",
    "aten.hardtanh",
    "aten.hardtanh_",
    "aten.heaviside_",
    "aten.lcm_",
    "aten.le_",
    "aten.lift",
    "aten.lift_fresh",
    "aten.lift_fresh_copy",
    "aten.log_normal_",
    "aten.log_sigmoid_forward",
    "aten.lt_",
    "aten.masked_fill",
    "aten.masked_fill_",
    "aten.mish",
    "aten.mish_",
    "aten.native_dropout",
    "aten.ne_",
    "aten._neg_view",
    "aten._neg_view_copy",
    "aten.normal_",
    "aten.ones_like",
    "aten.polar",
    "aten.prelu",
    "aten._prelu_kernel",
    "aten.rand_like",
    "aten.randint_like",
    "aten.randn_like",
    "aten.random_",
    "aten.rrelu_with_noise",
    "aten.rrelu_with_noise_",
    "aten.rsub",
    "aten.softplus",
    "aten.threshold_",
    "aten._to_copy",
    "aten.uniform_",
    "aten.xlogy_",
    "aten.zero",
    "aten.zero_",
    "aten.zeros_like",
)


@rule(*UNTAGGED)
def pointwise(site: Site) -> list[Dims]:
    """Broadcast from the right: a size of 1 against n says nothing about either.

    Example: ``(B, C, H, W) + (C, 1, 1)`` makes both C one axis.
    """
    out = site.call.outputs[0]
    inputs = [ref for ref in site.call.inputs if len(ref.shape) <= len(out.shape)]
    if site.call.op == "aten._prelu_kernel" or site.call.op == "aten.prelu":
        inputs = inputs[:1] + [_channelwise(site, ref) for ref in inputs[1:]]
    dims = broadcast(site, inputs, out.shape)
    _elementwise_roles(site, inputs)  # before the labels: in place, out is one of the inputs
    _set_labels(site, out, inputs)
    _remember_square(site, out)
    return [dims] * len(site.call.outputs)


def broadcast(site: Site, inputs: Sequence[TensorRef], shape: Sequence[int]) -> Dims:
    """The axes of tensors broadcast to a shape: equal sizes are one axis, from the right."""
    return tuple(_common_axis(site, inputs, place, shape[place]) for place in range(-len(shape), 0))


def _channelwise(site: Site, ref: TensorRef) -> TensorRef:
    """A PReLU slope of shape (C,) goes with dimension 1, not with the last."""
    x = site.call.inputs[0]
    if len(ref.shape) == 1 and len(x.shape) > 2 and ref.shape[0] > 1:
        site.same(site.axis(ref, 0), site.axis(x, 1))
        site.role(ref, 0, "elementwise", "mean")
        return x
    return ref


def _common_axis(site: Site, inputs: Sequence[TensorRef], place: int, size: int) -> Axis:
    for ref in inputs:
        if len(ref.shape) >= -place and ref.shape[place] == 1 != size:
            site.pin(site.axis(ref, place), "a single position broadcast over many")
    found = [
        site.axis(ref, place)
        for ref in inputs
        if len(ref.shape) >= -place and ref.shape[place] == size
    ]
    for other in found[1:]:
        site.same(found[0], other)
    return found[0] if found else site.free(size)


def _origin(site: Site, inputs: Sequence[TensorRef], place: int) -> frozenset[Label]:
    labels: frozenset[Label] = frozenset()
    for ref in inputs:
        if len(ref.shape) >= -place:
            labels |= site.labels(ref)[place]
    return labels


def _set_labels(site: Site, out: TensorRef, inputs: Sequence[TensorRef]) -> None:
    places = range(-len(out.shape), 0)
    site.set_labels(out, [_origin(site, inputs, place) for place in places])


def _elementwise_roles(site: Site, inputs: Sequence[TensorRef]) -> None:
    """A parameter that meets an activation position by position is elementwise."""
    if all(site.is_weight(ref) for ref in inputs):
        return
    fill = "zero" if site.call.op in ADDITIVE else "mean"
    for ref in inputs:
        if site.is_weight(ref):
            for dim, size in enumerate(ref.shape):
                if size > 1:
                    site.role(ref, dim, "elementwise", fill)


def _remember_square(site: Site, out: TensorRef) -> None:
    """Keep x of x*x and x**2, by which a hand-written RMS norm is known."""
    if site.call.op not in SQUARES:
        return
    base = site.call.args[0]
    other = site.arg(1, "exponent", 2)
    if isinstance(base, TensorRef) and (other == base or other == 2):
        site.draft.squares[out] = base
