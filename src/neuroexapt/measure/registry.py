"""Signals by name: a table that a signal of your own joins by one row.

A :class:`Signal` says in words what it tells, in which unit, and what it looks at; its ``read``
turns :class:`~neuroexapt.measure.evidence.Evidence` into readings. What is built in stands in
`builtin`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from neuroexapt.couple import AxisMap
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Batch, LossFn, Reading
from neuroexapt.measure.evidence import CAP, NEEDS, Evidence, gather
from neuroexapt.measure.targets import TargetFn


@dataclass(frozen=True)
class Signal:
    """A kind of number about a model.

    Args:
        name: as in the readings it gives.
        unit: unit of value and error.
        says: one line for people: what a large value means.
        needs: what it looks at, of ``"rows"``, ``"targets"``, ``"blocks"``, ``"gradients"``,
            ``"gates"``; nothing where it runs the model itself or looks at losses alone.
        read: the readings, from what was seen; of `evidence.tried(...)`, so that one place that
            cannot be measured does not cost the others.
        formula: in plain characters.
        paper: where it comes from.
        beware: what it is not good for.
        default: measured where nobody names signals; those that run the model many times are not.

    Example:
        >>> Signal("rows", "rows", "how many rows were kept", ("rows",), lambda seen: []).name
        'rows'
    """

    name: str
    unit: str
    says: str
    needs: tuple[str, ...]
    read: Callable[[Evidence], Iterable[Reading]]
    formula: str = ""
    paper: str = ""
    beware: str = ""
    default: bool = True


_SIGNALS: dict[str, Signal] = {}


def register_signal(signal: Signal) -> Signal:
    """Add a row to the table; a signal made again under its name by the same code replaces it.

    Raises:
        MeasureError: unknown needs, or another signal has this name.

    Example:
        >>> signal = signals()["saturation"]
        >>> register_signal(signal) is signal
        True
    """
    unknown = [need for need in signal.needs if need not in NEEDS]
    if unknown:
        raise MeasureError(
            signal.name,
            seen=f"needs={unknown}",
            needed=f"some of {', '.join(NEEDS)}",
            next_step="name what the signal looks at, or nothing",
        )
    known = _SIGNALS.get(signal.name, signal)
    if _origin(known) != _origin(signal):
        raise MeasureError(
            signal.name,
            seen=f"another signal, read by {'.'.join(_origin(signal))}",
            needed=f"another name: {'.'.join(_origin(known))} has this one",
            next_step="rename the signal",
        )
    _SIGNALS[signal.name] = signal
    return signal


def _origin(signal: Signal) -> tuple[str, str]:
    return signal.read.__module__, signal.read.__qualname__


def signals() -> Mapping[str, Signal]:
    """All signals by name, in the order in which they were added; a view."""
    return MappingProxyType(_SIGNALS)


def chosen_signals(names: Collection[str] | None) -> list[Signal]:
    """The signals of these names; None: those measured by default.

    Raises:
        MeasureError: no signal has such a name; near ones are suggested.
    """
    if names is None:
        return [signal for signal in _SIGNALS.values() if signal.default]
    for name in names:
        if name not in _SIGNALS:
            near = difflib.get_close_matches(name, _SIGNALS, n=3, cutoff=0.4)
            raise MeasureError(
                "signals",
                seen=repr(name),
                needed="names of signals",
                next_step=f"use one of {', '.join(near or sorted(_SIGNALS))}",
            )
    return [_SIGNALS[name] for name in names]


def read_signals(evidence: Evidence, names: Collection[str] | None = None) -> tuple[Reading, ...]:
    """Readings of some signals from what was seen.

    A place that a signal cannot measure is left out; ``evidence.refused`` says why.

    Raises:
        MeasureError: an unknown name.
    """
    return tuple(reading for signal in chosen_signals(names) for reading in signal.read(evidence))


def measure(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    axes: AxisMap,
    names: Collection[str] | None = None,
    *,
    targets: TargetFn | None = None,
    cap: int = CAP,
) -> tuple[Reading, ...]:
    """Run a model on some batches and take the readings of some signals.

    Invariant: as :func:`gather`; only what the signals need is collected.

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of the batch.
        batches: micro-batches of one size, better ones the model was not trained on.
        axes: the model's present map.
        names: of signals; by default all but those that run the model many times.
        targets: see :func:`gather`.
        cap: bytes that activations may take.

    Raises:
        MeasureError: see :func:`gather`; or an unknown name.

    Example:
        >>> import torch
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> batches = [(torch.randn(16, 3), torch.randint(2, (16,))) for _ in range(4)]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> axes = map_axes(net, (batches[0][0],))
        >>> [reading] = measure(net, loss_fn, batches, axes, ["saturation"])
        >>> reading.at, reading.unit, reading.samples
        ('0.out', 'share of width', 64)
    """
    wanted = chosen_signals(names)
    needs = {need for signal in wanted for need in signal.needs}
    seen = gather(model, loss_fn, batches, axes, needs=needs, targets=targets, cap=cap)
    return read_signals(seen, names)
