"""PruneWeights: single weights held at zero by a mask; MakePermanent: the mask goes, zeros stay."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from neuroexapt.capture.masks import mask_of
from neuroexapt.couple import AxisMap, size_of
from neuroexapt.edit.base import Edit, is_glob
from neuroexapt.edit.patch import Masking, Patch
from neuroexapt.edit.sparsity import keep_n_of_m, lamp, without_lowest
from neuroexapt.edit.weights import fitting, found_weights, input_dim, masked_weights
from neuroexapt.errors import EditError

_NAMED = 3  # weights that a description names one by one
_SCOPES = ("global", "layer")
_SCORES = ("lamp", "magnitude", "random")


@dataclass(frozen=True)
class PruneWeights(Edit):
    """Hold the least important weights at zero by a mask.

    Promise: none; the description says how many weights are zero afterwards, ``Applied`` how far
    the outputs moved. The mask is a buffer beside the weight (``fc.weight`` gets
    ``fc.nx_mask_weight``), is saved with the model, and follows later edits; new units come
    unmasked. The forward reads ``weight * mask``, so that no optimizer can move a masked weight,
    and its momentum is gone. A weight once masked stays masked (see ``RegrowWeights``).

    Zeros by themselves save neither time nor memory on ordinary hardware: see ``Narrow`` for that.

    Args:
        at: a parameter's name, a module's path, or a glob over both. A path or a pattern means
            the weights of linear, convolution, recurrent and attention layers: never biases,
            norm scales or embeddings. Those can be named.
        share: share of these weights that are zero afterwards, those that were included.
        pattern: ``(n, m)`` keeps n of every m consecutive weights along the dimension that the
            layer reads, such as (2, 4). Exactly one of ``share`` and ``pattern``. With a glob,
            weights whose size m does not divide stay as they are; the description says which.
        scope: ``"global"``, one threshold over all weights, or ``"layer"``, the share in each.
        score: ``"lamp"`` (magnitude, weighed so that each layer gets a share of its own; best or
            even in every comparison of ``docs/operations.md``), ``"magnitude"`` or ``"random"``;
            lower goes first.
        scores: per parameter name one score a weight instead (see
            :func:`neuroexapt.measure.weight_scores`), higher is more important.
        skip: names, paths or globs of what is left alone.
        seed: seed of random scores.

    Raises:
        UnknownPlaceError, EditError: from :meth:`plan`.

    Example:
        >>> from torch import nn
        >>> from neuroexapt import PruneWeights, apply
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> done = apply(net, PruneWeights("*", share=0.5), args=(torch.randn(5, 4),))
        >>> net[0].nx_mask_weight.dtype, int(sum((net[i].weight == 0).sum() for i in (0, 2)))
        (torch.bool, 24)

    Lee et al. 2021 for LAMP, Han et al. 2015 for magnitude, Mishra et al. 2021 for 2:4.
    """

    at: str = "*"
    share: float | None = None
    pattern: tuple[int, int] | None = None
    scope: str = "global"
    score: str = "lamp"
    scores: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    skip: tuple[str, ...] = ()
    seed: int = 0

    @property
    def place(self) -> str:
        return self.at

    def check(self, axes: AxisMap) -> list[EditError]:
        """Settings, place, and weights that a pattern does not fit."""
        problems = self._settings()
        try:
            names = found_weights(axes, self.at, self.skip)
        except EditError as error:
            return [*problems, error]
        if problems or self.pattern is None:
            return problems
        left = [error for name in names for error in self._misfit(axes, name)]
        return left if not is_glob(self.at) or len(left) == len(names) else []

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """One mask a weight."""
        problems = self.check(axes)
        if problems:
            raise problems[0]
        names = found_weights(axes, self.at, self.skip)
        left = [error for name in names for error in self._misfit(axes, name)]
        places = {error.place for error in left}
        names = tuple(name for name in names if name not in places)
        if self.scores:
            fitting(names, self.scores, tensors, "scores")
        ranks = {name: self._ranks(name, tensors) for name in names}
        masks = self._masks(axes, ranks, tensors)
        emptied = next((name for name, mask in masks.items() if not mask.any()), None)
        if emptied is not None:
            raise _emptied(emptied, self.share, tensors[emptied].numel())
        kept = "".join(f"; '{error.place}' stays: {error.seen}" for error in left[:_NAMED])
        kept += f"; {len(left) - _NAMED} more stay" if len(left) > _NAMED else ""
        return Patch(
            self,
            "none",
            f"prune {told(masks)}{kept}",
            maskings=tuple(Masking(name, mask) for name, mask in masks.items()),
        )

    def _settings(self) -> list[EditError]:
        wrong = []
        if (self.share is None) == (self.pattern is None):
            wrong.append(("share, pattern", "exactly one of both", "use share=0.5"))
        elif self.share is not None and not _is_share(self.share):
            wrong.append(("share", "a share between 0 and 1", "use share=0.5 for half"))
        elif self.pattern is not None and not _is_pattern(self.pattern):
            wrong.append(("pattern", "whole numbers (n, m) with 0 < n < m", "use pattern=(2, 4)"))
        if self.scope not in _SCOPES:
            wrong.append(("scope", f"one of {_SCOPES}", "use scope='global'"))
        if self.score not in _SCORES:
            wrong.append(
                ("score", f"one of {_SCORES}", "measure others and pass them as scores={...}")
            )
        return [
            EditError(
                self.at,
                seen=", ".join(f"{n}={getattr(self, n)!r}" for n in names.split(", ")),
                needed=needed,
                next_step=advice,
            )
            for names, needed, advice in wrong
        ]

    def _misfit(self, axes: AxisMap, name: str) -> list[EditError]:
        """Why a pattern does not fit a weight."""
        if self.pattern is None:
            return []
        n, m = self.pattern
        dim = input_dim(axes, name)
        size = 0 if dim is None else size_of(axes.tensors[name][dim], {})
        if dim is not None and size % m == 0:
            return []
        seen = "no dimension that it reads along" if dim is None else f"{size} inputs"
        return [
            EditError(
                name,
                seen=seen,
                needed=f"a number of inputs that {m} divides, to keep {n} of every {m}",
                next_step=f"use share={1 - n / m:g}, or widen what it reads to "
                f"{-(-size // m) * m or m}",
            )
        ]

    def _ranks(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scores on the weight's device, lowest where it is masked already."""
        weight, mask = tensors[name].detach(), tensors.get(mask_of(name))
        if self.scores:
            ranks = self.scores[name].detach().to(weight.device)
        elif self.score == "random":
            # Another draw for each tensor, whatever the others are.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            ranks = torch.rand(weight.shape, generator=generator).to(weight.device)
        else:
            ranks = lamp(weight) if self.score == "lamp" else weight.abs()
            ranks = ranks if weight.dtype == torch.float64 else ranks.float()
        ranks = ranks if ranks.dtype == torch.float64 else ranks.float()
        if not bool(ranks.isfinite().all()):
            raise EditError(
                name,
                seen="weights that are not finite",
                needed="finite weights",
                next_step="go back to a checkpoint from before the training diverged",
            )
        return ranks if mask is None else ranks.masked_fill(~mask, -torch.inf)

    def _masks(
        self, axes: AxisMap, ranks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if self.pattern is not None:
            n, m = self.pattern
            found = {}
            for name, rank in ranks.items():
                dim = input_dim(axes, name)
                assert dim is not None  # _misfit has seen to it
                found[name] = keep_n_of_m(rank, dim, n, m) & (rank > -torch.inf)
            return found
        together = self.scope == "global"
        groups = [tuple(ranks)] if together else [(name,) for name in ranks]
        found = {}
        for names in groups:
            count = self._count([ranks[name] for name in names])
            masks = without_lowest(_comparable([ranks[name] for name in names]), count)
            found.update(zip(names, masks, strict=True))
        return {name: mask.to(tensors[name].device) for name, mask in found.items()}

    def _count(self, ranks: Sequence[Tensor]) -> int:
        """How many of the weights are zero afterwards."""
        total = sum(rank.numel() for rank in ranks)
        masked = sum(int((rank == -torch.inf).sum()) for rank in ranks)
        count = int(float(self.share or 0) * total + 0.5)
        if self.scope == "layer":
            return max(count, masked)
        if count < masked:
            raise EditError(
                self.at,
                seen=f"share={self.share} of {total:,} weights, {masked:,} of which are masked",
                needed=f"a share of at least {masked / total:.4g}",
                next_step="prune more, exchange weights by RegrowWeights, or undo by MakePermanent",
            )
        return count


@dataclass(frozen=True)
class MakePermanent(Edit):
    """Take masks away: the zeros stay as values, and the module is of its own class again.

    Promise: exact. For handing a pruned model on (export, quantisation, another library).
    Further training moves the zeros like any weight.

    Args:
        at: a parameter's name, a module's path, or a glob over both.

    Raises:
        UnknownPlaceError, EditError: from :meth:`plan`.

    Example:
        >>> from torch import nn
        >>> from neuroexapt import PruneWeights, apply
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 4)
        >>> done = apply(net, PruneWeights("0", share=0.5), args=(x,))
        >>> done = apply(net, MakePermanent(), args=(x,))
        >>> type(net[0]).__name__, int((net[0].weight == 0).sum()), done.max_difference
        ('Linear', 16, 0.0)
    """

    at: str = "*"

    @property
    def place(self) -> str:
        return self.at

    def check(self, axes: AxisMap) -> list[EditError]:
        """Weights with a mask."""
        try:
            masked_weights(axes, self.at)
        except EditError as error:
            return [error]
        return []

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """No mask for each weight that has one."""
        names = masked_weights(axes, self.at)
        masks = {name: tensors[mask_of(name)] for name in names}
        return Patch(
            self,
            "exact",
            f"make zeros permanent: {told(masks)}",
            maskings=tuple(Masking(name, None) for name in names),
        )


def told(masks: Mapping[str, Tensor]) -> str:
    """How sparse masks are, for people.

    Example:
        >>> told({"fc.weight": torch.tensor([True, False, False, False])})
        '3 of 4 weights are zero (75.0 %) in fc.weight'
    """
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    total = sum(mask.numel() for mask in masks.values())
    share = {name: 100 * zeros[name] / mask.numel() for name, mask in masks.items()}
    whole = f"{sum(zeros.values()):,} of {total:,} weights are zero"
    whole += f" ({100 * sum(zeros.values()) / total:.1f} %)"
    if len(masks) == 1:
        return f"{whole} in {next(iter(masks))}"
    least, most = min(share, key=share.__getitem__), max(share, key=share.__getitem__)
    if share[least] == share[most]:
        return f"{whole} in each of {len(masks)} tensors"
    spread = f"from {share[least]:.1f} % in {least} to {share[most]:.1f} % in {most}"
    return f"{whole} in {len(masks)} tensors, {spread}"


def _comparable(ranks: Sequence[Tensor]) -> list[Tensor]:
    """Weights of one model may lie on several devices, and be of several precisions."""
    devices = {rank.device for rank in ranks}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    wide = any(rank.dtype == torch.float64 for rank in ranks)
    return [rank.to(device, torch.float64 if wide else torch.float32) for rank in ranks]


def _is_share(share: object) -> bool:
    return isinstance(share, Real) and not isinstance(share, bool) and 0 < float(share) < 1


def _is_pattern(pattern: Sequence[object]) -> bool:
    whole = isinstance(pattern, (tuple, list)) and len(pattern) == 2
    if not whole or not all(type(number) is int for number in pattern):
        return False
    n, m = pattern
    return bool(0 < n < m)  # type: ignore[operator]


def _emptied(name: str, share: float | None, size: int) -> EditError:
    return EditError(
        name,
        seen=f"share={share}, which masks all {size} weights",
        needed="a weight left in every tensor",
        next_step="use a lower share, score='lamp' or scope='layer', or leave it out by skip",
    )
