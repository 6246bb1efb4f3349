"""The model as the evolver sees it: mapped anew when it has changed, measured by counted passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from neuroexapt.couple import AxisMap, map_axes
from neuroexapt.measure import Batch, LossFn, batch_size_of, count_parameters, flops_of
from neuroexapt.train.inputs import example_input, signal_batches
from neuroexapt.train.meter import Meter


class Scene:
    """What signals, trials and verdicts are about.

    Args:
        model: the model, unwrapped.
        optimizer: the optimizer that trains it.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        holdout: re-iterable batches.
        signals: how many of them signals may come from.

    Attributes:
        meter: what was used so far.
        loss_fn: the same function, its passes counted.
        batches: held-out batches for signals.
        example: positional and keyword input of the model.
        recent: training batches of the present epoch, the first of them.
        copies: what follows every change.
        start_loss: loss of the model as it was given, on one batch.

    Raises:
        SettingsError: the holdout cannot be read twice or has fewer than four batches.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        holdout: Iterable[Batch],
        signals: int,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.meter = Meter()
        self.loss_fn = self.meter.counted(loss_fn)
        self.batches = signal_batches(holdout, signals)
        self.example: tuple[tuple[Any, ...], Mapping[str, Any]]
        self.example, self.start_loss = example_input(model, loss_fn, self.batches[0])
        self.recent: list[Batch] = []
        self.copies: tuple[nn.Module, ...] = ()
        self._axes: AxisMap | None = None
        self._mapped: tuple[tuple[Any, ...], ...] = ()

    def axes(self) -> AxisMap:
        """The map of the model as it is, made anew only after a change, also one by hand."""
        form = _form(self.model)
        if self._axes is None or self._mapped != form:
            self._axes, self._mapped = map_axes(self.model, *self.example), form
            self.meter.flops = flops_of(self._axes.traces[0])
        return self._axes

    def flops(self) -> int:
        """FLOPs of one sample's forward, as the model is."""
        return flops_of(self.axes().traces[0])

    @property
    def now(self) -> tuple[int, int]:
        """Present parameters and FLOPs."""
        return count_parameters(self.model), self.flops()

    @property
    def batch_flops(self) -> float:
        """FLOPs of a forward of one held-out batch."""
        return float(self.flops() * batch_size_of(self.batches[0]))


def _form(model: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """What a map depends on and an edit changes: the modules, and the shapes of parameters."""
    modules = tuple((path, type(module)) for path, module in model.named_modules())
    return modules, tuple((name, p.shape) for name, p in model.named_parameters())
