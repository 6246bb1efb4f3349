"""Direct calls of operators that order, reduce, regroup, resample or view."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.couple.brute_force import RealCall
from tests.couple.drawn import call, mask, positive, whole, x


def order() -> Iterator[RealCall]:
    yield call("roll", x(4, 5), [1], [0])
    yield call("roll", x(4, 5), [1])
    yield call("flip", x(4, 5), [1])
    yield call("rot90", x(4, 5, 6), 1, [0, 2])
    yield call("sort", x(4, 5), 0)
    yield call("sort.stable", x(4, 5), stable=True, dim=0)
    yield call("argsort", x(4, 5))
    yield call("msort", x(4, 5))
    for op in ("tril", "triu", "tril_", "triu_"):
        yield call(op, x(3, 4, 5))
    yield call("topk", x(4, 5), 2, 0)
    for op in ("cumsum", "cumsum_", "cumprod", "cumprod_", "logcumsumexp", "cummax", "cummin"):
        yield call(op, x(4, 5), 1)
    edges = positive(3, 6).cumsum(1)
    yield call("bucketize.Tensor", x(4, 5), edges[0])
    yield call("searchsorted.Tensor", edges, x(3, 4))
    order = torch.stack([torch.arange(6)] * 3)
    yield call("searchsorted.Tensor", edges, x(3, 4), sorter=order)
    yield call("searchsorted.Scalar", edges[0], 0.5)
    yield call("isin.Tensor_Tensor", whole(9, 4, 5), whole(9, 3))
    yield call("isin.Tensor_Scalar", whole(9, 4, 5), 3)
    yield call("histc", x(4, 5), 6)
    yield call("bincount", whole(6, 9))
    yield call("_unique2", whole(6, 9), True, True, True)
    yield call("unique_dim", whole(2, 9, 2), 0)
    yield call("unique_consecutive", whole(2, 9))
    yield call("multinomial", positive(4, 5), 2)


def reductions() -> Iterator[RealCall]:
    for op in (
        *("all", "amax", "amin", "aminmax", "any", "argmax", "argmin", "count_nonzero", "max"),
        *("median", "min", "nanmedian", "nansum", "norm.Scalar", "prod", "std", "std_mean"),
        *("sum", "var", "var_mean", "linalg_vector_norm"),
    ):
        yield call(op, x(4, 5))
    for op in (
        *("all.dim", "any.dim", "argmax", "argmin", "kthvalue", "max.dim", "median.dim", "min.dim"),
        *("mode", "nanmedian.dim", "prod.dim_int", "count_nonzero"),
    ):
        yield call(op, x(4, 5), *([2] if op == "kthvalue" else []), 0)
    for op in ("amax", "amin", "logsumexp", "mean.dim", "nansum", "std.dim", "sum.dim_IntList"):
        yield call(op, x(4, 5, 6), [0, 2])
        yield call(op, x(4, 5, 6), [-2], keepdim=True)
    for op in ("_is_all_true", "_is_any_true"):
        yield call(op, mask(4, 5))
    yield call("aminmax", x(4, 5), dim=0, keepdim=True)
    yield call("norm.ScalarOpt_dim", x(4, 5), 2, [1])
    yield call("linalg_vector_norm", x(4, 5), 2, [0])
    yield call("var.correction", x(4, 5), [1])
    yield call("var_mean.correction", x(4, 5), [1])
    for op in ("_log_softmax", "_softmax"):
        yield call(op, x(4, 5), 0, False)
    for op in ("_safe_softmax", "softmax.int", "log_softmax.int"):
        yield call(op, x(4, 5), 1)


def shapes() -> Iterator[RealCall]:
    for op in ("view", "reshape", "_reshape_copy", "view_copy", "_unsafe_view"):
        yield call(op, x(4, 6, 5), [4, 2, 15])
        yield call(op, x(4, 6, 5), [24, 5])
    yield call("_reshape_alias", x(4, 6), [4, 2, 3], [6, 3, 1])
    yield call("flatten.using_ints", x(4, 6, 5), 1)
    for op in ("unsqueeze_", "unsqueeze_copy"):
        yield call(op, x(4, 5), 1)
    for op in ("squeeze_", "squeeze_copy"):
        yield call(op, x(4, 1, 5))
    yield call("permute_copy", x(4, 5, 6), [2, 0, -2])
    for op in ("transpose_", "transpose_copy.int", "swapaxes"):
        yield call(op, x(4, 5, 6), 0, -1)
    for op in ("t_", "t_copy", "numpy_T", "mT"):
        yield call(op, x(4, 5))
    yield call("mT", x(3, 4, 5))
    for op in ("expand_copy", "broadcast_to"):
        yield call(op, x(4, 1), [3, 4, 5])
    yield call("expand_as", x(4, 1), x(3, 4, 5))
    for op in ("repeat", "tile"):
        yield call(op, x(4, 5), [2, 1, 3])
        yield call(op, x(4, 1), [2, 3])
    yield call("tile", x(4, 5), [3])
    for op in ("concat", "concatenate"):
        yield call(op, [x(4, 5), x(4, 6)], 1)
    yield call("select_copy.int", x(4, 5), 1, 2)
    yield call("unbind_copy.int", x(4, 5), 1)
    yield call("slice_copy.Tensor", x(4, 5), 1, 1, 4)
    yield call("slice_copy.Tensor", x(4, 6), 1, 2, 4)
    yield call("slice_copy.Tensor", x(4, 6), 1, -5, 100, 2)
    yield call("narrow", x(4, 6), 1, 3, 3)
    yield call("narrow", x(4, 6), 1, -3, 2)
    for op in ("chunk", "unsafe_chunk", "tensor_split.sections"):
        yield call(op, x(4, 6), 2, 1)
        yield call(op, x(4, 7), 3, 1)
    yield call("tensor_split.indices", x(4, 7), [1, 5], 1)
    for op in ("split_copy.Tensor", "unsafe_split.Tensor"):
        yield call(op, x(4, 6), 2, 1)
    for op in ("split_with_sizes_copy", "split_with_sizes", "unsafe_split_with_sizes"):
        yield call(op, x(4, 6), [1, 3, 2], 1)
    yield call("pad", x(4, 6), [1, 2])
    yield call("constant_pad_nd", x(4, 3, 6), [0, -1, 1, 1])
    yield call("native_channel_shuffle", x(2, 6, 3), 2)
    yield call("cat", [x(4, 3), x(4, 3), x(4, 2)], 1)
    yield call("stack", [x(4, 3), x(4, 3)], -1)


def spatial() -> Iterator[RealCall]:
    inputs = {1: (2, 3, 6), 2: (2, 3, 6, 6), 3: (2, 3, 4, 4, 4)}
    for rank, shape in inputs.items():
        for op in (f"avg_pool{rank}d", f"max_pool{rank}d", f"adaptive_avg_pool{rank}d"):
            yield call(op, x(*shape), [2] * rank)
        for op in (f"reflection_pad{rank}d", f"replication_pad{rank}d"):
            yield call(op, x(*shape), [1] * (2 * rank))
        for op in (f"upsample_nearest{rank}d", f"_upsample_nearest_exact{rank}d"):
            yield call(op, x(*shape), [5] * rank)
        linear = ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")
        yield call(linear[rank - 1], x(*shape), [5] * rank, False)
    for rank in (2, 3):
        yield call(f"_adaptive_avg_pool{rank}d", x(*inputs[rank]), [3] * rank)
        yield call(f"adaptive_max_pool{rank}d", x(*inputs[rank]), [3] * rank)
        samples = positive(2, 3, rank)
        op = f"fractional_max_pool{rank}d"
        yield call(op, x(*inputs[rank]), [2] * rank, [2] * rank, samples)
        small = (2, 3, *[2] * rank)
        places = torch.arange(2**rank).reshape([2] * rank).expand(small).contiguous()
        extra = ([2] * rank, [0] * rank) if rank == 3 else ()
        yield call(f"max_unpool{rank}d", x(*small), places, [4] * rank, *extra)
        yield call(f"grid_sampler_{rank}d", x(*inputs[rank]), x(2, *[5] * rank, rank), 0, 0, False)
    yield call("max_pool3d_with_indices", x(*inputs[3]), [2, 2, 2])
    for op in ("upsample_bicubic2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"):
        yield call(op, x(*inputs[2]), [5, 5], False)
    yield call("affine_grid_generator", x(3, 2, 3), [3, 4, 5, 6], False)
    yield call("pixel_shuffle", x(2, 12, 3, 5), 2)
    yield call("pixel_unshuffle", x(2, 3, 4, 6), 2)
    yield call("im2col", x(2, 3, 5, 6), [2, 2], [1, 1], [0, 0], [1, 1])
    yield call("col2im", x(2, 12, 6), [3, 4], [2, 2], [1, 1], [0, 0], [1, 1])


def views() -> Iterator[RealCall]:
    for op in ("diagonal", "diagonal_copy"):
        yield call(op, x(4, 5, 4), 0, 0, 2)
        yield call(op, x(4, 5), 0)
        yield call(op, x(4, 4), 1)
    yield call("trace", x(4, 4))
    yield call("diag_embed", x(4, 5))
    yield call("diag_embed", x(4, 5), 1, 0, 2)
    yield call("block_diag", [x(2, 3), x(3, 4)])
    for op in ("unfold", "unfold_copy"):
        yield call(op, x(4, 6, 3), 1, 2, 2)
    yield call("slice_backward", x(4, 2, 3), [4, 6, 3], 1, 2, 4, 1)
    yield call("select_backward", x(4, 3), [4, 6, 3], 1, 2)
    yield call("unfold_backward", x(4, 3, 2), [4, 6], 1, 2, 2)
    for op in ("as_strided", "as_strided_copy"):
        yield call(op, x(4, 6), [3, 2], [2, 1])
        yield call(op, x(2, 8, 3), [2, 3, 4, 3], [24, 6, 3, 1])
        yield call(op, x(6, 4).t(), [4, 6], [6, 1])
        yield call(op, x(4, 6), [3, 6], [6, 1], 6)
    yield call("as_strided_", x(4, 6, 1, 1), [4, 6, 1, 1], [6, 1, 6, 6])
    yield call("as_strided_", x(4, 6, 1, 1, 1), [4, 6, 1, 1, 1], [6, 1, 6, 6, 6])
    yield call("select_scatter", x(4, 5, 6), x(4, 6), 1, 2)
    yield call("slice_scatter", x(4, 5, 6), x(4, 2, 6), 1, 1, 3)
    yield call("diagonal_scatter", x(4, 5, 4), x(5, 4), 0, 0, 2)
