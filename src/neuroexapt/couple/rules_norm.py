"""Normalisation: which axis is normalised position by position, and which is mixed."""

from __future__ import annotations

from collections.abc import Sequence

from neuroexapt.capture import TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.site import Dims, Site, rule

BATCH_NORM_FILLS = ("one", "zero", "zero", "one")  # weight, bias, running mean, running var


def _outputs(site: Site, x: TensorRef, channel: Axis | None) -> list[Dims]:
    """The normalised tensor like x; statistics of the channel's size belong to the channel."""
    first, *rest = site.call.outputs
    dims: list[Dims] = [site.dims(x)]
    for ref in rest:
        if channel is not None and ref.shape == (channel.size,):
            dims.append((channel,))
        else:
            dims.append(tuple(site.free(n) for n in ref.shape))  # statistics, met by nobody
    site.set_labels(first, site.labels(x))
    return dims


def _names(site: Site, ref: TensorRef | None) -> frozenset[str]:
    if ref is None:
        return frozenset()
    return frozenset(label.name for labels in site.labels(ref) for label in labels)


def _affine(site: Site, refs: Sequence[TensorRef | None], dims: Sequence[Axis]) -> None:
    """Weight and bias of a norm over trailing dimensions."""
    for ref, fill in zip(refs, ("mean", "zero"), strict=False):
        if ref is not None:
            for place, axis in enumerate(dims):
                site.same(site.axis(ref, place), axis)
                site.role(ref, place, "elementwise", fill)


@rule(
    "aten.native_batch_norm",
    "aten.cudnn_batch_norm",
    "aten.miopen_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_functional",
    "aten._native_batch_norm_legit_no_training",
    "aten._batch_norm_with_update",
    "aten._batch_norm_no_update",
    "aten.batch_norm",
)
def batch_norm(site: Site) -> list[Dims]:
    """(N, C, ...): each channel by itself, with its scale, shift and running statistics."""
    x = site.call.args[0]
    channel = site.axis(x, 1)
    for ref, fill in zip(site.call.args[1:5], BATCH_NORM_FILLS, strict=False):
        if isinstance(ref, TensorRef):
            site.same(site.axis(ref, 0), channel)
            site.role(ref, 0, "elementwise", fill)
    return _outputs(site, x, channel)


@rule("aten.native_layer_norm", "aten.layer_norm")
def layer_norm(site: Site) -> list[Dims]:
    """(..., d): subtracts the mean over d and divides by the deviation over d."""
    x, shape = site.call.args[:2]
    weight, bias = site.arg(2, "weight"), site.arg(3, "bias")
    normalised = site.dims(x)[-len(shape) :]
    _affine(site, (weight, bias), normalised)
    for axis in normalised:
        site.mix(
            axis,
            "layer_norm" if len(shape) == 1 else "layer_norm_nd",
            weight=_names(site, weight),
            bias=_names(site, bias),
            **site.epsilon(site.arg(4, "eps", 1e-5)),
        )
    site.bind("normalized_shape", normalised, is_tuple=True)
    return _outputs(site, x, None)


@rule("aten._fused_rms_norm", "aten.rms_norm")
def rms_norm(site: Site) -> list[Dims]:
    """(..., d): divides by the root mean square over d."""
    x, shape = site.call.args[:2]
    weight = site.arg(2, "weight")
    normalised = site.dims(x)[-len(shape) :]
    _affine(site, (weight,), normalised)
    for axis in normalised:
        site.mix(axis, "mean_square", weight=_names(site, weight), **site.epsilon(None))
    site.bind("normalized_shape", normalised, is_tuple=True)
    return _outputs(site, x, None)


@rule("aten.native_group_norm", "aten.group_norm")
def group_norm(site: Site) -> list[Dims]:
    """(N, g*c, ...): mixes over the c channels of each of g groups."""
    x = site.call.args[0]
    legacy = site.call.op == "aten.group_norm"
    groups = int(site.call.args[1] if legacy else site.call.args[6])
    refs = site.call.args[2:4] if legacy else site.call.args[1:3]
    channels = site.axis(x, 1)
    if groups == 1:
        inner: list[Axis] = [channels]
    else:
        size = channels.size // groups
        outer, inside = site.free(groups), site.free(size)
        site.same(channels, algebra.product([outer, inside]))
        site.groups("num_groups", outer)
        inner = [inside] if size > 1 else []
    _affine(site, [r if isinstance(r, TensorRef) else None for r in refs], [channels])
    for axis in inner:
        # A new channel would change its group's variance over space, whatever it holds.
        site.mix(axis, "group_norm")
    site.bind("num_channels", [channels])
    return _outputs(site, x, None)
