"""What becomes of the new entries of a width on their way to a norm.

Widen keeps a norm's statistics by making new entries the mean of their siblings (LayerNorm) or
zero (RMSNorm) where they are made. That holds at the norm only if everything in between keeps
it: a sum does, an activation does not keep a mean, a sigmoid does not keep a zero. This is
followed here, operator by operator, for every dimension of every tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from neuroexapt.capture import TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis, share
from neuroexapt.couple.marks import KEPT, LOST, POSTED, Dims, Entry, Mix, joined
from neuroexapt.couple.site import Site

_LINEAR = {
    "add", "sub", "neg", "clone", "detach", "alias", "_to_copy", "copy", "lift_fresh", "contiguous",
    "dropout", "native_dropout", "view", "_unsafe_view", "reshape", "_reshape_alias", "expand",
    "permute", "transpose", "t", "unsqueeze", "squeeze", "flatten", "select", "unbind", "slice",
    "narrow", "split", "split_with_sizes", "chunk", "cat", "concat", "stack", "repeat", "roll",
    "flip", "index", "index_select", "gather", "embedding", "mean", "sum", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "as_strided",
    "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d", "constant_pad_nd",
}  # fmt: skip
_CONTRACTIONS = {"mm", "bmm", "addmm", "baddbmm", "linear", "mv"}
_REPEATING = {"expand", "repeat"}
_FACTORS = {"mul", "div"}
_RANDOM = {"bernoulli", "rand", "rand_like"}
_KEEP_ZERO = {
    "abs", "asin", "atan", "celu", "elu", "erf", "expm1", "floor", "gelu", "hardswish", "hardtanh",
    "leaky_relu", "log1p", "mish", "pow", "prelu", "_prelu_kernel", "relu", "relu6", "round",
    "selu", "sign", "silu", "sin", "sinh", "sqrt", "square", "tan", "tanh", "trunc",
    "max_pool1d", "max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "native_batch_norm", "_native_batch_norm_legit_functional", "cudnn_batch_norm",
    "_native_batch_norm_legit_no_training", "_fused_rms_norm", "rms_norm",
}  # fmt: skip
_LAYER_NORMS = {"native_layer_norm", "layer_norm"}


def follow(site: Site, outputs: Iterable[tuple[TensorRef, Dims]]) -> None:
    """Note the state of every output dimension of a call from those of its inputs."""
    op = site.call.op.removeprefix("aten.").rstrip("_") or site.call.op
    inputs = site.call.inputs
    chance = op in _RANDOM or (inputs and all(ref in site.draft.chance for ref in inputs))
    for ref, dims in outputs:
        if chance:
            site.draft.chance.add(ref)
        site.draft.entries[ref] = tuple(_after(site, op, axis) for axis in dims)


def met(site: Site, mix: Mix) -> Mix:
    """The mix with the state in which new entries of its axis reach it."""
    return replace(mix, entry=site.entry(mix.axis))


def _after(site: Site, op: str, axis: Axis) -> Entry:
    if all(atom.pin for atom in algebra.atoms(axis)):
        return Entry()  # it never gets new entries
    # A mask of dropout stands for its mean, which is the same everywhere.
    given = [ref for ref in site.call.inputs if ref not in site.draft.chance]
    if op in _CONTRACTIONS:
        return _contracted(site, op, axis)
    sharing = [ref for ref in given if _has(site, ref, axis)]
    data = [ref for ref in sharing if not site.is_weight(ref)]
    before = joined(site.entry_of(ref, axis) for ref in data)
    if not sharing and op in _REPEATING:
        return Entry(KEPT, zero=False)  # one more copy of what the others hold
    if op in _FACTORS:
        # By a tensor that has the width as well, or by one that is the same for all units.
        return Entry(LOST if len(sharing) > 1 else before.mean, _any_zero(site, data, axis))
    if op in _LINEAR:
        shifted = op in ("add", "sub") and not isinstance(site.arg(1, "other"), TensorRef)
        return Entry(before.mean, before.zero and not shifted, before.taken and sharing == data)
    if "scaled_dot_product" in op:
        return _attended(site, data, axis)
    if op == "convolution":
        return Entry(LOST if data else KEPT, before.zero)
    if op in _LAYER_NORMS:
        zero = site.arg(3, "bias") is None and before.zero
        return Entry(max(before.mean, POSTED), zero, taken=before.mean == KEPT)
    return Entry(LOST, before.zero and op in _KEEP_ZERO)


def _contracted(site: Site, op: str, axis: Axis) -> Entry:
    """What the dimensions that a product keeps of its data have become; those it adds up are gone.

    They may be one width: a square layer makes the units that it reads.
    """
    operands = site.call.inputs[:2] if op in ("linear", "mv") else site.call.inputs[-2:]
    gone = {operands[0]: -1, operands[1]: {"linear": -1, "mv": 0}.get(op, -2)}
    found = []
    for ref in site.call.inputs:
        dims = site.dims(ref)
        summed = gone[ref] % len(dims) if ref in gone else None
        states = site.draft.entries.get(ref, [Entry()] * len(dims))
        kept = [
            s
            for n, (own, s) in enumerate(zip(dims, states, strict=True))
            if n != summed and share(own, axis)
        ]
        if kept and not site.is_weight(ref) and ref not in site.draft.chance:
            found.append(joined(kept))
    return Entry(
        LOST if len(found) > 1 else joined(found).mean, not found or any(s.zero for s in found)
    )


def _attended(site: Site, data: list[TensorRef], axis: Axis) -> Entry:
    """Attention is linear in its values alone: zero queries attend to everything alike."""
    value = site.call.inputs[2]
    own = {atom for part in site.dims(value) for atom in algebra.atoms(part)}
    if not own.issuperset(atom for atom in algebra.atoms(axis) if not atom.pin):
        return Entry(LOST, zero=False)  # query heads that share one value
    state = site.entry_of(value, axis)
    return Entry(LOST if len(data) > 1 else state.mean, state.zero)


def _any_zero(site: Site, data: list[TensorRef], axis: Axis) -> bool:
    """Nothing times anything is nothing."""
    return any(site.entry_of(ref, axis).zero for ref in data) or not data


def _has(site: Site, ref: TensorRef, axis: Axis) -> bool:
    return any(share(own, axis) for own in site.dims(ref))
