"""Scores of units that need no data."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from neuroexapt.couple import AxisMap, Width, first_names, unit_sums

SCORES = ("l2", "l1", "random")


def unit_norms(
    axes: AxisMap, width: Width, tensors: Mapping[str, Tensor], score: str = "l2", seed: int = 0
) -> list[float]:
    """One score a unit, higher is more important.

    ``"l2"`` is the root of the unit's squared weights over all tensors that make or read it,
    ``"l1"`` the sum of their absolute values. Each tensor's share is divided by its mean over
    units, so that no tensor rules by its size. ``"random"`` is a permutation drawn from ``seed``
    and the width's name.

    Invariant: ``"l2"`` and ``"l1"`` stay the same when one tensor is scaled as a whole.

    Example:
        >>> from torch import nn
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> axes = map_axes(net, (torch.zeros(1, 1),))
        >>> weights = {"0.weight": torch.tensor([[3.0], [1.0]]), "1.weight": torch.ones(1, 2)}
        >>> unit_norms(axes, axes.widths["0.out"], weights, "l1")
        [2.5, 1.5]

    Fang et al. 2023 (DepGraph) for the norm over coupled tensors.
    """
    if score == "random":
        generator = torch.Generator().manual_seed(seed + zlib.crc32(width.name.encode()))
        return [float(rank) for rank in torch.randperm(width.size, generator=generator)]
    total = torch.zeros(width.size, dtype=torch.float64)
    first = first_names(axes)
    for place in width.appearances:
        if place.roles == {"elementwise"} or first[place.tensor] != place.tensor:
            continue
        sizes = tensors[place.tensor].detach().abs()
        sizes = sizes.float() if sizes.device.type == "mps" else sizes.double()
        sizes = sizes if score == "l1" else sizes.square()
        expr = axes.tensors[place.tensor][place.dim]
        share = unit_sums(sizes.cpu(), expr, width.name, place.dim, width.size)
        mean = float(share.mean())
        if mean > 0:
            total += share / mean
    return [float(value) for value in (total if score == "l1" else total.sqrt())]
