"""The evolver for a plain training loop; every other adapter calls it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from neuroexapt.capture.interrupts import held_back
from neuroexapt.couple import AxisMap, map_axes
from neuroexapt.errors import NeuroExaptError
from neuroexapt.guard import Trial, inner_copies, inner_module
from neuroexapt.guard.memory import ran_out, release_cached
from neuroexapt.measure import (
    Batch,
    HoldoutScore,
    LossFn,
    count_parameters,
    evaluate,
    flops_of,
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
from neuroexapt.record import Audience, Journal, Watcher, write_report
from neuroexapt.record.replay import start_data
from neuroexapt.train.chronicle import Chronicle
from neuroexapt.train.inputs import example_input, signal_batches
from neuroexapt.train.resume import (
    Epoch,
    Pending,
    checked_state,
    chronicle_state,
    restore_chronicle,
)
from neuroexapt.train.room import new_trial, room_left
from neuroexapt.train.survey import Surveyor


class Evolver:
    """Changes a model's architecture while its own training loop trains it.

    Call :meth:`step` after each ``optimizer.step()`` and :meth:`end_epoch` after each epoch, the
    moment at which the architecture may change. The model, its parameters and the optimizer stay
    the same objects. At most one change is on trial at a time; one that does not hold up on
    held-out data is taken back bit for bit. Training data is never touched, and an error inside a
    change leaves the model as it was and the run going.

    Args:
        model: the model, not wrapped for several devices; a compiled one is measured uncompiled.
        optimizer: the optimizer that trains it.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the batch.
        holdout: re-iterable loader of at least four batches that training does not see; it
            serves the decisions, so report results on other data.
        budget: upper limits on the model.
        settings: how the search goes about it.
        journal: path of a JSON Lines file; None keeps the events in memory.

    Raises:
        GuardError: the model is wrapped for several devices, or scripted.
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
        # A compiled model shares this module; it recompiles by itself once a shape has changed.
        self.model = model = inner_module(model)
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.holdout = holdout
        self.settings = settings or Settings()
        self.overhead = 0.0
        self._started = time.perf_counter()
        self._trial: Pending | None = None
        self._axes: AxisMap | None = None
        self._mapped: tuple[tuple[Any, ...], ...] = ()
        self._copies: tuple[nn.Module, ...] = ()
        self._closed = False
        self._kept_score: HoldoutScore | None = None
        with self._own_time():
            self._batches = signal_batches(holdout, self.settings.signal_batches)
            self._example = example_input(model, loss_fn, self._batches[0])
            parameters, flops = count_parameters(model), self._flops()
            self.limits = (budget or Budget()).limits(parameters=parameters, flops=flops)
            self.state = State(parameters, flops)
            self.chronicle = Chronicle(journal, model, lambda: self._map().traces[0])
            self.chronicle.start(flops, self.limits, self.settings, self.state)
        self._audience = Audience(self.journal)

    @property
    def journal(self) -> Journal:
        """The journal of this run; ``journal.events`` holds what was written."""
        return self.chronicle.journal

    def follow(self, *copies: nn.Module) -> None:
        """Have moving averages, teachers and the like follow every change from now on.

        Raises:
            GuardError: one of them is no copy of the model as it is.
        """
        inner_copies(self.model, copies)
        self._copies += copies

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        """What follows every change."""
        return self._copies

    @property
    def trial(self) -> Trial | None:
        """The trial under way."""
        return None if self._trial is None else self._trial.trial

    def state_dict(self) -> dict[str, Any]:
        """What :func:`neuroexapt.save` keeps of the search; the model is not in it."""
        pending = self._trial
        return {
            "state": self.state,
            "score": self._kept_score,
            "pending": None if pending is None else (pending.number, pending.parameters),
            "overhead": self.overhead,
            "seconds": time.perf_counter() - self._started,
            "chronicle": chronicle_state(self.chronicle),
        }

    def load_state_dict(self, state: Mapping[str, Any], trial: Trial | None) -> None:
        """Go on from a state; :func:`neuroexapt.load` calls it.

        Args:
            state: from :meth:`state_dict`.
            trial: the trial that was under way, begun again on the model.

        Raises:
            CheckpointError: the state is of a run that began with another model.
        """
        self.state, self._kept_score = checked_state(state, self.state)
        self._trial = None
        if trial is not None:
            number, parameters = state["pending"]
            self._trial = Pending(number, trial, parameters)
        self.overhead = state["overhead"]
        self._started = time.perf_counter() - state["seconds"]
        self._axes = None
        plan = start_data(self.state, self.settings, self.limits)
        restore_chronicle(self.chronicle, state["chronicle"], plan)

    def watch(self, *watchers: Watcher) -> None:
        """Show the run while it goes on: ``LiveView()`` in the terminal, ``TensorBoard("runs/a")``.

        Each is told what was written so far, then every event once an epoch is done. One whose
        disk or server fails is let go with a warning. They live in ``neuroexapt.record``.
        """
        for watcher in watchers:
            self._audience.add(watcher)

    def step(self) -> None:
        """Count one optimizer step. Costs nothing else."""
        self.chronicle.step += 1

    def end_epoch(self, accuracy: float | None = None) -> Epoch:
        """Measure on held-out data, end or start a trial, and write it down.

        Args:
            accuracy: a held-out accuracy to write beside the loss, if the caller has one.

        Ctrl-C comes through where the model and what is known of it agree; a second one at once.
        """
        with held_back(), self._own_time():
            number = self.state.epoch + 1
            self.chronicle.epoch_number = number
            score = evaluate(self.model, self.loss_fn, self.holdout)
            point = Point(number, score.loss, score.error or 0.0)
            planned = self.chronicle.planned
            self.state = planned("observed", observed(self.state, point), point=point)
            verdict = self._judge()
            if verdict is not None and not verdict.kept and self._kept_score is not None:
                score = self._kept_score  # the model is bit for bit the one this was measured on
            self._kept_score = score
            parameters = count_parameters(self.model)
            memory = tensor_bytes(self.model, self.optimizer)
            self.chronicle.epoch(score, accuracy, parameters, self._flops(), memory)
            ready, why = planned("wants_change", wants_change(self.state, self.settings))
            decision = self._decide() if ready else None
            self.chronicle.decided()
            self._audience.tell()
        said = decision or verdict
        why = said.why if said else why
        return Epoch(number, score, count_parameters(self.model), verdict, decision, why)

    def close(self) -> None:
        """End the run: a trial too young for a verdict is taken back, the journal is closed.

        Closing twice does nothing.
        """
        with held_back():
            self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._trial is not None:
            pending, self._trial = self._trial, None
            pending.trial.roll_back()
            self._axes = None
            why = "the run ended before its verdict"
            self.chronicle.verdict(pending.number, "rolled_back", why)
        self.chronicle.decided()
        seconds = time.perf_counter() - self._started
        self.chronicle.end(self._flops(), seconds, self.overhead)
        self._audience.close()

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
        """The map of the model as it is, made anew only after a change, also one by hand."""
        form = _form(self.model)
        if self._axes is None or self._mapped != form:
            self._axes, self._mapped = map_axes(self.model, *self._example), form
        return self._axes

    def _flops(self) -> int:
        return flops_of(self._map().traces[0])

    def _judge(self) -> Verdict | None:
        planned = self.chronicle.planned
        outcome = planned("judge", judge(self.state, self.settings, self.limits))
        if outcome is None or self._trial is None:
            return None
        self.state, verdict = outcome
        pending, self._trial = self._trial, None
        if verdict.kept:
            pending.trial.keep()
        else:
            pending.trial.roll_back()
            self._axes = None
        name = "kept" if verdict.kept else "rolled_back"
        realised = {"loss": verdict.realised, "parameters": pending.parameters}
        self.chronicle.verdict(pending.number, name, verdict.why, realised)
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
        now = count_parameters(self.model), self._flops()
        try:
            survey = surveyor.take()
            candidates = propose(survey)
        except NeuroExaptError as error:
            return Decision(None, f"the model could not be surveyed: {error}")
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            release_cached()
            return Decision(None, f"the model could not be surveyed, out of memory: {error}")
        self.chronicle.survey(survey.readings)
        chosen = choose(self.state, self.settings, self.limits, candidates, now)
        self.chronicle.planned("choose", chosen, candidates=candidates, now=now)
        self.state, decision = chosen
        if decision.candidate is not None:
            self._try(decision, decision.candidate, axes)
        return decision

    def _try(self, decision: Decision, candidate: Candidate, axes: AxisMap) -> None:
        number = self.chronicle.proposal(decision, candidate)
        held = self.model, self.optimizer, self._copies
        room = room_left(self.limits, *held, axes)
        trial = new_trial(*held, room, self.settings, (self.loss_fn, self._batches))
        try:
            done = trial.apply(candidate.edit, *self._example, axes=axes)
        except NeuroExaptError as error:
            self._refuse(number, candidate, str(error), for_good=True)
            return
        except BaseException:
            trial.roll_back()
            raise
        first = self._first_check(trial, candidate)
        if not first.kept:
            trial.roll_back()
            self._refuse(number, candidate, first.why, for_good=False)
            return
        added = done.parameters_after - done.parameters_before
        self._axes = None
        begun = started(self.state, candidate)
        self.state = self.chronicle.planned("started", begun, candidate=candidate)
        self._trial = Pending(number, trial, added)
        self.chronicle.applied(number, done)

    def _first_check(self, trial: Trial, candidate: Candidate) -> Verdict:
        """Measure the edited model; whatever stops that, the edit is taken back first."""
        try:
            assert self._kept_score is not None
            step = evaluate(self.model, self.loss_fn, self.holdout).loss - self._kept_score.loss
            first = bearable(self.state, self.settings, self.limits, candidate, step)
            return self.chronicle.planned("bearable", first, candidate=candidate, step=step)
        except (RuntimeError, MemoryError) as error:
            trial.roll_back()
            if not ran_out(error):
                raise
            return Verdict(False, f"out of memory: {error}", float("nan"))
        except BaseException:
            trial.roll_back()
            raise

    def _refuse(self, number: int, candidate: Candidate, why: str, *, for_good: bool) -> None:
        state = refused(self.state, candidate, for_good=for_good)
        said = {"candidate": candidate, "for_good": for_good}
        self.state = self.chronicle.planned("refused", state, **said)
        self.chronicle.verdict(number, "refused", why)


def _form(model: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """What a map depends on and an edit changes: the modules, and the shapes of parameters."""
    modules = tuple((path, type(module)) for path, module in model.named_modules())
    return modules, tuple((name, p.shape) for name, p in model.named_parameters())
