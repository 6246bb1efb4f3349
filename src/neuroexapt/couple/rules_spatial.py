"""Pooling, resampling and unfolding: channels pass, spatial sizes are computed anew."""

from __future__ import annotations

from collections.abc import Sequence

from neuroexapt.capture import TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.marks import Dims
from neuroexapt.couple.site import Site, rule

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
        new = _new_space(site, out.shape[lead:])
        _pin_space(site, x, spatial)
        result.append((*site.dims(x)[:lead], *new))
    return result


def _pin_space(site: Site, x: TensorRef, count: int) -> None:
    for axis in site.dims(x)[len(x.shape) - count :]:
        site.pin(axis, "neighbours in space")


def _new_space(site: Site, sizes: Sequence[int]) -> Dims:
    return tuple(site.fixed(n, "a spatial size, computed from the input") for n in sizes)


@rule("aten.fractional_max_pool2d", "aten.fractional_max_pool3d")
def random_windows(site: Site) -> list[Dims]:
    """(N, C, spatial...) and random numbers (N, C, 2 or 3) -> (N, C, other spatial...)."""
    x, samples = site.call.inputs[:2]
    spatial = samples.shape[-1]
    lead = len(x.shape) - spatial
    for place in range(-lead, 0):
        site.same(site.axis(samples, place - 1), site.axis(x, place - spatial))
    site.pin(site.axis(samples, -1), "one number for each direction")
    _pin_space(site, x, spatial)
    return [
        (*site.dims(x)[:lead], *_new_space(site, out.shape[lead:])) for out in site.call.outputs
    ]


@rule("aten.max_unpool2d", "aten.max_unpool3d")
def unpool(site: Site) -> list[Dims]:
    """(N, C, spatial...) to the places of the maxima (N, C, spatial...)."""
    x, places = site.call.inputs[:2]
    spatial = int(next(c for c in site.call.op if c in "23"))
    lead = len(x.shape) - spatial
    for ref in (x, places):
        _pin_space(site, ref, spatial)
    for mine, theirs in zip(site.dims(x)[:lead], site.dims(places)[:lead], strict=True):
        site.same(mine, theirs)
    return [(*site.dims(x)[:lead], *_new_space(site, site.call.outputs[0].shape[lead:]))]


@rule("aten.grid_sampler_2d", "aten.grid_sampler_3d", "aten.cudnn_grid_sampler")
def grid_sampler(site: Site) -> list[Dims]:
    """(N, C, spatial...) read at the places of a grid (N, other spatial..., 2 or 3)."""
    x, grid = site.call.inputs[:2]
    site.same(site.axis(x, 0), site.axis(grid, 0))
    _pin_space(site, x, len(x.shape) - 2)
    site.pin(site.axis(grid, -1), "one number for each direction")
    return [(*site.dims(x)[:2], *site.dims(grid)[1:-1])]


@rule("aten.affine_grid_generator")
def affine_grid(site: Site) -> list[Dims]:
    """(N, 2, 3) -> (N, H, W, 2)."""
    theta, out = site.call.inputs[0], site.call.outputs[0]
    for axis in site.dims(theta)[1:]:
        site.pin(axis, "a matrix for points in space")
    return [(site.axis(theta, 0), *_new_space(site, out.shape[1:]))]


@rule("aten.pixel_shuffle")
def pixel_shuffle(site: Site) -> list[Dims]:
    """(N, C*r*r, H, W) -> (N, C, H*r, W*r)."""
    x, factor = site.call.args[:2]
    out = site.call.outputs[0]
    inner = site.fixed(factor * factor, "an upscale factor")
    channel = site.free(out.shape[-3])
    site.same(site.axis(x, -3), algebra.product([channel, inner]))
    _pin_space(site, x, 2)
    return [(*site.dims(x)[:-3], channel, *_new_space(site, out.shape[-2:]))]


@rule("aten.pixel_unshuffle")
def pixel_unshuffle(site: Site) -> list[Dims]:
    """(N, C, H*r, W*r) -> (N, C*r*r, H, W)."""
    x, factor = site.call.args[:2]
    out = site.call.outputs[0]
    inner = site.fixed(factor * factor, "a downscale factor")
    channels = algebra.product([site.axis(x, -3), inner])
    _pin_space(site, x, 2)
    return [(*site.dims(x)[:-3], channels, *_new_space(site, out.shape[-2:]))]


@rule("aten.im2col")
def im2col(site: Site) -> list[Dims]:
    """(N, C, H, W) -> (N, C*kh*kw, L)."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    kernel = site.fixed(out.shape[-2] // x.shape[-3], "a kernel size")
    columns = site.fixed(out.shape[-1], "a number of windows")
    _pin_space(site, x, 2)
    return [(*site.dims(x)[:-3], algebra.product([site.axis(x, -3), kernel]), columns)]


@rule("aten.col2im")
def col2im(site: Site) -> list[Dims]:
    """(N, C*kh*kw, L) -> (N, C, H, W)."""
    x, out = site.call.inputs[0], site.call.outputs[0]
    channel = site.free(out.shape[-3])
    kernel = site.fixed(x.shape[-2] // out.shape[-3], "a kernel size")
    site.pin(site.axis(x, -1), "a number of windows")
    site.same(site.axis(x, -2), algebra.product([channel, kernel]))
    spatial = [site.fixed(n, "a spatial size") for n in out.shape[-2:]]
    return [(*site.dims(x)[:-2], channel, *spatial)]
