"""Pruned models for tests, and what to look at in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt import PruneWeights, apply
from neuroexapt.capture.masks import MASK, is_mask


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Masks by the name of their parameter, ties included."""
    buffers = model.named_buffers(remove_duplicate=False)
    return {name.replace(MASK, ""): mask for name, mask in buffers if is_mask(name)}


def stored(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def all_zero(model: nn.Module) -> bool:
    """Whether every masked entry is exactly zero where it is stored."""
    kept = stored(model)
    return all(bool((kept[name][~mask] == 0).all()) for name, mask in masks_of(model).items())


def zeroed(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A model without masks whose weights are zero where the masks are."""
    with torch.no_grad():
        for name, mask in masks.items():
            stored(model)[name][~mask] = 0
    return model


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.body(x)))


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def mlp(dtype: torch.dtype = torch.float32) -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return MLP().to(dtype)


def pruned(share: float = 0.5, **kwargs: Any) -> MLP:
    model = mlp()
    apply(model, PruneWeights("*", share=share, **kwargs), (X,))
    return model
