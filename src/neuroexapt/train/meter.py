"""What a run has used so far, in time and in FLOPs, and what measuring may still cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neuroexapt.measure import Batch, LossFn, batch_size_of

_STEP = 3  # a backward is two more forwards (Kaplan et al. 2020)


class Stopwatch:
    """The run's time, and the part of it that is the evolver's own.

    Attributes:
        own: seconds inside ``with watch:`` blocks.
    """

    def __init__(self) -> None:
        self.own = 0.0
        self._started = time.perf_counter()
        self._entered = 0.0

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._started

    def go_on(self, own: float, total: float) -> None:
        """As if the run had begun ``total`` seconds ago."""
        self.own, self._started = own, time.perf_counter() - total

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.own += time.perf_counter() - self._entered


class Meter:
    """Counts forwards and backwards of a model.

    Attributes:
        flops: of one sample's forward, as the model is now.
        training: FLOPs of the training steps it was told of.
        own: FLOPs of signals, judging, and training that was taken back.

    Example:
        >>> meter = Meter()
        >>> meter.flops = 10
        >>> meter.trained(torch.zeros(4, 3))
        >>> meter.counted(lambda model, batch: model(batch).sum())(nn.Identity(), torch.ones(2, 3))
        tensor(6.)
        >>> meter.training, meter.own
        (120, 60)
    """

    def __init__(self) -> None:
        self.flops = 0
        self.training = 0
        self.own = 0

    @property
    def spent(self) -> int:
        """All FLOPs of the run so far, training that was taken back counted once."""
        return self.training + self.own

    def trained(self, batch: Batch) -> None:
        """A training step on a batch."""
        self.training += _STEP * self.flops * batch_size_of(batch)

    def taken_back(self, since: int) -> None:
        """Training done since the meter stood at ``since`` is lost."""
        lost = self.training - since
        self.training -= lost
        self.own += lost

    def applied(self, samples: int) -> None:
        """An edit compares the model with itself before: both modes, twice, and one backward."""
        self.own += 2 * _STEP * self.flops * samples

    def counted(self, loss_fn: LossFn) -> LossFn:
        """A loss function that notes each of its calls here."""

        def counted(model: nn.Module, batch: Any) -> Any:
            passes = _STEP if torch.is_grad_enabled() else 1
            self.own += passes * self.flops * batch_size_of(batch)
            return loss_fn(model, batch)

        return counted


RECENT = 4  # training batches held on to
_LEAST = 4  # batches that an error needs
_JUDGING = 0.4  # of what measuring may cost, the share for judging by held-out loss
_GROWING = 0.5  # of what is left, the share for one look at places of growth
_DEAR = 0.1  # a survey that would take more than this share of all measuring is made smaller


@dataclass(frozen=True)
class Allowance:
    """What measuring may cost at one moment. Without counted training it may cost anything.

    Attributes:
        meter: what was used so far.
        share: of the whole run that measuring may use.
        total: FLOPs of the whole run, as far as they are known.
        batch: FLOPs of a forward of one held-out batch.
        batches: held-out batches kept for signals.
        reserved: held-out batches that the rest of the run will be judged by.
    """

    meter: Meter
    share: float
    total: float
    batch: float
    batches: int
    reserved: float = 0.0

    @property
    def judging(self) -> int | None:
        """Held-out batches to judge by after each epoch as long as the last; None for all."""
        if not self.meter.training:
            return None
        return max(_LEAST, int(_JUDGING * self.share * self.meter.training / max(1.0, self.batch)))

    @property
    def signals(self) -> int:
        """Batches to take signals from: all, or where they would cost too much the fewest."""
        dear = 3 * self.batches * self.batch > _DEAR * self.share * self.total
        return _LEAST if self.meter.training and dear else self.batches

    @property
    def surveys(self) -> bool:
        """Whether a survey can be paid, growth aside."""
        return not self.meter.training or self._left() >= 0

    @property
    def places(self) -> int | None:
        """How many places of growth can be measured; None for all."""
        if not self.meter.training:
            return None
        # Gradients for each place, and once for the parameters that are there.
        return max(0, int(_GROWING * self._left() / max(1.0, 3 * self.signals * self.batch)) - 1)

    def _left(self) -> float:
        """After a survey: gradients and activations of the signal batches, and the gap."""
        survey = 4 * self.signals + 3 * RECENT
        spoken_for = self.meter.own + (survey + self.reserved) * self.batch
        return self.share * self.total - spoken_for
