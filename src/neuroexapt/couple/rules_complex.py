"""Complex numbers as pairs, and Fourier transforms."""

from __future__ import annotations

from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Dims
from neuroexapt.couple.site import Site, rule

_PAIR = "the real and the imaginary part"


@rule("aten.view_as_real", "aten.view_as_real_copy")
def view_as_real(site: Site) -> list[Dims]:
    """(...) complex -> (..., 2)."""
    x = site.call.inputs[0]
    return [(*site.dims(x), site.fixed(2, _PAIR))]


@rule("aten.view_as_complex", "aten.view_as_complex_copy")
def view_as_complex(site: Site) -> list[Dims]:
    """(..., 2) -> (...) complex."""
    x = site.call.inputs[0]
    site.pin(site.axis(x, -1), _PAIR)
    owner = x
    while owner in site.draft.views:
        owner = site.draft.views[owner]
    # Pairs start at even places, so rows of the memory that they lie in have an even size.
    steps = zip(site.dims(owner), owner.strides, strict=False)
    rows = [axis for axis, stride in steps if stride == 1 < axis.size]
    if site.call.op == "aten.view_as_complex" and rows:
        _even(site, rows[-1])
    return [site.dims(x)[:-1]]


def _even(site: Site, axis: Axis) -> None:
    """Rows stay even if each of their segments does."""
    *_, inner = algebra.factors(axis)
    for segment in algebra.segments(inner):
        if algebra.find(segment).form == "atom":
            site.aligned(segment, 2)
        else:
            _even(site, segment)


@rule("aten._fft_r2c", "aten._fft_c2r", "aten._fft_c2c")
def fourier(site: Site) -> list[Dims]:
    """A transform along the dimensions named; the others pass."""
    x, named = site.call.args[:2]
    out = site.call.outputs[0]
    places = {int(dim) % len(x.shape) for dim in named}
    for place in places:
        site.pin(site.axis(x, place), "a Fourier transform goes along it")
    return [
        tuple(
            site.fixed(size, "frequencies") if place in places else site.axis(x, place)
            for place, size in enumerate(out.shape)
        )
    ]
