"""Small models, each with one trait that a map must see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Literal(nn.Module):
    """Writes a size into its code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(512, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        x = x.view(-1, 512)
        return self.fc(x)


class Grouped(nn.Module):
    """Grouped-query attention: four query heads share two key heads, by attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = 4, 2, 6
        self.q, self.k = nn.Linear(5, 24), nn.Linear(5, 12)
        self.v, self.o = nn.Linear(5, 12), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Branching(nn.Module):
    """Looks at its data to choose a path, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)) + torch.rand(1)
        return self.b(y if y.sum() > 1e9 else -y)


class Failing(nn.Module):
    """Fails inside a child, after batch norm has seen the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Auxiliary(nn.Module):
    """A head that exists in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.body(x).relu()
        return (self.head(h), self.aux(h)) if self.training else self.head(h)


class Tied(nn.Module):
    """The output layer is the embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(h + self.mid(h).relu())


class FromDict(nn.Module):
    """Takes a dict by position and a tensor by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, batch: dict[str, Tensor], *, side: Tensor) -> dict[str, Tensor]:
        return {"y": self.out(self.a(batch["x"]).relu() + self.b(side))}
