"""Tensors kept for evaluation are dropped when the weights they came from change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import Widen, apply, transaction
from neuroexapt.testing import changes, snapshot

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Biased(nn.Module):
    """Heads with a bias each that evaluation keeps, as LeViT does; training drops it."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.bias = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 2)
        self.kept = kept

    def train(self, mode: bool = True) -> Biased:
        """Forget what was computed."""
        super().train(mode)
        if mode and isinstance(self.kept, dict):
            self.kept.clear()
        elif mode:
            self.kept = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.relu(self.body(x) + self._computed())))

    def _computed(self) -> Tensor:
        if self.training:
            return self.bias.tanh()
        if not self.kept:
            made = self.bias.detach().tanh()
            self.kept = {**self.kept, "cpu": made} if isinstance(self.kept, dict) else [made]
        return self.kept["cpu"] if isinstance(self.kept, dict) else self.kept[0]


KEPT = pytest.mark.parametrize("kept", [{}, None], ids=["dict", "list"])


def evaluated(kept: Any) -> tuple[Biased, Tensor]:
    """A model that has run in evaluation mode, and what it said."""
    torch.manual_seed(0)
    model = Biased(kept).eval()
    with torch.no_grad():
        return model, model(X)


@KEPT
def test_a_stale_cache_does_not_stand_in_the_way(kept: Any) -> None:
    """The width grows although the model has kept a tensor of the old size; modes stay."""
    model, before = evaluated(kept)
    apply(model, Widen("body", by=2), (X,))
    assert not model.training
    assert model.body.out_features == 8
    torch.testing.assert_close(model(X), before)


@KEPT
def test_roll_back_brings_the_kept_tensors_back(kept: Any) -> None:
    """The very object, with the very contents."""
    model, _ = evaluated(kept)
    before, held = snapshot(model), model.kept
    tx = transaction(model)
    tx.apply(Widen("body", by=2), (X,))
    assert not model.kept
    tx.roll_back()
    assert not changes(before, snapshot(model))
    assert model.kept is held
    assert held
