"""Write a run down: one journal event for each thing that happens."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import nn

from neuroexapt.capture import Trace
from neuroexapt.edit import Edit
from neuroexapt.guard import Applied
from neuroexapt.guard.memory import in_use
from neuroexapt.measure import (
    HoldoutScore,
    LayerRow,
    Node,
    Reading,
    count_parameters,
    layers,
    wiring,
)
from neuroexapt.plan import Candidate, Decision, Limits, Settings, State
from neuroexapt.record import Journal, difference
from neuroexapt.record.replay import call_data, outcome_of, start_data

Result = TypeVar("Result")


class Chronicle:
    """The journal of one run; ``epoch`` and ``step`` are stamped on what needs them.

    Args:
        path: JSON Lines file; None keeps the events in memory.
        model: the model, unwrapped.
        trace: gives a run of the model as it is; asked only after layers came or went.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, model: nn.Module, trace: Callable[[], Trace]
    ) -> None:
        self.journal = Journal(path)
        self.epoch_number = 0
        self.step = 0
        self.proposals = 0
        self._calls: list[dict[str, Any]] = []
        self._model = model
        self._trace = trace
        self._layers: list[LayerRow] = []
        self._flow: list[Node] = []
        # What reads what depends on the modules alone; a roll-back finds it again.
        self._flows: dict[tuple[str, ...], list[Node]] = {}

    def start(self, flops: int, limits: Limits, settings: Settings, state: State) -> None:
        """The model before anything, the limits and the environment."""
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        self._layers, self._flow = layers(self._model), self._wired()
        self.journal.write(
            "start",
            run=type(self._model).__name__,
            model={**_model_fields(self._model, flops), "flow": self._flow},
            budget={
                "params": limits.parameters,
                "flops": limits.flops,
                "memory": limits.memory,
            },
            settings=settings,
            environment={
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "platform": platform.platform(),
                "device": str(device),
                "neuroexapt": metadata.version("neuroexapt"),
            },
            plan=start_data(state, settings, limits),
        )

    def planned(self, name: str, result: Result, /, **given: Any) -> Result:
        """Note a call of a pure function of :mod:`neuroexapt.plan`, and hand on its result."""
        self._calls.append(call_data(name, given, outcome_of(result)))
        return result

    def decided(self) -> None:
        """The calls since the last time, in one event."""
        calls, self._calls = self._calls, []
        if calls:
            self.journal.write("plan", epoch=self.epoch_number, step=self.step, calls=calls)

    def epoch(
        self, score: HoldoutScore, accuracy: float | None, parameters: int, flops: int, memory: int
    ) -> None:
        """The model that goes into the next epoch."""
        self.journal.write(
            "epoch",
            epoch=self.epoch_number,
            step=self.step,
            holdout_loss=score.loss,
            holdout_error=score.error,
            holdout_accuracy=accuracy,
            parameters=parameters,
            flops=flops,
            memory_bytes=memory,
            memory_in_use=in_use(),
            **self._structure(),
        )

    def survey(self, readings: list[Reading]) -> None:
        """What was measured of each layer when a change was considered."""
        self.journal.write("survey", epoch=self.epoch_number, step=self.step, readings=readings)

    def proposal(self, decision: Decision, candidate: Candidate) -> int:
        """What is about to be tried and why; returns its number."""
        self.proposals += 1
        self.journal.write(
            "proposal",
            id=self.proposals,
            epoch=self.epoch_number,
            step=self.step,
            kind=candidate.kind,
            at=candidate.edit.place,
            edit=_edit_fields(candidate.edit),
            also=[{"kind": type(e).__name__, **_edit_fields(e)} for e in candidate.also],
            reason=decision.why,
            predicted={
                "loss": candidate.loss,
                "parameters": candidate.parameters,
                "flops": candidate.flops,
            },
            readings=candidate.readings,
            runner_up=decision.runner_up,
        )
        return self.proposals

    def applied(self, number: int, done: Applied) -> None:
        """What the edit did to the model."""
        self.journal.write(
            "applied",
            id=number,
            parameters_before=done.parameters_before,
            parameters_after=done.parameters_after,
            max_difference=done.max_difference,
            seconds=done.seconds,
            **self._structure(),
        )

    def verdict(
        self, number: int, verdict: str, why: str, realised: dict[str, float] | None = None
    ) -> None:
        """The end of a proposal: ``"kept"``, ``"rolled_back"`` or ``"refused"``."""
        self.journal.write(
            "verdict",
            id=number,
            epoch=self.epoch_number,
            step=self.step,
            verdict=verdict,
            why=why,
            realised=realised,
            **self._structure(),
        )

    def end(self, flops: int, seconds: float, overhead: float) -> None:
        """The model after everything; closes the journal."""
        self.journal.write(
            "end",
            epoch=self.epoch_number,
            step=self.step,
            model=_model_fields(self._model, flops),
            seconds=seconds,
            overhead_seconds=overhead,
            **self._structure(),
        )
        self.journal.close()

    @property
    def structure(self) -> tuple[list[LayerRow], list[Node]]:
        """Layers, and what reads what, as the last event left them."""
        return self._layers, self._flow

    @structure.setter
    def structure(self, known: tuple[list[LayerRow], list[Node]]) -> None:
        self._layers, self._flow = known

    def _structure(self) -> dict[str, Any]:
        """How layers, and what reads what, differ from the event before; empty if they do not."""
        rows = layers(self._model)
        found: dict[str, Any] = {}
        if rows != self._layers:
            found["layers"] = difference(self._layers, rows)
            self._layers = rows
        flow = self._wired()
        if flow != self._flow:
            found["flow"] = self._flow = flow
        return found

    def _wired(self) -> list[Node]:
        names = tuple(name for name, _ in self._model.named_modules())
        if names not in self._flows:
            self._flows[names] = wiring(self._model, self._trace())
        return self._flows[names]


def _model_fields(model: nn.Module, flops: int) -> dict[str, Any]:
    return {
        "class": type(model).__name__,
        "parameters": count_parameters(model),
        "flops": flops,
        "layers": layers(model),
    }


def _edit_fields(edit: Edit) -> dict[str, Any]:
    """The edit's settings without what was measured for it, which the readings sum up."""
    measured = ("scores", "rows", "means", "products")
    return {f.name: getattr(edit, f.name) for f in fields(edit) if f.name not in measured}
