"""Pooling, resampling and unfolding: channels pass, spatial sizes are computed anew."""

from __future__ import annotations

from neuroexapt.couple import axis as algebra
from neuroexapt.couple.site import Dims, Site, rule

POOLING = (
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "mkldnn_max_pool2d",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
RESAMPLING = (
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
    "upsample_bilinear2d",
    "_upsample_bilinear2d_aa",
    "upsample_linear1d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "upsample_trilinear3d",
)


@rule(*(f"aten.{name}" for name in (*POOLING, *RESAMPLING)))
def windows(site: Site) -> list[Dims]:
    """(N, C, spatial...) -> (N, C, other spatial...)."""
    x = site.call.inputs[0]
    spatial = int(next(c for c in site.call.op if c in "123"))
    lead = len(x.shape) - spatial
    result = []
    for out in site.call.outputs:
        new = [site.fixed(n, "a spatial size, computed from the input") for n in out.shape[lead:]]
        for axis in site.dims(x)[lead:]:
            site.pin(axis, "neighbours in space")
        site.set_labels(out, (*site.labels(x)[:lead], *((frozenset(),) * spatial)))
        result.append((*site.dims(x)[:lead], *new))
    return result


@rule("aten.im2col")
def im2col(site: Site) -> list[Dims]:
    """(N, C, H, W) -> (N, C*kh*kw, L)."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    kernel = site.fixed(out.shape[-2] // x.shape[-3], "a kernel size")
    columns = site.fixed(out.shape[-1], "a number of windows")
    return [(*site.dims(x)[:-3], algebra.product([site.axis(x, -3), kernel]), columns)]


@rule("aten.col2im")
def col2im(site: Site) -> list[Dims]:
    """(N, C*kh*kw, L) -> (N, C, H, W)."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    channel = site.free(out.shape[-3])
    kernel = site.fixed(x.shape[-2] // out.shape[-3], "a kernel size")
    site.same(site.axis(x, -2), algebra.product([channel, kernel]))
    spatial = [site.fixed(n, "a spatial size") for n in out.shape[-2:]]
    return [(*site.dims(x)[:-2], channel, *spatial)]
