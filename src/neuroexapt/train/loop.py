"""The evolver for a plain training loop; every other adapter calls it."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from neuroexapt.couple import AxisMap, map_axes
from neuroexapt.edit import Edit
from neuroexapt.errors import NeuroExaptError, SettingsError
from neuroexapt.guard import Trial
from neuroexapt.measure import (
    Batch,
    HoldoutScore,
    LossFn,
    count_parameters,
    evaluate,
    flops_of,
    layers,
    tensor_bytes,
)
from neuroexapt.plan import (
    Budget,
    Candidate,
    Decision,
    Point,
    Settings,
    State,
    Verdict,
    bearable,
    choose,
    judge,
    observed,
    propose,
    refused,
    started,
    wants_change,
)
from neuroexapt.record import Journal, write_report
from neuroexapt.train.survey import Surveyor


@dataclass(frozen=True)
class Epoch:
    """What happened at the end of an epoch.

    Attributes:
        number: the epoch, counted from 1.
        holdout: the held-out loss of the model as it goes into the next epoch.
        parameters: its number of parameters.
        verdict: the end of a trial, if one ended.
        decision: what was decided, if a change was considered; its candidate is now on trial.
        why: one sentence on why nothing was decided, else the decision's or verdict's.
    """

    number: int
    holdout: HoldoutScore
    parameters: int
    verdict: Verdict | None
    decision: Decision | None
    why: str


class Evolver:
    """Changes a model's architecture while its own training loop trains it.

    Call :meth:`step` after each ``optimizer.step()`` and :meth:`end_epoch` after each epoch, the
    moment at which the architecture may change. The model, its parameters and the optimizer stay
    the same objects. At most one change is on trial at a time; one that does not hold up on
    held-out data is taken back bit for bit. Training data is never touched, and an error inside a
    change leaves the model as it was and the run going.

    Args:
        model: the model, unwrapped.
        optimizer: the optimizer that trains it.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the batch.
        holdout: re-iterable loader of at least four batches that training does not see; it
            serves the decisions, so report results on other data.
        budget: upper limits on the model.
        settings: how the search goes about it.
        journal: path of a JSON Lines file; None keeps the events in memory.

    Raises:
        SettingsError: the holdout cannot be read twice or has fewer than four batches.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> def loss_fn(model, batch):
        ...     return (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        >>> data = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
        >>> holdout = list(data[64:].split(8))
        >>> evolver = Evolver(model, optimizer, loss_fn=loss_fn, holdout=holdout,
        ...                   budget=Budget(params=0.5))
        >>> for epoch in range(8):
        ...     for batch in data[:64].split(8):
        ...         optimizer.zero_grad()
        ...         loss_fn(model, batch).backward()
        ...         optimizer.step()
        ...         evolver.step()
        ...     end = evolver.end_epoch()
        >>> evolver.close()
        >>> sum(p.numel() for p in model.parameters()) < 193
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss_fn: LossFn,
        holdout: Iterable[Batch],
        budget: Budget | None = None,
        settings: Settings | None = None,
        journal: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.holdout = holdout
        self.settings = settings or Settings()
        self.journal = Journal(journal)
        self._kept_score: HoldoutScore
        self._trial_parameters = 0
        self.steps = 0
        self.overhead = 0.0
        self._started = time.perf_counter()
        self._proposals = itertools.count(1)
        self._trial: tuple[int, Trial] | None = None
        with self._own_time():
            self._batches = _signal_batches(holdout, self.settings.signal_batches)
            self._example = _example_input(model, loss_fn, self._batches[0])
            self._axes: AxisMap | None = None
            self._flops = flops_of(self._map().traces[0])
            parameters = count_parameters(model)
            self.limits = (budget or Budget()).limits(parameters=parameters, flops=self._flops)
            self.state = State(parameters, self._flops)
            self.journal.write("start", **self._start_fields())

    def step(self) -> None:
        """Count one optimizer step. Costs nothing else."""
        self.steps += 1

    def end_epoch(self, accuracy: float | None = None) -> Epoch:
        """Measure on held-out data, end or start a trial, and write it down.

        Args:
            accuracy: a held-out accuracy to write beside the loss, if the caller has one.
        """
        with self._own_time():
            number = self.state.epoch + 1
            score = self._observe(number)
            verdict = self._judge()
            if verdict is not None and not verdict.kept:
                score = self._kept_score  # the model is bit for bit the one this was measured on
            self._kept_score = score
            self._write_epoch(number, score, accuracy)
            ready, why = wants_change(self.state, self.settings)
            decision = self._decide() if ready else None
        if decision is not None:
            why = decision.why
        elif verdict is not None:
            why = verdict.why
        return Epoch(number, score, count_parameters(self.model), verdict, decision, why)

    def close(self) -> None:
        """End the run: a trial too young for a verdict is taken back, the journal is closed."""
        if self._trial is not None:
            number, trial = self._trial
            trial.roll_back()
            self._trial, self._axes = None, None
            self._write_verdict(number, "rolled_back", "the run ended before its verdict", None)
        self.journal.write(
            "end",
            epoch=self.state.epoch,
            step=self.steps,
            model=self._model_fields(),
            seconds=time.perf_counter() - self._started,
            overhead_seconds=self.overhead,
        )
        self.journal.close()

    def report(self, path: str | os.PathLike[str], *, title: str = "neuroexapt run") -> Path:
        """Write the run so far as one self-contained HTML file."""
        return write_report(self.journal.events, path, title=title)

    def __enter__(self) -> Evolver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _own_time(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.overhead += time.perf_counter() - started

    def _map(self) -> AxisMap:
        """The map of the model as it is, made anew only after a change."""
        if self._axes is None:
            self._axes = map_axes(self.model, *self._example)
        return self._axes

    def _observe(self, number: int) -> HoldoutScore:
        score = evaluate(self.model, self.loss_fn, self.holdout)
        self.state = observed(self.state, Point(number, score.loss, score.error or 0.0))
        return score

    def _judge(self) -> Verdict | None:
        outcome = judge(self.state, self.settings, self.limits)
        if outcome is None or self._trial is None:
            return None
        self.state, verdict = outcome
        number, trial = self._trial
        self._trial = None
        saved = count_parameters(self.model)
        if verdict.kept:
            trial.keep()
        else:
            trial.roll_back()
            self._axes = None
        realised = {"loss": verdict.realised, "parameters": count_parameters(self.model) - saved}
        if verdict.kept:
            realised["parameters"] = self._trial_parameters
        name = "kept" if verdict.kept else "rolled_back"
        self._write_verdict(number, name, verdict.why, realised)
        return verdict

    def _decide(self) -> Decision:
        axes = self._map()
        surveyor = Surveyor(
            self.model,
            self.optimizer,
            self.loss_fn,
            self._batches,
            self._example,
            axes,
            self.settings.seed + self.state.epoch,
        )
        now = count_parameters(self.model), self._flops
        self.state, decision = choose(
            self.state, self.settings, self.limits, propose(surveyor.take()), now
        )
        if decision.candidate is not None:
            self._try(decision, decision.candidate, axes)
        return decision

    def _try(self, decision: Decision, candidate: Candidate, axes: AxisMap) -> None:
        number = next(self._proposals)
        self._write_proposal(number, decision, candidate)
        trial = Trial(self.model, self.optimizer)
        try:
            done = trial.apply(candidate.edit, *self._example, axes=axes)
        except NeuroExaptError as error:
            self._refuse(number, candidate, str(error))
            return
        after = evaluate(self.model, self.loss_fn, self.holdout)
        first = bearable(
            self.state, self.settings, self.limits, candidate, after.loss - self._kept_score.loss
        )
        if not first.kept:
            trial.roll_back()
            self._refuse(number, candidate, first.why)
            return
        self._axes = None
        self.state = started(self.state, candidate)
        self._trial = number, trial
        self._trial_parameters = done.parameters_after - done.parameters_before
        self.journal.write(
            "applied",
            id=number,
            parameters_before=done.parameters_before,
            parameters_after=done.parameters_after,
            max_difference=done.max_difference,
            seconds=done.seconds,
        )

    def _refuse(self, number: int, candidate: Candidate, why: str) -> None:
        self.state = refused(self.state, candidate)
        self._write_verdict(number, "refused", why, None)

    def _start_fields(self) -> dict[str, Any]:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return {
            "run": type(self.model).__name__,
            "model": self._model_fields(),
            "budget": {"params": self.limits.parameters, "flops": self.limits.flops},
            "settings": self.settings,
            "environment": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "platform": platform.platform(),
                "device": str(device),
                "neuroexapt": metadata.version("neuroexapt"),
            },
        }

    def _model_fields(self) -> dict[str, Any]:
        return {
            "class": type(self.model).__name__,
            "parameters": count_parameters(self.model),
            "flops": self._flops,
            "layers": layers(self.model),
        }

    def _write_epoch(self, number: int, score: HoldoutScore, accuracy: float | None) -> None:
        self._flops = flops_of(self._map().traces[0])
        self.journal.write(
            "epoch",
            epoch=number,
            step=self.steps,
            holdout_loss=score.loss,
            holdout_error=score.error,
            holdout_accuracy=accuracy,
            parameters=count_parameters(self.model),
            flops=self._flops,
            memory_bytes=tensor_bytes(self.model, self.optimizer),
        )

    def _write_proposal(self, number: int, decision: Decision, candidate: Candidate) -> None:
        self.journal.write(
            "proposal",
            id=number,
            epoch=self.state.epoch,
            step=self.steps,
            kind=candidate.kind,
            at=candidate.edit.place,
            edit=_edit_fields(candidate.edit),
            reason=decision.why,
            predicted={
                "loss": candidate.loss,
                "parameters": candidate.parameters,
                "flops": candidate.flops,
            },
            readings=candidate.readings,
            runner_up=decision.runner_up,
        )

    def _write_verdict(
        self, number: int, verdict: str, why: str, realised: dict[str, float] | None
    ) -> None:
        self.journal.write(
            "verdict",
            id=number,
            epoch=self.state.epoch,
            step=self.steps,
            verdict=verdict,
            why=why,
            realised=realised,
        )


def _edit_fields(edit: Edit) -> dict[str, Any]:
    """The edit's settings without the scores, which the readings sum up."""
    return {f.name: getattr(edit, f.name) for f in fields(edit) if f.name != "scores"}


def _signal_batches(holdout: Iterable[Batch], count: int) -> list[Batch]:
    if iter(holdout) is holdout:
        raise SettingsError(
            "holdout",
            seen=f"a {type(holdout).__name__} that can be read once",
            needed="a loader or list that can be read after every epoch",
            next_step="pass the DataLoader itself, or list(...) of the batches",
        )
    batches = list(itertools.islice(holdout, count))
    if len(batches) < 4:
        raise SettingsError(
            "holdout",
            seen=f"{len(batches)} batches",
            needed="at least 4, so that signals have an error estimate",
            next_step="use a smaller batch size for the held-out loader",
        )
    return batches


def _example_input(
    model: nn.Module, loss_fn: LossFn, batch: Batch
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which the loss function calls the model."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        evaluate(model, loss_fn, [batch])
    finally:
        handle.remove()
    if not seen:
        raise SettingsError(
            "loss_fn",
            seen="no call of the model's forward",
            needed="a loss that calls model(...)",
            next_step="call the model itself, not a submodule of it, inside loss_fn",
        )
    return seen[0]
