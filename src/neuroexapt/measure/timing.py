"""Seconds and bytes, measured: the time of a forward, and what a step keeps for its backward.

For `plan`: prices in the user's own units, since equal FLOPs are not equal time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture.interrupts import breathe
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Batch, LossFn, Reading, batch_size_of, undisturbed


@dataclass(frozen=True)
class Latency:
    """Seconds of one call: the median of several, its error, and how far single calls scatter.

    Attributes:
        median: seconds.
        error: half the distance of the two order statistics that enclose the true median with a
            probability of 68 %, whatever the distribution.
        spread: median distance from the median.
        calls: how many were timed.
    """

    median: float
    error: float
    spread: float
    calls: int


def latency(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    calls: int = 20,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Time the forward in evaluation mode, without a graph.

    The median, because what else runs on the machine only ever makes a call slower. An
    accelerator is waited for before each look at the clock.

    Invariant: as :func:`undisturbed`. Bias: warm caches and one input; other batch sizes differ.

    Args:
        model: the model.
        args: positional inputs.
        kwargs: keyword inputs.
        calls: how many are timed, at least 3.
        warm_up: how many run before.
        clock: gives seconds.

    Raises:
        MeasureError: fewer than 3 calls, or a negative warm-up.

    Example:
        >>> found = latency(nn.Linear(2, 2), (torch.ones(1, 2),), calls=5)
        >>> found.median > 0, found.calls
        (True, 5)
    """
    if calls < 3 or warm_up < 0:
        raise MeasureError(
            "latency",
            seen=f"calls={calls}, warm_up={warm_up}",
            needed="at least 3 calls, and a warm-up of 0 or more",
            next_step="use calls=20, warm_up=3",
        )
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    times = []
    with undisturbed(model), torch.no_grad():
        model.eval()
        for number in range(warm_up + calls):
            breathe()
            _wait(devices)
            started = clock()
            model(*args, **(kwargs or {}))
            _wait(devices)
            if number >= warm_up:
                times.append(clock() - started)
    return _summary(times)


def _wait(devices: set[torch.device]) -> None:
    for device in devices:
        torch.accelerator.synchronize(device)


def _summary(times: list[float]) -> Latency:
    ordered = torch.tensor(sorted(times), dtype=torch.float64)
    count = len(ordered)
    # The number of calls below the true median is binomial: count / 2 +- sqrt(count) / 2.
    low = max(0, math.floor((count - math.sqrt(count)) / 2))
    high = min(count - 1, math.ceil((count + math.sqrt(count)) / 2) - 1)
    median = float(ordered.quantile(0.5))
    spread = float((ordered - median).abs().quantile(0.5))
    return Latency(median, float(ordered[high] - ordered[low]) / 2, spread, count)


def read_latency(found: Latency, at: str = "model") -> Reading:
    """A :class:`Latency` as a reading of its median.

    Example:
        >>> read_latency(Latency(0.5, 0.1, 0.2, 9)).unit
        'seconds'
    """
    return Reading("latency", at, found.median, "seconds", found.error, found.calls)


def activation_memory(model: nn.Module, loss_fn: LossFn, batch: Batch) -> int:
    """Bytes that one step keeps for its backward: saved tensors, each storage once.

    Parameters and buffers are not counted; what operators need for a moment is not either, so the
    peak of a step is above it. Modes are used as they are: dropout saves masks in training.

    Invariant: as :func:`undisturbed`; exact, so it has no error.

    Raises:
        MeasureError: an unreadable batch.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid())  # its input, and what it put out
        >>> x = torch.ones(8, 3)
        >>> activation_memory(net, lambda model, x: model(x).sum(), x) == 4 * 8 * (3 + 4)
        True
    """
    batch_size_of(batch)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[tuple[torch.device, int], int] = {}
    alive: list[Tensor] = []  # an address is one tensor's only while that lives

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[tensor.device, storage.data_ptr()] = storage.nbytes()
                alive.append(tensor.detach())
        return tensor

    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        loss_fn(model, batch)
    return sum(kept.values())


def read_activation_memory(model: nn.Module, loss_fn: LossFn, batch: Batch) -> Reading:
    """`activation_memory` per sample, as a reading; it is exact, so its error is 0.

    Example:
        >>> x = torch.ones(8, 3)
        >>> read_activation_memory(nn.Linear(3, 4), lambda model, x: model(x).sum(), x).value
        12.0
    """
    samples = batch_size_of(batch)
    value = activation_memory(model, loss_fn, batch) / max(1, samples)
    return Reading("activation_memory", "model", value, "bytes per sample", 0.0, samples)
