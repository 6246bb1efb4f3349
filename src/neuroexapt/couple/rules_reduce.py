"""Operators that mix over dimensions: sums, means, maxima, softmax."""

from __future__ import annotations

from collections.abc import Sequence

from neuroexapt.capture import TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.marks import Dims
from neuroexapt.couple.site import Site, rule

# Operators whose output, the last one, holds the number of a position.
_NUMBERING = ("argmax", "argmin", "max", "min", "median", "nanmedian", "mode", "kthvalue")
_LAST_DIM = ("aten.mode", "aten.kthvalue")  # where no dimension is given


@rule(
    "aten.all",
    "aten._is_all_true",
    "aten._is_any_true",
    "aten.amax",
    "aten.amin",
    "aten.aminmax",
    "aten.any",
    "aten.argmax",
    "aten.argmin",
    "aten.count_nonzero",
    "aten.kthvalue",
    "aten.linalg_vector_norm",
    "aten.logsumexp",
    "aten.max",
    "aten.mean",
    "aten.median",
    "aten.min",
    "aten.mode",
    "aten.nanmedian",
    "aten.nansum",
    "aten.norm",
    "aten.prod",
    "aten.std",
    "aten.std_mean",
    "aten.sum",
    "aten.var",
    "aten.var_mean",
)
def reduce(site: Site) -> list[Dims]:
    """Dimensions that vanish, or stay with size 1; the result depends on all their positions."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    reduced = _reduced_dims(site, x)
    kept = len(out.shape) == len(x.shape)
    for dim in reduced:
        _mix(site, x, dim)
    dims = []
    for place, axis in enumerate(site.dims(x)):
        if place not in reduced:
            dims.append(axis)
        elif kept:
            dims.append(site.fixed(1, "a reduced dimension"))
    _number(site, x, reduced)
    return [tuple(dims)] * len(site.call.outputs)


def _number(site: Site, x: TensorRef, reduced: set[int]) -> None:
    name = site.call.op.removeprefix("aten.")
    if name in _NUMBERING and (name.startswith("arg") or len(site.call.outputs) > 1):
        site.numbers(site.call.outputs[-1], [site.axis(x, dim) for dim in reduced])


def _reduced_dims(site: Site, x: TensorRef) -> set[int]:
    given = site.setting("dim")
    if given is None and site.call.op in _LAST_DIM:
        given = -1
    listed: Sequence[int] = [given] if isinstance(given, int) else (given or range(len(x.shape)))
    return {int(dim) % len(x.shape) for dim in listed} if x.shape else set()


def _mix(site: Site, x: TensorRef, dim: int) -> None:
    axis = site.axis(x, dim)
    if all(atom.pin for atom in algebra.atoms(axis)):
        return
    site.bind("normalized_shape", [axis], is_tuple=True)  # nn.RMSNorm, where torch decomposes it
    if site.call.op == "aten.mean" and x in site.draft.squares:
        site.mix(axis, "mean_square", **site.epsilon(None))
    else:
        site.mix(axis, site.call.op.removeprefix("aten."))


@rule(
    "aten._softmax",
    "aten._log_softmax",
    "aten._safe_softmax",
    "aten.softmax",
    "aten.log_softmax",
)
def along(site: Site) -> list[Dims]:
    """Same shape; every position of the dimension depends on the others."""
    x, dim = site.call.args[:2]
    if x.shape:
        site.mix(site.axis(x, dim), "softmax")
    return [site.dims(x)] * len(site.call.outputs)


@rule("aten.glu")
def glu(site: Site) -> list[Dims]:
    """First half times the sigmoid of the second half, along one dimension."""
    x = site.call.args[0]
    dim = int(site.arg(1, "dim", -1)) % len(x.shape)
    halves, inner = site.free(2), site.free(x.shape[dim] // 2)
    site.same(site.axis(x, dim), algebra.product([halves, inner]))
    site.pin(halves, "two halves of a gate")
    dims = list(site.dims(x))
    dims[dim] = inner
    return [tuple(dims)]
