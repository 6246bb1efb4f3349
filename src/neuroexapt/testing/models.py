"""Models to try an edit on: rows of a table, and a small zoo of them to begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from neuroexapt.capture.run import opened

Loss = Callable[[Any], Tensor]


def squared_error(output: Any) -> Tensor:
    """Mean squared error of every floating-point output against a fixed random target; a scalar."""
    leaves = [leaf for leaf in opened(output) if isinstance(leaf, Tensor)]
    errors = []
    for number, leaf in enumerate(leaf for leaf in leaves if leaf.is_floating_point()):
        generator = torch.Generator().manual_seed(number)
        target = torch.randn(leaf.shape, generator=generator, dtype=torch.float32)
        errors.append(F.mse_loss(leaf, target.to(leaf)))
    return torch.stack(errors).mean()


@dataclass(frozen=True)
class Row:
    """One model that edits are tried on.

    Attributes:
        name: what reports call it.
        make: builds it; called with the same random state each time, so that it gives the same
            weights.
        args: positional example input, a batch of two or more; floating-point tensors are cast to
            the dtype under test.
        kwargs: keyword example input.
        loss: a scalar from the model's output.
    """

    name: str
    make: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss = squared_error

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in training mode; the global random state stays."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return self.make().to(dtype).train()

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example input, its floating-point tensors in a dtype."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()

        args, kwargs = pytree.tree_map_only(Tensor, cast, (self.args, dict(self.kwargs)))
        return args, kwargs


class _Residual(nn.Module):
    """A residual block over images."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class _Block(nn.Module):
    """A pre-norm transformer block with a causal attention of its own."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return torch.as_tensor(x + self.mlp(self.ln2(x)))


class _Decoder(nn.Module):
    """A language model whose head is tied to its embedding."""

    def __init__(self, vocabulary: int = 13, d: int = 12) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, d), nn.Embedding(8, d)
        self.blocks = nn.ModuleList([_Block(d, 2)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return torch.as_tensor(self.head(self.norm(x)))


class _Recurrent(nn.Module):
    """An LSTM over a signal, its last output classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 7, batch_first=True), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.lstm(x)[0][:, -1]))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 10), nn.ReLU(), nn.Dropout(0.1), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4)
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )


def _resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        _Residual(6),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        _Residual(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def default_models() -> tuple[Row, ...]:
    """Five small models: an MLP, two convolutional nets, a transformer decoder, an LSTM.

    The decoder's head is tied to its embedding.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float32)
    vector = torch.randn(8, 6, generator=generator, dtype=torch.float32)
    signal = torch.randn(4, 5, 3, generator=generator, dtype=torch.float32)
    tokens = torch.randint(0, 13, (3, 8), generator=generator)
    return (
        Row("mlp", _mlp, (vector,)),
        Row("cnn", _cnn, (image,)),
        Row("resnet", _resnet, (image,)),
        Row("decoder", _Decoder, (tokens,)),
        Row("lstm", _Recurrent, (signal,)),
    )
