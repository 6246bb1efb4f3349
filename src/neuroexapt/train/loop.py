"""The evolver for a plain training loop; every other adapter calls it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from neuroexapt.capture.interrupts import held_back
from neuroexapt.guard import Trial, inner_copies, inner_module
from neuroexapt.measure import (
    Batch,
    LossFn,
    count_parameters,
    tensor_bytes,
)
from neuroexapt.plan import (
    Budget,
    Limits,
    Point,
    Settings,
    State,
    observed,
    wants_change,
)
from neuroexapt.record import Audience, Journal, Watcher, write_report
from neuroexapt.record.replay import start_data
from neuroexapt.train.changes import Changes
from neuroexapt.train.chronicle import Chronicle
from neuroexapt.train.epoch import Epoch
from neuroexapt.train.inputs import no_batch
from neuroexapt.train.judge import Judge
from neuroexapt.train.meter import RECENT, Allowance, Meter, Stopwatch
from neuroexapt.train.resume import (
    checked_state,
    chronicle_state,
    restore_chronicle,
    restore_run,
    run_state,
)
from neuroexapt.train.scene import Scene


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
        self.budget = budget or Budget()
        self._watch = Stopwatch()
        self._closed = False
        with self._watch:
            settings = settings or Settings()
            self._scene = Scene(model, optimizer, loss_fn, holdout, settings.signal_batches)
            parameters, flops = self._scene.now
            limits = self.budget.limits(parameters=parameters, flops=flops)
            self.judge = Judge(model, self._scene.loss_fn, holdout)
            self.chronicle = Chronicle(journal, model, lambda: self._scene.axes().traces[0])
            self._changes = Changes(self._scene, self.judge, self.chronicle, settings, limits)
            bound, loss = self.budget.compute is not None, self._scene.start_loss
            self.state = State(parameters, flops, compute_bound=bound, start_loss=loss)
            self.chronicle.start(flops, limits, settings, self.state)
        self._audience = Audience(self.journal)

    @property
    def state(self) -> State:
        """All that the controller remembers."""
        return self._changes.state

    @state.setter
    def state(self, state: State) -> None:
        self._changes.state = state

    @property
    def settings(self) -> Settings:
        """How the search goes about it; others may be set at any time."""
        return self._changes.settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._changes.settings = settings

    @property
    def limits(self) -> Limits:
        """Upper limits on the model in absolute numbers."""
        return self._changes.limits

    @property
    def meter(self) -> Meter:
        """What the run has used so far, in FLOPs."""
        return self._scene.meter

    @property
    def overhead(self) -> float:
        """Seconds that measuring and editing took so far."""
        return self._watch.own

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
        self._scene.copies += copies

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        """What follows every change."""
        return self._scene.copies

    @property
    def trial(self) -> Trial | None:
        """The trial under way."""
        pending = self._changes.pending
        return None if pending is None else pending.trial

    def state_dict(self) -> dict[str, Any]:
        """What :func:`neuroexapt.save` keeps of the search; the model is not in it."""
        return {
            **run_state(self.state, self.judge, self.meter, self._changes.pending),
            "overhead": self._watch.own,
            "seconds": self._watch.total,
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
        self.state = checked_state(state, self.state)
        self._changes.pending = restore_run(state, self.judge, self.meter, trial)
        self._watch.go_on(state["overhead"], state["seconds"])
        plan = start_data(self.state, self.settings, self.limits)
        restore_chronicle(self.chronicle, state["chronicle"], plan)

    def watch(self, *watchers: Watcher) -> None:
        """Show the run while it goes on: ``LiveView()`` in the terminal, ``TensorBoard("runs/a")``.

        Each is told what was written so far, then every event once an epoch is done. One whose
        disk or server fails is let go with a warning. They live in ``neuroexapt.record``.
        """
        for watcher in watchers:
            self._audience.add(watcher)

    @property
    def progress(self) -> float | None:
        """Share of the run that is done: of ``Budget.compute``, else of ``Settings.epochs``.

        None where neither is known. A schedule that follows it ends when the computing does.
        """
        if self.budget.compute is not None:
            return min(1.0, self.meter.spent / self.budget.compute)
        if self.settings.epochs is not None:
            return min(1.0, self.chronicle.epoch_number / self.settings.epochs)
        return None

    def step(self, batch: Batch | None = None) -> None:
        """Count one optimizer step.

        Args:
            batch: what the step was made on. The first four of an epoch are held on to, so that
                training and held-out loss can be compared, and the computing is counted; without
                them the evolver leaves regularisation alone.

        Raises:
            SettingsError: no batch although the budget limits the computing.
        """
        self.chronicle.step += 1
        if batch is not None:
            self.meter.trained(batch)
            if len(self._scene.recent) < RECENT:
                self._scene.recent.append(batch)
        elif self.budget.compute is not None:
            raise no_batch()

    def end_epoch(self, accuracy: float | None = None) -> Epoch:
        """Measure on held-out data, end or start a trial, and write it down.

        Args:
            accuracy: a held-out accuracy to write beside the loss, if the caller has one.

        Ctrl-C comes through where the model and what is known of it agree; a second one at once.
        """
        with held_back(), self._watch:
            number = self.state.epoch + 1
            self.chronicle.epoch_number = number
            if self.judge.count is None:
                self.judge.count = self._allowance().judging
            score, planned = self.judge.score(), self.chronicle.planned
            point = Point(number, score.loss, self.judge.error(score), self.progress)
            self.state = planned("observed", observed(self.state, point), point=point)
            verdict = self._changes.conclude()
            if verdict is not None and not verdict.kept and self.judge.kept is not None:
                score = self.judge.kept  # the model is bit for bit the one this was measured on
            self.judge.kept = score
            parameters = count_parameters(self.model)
            memory = tensor_bytes(self.model, self.optimizer)
            self.chronicle.epoch(score, accuracy, parameters, self._scene.flops(), memory)
            ready, why = self._ready()
            asked = self._changes.decide(self._allowance()) if ready else (None, ())
            decision, proposals = asked
            self._scene.recent.clear()  # the last ones are fitted as no others are
            self.chronicle.decided()
            self._audience.tell()
        said = decision or verdict
        why = said.why if said else why
        left = count_parameters(self.model)
        return Epoch(number, score, left, verdict, decision, why, proposals)

    def _ready(self) -> tuple[bool, str]:
        """Whether to look for a change now, and if not, why not."""
        if self.settings.mode == "observe":
            return False, "observing only"
        wanted = wants_change(self.state, self.settings)
        ready, why = self.chronicle.planned("wants_change", wanted)
        if ready and not self._allowance().surveys:
            return False, f"measuring has used its {self.settings.overhead:.0%} of the computing"
        return ready, why

    def _allowance(self) -> Allowance:
        total = self.budget.compute or self.meter.spent / max(self.progress or 1.0, 1e-9)
        batch, count = self._scene.batch_flops, len(self._scene.batches)
        share, reserved = self.settings.overhead, self._reserved()
        return Allowance(self.meter, share, total, batch, count, reserved)

    def _reserved(self) -> float:
        """Held-out batches that the rest of the run will be judged by, by what it was so far."""
        if not self.state.epoch or not self.progress:
            return 0.0
        left = self.state.epoch * (1 / self.progress - 1)
        return left * (self.judge.count or 0)

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
        self._changes.abandon("the run ended before its verdict")
        self.chronicle.decided()
        self.chronicle.end(self._scene.flops(), self._watch.total, self._watch.own)
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
