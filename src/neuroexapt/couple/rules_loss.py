"""Losses that torch computes in one operator."""

from __future__ import annotations

from collections.abc import Iterable

from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Dims
from neuroexapt.couple.rules_pointwise import broadcast
from neuroexapt.couple.site import Site, rule

_NONE = 0  # the code of reduction="none"


@rule(
    "aten.binary_cross_entropy",
    "aten.binary_cross_entropy_with_logits",
    "aten.huber_loss",
    "aten.mse_loss",
    "aten.smooth_l1_loss",
    "aten.soft_margin_loss",
)
def elementwise_loss(site: Site) -> list[Dims]:
    """A loss of every pair of entries, or their sum or mean."""
    shape = max((ref.shape for ref in site.call.inputs), key=len)
    dims = broadcast(site, site.call.inputs, shape)
    return [_reduced(site, dims)]


def _reduced(site: Site, dims: Iterable[Axis]) -> Dims:
    if site.setting("reduction", 1) == _NONE:
        return tuple(dims)
    for axis in dims:
        site.mix(axis, "loss")
    return ()


@rule("aten.nll_loss_forward", "aten.nll_loss2d_forward")
def nll_loss(site: Site) -> list[Dims]:
    """(N, C, ...) and classes (N, ...) by number."""
    x, target, *weight = site.call.inputs
    at = 1 if len(x.shape) > 1 else 0
    for axis in (site.axis(x, at), *(site.axis(ref, 0) for ref in weight)):
        site.pin(axis, "classes named by number")
    rest = [axis for place, axis in enumerate(site.dims(x)) if place != at]
    for axis, other in zip(rest, site.dims(target), strict=False):
        site.same(axis, other)
    return [_reduced(site, rest), ()]


@rule(
    "aten._ctc_loss",
    "aten.multi_margin_loss",
    "aten.multilabel_margin_loss_forward",
)
def class_loss(site: Site) -> list[Dims]:
    """Losses that name classes and steps by number: everything they touch is held."""
    for ref in site.call.inputs:
        for axis in site.dims(ref):
            site.pin(axis, "classes named by number")
    return [tuple(site.chosen(size) for size in ref.shape) for ref in site.call.outputs]
