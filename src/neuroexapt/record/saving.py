"""What a run is made of, as the files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neuroexapt import edit, measure, plan
from neuroexapt.edit import Writer, registered, registered_specs
from neuroexapt.errors import CheckpointError
from neuroexapt.guard import Trial
from neuroexapt.guard.by_name import Held, each, held_by, record_of
from neuroexapt.guard.contents import Contents, contents
from neuroexapt.guard.several import Optimizers
from neuroexapt.record.folder import Files
from neuroexapt.record.randomness import random_states


class Evolving(Protocol):
    """What a checkpoint asks of an evolver."""

    @property
    def model(self) -> nn.Module:
        """The module that is edited."""

    @property
    def optimizer(self) -> Optimizers:
        """What trains it."""

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        """What follows its edits."""

    @property
    def trial(self) -> Trial | None:
        """The trial under way."""

    def state_dict(self) -> dict[str, Any]:
        """Its state, of plain values and registered dataclasses."""

    def load_state_dict(self, state: Mapping[str, Any], trial: Trial | None) -> None:
        """Go on from a state."""


def kinds() -> dict[str, type]:
    """The dataclasses that an evolver's state may hold, by name: a closed list."""
    found: dict[str, type] = {**registered_specs(), **registered()}
    for room in (edit, measure, plan):
        for name in room.__all__:
            thing = getattr(room, name)
            if isinstance(thing, type) and is_dataclass(thing):
                found.setdefault(name, thing)
    return found


@dataclass(frozen=True)
class Saving:
    """A run that is to be saved.

    Args:
        model: the model, unwrapped.
        optimizers: what trains it.
        evolver: what changes it.
        copies: what is saved along.
    """

    model: nn.Module
    optimizers: Optimizers
    evolver: Evolving | None
    copies: tuple[nn.Module, ...]

    def files(self, objects: Mapping[str, object]) -> Files:
        """The files of a checkpoint.

        Raises:
            CheckpointError: a part of the run can be no data, or is of another run.
        """
        files, evolver = Files(), self.evolver
        followed = () if evolver is None else evolver.copies
        if evolver is not None and evolver.model is not self.model:
            raise CheckpointError(
                "evolver",
                seen="an evolver of another model",
                needed="the evolver of this model",
                next_step="pass the model that the evolver was given",
            )
        run = Run(files)
        copies = united(self.copies, followed)
        now = [contents(self.model), *(contents(copy) for copy in copies)]
        files.data["architecture.json"] = {
            "class": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            **structure(files, "model.safetensors", now[0]),
            "copies": [
                structure(files, f"copy{number}.safetensors", one)
                for number, one in enumerate(now[1:])
            ],
        }
        held = [held_by(optimizer) for optimizer in each(self.optimizers)]
        run.data["optimizers"] = self._optimizers(run, held, now[0].tensors, "optimizers")
        run.data["objects"] = {
            name: run.object(value, f"objects.{name}") for name, value in objects.items()
        }
        if evolver is not None:
            run.data["evolver"] = run.writer.data(evolver.state_dict(), "evolver")
            self._before(run, evolver)
        run.data["random"] = run.writer.data(random_states(), "random")
        run.data["forms"] = run.forms
        files.data["run.json"] = run.data
        return files

    def _optimizers(
        self, run: Run, held: Sequence[Held], tensors: Mapping[str, Tensor], place: str
    ) -> list[dict[str, Any]]:
        parameters = {n: t for n, t in tensors.items() if t.is_leaf}
        return [
            record_of(optimizer, one, parameters, run.writer, f"{place}[{number}]")
            for number, (optimizer, one) in enumerate(zip(each(self.optimizers), held, strict=True))
        ]

    def _before(self, run: Run, evolver: Evolving) -> None:
        """The run as it was before a trial under way."""
        before = None if evolver.trial is None else evolver.trial.before()
        if before is None:
            return
        if each(evolver.optimizer) != each(self.optimizers):
            raise CheckpointError(
                "optimizer",
                seen="another one than the evolver's, with a change on trial",
                needed="the optimizer that the evolver was given",
                next_step="pass optimizer=... to save",
            )
        run.data["before"] = {
            "models": [
                structure(run.files, f"before{number}.safetensors", one)
                for number, one in enumerate(before.models)
            ],
            "optimizers": self._optimizers(
                run, before.optimizers, before.objects, "before.optimizers"
            ),
        }


class Run:
    """The data of ``run.json`` while they are gathered."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.data: dict[str, Any] = {}
        self.forms: dict[str, Any] = {}
        self.writer = Writer(kinds(), self._keep)

    def _keep(self, place: str, tensor: Tensor) -> str:
        self.forms[place] = self.files.keep("run.safetensors", place, tensor)
        return place

    def object(self, value: object, place: str) -> dict[str, Any]:
        """An object of the user's: its state, or itself if it is plain."""
        if isinstance(value, torch.Generator):
            return {"generator": self.writer.data(value.get_state(), place)}
        state = getattr(value, "state_dict", None)
        if callable(state):
            return {"state": self.writer.data(state(), place), "class": type(value).__name__}
        return {"plain": self.writer.data(value, place)}


def united(given: Sequence[nn.Module], followed: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """Each once, those given first."""
    others = [copy for copy in followed if not any(copy is one for one in given)]
    return (*given, *others)


def structure(files: Files, file: str, held: Contents) -> dict[str, Any]:
    """A model as data: its edits, the form of each tensor, its flags; values go to a file."""
    first: dict[int, str] = {}
    tensors: dict[str, Any] = {}
    for name, tensor in held.tensors.items():
        if id(tensor) in first:
            tensors[name] = {"same_as": first[id(tensor)]}
        else:
            first[id(tensor)] = name
            tensors[name] = files.keep(file, name, tensor)
    files.tensors.setdefault(file, {})
    writer = Writer()
    return {
        "edits": {
            path: [json.loads(entry) for entry in entries]
            for path, entries in held.lineages.items()
        },
        "tensors": tensors,
        "frozen": list(held.frozen),
        "transient": list(held.transient),
        "evaluating": list(held.evaluating),
        "modules": dict(held.kinds),
        "extra": {path: writer.data(state, f"{path}: extra") for path, state in held.extra.items()},
    }
