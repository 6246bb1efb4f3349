"""What a loss compares the model with: found where the loss function compares it.

No convention about batches is needed: while the loss function runs, calls of torch's own losses
are watched, and their targets are what the model is to predict. Where a loss is written by hand,
the batch says it, or the caller does.

Shapes in names: B samples of a batch, P positions of a sample, K numbers a position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Batch
from neuroexapt.measure.probe import Kind

TargetFn = Callable[[Batch], "Tensor | Mapping[str, Tensor]"]

_LABELS = ("cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d")
_MARKS = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
_NUMBERS = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "gaussian_nll_loss")
_SIDE = 64
_KEYS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True, eq=False)
class Wanted:
    """The target of a batch, by sample and position.

    Attributes:
        kind: classes, marks or numbers.
        values: (B, P) classes or (B, P, K) numbers; P is 1 for one target a sample.
        space: sizes of the dimensions of positions.
    """

    kind: Kind
    values: Tensor
    space: tuple[int, ...]


class TargetTap(TorchFunctionMode):
    """Keeps the targets of the losses that are called while it is active.

    Args:
        samples: number of samples of the batch that the loss function is given.

    Example:
        >>> from torch.nn import functional as F
        >>> with TargetTap(3) as tap:
        ...     _ = F.cross_entropy(torch.zeros(3, 5), torch.tensor([0, 4, 2]))
        >>> [(one.kind, one.values.tolist()) for one in tap.found]
        [('labels', [[0], [4], [2]])]
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.found: list[Wanted] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        kind = _kind_of(name)
        if kind is not None:
            given = [*args, *kwargs.values()][:2]
            target = args[1] if len(args) > 1 else kwargs.get("target")
            if isinstance(target, Tensor) and isinstance(given[0], Tensor):
                wanted = _arranged(kind, target.detach(), given[0].shape, self.samples)
                if wanted is not None:
                    self.found.append(wanted)
        return func(*args, **kwargs)


def _kind_of(name: str) -> Kind | None:
    if name in _LABELS:
        return "labels"
    if name in _MARKS:
        return "marks"
    return "numbers" if name in _NUMBERS else None


def _arranged(kind: Kind, target: Tensor, predicted: torch.Size, samples: int) -> Wanted | None:
    """By sample and position; None where the target does not divide into samples."""
    if kind == "labels" and target.is_floating_point():
        if target.shape != predicted:
            return None
        target = target.argmax(1)  # probabilities of classes: the most likely one
    if not samples or target.dim() == 0 or target.shape[0] % samples:
        return None
    if target.shape[0] != samples:
        target = target.reshape(samples, -1, *target.shape[1:])
    if kind == "labels":
        target = _coarse(target, 1)
        space = tuple(target.shape[1:])
        return Wanted(kind, target.reshape(samples, -1), space if target.dim() > 1 else ())
    if target.dim() <= 2:
        return Wanted(kind, target.reshape(samples, 1, -1).float(), ())
    # Maps have their numbers behind the samples, sequences have them last.
    last = _coarse(target, 2).movedim(1, -1) if target.dim() > 3 else target
    values = last.reshape(samples, -1, last.shape[-1])
    return Wanted(kind, values.float(), tuple(last.shape[1:-1]))


def _coarse(target: Tensor, first: int) -> Tensor:
    """Maps, from dimension `first` on, with at most 64 places a side: the nearest ones."""
    if target.dim() - first < 2:
        return target
    for dim in range(first, target.dim()):
        size = target.shape[dim]
        if size > _SIDE:
            at = ((torch.arange(_SIDE) + 0.5) * size / _SIDE).long()
            target = target.index_select(dim, at.to(target.device))
    return target


def given_targets(batch: Batch, targets: TargetFn | None, samples: int) -> dict[str, Wanted]:
    """The targets that the caller names, or that a batch shows: its last tensor, or its labels.

    Raises:
        MeasureError: none is found, or it does not divide into samples.
    """
    found = targets(batch) if targets is not None else _in_batch(batch)
    named = {"": found} if isinstance(found, Tensor) else dict(found or {})
    arranged = {name: _as_given(value, samples) for name, value in named.items()}
    good = {name: one for name, one in arranged.items() if one is not None}
    if not good:
        raise MeasureError(
            "targets",
            seen="no call of a loss of torch, and no target in the batch",
            needed="what the model is to predict",
            next_step="pass targets=lambda batch: ..., a tensor of one row a sample",
        )
    return good


def _in_batch(batch: Batch) -> Tensor | None:
    if isinstance(batch, Mapping):
        value = next((batch[key] for key in _KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        value = batch[-1]
    else:
        value = None
    return value if isinstance(value, Tensor) else None


def _as_given(value: Tensor, samples: int) -> Wanted | None:
    kind: Kind = "numbers" if value.is_floating_point() else "labels"
    if value.dtype == torch.bool:
        kind, value = "marks", value.float()
    return _arranged(kind, value.detach(), torch.Size(), samples)
