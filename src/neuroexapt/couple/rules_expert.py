"""Mixtures of experts: one matrix product for each group of rows."""

from __future__ import annotations

from neuroexapt.couple.marks import Dims
from neuroexapt.couple.site import Site, rule

_GROUPS = "rows go to the experts by their order"
_ALIGNMENT = 16  # bytes: what the kernel asks of every row


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_mm(site: Site) -> list[Dims]:
    """Rows (T, k), grouped by offsets (E), times a matrix (E, k, n) for each group -> (T, n).

    The inner widths are free as in any product. The experts are a width where the offsets are
    sums of counts, one for each expert; else experts and rows are named by order.
    """
    x, weight, *rest = site.call.inputs
    if len(x.shape) != 2 or len(weight.shape) != 3:
        raise ValueError("groups along another dimension")
    groups = [site.axis(weight, 0), *(site.axis(ref, 0) for ref in rest)]
    if any(ref in site.draft.counts for ref in rest):
        for axis in groups[1:]:
            site.same(axis, groups[0])
    else:
        for axis in (site.axis(x, 0), *groups):
            site.pin(axis, _GROUPS)
    inner = site.same(site.axis(x, 1), site.axis(weight, 1))
    if site.call.op == "aten._grouped_mm":
        for axis in (inner, site.axis(weight, 2)):
            site.aligned(axis, _ALIGNMENT // weight.dtype.itemsize)
    if site.silences(weight, 1):
        site.contract(weight, [1])
    else:
        site.mix(inner, "sum")
    for bias in (ref for ref in rest if len(ref.shape) == 2):
        site.same(site.axis(bias, 1), site.axis(weight, 2))
        site.role(bias, 1, "elementwise", "zero")
    site.set_labels(site.call.outputs[0], (site.labels(x)[0], site.labels(weight)[2]))
    return [(site.axis(x, 0), site.axis(weight, 2))]
