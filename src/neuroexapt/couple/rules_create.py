"""Operators that create tensors: from numbers alone, or by the positions of their values."""

from __future__ import annotations

from neuroexapt.couple.marks import Dims
from neuroexapt.couple.rules_pointwise import pointwise
from neuroexapt.couple.site import Site, rule


@rule(
    "aten.empty",
    "aten.empty_strided",
    "aten.full",
    "aten.new_empty",
    "aten.new_empty_strided",
    "aten.new_full",
    "aten.new_ones",
    "aten.new_zeros",
    "aten.ones",
    "aten.rand",
    "aten.randint",
    "aten.randn",
    "aten.scalar_tensor",
    "aten.zeros",
)
def create(site: Site) -> list[Dims]:
    """A tensor made from numbers alone; what it meets says which axes it has."""
    for ref in site.call.outputs:
        site.set_labels(ref, (frozenset(),) * len(ref.shape))
        site.draft.weights.add(ref)
    return [tuple(site.free(n) for n in ref.shape) for ref in site.call.outputs]


@rule("aten.normal")
def draw(site: Site) -> list[Dims]:
    """Random numbers around given means, position by position, or from numbers alone."""
    if site.call.inputs:
        return pointwise(site)
    return create(site)


@rule(
    "aten.arange",
    "aten.bartlett_window",
    "aten.blackman_window",
    "aten.eye",
    "aten.hamming_window",
    "aten.hann_window",
    "aten.kaiser_window",
    "aten.linspace",
    "aten.logspace",
    "aten.randperm",
    "aten.tril_indices",
    "aten.triu_indices",
)
def count(site: Site) -> list[Dims]:
    """Values made from positions: another number of positions gives each another value."""
    result = create(site)
    return [tuple(site.fixed(axis.size, "values made by position") for axis in d) for d in result]
