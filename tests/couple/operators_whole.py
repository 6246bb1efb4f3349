"""Rows of the table of operators: whole matrices, complex numbers, space, losses, diagonals."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.couple.tiny import FLAT, IMAGE, TOKENS, VECTOR, Row, Weighted, conv, image, vector


class Shared(nn.Module):
    """Attention in which two query heads share a key head; the heads are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads = 4, 2
        self.q, self.k, self.v = nn.Linear(5, 20), nn.Linear(5, 10), nn.Linear(5, 10)
        self.out = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.kv_heads, -1).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.kv_heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Straight(torch.autograd.Function):
    """Rounds, and lets the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def turned(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(len(x), -1, 2))
    return torch.view_as_real(pairs * torch.polar(pairs.real, pairs.imag)).flatten(1)


class Rotary(nn.Module):
    """Two heads of (plain | pairs to be turned); a row of its matrix must stay even."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(5, 20), nn.Linear(20, 3)
        self.plain, self.pairs = 6, 4

    def forward(self, x: Tensor) -> Tensor:
        heads = self.q(x).view(*x.shape[:2], 2, self.plain + self.pairs)
        plain, pairs = heads.split([self.plain, self.pairs], dim=-1)
        turned = torch.view_as_complex(pairs.unflatten(-1, (-1, 2))) * torch.tensor(1j)
        return self.out(torch.cat([plain, torch.view_as_real(turned).flatten(3)], -1).flatten(2))


class Asserting(nn.Module):
    """Asks the data something, then compares a size with an attribute, beside other operators."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.beside, self.last = nn.Linear(5, 6), nn.Linear(5, 3), nn.Linear(6, 3)
        self.wide = 6

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * (-x if x.isnan().any().item() else x)
        y = self.first(x)
        assert y.shape[-1] == self.wide
        return self.beside(x) + self.last(y)


def in_chunks(x: Tensor) -> Tensor:
    """Chunks of two tokens, each beginning in the middle of the last one, summed up."""
    batch, token, channel = x.stride()
    shape, strides = (len(x), x.shape[1] - 1, 2, x.shape[2]), (batch, token, token, channel)
    return x.as_strided(shape, strides).sum(2)


def pooled_back(x: Tensor) -> Tensor:
    small, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(small, places, 2)


def sampled(x: Tensor) -> Tensor:
    turn = torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(turn, list(x.shape), False), align_corners=False)


def by_hook(layer: nn.Module) -> nn.Module:
    """The old form of weight norm: a plain attribute, computed before each forward.

    Made without a graph, else the oracle could not copy the module.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


normed = by_hook, parametrizations.weight_norm

WHOLE_ROWS = (
    *(
        Row(name, conv(norm(nn.Linear(5, 6)), nn.ReLU(), norm(nn.Linear(6, 3))), VECTOR, (6,))
        for name, norm in zip(("weight norm by hook", "weight norm"), normed, strict=True)
    ),
    Row(
        "weight norm of a convolution",
        conv(
            parametrizations.weight_norm(nn.Conv1d(7, 6, 3)),
            nn.ReLU(),
            parametrizations.weight_norm(nn.Conv1d(6, 3, 1)),
        ),
        TOKENS,
        (6,),
    ),
    Row(
        "spectral norm",
        conv(
            parametrizations.spectral_norm(nn.Linear(5, 6)),
            nn.ReLU(),
            parametrizations.spectral_norm(nn.Linear(6, 3)),
        ),
        VECTOR,
        (6,),
    ),
    Row(
        "orthogonal",
        conv(parametrizations.orthogonal(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3)),
        VECTOR,
        (),
        "works on the whole matrix",
    ),
    Row(
        "cdist",
        lambda: Weighted(
            lambda x, a, c, b: (
                torch.cdist(x @ a, c, compute_mode="donot_use_mm_for_euclid_dist") @ b
            ),
            (5, 6),
            (7, 6),
            (7, 3),
        ),
        VECTOR,
        (6, 7),
    ),
    Row(
        "bilinear",
        lambda: Weighted(
            lambda x, a, c, w, b: F.bilinear(x @ a, x @ c, w) @ b, (5, 6), (5, 7), (4, 6, 7), (4, 3)
        ),
        VECTOR,
        (4, 6, 7),
    ),
    Row(
        "einsum",
        lambda: Weighted(lambda x, a, b: torch.einsum("bi,io,oj->bj", x, a, b), (5, 6), (6, 3)),
        VECTOR,
        (6,),
    ),
    Row(
        "outer products",
        lambda: Weighted(lambda x, a, b, c: x @ torch.addr(c, a, b).T, (6,), (5,), (6, 5)),
        VECTOR,
        (),
    ),
    Row("grouped queries", Shared, TOKENS, (2, 2, 5)),
    Row("renorm", vector(lambda x: x.renorm(2, 0, 1.0)), VECTOR, (6,)),
    Row("layer norm of an image", image(nn.LayerNorm([6, 8, 8])), IMAGE, (6,)),
    Row("local response norm", image(nn.LocalResponseNorm(3)), IMAGE, (), "a spatial size"),
    Row(
        "dropout of channels", image(nn.Sequential(nn.Dropout2d(), nn.AlphaDropout())), IMAGE, (6,)
    ),
    Row(
        "cosine similarity",
        lambda: Weighted(
            lambda x, a, c: F.cosine_similarity((x @ a)[:, None], c[None], -1), (5, 6), (7, 6)
        ),
        VECTOR,
        (6,),
    ),
    Row("normalize", vector(lambda x: F.normalize(x, dim=-1)), VECTOR, (6,)),
    Row("fft of tokens", vector(lambda x: torch.fft.fft(x, dim=1).real), TOKENS, (6,)),
    Row(
        "fft of the width",
        vector(lambda x: torch.fft.rfft(x).abs(), 6, 4),
        VECTOR,
        (),
        "a Fourier transform",
    ),
    Row("complex pairs", vector(turned), VECTOR, (3,), "the real and the imaginary"),
    Row(
        "cross product",
        vector(lambda x: torch.linalg.cross(x.view(4, -1, 3), x.view(4, -1, 3)).flatten(1)),
        VECTOR,
        (2,),
        "three axes",
    ),
    Row(
        "inverse",
        vector(
            lambda x: torch.linalg.inv(torch.eye(3) * (x.abs() + 1)[..., None, None]).sum((-1, -2))
        ),
        VECTOR,
        (6,),
    ),
    Row("max unpool", image(pooled_back), IMAGE, (6,)),
    Row("grid sample", image(sampled), IMAGE, (6,)),
    Row("reflection pad", image(nn.ReflectionPad2d(1)), IMAGE, (6,)),
    Row("circular pad", image(lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")), IMAGE, (6,)),
    Row("sliding windows", vector(lambda x: x.unfold(1, 3, 2).mean(-1)), TOKENS, (6,)),
    Row("strides", vector(lambda x: x.as_strided((4, 3), (6, 2)), 6, 3), VECTOR, (), "by strides"),
    Row("strides that leave channels", vector(in_chunks), TOKENS, (6,)),
    Row("an assertion after a question to the data", Asserting, VECTOR, (6,)),
    Row("pairs in even rows", Rotary, TOKENS, (2, 6), "imaginary part"),
    Row("diagonals", vector(lambda x: x.diag_embed().diagonal(dim1=1, dim2=2)), VECTOR, (6,)),
    Row(
        "blocks",
        lambda: Weighted(
            lambda x, a, b, c: torch.cat([x, x], 1) @ torch.block_diag(a, b) @ c,
            (5, 4),
            (5, 6),
            (10, 2),
        ),
        VECTOR,
        (4, 6),
    ),
    Row(
        "cross entropy",
        lambda: Weighted(lambda x, a, b: F.cross_entropy(x @ a @ b, FLAT % 3), (5, 6), (6, 3)),
        VECTOR,
        (6,),
        "classes named by number",
    ),
    Row(
        "mean squared error",
        lambda: Weighted(lambda x, a, b: F.mse_loss(x @ a, x @ b), (5, 6), (5, 6)),
        VECTOR,
        (6,),
    ),
    Row(
        "read through an exponential",
        lambda: Weighted(lambda x, a, b: x @ (a @ b.exp()), (5, 6), (6, 3)),
        VECTOR,
        (6,),
    ),
    Row(
        "read through exponentials alone",
        lambda: Weighted(lambda x, a, b: (x @ a) @ b.exp(), (5, 6), (6, 3)),
        VECTOR,
        (6,),
    ),
    Row("autograd function", vector(lambda x: Straight.apply(x)), VECTOR, (6,)),
    Row("checkpoint", vector(lambda x: checkpoint(F.gelu, x, use_reentrant=False)), VECTOR, (6,)),
)
