"""Widen beside norms: what is exact, what is refused beforehand, and what new units look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt import Narrow, Widen, apply, map_axes
from neuroexapt.errors import EditError

X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Rms(nn.Module):
    """An RMS norm with its scale as ``1 + weight``, as Gemma has it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(size) * 0.3), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return y * (1.0 + self.weight)


class Between(nn.Module):
    """Layers, an operator in the middle, a norm and a reader."""

    def __init__(self, op: Callable[[Any, Tensor], Tensor], norm: nn.Module, **parts: Any) -> None:
        super().__init__()
        self.first, self.op, self.norm, self.head = nn.Linear(8, 12), op, norm, nn.Linear(12, 3)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.op(self, self.first(x))))


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys, as Qwen 3 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.groups = 6, 2
        self.q, self.k, self.v = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(8, 12)
        self.q_norm, self.k_norm = nn.RMSNorm(6, eps=1e-4), nn.RMSNorm(6, eps=1e-4)
        self.out = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.size)
        q = self.q_norm(self.q(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(shape)).transpose(1, 2)
        v = self.v(x).view(shape).transpose(1, 2)
        k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


def outputs(model: nn.Module) -> Tensor:
    """What it puts out, without a graph: a live one forbids an edit."""
    with torch.no_grad():
        return torch.as_tensor(model(X))


def trained(model: nn.Module) -> nn.Module:
    """Every parameter away from where it starts."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.3 * noise)
    return model


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True, norm_first=norm_first)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(8, 12), stack, nn.Linear(12, 3))


def gain() -> nn.Parameter:
    return nn.Parameter(torch.randn(12))


def depthwise() -> nn.Module:
    return nn.Conv1d(12, 12, 1, groups=12)


@dataclass(frozen=True)
class Row:
    """A model and a width that grows exactly, or the words with which it is refused."""

    name: str
    make: Callable[[], nn.Module]
    width: str
    refused: str = ""


ROWS = (
    Row(
        "plain sum",
        lambda: Between(lambda m, y: y + m.dense(y), nn.LayerNorm(12), dense=nn.Linear(12, 12)),
        "first.out",
    ),
    Row("scaled", lambda: Between(lambda m, y: 0.5 * y - 1, nn.LayerNorm(12)), "first.out"),
    Row("pooled", lambda: Between(lambda m, y: y.mean(1), nn.LayerNorm(12)), "first.out"),
    Row(
        "activation",
        lambda: Between(lambda m, y: y.relu(), nn.LayerNorm(12)),
        "first.out",
        "behind an operator",
    ),
    Row(
        "layer scale",
        lambda: Between(lambda m, y: y * m.gain, nn.LayerNorm(12), gain=gain()),
        "first.out",
        "behind an operator",
    ),
    Row(
        "depthwise",
        lambda: Between(lambda m, y: m.depthwise(y.mT).mT, nn.LayerNorm(12), depthwise=depthwise()),
        "first.out",
        "behind an operator",
    ),
    Row(
        "no scale",
        lambda: Between(lambda m, y: y, nn.LayerNorm(12, elementwise_affine=False)),
        "first.out",
        "without a scale",
    ),
    Row(
        "epsilon in the code",
        lambda: Between(
            lambda m, y: F.layer_norm(y, y.shape[-1:], m.gain, None, 1e-2),
            nn.Identity(),
            gain=gain(),
        ),
        "first.out",
        "epsilon is a number in the code",
    ),
    Row("rms, activation", lambda: Between(lambda m, y: y.relu(), Rms(12)), "first.out"),
    Row("rms, factor", lambda: Between(lambda m, y: y * m.gain, Rms(12), gain=gain()), "first.out"),
    Row(
        "rms, depthwise",
        lambda: Between(lambda m, y: m.depthwise(y.mT).mT, Rms(12), depthwise=depthwise()),
        "first.out",
    ),
    Row(
        "rms, sigmoid",
        lambda: Between(lambda m, y: y.sigmoid(), Rms(12)),
        "first.out",
        "behind an operator",
    ),
    Row("query norm: size", Attention, "size"),
    Row("query norm: heads", Attention, "groups"),
    Row("pre-norm encoder: heads", lambda: encoder(True), "1.layers.0.self_attn.num_heads"),
    Row("pre-norm encoder: size", lambda: encoder(True), "1.layers.0.self_attn.head_dim"),
    Row(
        "post-norm encoder, trained",
        lambda: encoder(False),
        "1.layers.0.self_attn.num_heads",
        "differs between units",
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_exact_or_refused_beforehand(row: Row) -> None:
    """Nothing is promised and taken back: outputs are equal to 1e-10, or an EditError says why."""
    torch.manual_seed(0)
    model = trained(row.make().double())
    before = outputs(model)
    if row.refused:
        with pytest.raises(EditError, match=row.refused):
            apply(model, Widen(row.width, by=2), (X,))
        assert torch.equal(outputs(model), before)
        assert apply(model, Narrow(row.width, by=1), (X,)).parameters_after
        return
    for by in (1, 3):
        apply(model, Widen(row.width, by=by), (X,))
        scale = float(before.abs().max())
        assert float((outputs(model) - before).abs().max()) <= 1e-10 * scale


def test_a_fresh_post_norm_stream_grows_and_its_new_units_differ() -> None:
    """Readers of equal entries add up to zero, and the units part in training."""
    torch.manual_seed(0)
    model = encoder(False).double()
    before = outputs(model)
    apply(model, Widen("1.layers.0.self_attn.num_heads", by=2), (X,))
    assert float((outputs(model) - before).abs().max()) <= 1e-10
    columns = model[2].weight[:, 12:].detach()
    assert float(columns.sum(1).abs().max()) <= 1e-12
    assert float(columns.abs().max()) > 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    rows = model[0].weight.detach()[12:].view(2, 4, 8)
    assert not torch.allclose(rows[0], rows[1])


class BesideNorm(nn.Module):
    """A pre-norm stream that is read through its norm and without it; the head is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 12, bias=False), nn.LayerNorm(12)
        self.normed, self.raw, self.back = nn.Linear(12, 5), nn.Linear(12, 5), nn.Linear(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.back(self.normed(self.norm(x)).tanh() + self.raw(x).tanh())
        return self.norm(x) @ self.embed.weight


@pytest.mark.parametrize("by", [1, 3])
def test_a_reader_without_the_norm_meets_new_entries_as_their_mean(by: int) -> None:
    """Its columns add up to nothing; behind the norm new entries are gone, and any column does."""
    torch.manual_seed(0)
    model = trained(BesideNorm().double())
    before = outputs(model)
    axes = map_axes(model, (X,))
    width = axes.widths["back.out"]
    behind = {p.tensor: p.behind_norm for p in width.appearances if "consumer" in p.roles}
    assert behind["normed.weight"]
    assert not behind["raw.weight"]
    apply(model, Widen(width.name, by=by), (X,))
    assert float((outputs(model) - before).abs().max()) <= 1e-10 * float(before.abs().max())
    assert float(model.raw.weight[:, 12:].detach().sum(1).abs().max()) <= 1e-12


def test_a_pattern_leaves_what_cannot_grow_and_names_it() -> None:
    """The description says which widths stay, and why."""
    model = nn.Sequential(
        nn.Linear(8, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)
    ).double()
    done = apply(model, Widen("*", by=0.5), (X,))
    assert (model[0].out_features, model[3].out_features) == (12, 9)
    assert "widen 3.out to 9; '0.out' stays" in done.description
    with pytest.raises(EditError, match="behind an operator"):
        apply(model, Widen("0*", by=0.5), (X,))


def test_heads_of_a_module_follow_its_stream() -> None:
    """nn.MultiheadAttention: numbers, in-projection, out-projection and stream change at once."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
            self.mix = nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.embed(x)
            return self.head(y + self.mix(y, y, y, need_weights=False)[0])

    model = Net().double()
    assert {w.size for w in map_axes(model, (X,)).widths.values()} == {3, 4}
    apply(model, Narrow("mix.num_heads", by=1), (X,))
    mix = model.mix
    assert (mix.embed_dim, mix.num_heads, mix.head_dim, mix.kdim, mix.vdim) == (8, 2, 4, 8, 8)
    assert mix.in_proj_weight.shape == (24, 8)
    assert mix.bias_k is not None
    assert mix.bias_k.shape == (1, 1, 8)
    assert model.embed.out_features == 8
    model(X).sum().backward()


def test_cross_attention_with_sizes_of_its_own() -> None:
    """Keys and values of other sizes: their streams are widths of their own."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 10), nn.Linear(8, 6)
            self.mix = nn.MultiheadAttention(12, 3, kdim=10, vdim=6, batch_first=True)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.a(x), self.b(x), self.c(x))[0])

    model = Cross().double()
    before = outputs(model)
    apply(model, Widen("b.out", by=3), (X,))
    apply(model, Widen("c.out", by=2), (X,))
    assert (model.mix.kdim, model.mix.vdim) == (13, 8)
    assert float((outputs(model) - before).abs().max()) <= 1e-10
    apply(model, Widen("mix.num_heads", by=1), (X,))
    assert (model.mix.embed_dim, model.mix.num_heads) == (16, 4)
    assert float((outputs(model) - before).abs().max()) <= 1e-10


class Tied(nn.Module):
    """A decoder whose head is its embedding, with or without a norm before it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.places, self.last = nn.Embedding(9, 6), nn.Embedding(5, 6), norm
        self.norm, self.mlp = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(5))
        x = x + self.mlp(self.norm(x))
        return F.linear(self.last(x), self.embed.weight)


def test_a_tied_head_needs_a_norm_before_it() -> None:
    """Else new entries, the mean of the others, would meet columns that are not zero."""
    ids = torch.arange(10).view(2, 5) % 9
    assert apply(Tied(nn.LayerNorm(6)), Widen("places", by=2), (ids,)).max_difference < 1e-5
    bare = Tied(nn.Identity())
    with pytest.raises(EditError, match="reads them without a norm before it"):
        apply(bare, Widen("places", by=2), (ids,))
    apply(bare, Narrow("places", by=2), (ids,))
    assert bare.embed.weight.shape == (9, 4)
