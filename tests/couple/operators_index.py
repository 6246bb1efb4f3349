"""Rows of the table of operators: what is read, written or chosen by number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.couple.tiny import FLAT, IMAGE, TOKENS, VECTOR, Between, Row, Weighted, vector

SPOTS = torch.arange(28).reshape(4, 7) % 3 > 0


class Experts(nn.Module):
    """A mixture of experts: one of three hidden layers for each token, chosen by a router."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.router, self.grouped = nn.Linear(8, 3), grouped
        self.up = nn.Parameter(torch.randn(3, 8, 12))
        self.down = nn.Parameter(torch.randn(3, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).softmax(-1).topk(1, -1)
        order = chosen[:, 0].argsort()
        run = self._together if self.grouped else self._one_by_one
        hidden = run(x[order], chosen[order, 0])
        return torch.zeros_like(x).index_add_(0, order, hidden * scores[order])

    def _together(self, x: Tensor, chosen: Tensor) -> Tensor:
        ends = torch.histc(chosen.to(x), 3, 0, 2).cumsum(0, dtype=torch.int32)
        x, up, down = x.float(), self.up.float(), self.down.float()
        result = F.grouped_mm(F.grouped_mm(x, up, offs=ends).relu(), down, offs=ends)
        return result.to(self.up.dtype)

    def _one_by_one(self, x: Tensor, chosen: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert, hit in enumerate(F.one_hot(chosen, 3).T):
            (at,) = torch.where(hit)
            result[at] = (x[at] @ self.up[expert]).relu() @ self.down[expert]
        return result


class Picked(nn.Module):
    """Every token takes its own matrix out of a table of three."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(4, 3)
        self.table, self.shift = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        which = x[:, 0].long().abs() % 3
        hidden = torch.bmm(self.table[which], self.first(x)[..., None])[..., 0] + self.shift[which]
        return self.last(hidden.relu())


class Windowed(nn.Module):
    """Attention with a bias for each head and pair of places, taken from a table by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.qkv, self.out = nn.Linear(5, 36), nn.Linear(12, 2)
        self.table = nn.Parameter(torch.randn(13, 3))
        self.register_buffer("places", torch.arange(7)[:, None] - torch.arange(7) + 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = self.table[self.places.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, bias[None])
        return self.out(y.transpose(1, 2).flatten(2))


def windows(x: Tensor) -> Tensor:
    """(2, C, 8, 8) -> windows of 4 x 4: (8, 16, C)."""
    x = x.permute(0, 2, 3, 1)
    batch, height, width, channels = x.shape
    x = x.view(batch, height // 4, 4, width // 4, 4, channels).roll((1, 1), (1, 3))
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, channels)


def assigned(x: Tensor) -> Tensor:
    result = x.clone()
    result[SPOTS] = result[SPOTS] * 2
    return result


def halves(x: Tensor) -> Tensor:
    """The first half plus the second, written into views of a new tensor."""
    half = x.shape[-1] // 2
    result = torch.empty_like(x)
    result[..., :half] = x[..., half:]
    result[..., half:].copy_(x[..., :half])
    return result


def rotated_pairs(x: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((-odd, even), -1).flatten(-2)


INDEX_ROWS = (
    Row(
        "gather of features",
        vector(lambda x: x.gather(1, FLAT[:, None, None].expand(4, 1, x.shape[-1]))),
        TOKENS,
        (6,),
    ),
    Row(
        "scatter of features",
        vector(lambda x: torch.zeros_like(x).scatter_add(0, FLAT[:, None].expand_as(x) % 4, x)),
        VECTOR,
        (6,),
    ),
    Row("index_add", vector(lambda x: torch.zeros_like(x).index_add(0, FLAT % 4, x)), VECTOR, (6,)),
    Row("index of two dimensions", vector(lambda x: x[FLAT % 4, FLAT]), TOKENS, (6,)),
    Row("mask of tokens", vector(lambda x: x[SPOTS]), TOKENS, (6,)),
    Row("assigned to a mask", vector(assigned), TOKENS, (6,)),
    Row(
        "masked_scatter",
        vector(lambda x: x.masked_scatter(SPOTS[..., None].expand_as(x), x.flatten(0, 1).flip(0))),
        TOKENS,
        (6,),
    ),
    Row(
        "masked_scatter in order",
        vector(lambda x: x.masked_scatter(x > 0, x.flip(0))),
        VECTOR,
        (),
        "filled in order",
    ),
    Row("masked_select", vector(lambda x: x + x[x > 0].mean()), VECTOR, (), "index tensor"),
    Row("nonzero", vector(lambda x: x[torch.where(SPOTS[:, 0])[0]]), VECTOR, (6,)),
    Row(
        "experts one by one",
        lambda: Between(nn.Linear(5, 8), Experts(False), nn.Linear(8, 3)),
        VECTOR,
        (8, 12),
        "named by number",
    ),
    Row(
        "experts together",
        lambda: Between(nn.Linear(5, 8), Experts(True), nn.Linear(8, 3)),
        VECTOR,
        (8, 12),
        "the forward holds its size as a number",
    ),
    Row("matrices by number", Picked, VECTOR, (4, 6), "index tensor"),
    Row("relative positions", Windowed, TOKENS, (3, 4), "index tensor"),
    Row(
        "windows of an image",
        lambda: Between(nn.Conv2d(3, 6, 1), windows, nn.Linear(6, 3)),
        IMAGE,
        (6,),
    ),
    Row("roll of tokens", vector(lambda x: x.roll(1, 1)), TOKENS, (6,)),
    Row("argmax", vector(lambda x: x * x.argmax(-1, keepdim=True)), VECTOR, (), "named by number"),
    Row("topk of the width", vector(lambda x: x.topk(3, -1)[0], 6, 3), VECTOR, (6,)),
    Row("topk by number", vector(lambda x: x * x.topk(1, -1)[1]), VECTOR, (), "named by number"),
    Row("sort", vector(lambda x: x.sort(-1)[0]), VECTOR, (), "change places"),
    Row(
        "multinomial",
        vector(lambda x: x.gather(1, x.softmax(-1).multinomial(2)), 6, 2),
        VECTOR,
        (6,),
    ),
    Row("cummax", vector(lambda x: x.cummax(1)[0]), TOKENS, (6,)),
    Row(
        "bucketize", vector(lambda x: x * torch.bucketize(x, FLAT.double().sort()[0])), VECTOR, (6,)
    ),
    Row("in-place halves", vector(halves), VECTOR, (3,)),
    Row("pairs, every second", vector(rotated_pairs), VECTOR, (3,), "every n-th position"),
    Row("repeat_interleave", vector(lambda x: x.repeat_interleave(2, 1), 6, 12), VECTOR, (6,)),
    Row(
        "repeat_interleave by counts",
        vector(lambda x: x.repeat_interleave(FLAT, 0)),
        VECTOR,
        (6,),
    ),
    Row(
        "packed",
        vector(
            lambda x: nn.utils.rnn.pad_packed_sequence(
                nn.utils.rnn.pack_padded_sequence(
                    x, FLAT.clamp(1, 7).sort(descending=True)[0], True
                ),
                True,
            )[0]
        ),
        TOKENS,
        (6,),
    ),
    Row(
        "bag of rows",
        lambda: Weighted(
            lambda x, e, w: F.embedding_bag(x.long().abs() % 9, e) @ w, (9, 6), (6, 2)
        ),
        VECTOR,
        (6,),
        "rows taken by number",
    ),
)
