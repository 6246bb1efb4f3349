"""One direct call of every operator that has a rule and that no tiny model reaches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.couple.brute_force import RealCall
from tests.couple.direct_calls_shape import order, reductions, shapes, spatial, views
from tests.couple.drawn import DRAW, W, call, definite, mask, positive, w, whole, x

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


def direct_calls() -> list[RealCall]:
    """Every call of the table; the values are the same each time."""
    DRAW.manual_seed(0)
    return [
        *_contractions(),
        *_pointwise(),
        *_created(),
        *_indexing(),
        *_matrices(),
        *_losses(),
        *_norms(),
        *order(),
        *reductions(),
        *shapes(),
        *spatial(),
        *views(),
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
    yield call("baddbmm_", x(2, 4, 3), x(2, 4, 5), x(2, 5, 3))
    yield call("addmm_", x(4, 3), x(4, 5), w(5, 3))
    for op in ("addbmm", "addbmm_"):
        yield call(op, x(4, 3), x(2, 4, 5), x(2, 5, 3))
    for op in ("addr", "addr_"):
        yield call(op, x(4, 3), x(4), x(3))
    for op in ("addmv", "addmv_"):
        yield call(op, x(4), w(4, 5), x(5))
    yield call("mv", w(4, 5), w(5))
    yield call("mv", x(4, 5), x(5))
    yield call("vdot", x(5), x(5))
    yield call("linear", x(2, 4, 5), w(3, 5), w(3))
    yield call("linear", x(2, 4, 5), x(3, 5))
    flags = False, False, False
    yield call(
        "_convolution", x(2, 4, 5), w(6, 2, 3), w(6), [1], [1], [1], False, [0], 2, *flags, True
    )
    yield call("convolution", x(2, 4, 5), x(6, 4, 3), None, [1], [1], [1], False, [0], 1)
    whole_input = w(3, 4, 2, 6), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    yield call("convolution", x(2, 4, 5, 6), *whole_input)
    for options in (([1, 1], [0, 0]), ([2, 1], [0, 0]), ([1, 1], [1, 0])):
        steps, padding = options
        yield call(
            "convolution",
            x(2, 4, 5, 6),
            w(3, 4, 1, 1),
            None,
            steps,
            padding,
            [1, 1],
            False,
            [0, 0],
            1,
        )
        yield call(
            "convolution",
            x(2, 4, 5, 6),
            w(4, 3, 1, 2),
            None,
            steps,
            padding,
            [1, 1],
            True,
            [0, 0],
            1,
        )
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
    for op in ("abs_", "alias_copy", "detach_copy", "_neg_view_copy", "gelu_", "zero"):
        yield call(op, x(4, 5))
    for op in ("eq_", "ne_", "ge_", "gt_", "le_", "lt_"):
        yield call(f"{op}.Tensor", x(4, 5), x(5))
    for op in ("copysign_.Tensor", "floor_divide", "floor_divide_.Tensor", "rsub.Tensor"):
        yield call(op, x(4, 5), x(4, 1))
    for op in ("gcd_", "lcm_"):
        yield call(op, whole(9, 4, 5) + 1, whole(9, 5) + 1)
    yield call("heaviside_", x(4, 5), x(5))
    yield call("xlogy_.Tensor", positive(4, 5), positive(5))
    yield call("threshold_", x(4, 5), 0.0, 1.0)
    yield call("rrelu_with_noise_", x(4, 5), x(4, 5))
    yield call("fill.Scalar", x(4, 5), 2.0)
    yield call("detach_", x(4, 5))
    yield call("_conj_copy", torch.complex(x(4, 5), x(4, 5)))
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
    yield call("_linalg_solve_ex", definite(3, 4), x(3, 4))
    yield call("linalg_solve_triangular", definite(3, 4), x(3, 2, 4), upper=True, left=False)
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
