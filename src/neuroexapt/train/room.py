"""What a change may cost in memory, and how the optimizer meets what is new."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from neuroexapt.couple import AxisMap
from neuroexapt.guard import Trial
from neuroexapt.guard.memory import activation_bytes
from neuroexapt.measure import Batch, LossFn, Probe, tensor_bytes
from neuroexapt.plan import Limits, Settings


def new_trial(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    copies: Sequence[nn.Module],
    room: int | None,
    settings: Settings,
    probed: tuple[LossFn, Iterable[Batch]],
) -> Trial:
    """A trial under the limits and by the policies of a run."""
    measured = settings.second_moments == "probe"
    return Trial(
        model,
        optimizer,
        copies=copies,
        memory=room,
        second_moments=Probe(*probed) if measured else "siblings",
    )


def room_left(
    limits: Limits,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    copies: Iterable[nn.Module],
    axes: AxisMap,
) -> int | None:
    """Bytes that a change may add under the limit on memory; None without one."""
    if limits.memory is None:
        return None
    held = tensor_bytes(model, optimizer) + sum(tensor_bytes(copy) for copy in copies)
    return max(0, limits.memory - held - max(map(activation_bytes, axes.traces)))
