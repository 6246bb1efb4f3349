"""RegrowWeights: one step of dynamic sparse training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from neuroexapt.capture.masks import mask_of
from neuroexapt.couple import AxisMap
from neuroexapt.edit.base import Edit
from neuroexapt.edit.patch import Masking, Patch
from neuroexapt.edit.prune import told
from neuroexapt.edit.weights import fitting, masked_weights
from neuroexapt.errors import EditError


@dataclass(frozen=True)
class RegrowWeights(Edit):
    """Drop the smallest entries of each masked weight, and grow as many where gradients are large.

    Promise: none. The number of zeros of each tensor stays. A weight that grows starts at zero,
    without momentum; one that is dropped and has one of the largest gradients stays as it is.

    Args:
        gradients: per parameter name the gradient as if there were no mask; see
            :func:`neuroexapt.measure.dense_gradients`.
        at: a parameter's name, a module's path, or a glob over both; weights without a mask are
            left alone.
        share: share of the kept weights that are exchanged; see
            :func:`neuroexapt.edit.drop_fraction` for the authors' schedule.
        skip: names, paths or globs of what is left alone.

    Raises:
        UnknownPlaceError, EditError: from :meth:`plan`.

    Example:
        >>> from torch import nn
        >>> from neuroexapt import PruneWeights, apply
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 4)
        >>> done = apply(net, PruneWeights("0", share=0.5), args=(x,))
        >>> edit = RegrowWeights({"0.weight": torch.randn(8, 4)}, share=0.25)
        >>> done = apply(net, edit, args=(x,))
        >>> int((net[0].nx_mask_weight).sum())
        16

    Evci et al. 2020 (RigL).
    """

    gradients: Mapping[str, Tensor] = field(compare=False)
    at: str = "*"
    share: float = 0.3
    skip: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return self.at

    def check(self, axes: AxisMap) -> list[EditError]:
        """The share, and weights with a mask."""
        problems = []
        if (
            isinstance(self.share, bool)
            or not isinstance(self.share, Real)
            or (not 0 < float(self.share) <= 1)
        ):
            problems.append(
                EditError(
                    self.at,
                    seen=f"share={self.share!r}",
                    needed="a share of the kept weights, above 0 and at most 1",
                    next_step="use share=0.3",
                )
            )
        try:
            masked_weights(axes, self.at, self.skip)
        except EditError as error:
            problems.append(error)
        return problems

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """A mask of as many entries for each weight that has one."""
        problems = self.check(axes)
        if problems:
            raise problems[0]
        names = masked_weights(axes, self.at, self.skip)
        fitting(names, self.gradients, tensors, "gradients")
        old = {name: tensors[mask_of(name)] for name in names}
        new = {name: self._mask(tensors[name], old[name], self.gradients[name]) for name in names}
        grown = sum(int((new[name] & ~old[name]).sum()) for name in names)
        kept = sum(int(mask.sum()) for mask in old.values())
        return Patch(
            self,
            "none",
            f"exchange {grown:,} of {kept:,} kept weights; {told(new)}",
            maskings=tuple(Masking(name, mask) for name, mask in new.items()),
        )

    def _mask(self, weight: Tensor, mask: Tensor, gradient: Tensor) -> Tensor:
        kept = int(mask.sum())
        count = int(self.share * kept + 0.5)
        sizes = weight.detach().abs().float().masked_fill(~mask, -torch.inf)
        stay = _best(sizes, kept - count)
        slopes = gradient.detach().to(weight.device).abs().float().masked_fill(stay, -torch.inf)
        return stay | _best(slopes, count)


def _best(scores: Tensor, count: int) -> Tensor:
    """A mask of the highest entries."""
    chosen = scores.flatten().topk(count).indices
    flat = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    return flat.index_fill_(0, chosen, True).view(scores.shape)
