"""Whether zeros in a parameter make zeros of what is computed from it.

A new unit stays silent where a reader's weights for it are zero. That needs the tensor that
reads to be zero, not only the parameter it is made of: ``exp(log_a)`` is one where ``log_a`` is
zero. This is followed here through everything that is made of weights alone.
"""

from __future__ import annotations

from neuroexapt.capture import TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Label
from neuroexapt.couple.site import Site

# Zero where every operand is zero.
_KEEPS = {
    "add", "sub", "neg", "clone", "detach", "alias", "_to_copy", "copy", "lift_fresh", "view",
    "_unsafe_view", "reshape", "_reshape_alias", "expand", "permute", "transpose", "t", "unsqueeze",
    "squeeze", "flatten", "select", "unbind", "slice", "narrow", "split", "split_with_sizes",
    "chunk", "cat", "concat", "stack", "repeat", "flip", "roll", "index", "index_select", "gather",
    "embedding", "mean", "sum", "diagonal", "diag_embed", "block_diag", "tril", "triu", "abs",
    "sign", "sqrt", "square", "pow", "tanh", "sin", "round", "trunc", "relu", "gelu", "silu", "erf",
    "dropout", "native_dropout", "fake_quantize_per_tensor_affine_cachemask",
    "fake_quantize_per_channel_affine_cachemask", "view_as_real", "view_as_complex", "_conj",
    "complex", "mm", "bmm", "mv", "addmm", "baddbmm", "linear", "convolution",
    "_weight_norm_interface",
}  # fmt: skip
# Zero where the first operand is zero.
_BY_FIRST = {"div", "polar"}


def follow_silence(site: Site) -> None:
    """Say of each output dimension whether zeros of its parameters still make zeros there."""
    for ref in site.call.outputs:
        if site.is_weight(ref) and any(site.labels(ref)):
            pairs = zip(site.dims(ref), site.labels(ref), strict=True)
            site.set_labels(ref, [_heard(site, ref, axis, labels) for axis, labels in pairs])


def _heard(site: Site, ref: TensorRef, axis: Axis, labels: frozenset[Label]) -> frozenset[Label]:
    if ref in site.call.inputs:  # written in place: what it was is told by its labels now
        silent = _keeps(site) and not any(label.muted for label in labels)
    else:
        silent = _stays_zero(site, axis)
    return labels if silent else frozenset(label.mute() for label in labels)


def _stays_zero(site: Site, axis: Axis) -> bool:
    told = {
        ref: all(site.silences(ref, dim) for dim in dims)
        for ref in site.call.inputs
        if (dims := _sharing(site, ref, axis))
    }
    if _name(site) in _BY_FIRST:
        return told.get(site.call.inputs[0], False)
    if _name(site) == "mul":
        return any(told.values())
    return _keeps(site) and all(told.values())


def _name(site: Site) -> str:
    return site.call.op.removeprefix("aten.").rstrip("_")


def _keeps(site: Site) -> bool:
    """Whether zeros alone give zero: no number is added, no exponent turns them over."""
    name = _name(site)
    if name in ("add", "sub") and not isinstance(site.arg(1, "other"), TensorRef):
        return False
    if name == "pow":
        exponent = site.arg(1, "exponent")
        return isinstance(exponent, (int, float)) and exponent > 0
    return name in _KEEPS


def _sharing(site: Site, ref: TensorRef, axis: Axis) -> list[int]:
    atoms = set(algebra.atoms(axis))
    dims = enumerate(site.dims(ref))
    return [dim for dim, own in dims if not atoms.isdisjoint(algebra.atoms(own))]
