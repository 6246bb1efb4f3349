"""Normalisation: which axis is normalised position by position, and which is mixed."""

from __future__ import annotations

from collections.abc import Sequence

from neuroexapt.capture import TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Dims
from neuroexapt.couple.site import Site, rule

BATCH_NORM_FILLS = ("one", "zero", "zero", "one")  # weight, bias, running mean, running var


def _outputs(site: Site, x: TensorRef, statistic: Dims) -> list[Dims]:
    """The normalised tensor like x; its statistics, where the kernel gives them."""
    first, *rest = site.call.outputs
    sizes = tuple(axis.size for axis in statistic)
    dims: list[Dims] = [site.dims(x)]
    for ref in rest:
        known = ref.shape == sizes
        dims.append(statistic if known else tuple(site.free(n) for n in ref.shape))
    site.set_labels(first, site.labels(x))
    return dims


def _reduced(site: Site, x: TensorRef, count: int) -> Dims:
    """The dimensions of x with the last ones reduced to 1."""
    ones = [site.fixed(1, "a reduced dimension") for _ in range(count)]
    return (*site.dims(x)[: len(x.shape) - count], *ones)


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
    if _takes_statistics(site):
        for axis in (site.axis(x, 0), *site.dims(x)[2:]):
            site.mix(axis, "batch_norm")
    return _outputs(site, x, (channel,))


def _takes_statistics(site: Site) -> bool:
    """Whether the batch is normalised by its own mean and variance, or by the running ones."""
    if site.call.op.endswith("_with_update"):
        return True
    return bool(site.setting("training", False))


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
    return _outputs(site, x, _reduced(site, x, len(shape)))


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
    return _outputs(site, x, _reduced(site, x, len(shape)))


@rule("aten.native_group_norm", "aten.group_norm")
def group_norm(site: Site) -> list[Dims]:
    """(N, g*c, ...): mixes over the c channels of each of g groups."""
    x = site.call.args[0]
    legacy = site.call.op == "aten.group_norm"
    groups = int(site.call.args[1] if legacy else site.call.args[6])
    refs = site.call.args[2:4] if legacy else site.call.args[1:3]
    channels = site.axis(x, 1)
    outer, inner = site.fixed(1, "one group"), [channels]
    if groups > 1:
        size = channels.size // groups
        outer, inside = site.free(groups), site.free(size)
        site.same(channels, algebra.product([outer, inside]))
        site.groups("num_groups", outer)
        inner = [inside] if size > 1 else []
    _affine(site, [r if isinstance(r, TensorRef) else None for r in refs], [channels])
    for axis in (*inner, *site.dims(x)[2:]):
        # A new channel would change its group's variance over space, whatever it holds.
        site.mix(axis, "group_norm")
    site.bind("num_channels", [channels])
    return _outputs(site, x, (site.axis(x, 0), outer))


@rule("aten.renorm", "aten.renorm_")
def renorm(site: Site) -> list[Dims]:
    """Each slice along one dimension is scaled down to a norm over all the others."""
    x, _, dim = site.call.args[:3]
    for place, axis in enumerate(site.dims(x)):
        if place != dim % len(x.shape):
            site.mix(axis, "renorm")
    return [site.dims(x)]


@rule("aten._weight_norm_interface")
def weight_norm(site: Site) -> list[Dims]:
    """v (..., n, ...) and g (1, n, 1) -> g * v / |v|, the norm over every dimension but one.

    A new entry of the other dimensions leaves the norm alone exactly if it is zero, as the
    readers of a new unit are.
    """
    v, g = site.call.inputs[:2]
    dim = int(site.setting("dim", 0)) % len(v.shape)
    site.same(site.axis(g, dim), site.axis(v, dim))
    for place in range(len(v.shape)):
        if place != dim:
            site.role(v, place, "consumer", "zero")
            if v.shape[place] > 1:
                site.pin(site.axis(g, place), "a single position broadcast over many")
    site.role(g, dim, "elementwise", "mean")
    labels = list(site.labels(v))
    labels[dim] |= site.labels(g)[dim]
    site.set_labels(site.call.outputs[0], labels)
    return [site.dims(v), site.dims(g)]


@rule("aten.fake_quantize_per_channel_affine_cachemask")
def fake_quantize(site: Site) -> list[Dims]:
    """Rounded with a scale and a zero point for each position of one dimension."""
    x, *tables = site.call.inputs
    channel = site.axis(x, int(site.setting("axis")))
    for ref in tables:
        site.same(site.axis(ref, 0), channel)
        site.role(ref, 0, "elementwise", "mean")
    return [site.dims(x)] * len(site.call.outputs)
