"""One direct call of every operator that has a rule and that no tiny model reaches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.couple.brute_force import RealCall

# Kernels of other devices, and forms that torch keeps for itself: their rules are functions that
# other operators of this file or of the rows share.
ELSEWHERE = {
    "aten._batch_norm_no_update",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_attention_math_for_mps",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "aten.convolution_overrideable",
    "aten.cudnn_batch_norm",
    "aten.cudnn_grid_sampler",
    "aten.miopen_batch_norm",
    "aten.mkldnn_max_pool2d",
    "transformers.grouped_mm_fallback",
}

_DRAW = torch.Generator()


class W(Tensor):
    """Marks a tensor made of weights."""


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_DRAW)


def w(*shape: int) -> Tensor:
    return x(*shape).as_subclass(W)


def positive(*shape: int) -> Tensor:
    return 0.1 + 0.8 * torch.rand(shape, dtype=torch.float64, generator=_DRAW)


def whole(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=_DRAW)


def mask(*shape: int) -> Tensor:
    return x(*shape) > 0


def definite(batch: int, size: int) -> Tensor:
    """Symmetric positive definite matrices."""
    roots = x(batch, size, size)
    return roots @ roots.mT + torch.eye(size, dtype=torch.float64)


def call(op: str, *args: Any, **kwargs: Any) -> RealCall:
    """The call of ``"name"`` or ``"name.overload"`` of the aten operators."""
    name, _, overload = op.partition(".")
    func = getattr(getattr(torch.ops.aten, name), overload or "default")
    flat = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    weights = {id(a): a.as_subclass(Tensor) for a in flat if isinstance(a, W)}

    def plain(value: Any) -> Any:
        return weights.get(id(value), value)

    return RealCall(
        func,
        tuple(map(plain, args)),
        {key: plain(value) for key, value in kwargs.items()},
        tuple(weights.values()),
    )


def direct_calls() -> list[RealCall]:
    """Every call of the table; the values are the same each time."""
    _DRAW.manual_seed(0)
    return [
        *_contractions(),
        *_pointwise(),
        *_created(),
        *_indexing(),
        *_matrices(),
        *_losses(),
        *_norms(),
        *_order(),
        *_reductions(),
        *_shapes(),
        *_spatial(),
        *_views(),
    ]


def _contractions() -> Iterator[RealCall]:
    for op in ("_scaled_dot_product_attention_math", "scaled_dot_product_attention"):
        yield call(op, x(2, 3, 5, 4), x(2, 3, 6, 4), x(2, 3, 6, 7))
        yield call(op, x(2, 3, 5, 4), x(2, 3, 5, 4), x(2, 3, 5, 4), is_causal=True)
        yield call(op, x(2, 3, 5, 4), x(2, 3, 6, 4), x(2, 3, 6, 4), x(3, 1, 6), scale=0.5)
        yield call(op, x(2, 6, 5, 4), x(2, 3, 7, 4), x(2, 3, 7, 4), enable_gqa=True)
    yield call(
        "_scaled_dot_product_flash_attention_for_cpu",
        x(2, 3, 5, 4),
        x(2, 3, 6, 4),
        x(2, 3, 6, 4),
        attn_mask=x(2, 3, 5, 6),
    )
    bags = whole(9, 6), torch.tensor([0, 2, 5])
    for mode in range(3):
        yield call("_embedding_bag", w(9, 4), *bags, False, mode)
        yield call("_embedding_bag_forward_only", w(9, 4), *bags, False, mode)
    yield call("embedding_renorm_", w(9, 4), torch.tensor([1, 4]), 1.0, 2.0)
    yield call("_int_mm", *(whole(9, 32, 32).to(torch.int8) for _ in range(2)))
    yield call("mm", x(4, 5), x(5, 3))
    yield call("mm", x(4, 5), w(5, 3))
    yield call("mm", w(4, 5), x(5, 3))
    yield call("baddbmm", x(3), x(2, 4, 5), x(2, 5, 3))
    yield call("addbmm", x(4, 3), x(2, 4, 5), x(2, 5, 3))
    yield call("addr", x(4, 3), x(4), x(3))
    yield call("addmv", x(4), w(4, 5), x(5))
    yield call("mv", x(4, 5), x(5))
    yield call("vdot", x(5), x(5))
    yield call("linear", x(2, 4, 5), w(3, 5), w(3))
    yield call("linear", x(2, 4, 5), x(3, 5))
    flags = False, False, False
    yield call(
        "_convolution", x(2, 4, 5), w(6, 2, 3), w(6), [1], [1], [1], False, [0], 2, *flags, True
    )
    yield call("convolution", x(2, 4, 5), x(6, 4, 3), None, [1], [1], [1], False, [0], 1)
    yield call("_trilinear", x(4, 5), w(3, 5, 6), x(4, 6), [1, 3], [0], [1, 2], [2, 3])
    yield call("_trilinear", x(4, 5), x(3, 5, 6), x(4, 6), [1, 3], [0], [1, 2], [2, 3])
    yield call("_cdist_forward", x(2, 4, 5), x(2, 3, 5), 2.0, None)
    yield call("_euclidean_dist", x(4, 5), w(3, 5))
    offsets = torch.tensor([2, 4], dtype=torch.int32)
    rows, matrices = (x(*shape).float() for shape in ((4, 8), (2, 8, 16)))
    yield call("_grouped_mm", rows, matrices.as_subclass(W), offsets)
    yield call("_grouped_mm", rows, matrices, offsets)


def _pointwise() -> Iterator[RealCall]:
    for op in (
        *("alias", "bernoulli", "_conj_physical", "_neg_view", "detach", "lift"),
        *("hardsigmoid", "hardsigmoid_", "hardswish", "hardswish_", "hardtanh", "hardtanh_"),
        *("lift_fresh", "lift_fresh_copy", "mish", "mish_", "softplus", "zero_", "zeros_like"),
        *("empty_like", "ones_like", "rand_like", "randn_like", "log_sigmoid_forward"),
        *("bernoulli_.float", "cauchy_", "exponential_", "log_normal_", "normal_", "uniform_"),
        *("random_", "clone", "_to_copy"),
    ):
        yield call(op, positive(4, 5))
    for op, *rest in (
        ("dropout", 0.5, True),
        ("fake_quantize_per_tensor_affine_cachemask", 0.1, 0, 0, 255),
        ("full_like", 2.0),
        ("geometric_", 0.5),
        ("native_dropout", 0.5, True),
        ("randint_like", 9),
        ("masked_fill.Scalar", mask(4, 1), 0.0),
        ("masked_fill_.Scalar", mask(5), 0.0),
        ("fill_.Tensor", x()),
        ("copy", x(5)),
        ("copy_", x(5)),
        ("complex", x(4, 5)),
        ("polar", x(4, 5)),
        ("rrelu_with_noise", x(4, 5)),
        ("prelu", w(5)),
        ("_prelu_kernel", w(1, 5)),
        ("lerp.Tensor", x(5), x(4, 1)),
        ("addcmul", x(4, 1), x(1, 5)),
        ("addcdiv", x(4, 1), positive(1, 5)),
    ):
        yield call(op, x(4, 5), *rest)
    scale = torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), torch.tensor(1)
    op = "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams"
    yield call(op, x(4, 5).float(), *scale, 0, 255)
    yield call("where.self", mask(4, 1), x(5), x(4, 5))
    yield call("normal.Tensor_float", x(4, 5))


def _created() -> Iterator[RealCall]:
    for op in ("rand", "randn", "zeros", "ones"):
        yield call(op, [4, 5])
    for op in ("new_empty", "new_ones", "new_zeros"):
        yield call(op, x(4), [5, 6])
    yield call("new_empty_strided", x(4), [5, 6], [6, 1])
    yield call("new_full", x(4), [5, 6], 2.0)
    yield call("empty_strided", [4, 5], [5, 1])
    yield call("full", [4, 5], 2.0)
    yield call("randint", 9, [4, 5])
    yield call("scalar_tensor", 2.0)
    for op in ("bartlett_window", "blackman_window", "hamming_window", "hann_window"):
        yield call(op, 5)
    yield call("kaiser_window", 5)
    yield call("eye", 5)
    yield call("randperm", 5)
    yield call("linspace", 0, 1, 5)
    yield call("logspace", 0, 1, 5)
    yield call("tril_indices", 3, 4)
    yield call("triu_indices", 3, 4)


def _indexing() -> Iterator[RealCall]:
    few, pair = torch.tensor([2, 0, 1]), torch.tensor([[1, 0], [3, 2]])
    chosen = torch.tensor([True, False, True, True])
    yield call("gather", x(4, 5), 1, whole(5, 4, 3))
    yield call("gather", x(4, 5), 0, whole(4, 2, 5))
    yield call("gather", x(4, 5), 0, whole(4, 2, 3))
    yield call("scatter.src", x(4, 5), 0, torch.stack([torch.randperm(4)[:3]] * 5, 1), x(3, 5))
    yield call("scatter_.value", x(4, 5), 1, few.expand(4, 3), 2.0)
    for op in ("scatter_add", "scatter_add_"):
        yield call(op, x(4, 5), 1, whole(5, 4, 3), x(4, 3))
    for op in ("scatter_reduce.two", "scatter_reduce_.two"):
        yield call(op, x(4, 5), 0, whole(4, 3, 5), x(3, 5), "amax")
    for op in ("index_add", "index_add_", "index_copy", "index_copy_"):
        yield call(op, x(4, 5), 1, few, x(4, 3))
    for op in ("index_reduce", "index_reduce_"):
        yield call(op, x(4, 5), 0, few, x(3, 5), "prod")
    for op in ("index_fill.int_Scalar", "index_fill_.int_Scalar"):
        yield call(op, x(4, 5), 0, few, 2.0)
    for op in ("index.Tensor", "_unsafe_index.Tensor"):
        yield call(op, x(4, 5), [None, few])
        yield call(op, x(4, 5, 6), [few, None, few])
        yield call(op, x(4, 5, 6), [None, pair, few[:2]])
    yield call("index.Tensor", x(4, 5, 6), [mask(4, 5)])
    yield call("index.Tensor", x(6, 4, 5), [None, chosen, few[:1]])
    yield call("index.Tensor", w(4, 5, 6), [pair])
    for op in ("index_put", "index_put_", "_index_put_impl_"):
        yield call(op, x(4, 5), [few], x(3, 5))
        yield call(op, x(4, 5), [None, few], x(3))
        yield call(op, x(4, 5, 6), [None, few, few], x(3), True)
    yield call("_unsafe_index_put", x(4, 5), [few], x(3, 5))
    yield call("index_put", x(4, 5), [chosen], x(3, 5))
    yield call("index_put", x(4, 5), [chosen], x())
    yield call("index_put", x(4, 5, 6), [mask(4, 5)], x(6))
    yield call("index_put", x(4, 5, 6), [mask(4, 5)], x(1, 6))
    yield call("index_put", x(4, 5), [None, torch.tensor([True] * 5)], x(4, 1))
    yield call("take", x(4, 5), few)
    yield call("put", x(4, 5), few, x(3))
    yield call("put_", x(4, 5), few, x(3))
    yield call("masked_select", x(4, 5), mask(4, 5))
    yield call("segment_reduce", x(4), "sum", lengths=torch.tensor([1, 3]))
    for op in ("masked_scatter", "masked_scatter_"):
        yield call(op, x(4, 5), mask(4, 5), x(20))
    yield call("nonzero", mask(4, 5))
    yield call("nonzero_static", mask(4, 5), size=3)
    yield call("argwhere", mask(4, 5))
    yield call("repeat_interleave.Tensor", torch.tensor([2, 1, 3]))


def _matrices() -> Iterator[RealCall]:
    for op in (
        *("_linalg_det", "_linalg_eigh", "_linalg_slogdet", "_linalg_svd", "cholesky"),
        *("cholesky_inverse", "linalg_cholesky_ex", "linalg_eig", "linalg_eigvals"),
        *("linalg_inv_ex", "linalg_ldl_factor_ex", "linalg_lu", "linalg_lu_factor_ex"),
        *("linalg_matrix_exp", "linalg_pinv.atol_rtol_tensor", "linalg_qr"),
    ):
        yield call(op, definite(3, 4))
    yield call("_linalg_solve_ex", definite(3, 4), x(3, 4, 2))
    yield call("cholesky_solve", x(3, 4, 2), definite(3, 4))
    yield call("linalg_householder_product", x(3, 5, 4), x(3, 4))
    yield call("linalg_solve_triangular", definite(3, 4), x(3, 4, 2), upper=True)
    yield call("triangular_solve", x(3, 4, 2), definite(3, 4))
    factor, pivots, _ = torch.linalg.lu_factor_ex(definite(3, 4))
    yield call("linalg_lu_solve", factor, pivots, x(3, 4, 2))
    factor, pivots, _ = torch.linalg.ldl_factor_ex(definite(3, 4))
    yield call("linalg_ldl_solve", factor, pivots, x(3, 4, 2))
    yield call("linalg_cross", x(1, 4, 3), x(5, 4, 3))
    yield call("dist", x(4, 5), x(4, 5))
    pairs = x(4, 5, 2)
    for op in ("view_as_complex", "view_as_complex_copy"):
        yield call(op, pairs)
    for op in ("view_as_real", "view_as_real_copy"):
        yield call(op, torch.view_as_complex(pairs))
    yield call("_fft_r2c", x(3, 4, 6), [1], 0, True)
    yield call("_fft_c2r", torch.complex(x(3, 4), x(3, 4)), [1], 0, 6)
    yield call("_fft_c2c", torch.complex(x(3, 4, 5), x(3, 4, 5)), [0, 1], 0, True)
    yield call("_conj", torch.complex(x(4, 5), x(4, 5)))
    yield call("mm", torch.complex(x(4, 5), x(4, 5)), torch.complex(x(5, 3), x(5, 3)))


def _losses() -> Iterator[RealCall]:
    for op in ("huber_loss", "mse_loss", "smooth_l1_loss", "soft_margin_loss"):
        for reduction in range(3):
            yield call(op, x(4, 5), x(4, 5), reduction)
    for reduction in range(3):
        yield call("binary_cross_entropy", positive(4, 5), positive(4, 5), positive(5), reduction)
        op = "binary_cross_entropy_with_logits"
        yield call(op, x(4, 5), positive(4, 5), None, positive(5), reduction)
        yield call("nll_loss_forward", x(4, 5), whole(5, 4), positive(5), reduction, -100)
        yield call("nll_loss2d_forward", x(4, 5, 2, 3), whole(5, 4, 2, 3), None, reduction, -100)
        yield call("multi_margin_loss", x(4, 5), whole(5, 4), 1, 1, None, reduction)
        yield call("multilabel_margin_loss_forward", x(4, 5), whole(5, 4, 5), reduction)
    yield call("_ctc_loss", x(7, 2, 5).log_softmax(-1), whole(4, 2, 3) + 1, [7, 7], [3, 3])


def _norms() -> Iterator[RealCall]:
    tables = w(3), w(3), w(3), positive(3)
    for training in (False, True):
        yield call("_native_batch_norm_legit", x(4, 3, 5), *tables, training, 0.1, 1e-5)
        yield call("batch_norm", x(4, 3, 5), *tables, training, 0.1, 1e-5, False)
        yield call("_native_batch_norm_legit_functional", x(4, 3), *tables, training, 0.1, 1e-5)
    yield call("_native_batch_norm_legit.no_stats", x(4, 3, 5), *tables[:2], True, 0.1, 1e-5)
    yield call("_native_batch_norm_legit_no_training", x(4, 3, 5), *tables, 0.1, 1e-5)
    yield call("_batch_norm_with_update", x(4, 3, 5), *tables, 0.1, 1e-5)
    yield call("layer_norm", x(2, 4, 5), [4, 5], w(4, 5), w(4, 5))
    yield call("native_layer_norm", x(2, 4, 5), [4, 5], None, None, 1e-5)
    yield call("rms_norm", x(2, 4, 5), [5], w(5))
    yield call("_fused_rms_norm", x(2, 4, 5), [5], w(5), 1e-6)
    yield call("group_norm", x(2, 6, 5), 3, w(6), w(6))
    yield call("native_group_norm", x(2, 6, 5), w(6), w(6), 2, 6, 5, 1, 1e-5)
    for op in ("renorm", "renorm_"):
        yield call(op, x(4, 5, 6), 2, 1, 1.0)
    yield call("_weight_norm_interface", w(4, 5), w(4, 1), 0)
    yield call("_weight_norm_interface", w(4, 5, 6), w(1, 1, 6), 2)
    tables = positive(4).float(), torch.zeros(4, dtype=torch.int32)
    yield call("fake_quantize_per_channel_affine_cachemask", x(4, 5).float(), *tables, 0, 0, 255)


def _order() -> Iterator[RealCall]:
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


def _reductions() -> Iterator[RealCall]:
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
    yield call("aminmax", x(4, 5), dim=0, keepdim=True)
    yield call("norm.ScalarOpt_dim", x(4, 5), 2, [1])
    yield call("linalg_vector_norm", x(4, 5), 2, [0])
    yield call("var.correction", x(4, 5), [1])
    yield call("var_mean.correction", x(4, 5), [1])
    for op in ("_log_softmax", "_softmax"):
        yield call(op, x(4, 5), 0, False)
    for op in ("_safe_softmax", "softmax.int", "log_softmax.int"):
        yield call(op, x(4, 5), 1)


def _shapes() -> Iterator[RealCall]:
    for op in ("view", "reshape", "_reshape_copy", "view_copy", "_unsafe_view"):
        yield call(op, x(4, 6, 5), [4, 2, 15])
        yield call(op, x(4, 6, 5), [24, 5])
    yield call("_reshape_alias", x(4, 6), [4, 2, 3], [6, 3, 1])
    yield call("flatten.using_ints", x(4, 6, 5), 1)
    yield call("unsqueeze_", x(4, 5), 1)
    yield call("squeeze_", x(4, 1, 5))
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
    for op in ("split_with_sizes_copy", "split_with_sizes"):
        yield call(op, x(4, 6), [1, 3, 2], 1)
    yield call("pad", x(4, 6), [1, 2])
    yield call("constant_pad_nd", x(4, 3, 6), [0, -1, 1, 1])
    yield call("native_channel_shuffle", x(2, 6, 3), 2)
    yield call("cat", [x(4, 3), x(4, 3), x(4, 2)], 1)
    yield call("stack", [x(4, 3), x(4, 3)], -1)


def _spatial() -> Iterator[RealCall]:
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


def _views() -> Iterator[RealCall]:
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
    yield call("unfold_backward", x(4, 3, 2), [4, 6], 1, 2, 2)
    for op in ("as_strided", "as_strided_copy"):
        yield call(op, x(4, 6), [3, 2], [2, 1])
    yield call("as_strided_", x(4, 6, 1, 1), [4, 6, 1, 1], [6, 1, 6, 6])
    yield call("select_scatter", x(4, 5, 6), x(4, 6), 1, 2)
    yield call("slice_scatter", x(4, 5, 6), x(4, 2, 6), 1, 1, 3)
    yield call("diagonal_scatter", x(4, 5, 4), x(5, 4), 0, 0, 2)
