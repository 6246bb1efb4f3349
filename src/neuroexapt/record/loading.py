"""A checkpoint's files, put into what a factory has built."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import Reader, original_class
from neuroexapt.edit.data import as_dict, as_list, as_text
from neuroexapt.errors import CheckpointError
from neuroexapt.guard import Trial, inner_module
from neuroexapt.guard.by_name import Restorer, each, outsiders
from neuroexapt.guard.forms import Form
from neuroexapt.guard.ledger import Ledger
from neuroexapt.guard.redo import Redo
from neuroexapt.record.folder import Opened, Tensors, damaged, form_from
from neuroexapt.record.randomness import set_random_states
from neuroexapt.record.saving import kinds, united

_MOST_MODULES = 1000  # besides ten for each that the factory built or a tensor is named for


@dataclass(frozen=True)
class Structure:
    """A model as a file tells it: read, its forms checked, nothing done yet."""

    opened: Opened
    file: str
    data: Mapping[str, Any]
    place: str
    forms: dict[str, Form] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tensors = as_dict(self.data.get("tensors"), f"{self.place}: tensors")
        for name, told in tensors.items():
            place = f"{self.place}: tensors.{name}"[:300]
            entry = as_dict(told, place)
            if "same_as" in entry:
                self.same[name] = as_text(entry["same_as"], place)
            else:
                self.forms[name] = form_from(entry, place)
        for name, first in self.same.items():
            if first not in self.forms:
                raise damaged(f"{self.place}: tensors.{name}"[:300], f"{first!r}"[:100], "a tensor")

    def edits(self) -> dict[str, list[str]]:
        """The entries of the lineage, by path of the part they belong to."""
        edits = as_dict(self.data.get("edits"), f"{self.place}: edits")
        return {
            path: [json.dumps(entry, separators=(",", ":")) for entry in as_list(held, self.place)]
            for path, held in edits.items()
        }

    def redo(self, ledger: Ledger, model: nn.Module) -> None:
        """Make the edits again, every tensor's final form, and what is trained."""
        built = sum(1 for _ in model.modules())
        most = _MOST_MODULES + 10 * (built + len(self.forms) + len(self.same))
        redo = Redo(ledger, model, most)
        redo.entries(self.edits())
        every = {**self.forms, **{name: self.forms[first] for name, first in self.same.items()}}
        transient = as_list(self.data.get("transient"), f"{self.place}: transient")
        redo.settle(every, {as_text(name, self.place) for name in transient})
        self._check_ties(model)
        self._compare_kinds(model)
        frozen = {as_text(n, self.place) for n in as_list(self.data.get("frozen"), self.place)}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad == (name in frozen):
                parameter.requires_grad_(name not in frozen)

    def _check_ties(self, model: nn.Module) -> None:
        first: dict[int, str] = {}
        for name, tensor in named_tensors(model).items():
            tied = first.setdefault(id(tensor), name)
            told = self.same.get(name, name)
            if (told == name) != (tied == name):
                raise CheckpointError(
                    name,
                    seen="a tensor of its own in one of both, tied in the other",
                    needed="the same tied tensors in the checkpoint and in the model",
                    next_step="tie them in the factory as they were tied for the run",
                )

    def _compare_kinds(self, model: nn.Module) -> None:
        """Another class of the same sizes fits and computes something else: that is said."""
        told = as_dict(self.data.get("modules", {}), f"{self.place}: modules")
        modules = model.named_modules(remove_duplicate=False)
        own = {path: original_class(module).__name__ for path, module in modules}
        odd = [path for path in own if path in told and told[path] != own[path]]
        if odd:
            pairs = ", ".join(f"'{p}' is a {own[p]}, was a {str(told[p])[:60]}" for p in odd[:3])
            warnings.warn(
                f"the factory builds other modules than were saved: {pairs}"
                f"{f' and {len(odd) - 3} more' if len(odd) > 3 else ''}",
                stacklevel=2,
            )

    def fill(self, model: nn.Module) -> None:
        """Values of all tensors, and the mode of each module."""
        named = named_tensors(model)
        with self.opened.tensors(self.file, self.forms) as held, torch.no_grad():
            for name in self.forms.keys() & named.keys():
                named[name].copy_(held.stored(name))
        evaluating = set(as_list(self.data.get("evaluating"), self.place))
        extra = as_dict(self.data.get("extra"), f"{self.place}: extra")
        for path, module in model.named_modules(remove_duplicate=False):
            module.training = path not in evaluating
            if path in extra:
                module.set_extra_state(Reader().value(extra[path], f"{self.place}: extra.{path}"))


class Loading:
    """One loading.

    Args:
        opened: the checkpoint.
        parts: what the factory built, by name.
    """

    def __init__(self, opened: Opened, parts: Mapping[str, Any]) -> None:
        self.opened = opened
        self.parts = parts
        self.model = inner_module(parts["model"])
        self.evolver = parts.get("evolver")
        given = parts.get("optimizer")
        if given is None and self.evolver is not None:
            given = self.evolver.optimizer
        self.optimizers = each(given)
        # Before any edit is made: what leaves the model is no stranger to its optimizer.
        self.outside = [outsiders(self.model, optimizer) for optimizer in self.optimizers]
        followed = () if self.evolver is None else self.evolver.copies
        self.copies = united(tuple(parts.get("copies", ())), followed)

    def run(self, *, whole: bool) -> dict[str, Any]:
        """Bring the parts to where the checkpoint was saved; the plain values of it.

        Args:
            whole: whether the run goes on, with its optimizer and random states.

        Raises:
            CheckpointError: they do not fit, or a file is damaged.
        """
        try:
            return self._run(whole)
        except CheckpointError:
            raise
        except Exception as error:  # what a hostile file makes torch raise has no common class
            raise CheckpointError(
                str(self.opened.path),
                seen=f"{type(error).__name__}: {str(error)[:400]}",
                needed="a checkpoint of what the factory builds",
                next_step="check that the factory is the one of the run; else load another one",
            ) from error

    def _run(self, whole: bool) -> dict[str, Any]:
        path = str(self.opened.path)
        architecture = self.opened.data("architecture.json")
        told = as_list(architecture.get("copies"), f"{path}: copies")
        now = [self._structure("model.safetensors", architecture, "architecture.json")]
        for number, data in enumerate(told):
            held = as_dict(data, f"{path}: copies[{number}]")
            now.append(self._structure(f"copy{number}.safetensors", held, f"copies[{number}]"))
        models = [self.model, *self.copies] if whole else [self.model]
        if whole and len(told) != len(self.copies):
            raise self._unlike("copies", f"{len(self.copies)} copies", f"{len(told)} of them")
        if not whole:
            self._redo([(now[0], self.model)], Ledger(), [])
            now[0].fill(self.model)
            return {}
        run = self.opened.data("run.json")
        place = f"{path}/run.json"
        forms = {
            name: form_from(data, f"{place}: forms.{name}"[:300])
            for name, data in as_dict(run.get("forms"), f"{place}: forms").items()
        }
        with ExitStack() as stack:
            tensors = stack.enter_context(self.opened.tensors("run.safetensors", forms))
            return self._continue(run, now, models, tensors)

    def _continue(
        self,
        run: Mapping[str, Any],
        now: Sequence[Structure],
        models: Sequence[nn.Module],
        tensors: Tensors,
    ) -> dict[str, Any]:
        place = str(self.opened.path / "run.json")
        reader = Reader(kinds(), tensors.fetch)
        restorers = self._restorers(run.get("optimizers"), f"{place}: optimizers")
        trial = None
        if "before" in run and self.evolver is not None:
            trial = self._trial(as_dict(run["before"], f"{place}: before"), reader)
            followed = [self.model, *self.evolver.copies]
            pairs = list(zip(now, models, strict=True))
            on_trial = [(s, m) for s, m in pairs if any(m is one for one in followed)]
            self._redo([pair for pair in pairs if pair not in on_trial], Ledger(), [])
            trial.again(lambda ledger: self._redo(on_trial, ledger, restorers))
        else:
            self._redo(zip(now, models, strict=True), Ledger(), restorers)
        for structure, model in zip(now, models, strict=True):
            structure.fill(model)
        for restorer in restorers:
            restorer.values(reader)
        plain = self._objects(as_dict(run.get("objects"), f"{place}: objects"), reader, place)
        random = reader.value(run.get("random"), f"{place}: random")
        if self.evolver is not None:
            if "evolver" not in run:
                raise self._unlike("evolver", "an evolver", "what was saved: none was")
            state = as_dict(reader.value(run["evolver"], f"{place}: evolver"), place)
            self.evolver.load_state_dict(state, trial)
        set_random_states(random, place)
        return plain

    def _structure(self, file: str, data: Mapping[str, Any], place: str) -> Structure:
        return Structure(self.opened, file, data, f"{self.opened.path}: {place}")

    def _restorers(self, told: Any, place: str) -> list[Restorer]:
        records = as_list(told, place)
        if len(self.optimizers) and len(records) != len(self.optimizers):
            seen = f"{len(self.optimizers)} optimizers"
            raise self._unlike("optimizer", seen, f"the {len(records)} that were saved")
        return [
            Restorer(optimizer, self.model, as_dict(record, place), outside, f"{place}[{number}]")
            for number, (optimizer, record, outside) in enumerate(
                zip(self.optimizers, records, self.outside, strict=False)
            )
        ]

    def _redo(
        self,
        pairs: Iterable[tuple[Structure, nn.Module]],
        ledger: Ledger,
        restorers: Sequence[Restorer],
    ) -> None:
        for structure, model in pairs:
            structure.redo(ledger, model)
        for restorer in restorers:
            restorer.members(ledger)

    def _trial(self, before: Mapping[str, Any], reader: Reader) -> Trial:
        """The run as it was before a trial, and the trial about to begin again."""
        assert self.evolver is not None
        place = f"{self.opened.path}/run.json: before"
        told = as_list(before.get("models"), place)
        followed = [self.model, *self.evolver.copies]
        if len(told) != len(followed):
            raise self._unlike("copies", f"{len(followed) - 1} copies", f"{len(told) - 1} of them")
        structures = [
            self._structure(f"before{n}.safetensors", as_dict(data, place), f"before.models[{n}]")
            for n, data in enumerate(told)
        ]
        restorers = self._restorers(before.get("optimizers"), f"{place}.optimizers")
        pairs = list(zip(structures, followed, strict=True))
        self._redo(pairs, Ledger(), restorers)
        for structure, model in pairs:
            structure.fill(model)
        for restorer in restorers:
            restorer.values(reader)
        return Trial(self.model, self.evolver.optimizer, copies=self.evolver.copies)

    def _objects(self, told: Mapping[str, Any], reader: Reader, place: str) -> dict[str, Any]:
        """States go into the objects of the factory; plain values are returned."""
        plain = {}
        for name, data in told.items():
            at = f"{place}: objects.{name}"[:300]
            entry = as_dict(data, at)
            if "plain" in entry:
                plain[name] = reader.value(entry["plain"], at)
            elif name in self.parts:
                word = "generator" if "generator" in entry else "state"
                _restore(self.parts[name], reader.value(entry.get(word), at), word, at)
        known = {"model", "optimizer", "evolver", "copies", *told}
        strange = [name for name in self.parts if name not in known]
        stateful = [n for n in strange if hasattr(self.parts[n], "load_state_dict")]
        if stateful:
            raise self._unlike(stateful[0], "an object with a state", "what was saved: it was not")
        return plain

    def _unlike(self, place: str, seen: str, needed: str) -> CheckpointError:
        return CheckpointError(
            f"{self.opened.path}: {place}",
            seen=f"{seen} from the factory",
            needed=needed,
            next_step="build in the factory what was passed to save",
        )


def _restore(held: Any, state: Any, word: str, place: str) -> None:
    """Give an object of the user's its state.

    Raises:
        CheckpointError: it is another kind of object, or refuses.
    """
    load = partial(held.set_state, state) if word == "generator" else None
    if load is None and callable(getattr(held, "load_state_dict", None)):
        _check_keys(held, state, place)
        load = partial(held.load_state_dict, state)
    if load is None:
        raise damaged(place, f"a {word} for a {type(held).__name__}", "an object that takes it")
    try:
        load()
    except Exception as error:  # an object of the user's may raise anything
        raise CheckpointError(
            place,
            seen=f"{type(error).__name__}: {str(error)[:300]}",
            needed=f"the state of a {type(held).__name__}",
            next_step="build the object in the factory as it was built for the run",
        ) from error


def _check_keys(held: Any, state: Any, place: str) -> None:
    """A scheduler takes whatever keys it is given as attributes: only its own may come."""
    if isinstance(held, torch.optim.lr_scheduler.LRScheduler):
        strange = sorted(as_dict(state, place).keys() - held.state_dict().keys())
        if strange:
            raise damaged(place, f"the key {strange[0]!r}"[:100], f"a {type(held).__name__}'s")
