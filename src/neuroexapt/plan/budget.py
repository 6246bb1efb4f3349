"""What may be spent: limits on the model, and the settings of the search."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from neuroexapt.errors import SettingsError

# Nats of loss for all parameters of the start, by objective.
_PRICES = {"accuracy": 0.005, "balanced": 0.02, "efficiency": 0.08}
_MODES = ("evolve", "advise", "observe")


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(f'"{name}"' for name in names)


def _require(good: bool, name: str, value: object, needed: str) -> None:
    if not good:
        raise SettingsError(name, seen=repr(value), needed=needed, next_step=f"pass another {name}")


@dataclass(frozen=True)
class Limits:
    """Upper limits in absolute numbers; None is no limit.

    One on memory (bytes) refuses what would exceed it; the others are prices.
    """

    parameters: int | None = None
    flops: int | None = None
    memory: int | None = None

    def excess(self, parameters: int, flops: int) -> float:
        """By which share the tightest limit is exceeded; 0 when all hold.

        Example:
            >>> Limits(parameters=100).excess(150, 0)
            0.5
        """
        pairs = ((parameters, self.parameters), (flops, self.flops))
        return max([0.0, *(now / limit - 1 for now, limit in pairs if limit)])


@dataclass(frozen=True)
class Budget:
    """Upper limits on the model: a share of the starting model (float) or a count (int).

    Args:
        params: limit on the number of parameters; ``0.5`` is half of the start.
        flops: limit on the FLOPs of one sample's forward.
        memory: limit in bytes on weights, gradients and optimizer state as they are held at the
            end of an epoch, copies, the old content while a change is on trial, and activations
            of a step. A change that would exceed it is refused.
        compute: FLOPs that the whole run may use, measuring and trials included. With it a smaller
            model trains for more steps, which the evolver takes into account;
            ``evolver.progress`` says how much is used. See ``docs/concepts.md``.

    Raises:
        SettingsError: not positive, or a share of memory.

    Example:
        >>> Budget(params=0.5).limits(parameters=1000, flops=80)
        Limits(parameters=500, flops=None, memory=None)
    """

    params: float | int | None = None
    flops: float | int | None = None
    memory: int | None = None
    compute: float | None = None

    def __post_init__(self) -> None:
        whole = self.memory is None or (type(self.memory) is int and self.memory > 0)
        _require(whole, "memory", self.memory, "a positive number of bytes (int)")
        limits = (("params", self.params), ("flops", self.flops), ("compute", self.compute))
        for name, value in limits:
            good = value is None or (not isinstance(value, bool) and value > 0)
            _require(good, name, value, "a positive share (float) or count (int)")

    def limits(self, *, parameters: int, flops: int) -> Limits:
        """The limits for a model that starts with these counts."""
        return Limits(_absolute(self.params, parameters), _absolute(self.flops, flops), self.memory)


def _absolute(limit: float | int | None, start: int) -> int | None:
    return int(limit * start) if isinstance(limit, float) else limit


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the search goes about it. The defaults need no tuning for a first run.

    Args:
        epochs: length of the training run, if known; nothing changes in its last part.
        until: share of ``epochs`` after which nothing changes.
        trial_epochs: epochs of training between an edit and its verdict.
        cool_down: epochs of plain training after a change was taken back.
        patience: the search stops after this many fruitless decisions in a row.
        significance: how many standard errors count as noise.
        objective: ``"accuracy"`` (the best score within the limits), ``"efficiency"`` (the smallest
            model for about the score of the start) or ``"balanced"``.
        price: nats of loss that the whole of a limited resource (parameters where nothing is
            limited) is worth, while every limit holds; it doubles with each decision in a row
            that finds a limit exceeded. None takes what the objective says.
        mode: ``"evolve"``; ``"advise"`` ranks proposals and touches nothing; ``"observe"`` only
            measures.
        overhead: share of the run's FLOPs that measuring may use.
        signal_batches: held-out batches used for signals.
        seed: seed of new weights.
        second_moments: where the optimizer's second moments of new units start: at the mean of
            their ``"siblings"``', or measured on the signal batches (``"probe"``).

    Raises:
        SettingsError: a value out of range.
    """

    epochs: int | None = None
    until: float = 0.6
    trial_epochs: int = 1
    cool_down: int = 2
    patience: int = 6
    significance: float = 2.0
    objective: str = "balanced"
    price: float | None = None
    mode: str = "evolve"
    overhead: float = 0.1
    signal_batches: int = 8
    seed: int = 0
    second_moments: str = "siblings"

    def __post_init__(self) -> None:
        known = self.second_moments in ("siblings", "probe")
        _require(known, "second_moments", self.second_moments, "'siblings' or 'probe'")
        _require(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "1 or more")
        _require(0 < self.until <= 1, "until", self.until, "a share in (0, 1]")
        _require(self.trial_epochs > 0, "trial_epochs", self.trial_epochs, "1 or more")
        _require(self.cool_down >= 0, "cool_down", self.cool_down, "0 or more")
        _require(self.patience > 0, "patience", self.patience, "1 or more")
        _require(self.significance >= 0, "significance", self.significance, "0 or more")
        _require(self.objective in _PRICES, "objective", self.objective, _one_of(_PRICES))
        _require(self.price is None or self.price >= 0, "price", self.price, "0 or more")
        _require(self.mode in _MODES, "mode", self.mode, _one_of(_MODES))
        _require(0 < self.overhead <= 1, "overhead", self.overhead, "a share in (0, 1]")
        _require(self.signal_batches >= 4, "signal_batches", self.signal_batches, "4 or more")

    @property
    def worth(self) -> float:
        """Nats that the whole of a limited resource is worth."""
        return _PRICES[self.objective] if self.price is None else self.price
