"""Make the structure of an edited model again, from the entries of its lineage.

What is made has no values: tensors that an entry resizes or adds are on the meta device until
:meth:`Redo.settle` gives each the device it belongs to, and memory to be filled. So no entry,
however large the numbers in it, takes memory that the file behind it does not have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from neuroexapt.capture.attributes import Attribute, read
from neuroexapt.capture.masks import MASK
from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import Reader, Spec, fitting_class, is_branch, registered_specs
from neuroexapt.edit.copies import CopySpec
from neuroexapt.edit.data import as_count, as_dict, as_list, as_shape, as_text
from neuroexapt.edit.graft import PASS
from neuroexapt.errors import CheckpointError
from neuroexapt.guard.contents import transient_buffers
from neuroexapt.guard.forms import Form, empty, strides
from neuroexapt.guard.holders import check_swappable
from neuroexapt.guard.hooked import drop_graphs
from neuroexapt.guard.ledger import (
    Ledger,
    add_child,
    drop_item,
    put_item,
    set_attribute,
    set_class,
    swap,
)
from neuroexapt.guard.lineage import become, lineage, lineages
from neuroexapt.guard.recurrent import recurrent_owners, release, renew
from neuroexapt.guard.values import alike

_META = torch.device("meta")
_PLAIN = (type(None), bool, int, float, str, tuple, list, dict, torch.dtype)


@dataclass
class Redo:
    """Entries carried out on a model, each write with its way back.

    Args:
        ledger: takes every write.
        model: a model as its factory builds it, or as earlier entries left it.
        most: modules that the model may come to have.
    """

    ledger: Ledger
    model: nn.Module
    most: int
    homes: dict[int, torch.device] = field(default_factory=dict)
    _named: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        lazy = [n for n, t in named_tensors(self.model).items() if is_lazy(t)]
        if lazy:
            raise CheckpointError(
                lazy[0],
                seen="a parameter without a shape",
                needed="a model whose lazy modules have run once",
                next_step="call the model on an example inside the factory",
            )
        recurrent = [m for m in self.model.modules() if isinstance(m, nn.RNNBase)]
        release(self.ledger, recurrent)
        drop_graphs(self.ledger, self.model)

    def entries(self, at: Mapping[str, Sequence[str]]) -> None:
        """Carry out the entries of the model and its parts, in the order in which they were made.

        Raises:
            CheckpointError: one does not fit the model; the message says which.
        """
        new = {path: self._further(path, entries) for path, entries in at.items()}
        for path in lineages(self.model).keys() - at.keys():
            raise _unlike(f"edits of '{path}'", "a model that was edited elsewhere")
        for path, number, entry in _sorted(new):
            root = self._module(path, "lineage")
            place = f"edit {number} ({str(entry.get('description', ''))[:120]})"
            if "unsaved" in entry:
                raise CheckpointError(
                    place,
                    seen=str(entry["unsaved"])[:300],
                    needed="an edit that can be written down",
                    next_step="register its spec with neuroexapt.edit.register before the edit",
                )
            for change in as_list(entry.get("changes"), place):
                self._change(root, path, as_dict(change, place), place)
        for path, entries in new.items():
            root = self._module(path, "lineage")
            become(self.ledger, root, (*lineage(root), *(text for _, text in entries)))

    def _further(self, path: str, entries: Sequence[str]) -> list[tuple[int, str]]:
        """The entries, with their numbers, that the model does not have yet.

        A factory may edit what it builds; its entries are the first ones then.
        """
        own = lineage(self._module(path, "lineage"))
        for number, (mine, theirs) in enumerate(zip(own, entries, strict=False), 1):
            pair = [{**_parsed(text, f"edit {number}"), "time": 0} for text in (mine, theirs)]
            if pair[0] != pair[1]:
                raise _unlike(f"edit {number}", f"'{pair[0].get('description')}' by the factory")
        if len(own) > len(entries):
            raise _unlike(f"edits of '{path}'", f"{len(own)} of them by the factory")
        return list(enumerate(entries, 1))[len(own) :]

    def _change(self, root: nn.Module, path: str, change: dict[str, Any], place: str) -> None:
        step = _STEPS.get(as_text(change.get("do"), place))
        if step is None:
            raise _damaged(place, f"the change {change['do']!r}"[:100], "a change of this version")
        at = f"{path}." if path else ""
        try:
            step(self, at, change, f"{place}: {change['do']}")
        except CheckpointError:
            raise
        except Exception as error:  # a user's factory or spec may raise anything
            raise CheckpointError(
                f"{place}: {change['do']}",
                seen=f"{type(error).__name__}: {str(error)[:300]}",
                needed="the model that was edited, as its factory builds it",
                next_step="check that the factory is the one of the run",
            ) from error
        if change["do"] != "resize":  # which keeps every object
            self._named = None

    def _module(self, path: str, place: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise _unlike(place, f"no module '{path}'"[:200]) from error

    def _tensor(self, name: str, place: str) -> Tensor:
        if self._named is None:
            self._named = named_tensors(self.model)
        if name not in self._named:
            raise _unlike(place, f"no tensor '{name}'"[:200])
        return self._named[name]

    def resize(self, at: str, change: Mapping[str, Any], place: str) -> None:
        """A tensor gets another shape."""
        name = at + as_text(change.get("tensor"), place)
        before, after = (as_shape(change.get(key), place) for key in ("before", "after"))
        tensor = self._tensor(name, place)
        if tuple(tensor.shape) != before:
            raise _unlike(place, f"'{name}' of shape {tuple(tensor.shape)}, {before} was edited")
        check_swappable({name: tensor})
        self.homes.setdefault(id(tensor), tensor.device)
        new = torch.empty(after, dtype=tensor.dtype, device=_META)
        swap(self.ledger, tensor, alike(tensor, new), name)

    def attribute(self, at: str, change: Mapping[str, Any], place: str) -> None:
        """An attribute, or a number in a config, gets another value."""
        path = (at + as_text(change.get("module"), place)).rstrip(".")
        name = as_text(change.get("name"), place)
        value = Reader().value(change.get("value"), place)
        self._module(path, place)
        try:
            old = read(self.model, Attribute(path, name))
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            raise _unlike(place, f"no attribute '{name}' of '{path}'"[:200]) from error
        if any(part.startswith("_") for part in name.split(".")) or not isinstance(old, _PLAIN):
            raise _damaged(place, f"the attribute '{name}'"[:100], "a plain value of the model's")
        set_attribute(self.ledger, self.model, Attribute(path, name), value)

    def insert(self, at: str, change: Mapping[str, Any], place: str) -> None:
        """A module is added under a reserved name."""
        path = (at + as_text(change.get("module"), place)).rstrip(".")
        child, spec = as_text(change.get("child"), place), self._spec(change, place)
        module = self._module(path, place)
        if not is_branch(child) or "." in child or child in module._modules:
            raise _damaged(place, f"the name {child!r}"[:100], "a free reserved name")
        root = self.model.get_submodule(at.rstrip("."))
        branch = self._made(spec, root, place)
        near = change.get("neighbour")
        home = dict(root.named_parameters(remove_duplicate=False)).get(near) if near else None
        dtype = Reader().value(change.get("dtype"), place)
        if spec.fresh and home is not None:
            branch = branch.to(dtype=dtype or home.dtype)
        if spec.fresh:
            branch.train(module.training)
        known = {id(t) for t in named_tensors(self.model).values()}
        for tensor in named_tensors(branch).values():
            if id(tensor) not in known:
                self.homes[id(tensor)] = self._home(home)
        add_child(self.ledger, module, child, branch)
        set_class(self.ledger, module, fitting_class(module))
        count = sum(1 for _ in self.model.modules())
        if count > self.most:
            raise _damaged(place, f"{count} modules", f"at most {self.most}")

    def _home(self, near: Tensor | None) -> torch.device:
        beside = next(self.model.parameters(), None) if near is None else near
        device = torch.device("cpu") if beside is None else beside.device
        return self.homes.get(id(beside), device)

    def _spec(self, change: Mapping[str, Any], place: str) -> Spec:
        spec = Reader(registered_specs()).value(change.get("spec"), place)
        if not isinstance(spec, Spec):
            raise _damaged(place, f"a {type(spec).__name__}", "a spec")
        return spec

    def _made(self, spec: Spec, root: nn.Module, place: str) -> nn.Module:
        if isinstance(spec, CopySpec):
            block = root.get_submodule(spec.source)
            for path, name, _ in spec.numbers:
                if type(vars(block.get_submodule(path)).get(name)) is not int:
                    raise _damaged(place, f"the number '{name}'"[:100], "one that the block holds")
        with torch.random.fork_rng(devices=[]), _META:
            made = spec.make(root)
        if not isinstance(made, nn.Module):
            raise _damaged(place, f"a {type(made).__name__}", "a spec of a module")
        return made

    def remove(self, at: str, change: Mapping[str, Any], place: str) -> None:
        """A module loses what it holds; a pass-through answers in its place."""
        path = (at + as_text(change.get("module"), place)).rstrip(".")
        module = self._module(path, place)
        passage = self._made(self._spec(change, place), self.model, place).train(module.training)
        if PASS in module._modules:
            raise _damaged(place, f"'{path}', which is removed already"[:200], "another module")
        for held in (module._parameters, module._buffers, module._modules):
            for name in [n for n in held if not is_branch(n)]:
                drop_item(self.ledger, held, name)
        add_child(self.ledger, module, PASS, passage)
        set_class(self.ledger, module, fitting_class(module))

    def drop(self, at: str, change: Mapping[str, Any], place: str) -> None:
        """What was inserted is taken away."""
        parent, _, name = (at + as_text(change.get("module"), place)).rpartition(".")
        holder = self._module(parent, place)
        if not is_branch(name) or name not in holder._modules:
            raise _unlike(place, f"no inserted module '{name}' at '{parent}'"[:200])
        drop_item(self.ledger, holder._modules, name)
        set_class(self.ledger, holder, fitting_class(holder))

    def give(self, at: str, change: Mapping[str, Any], place: str) -> None:
        """A parameter comes into being that the layer was built without."""
        full = at + as_text(change.get("tensor"), place)
        path, _, name = full.rpartition(".")
        module = self._module(path, place)
        beside = next((p for p in module._parameters.values() if p is not None), None)
        if module._parameters.get(name, beside) is not None or beside is None:
            raise _unlike(place, f"no empty place '{full}'"[:200])
        empty = torch.empty(as_shape(change.get("shape"), place), dtype=beside.dtype, device=_META)
        new = alike(beside, empty)
        self.homes[id(new)] = self._home(beside)
        put_item(self.ledger, module._parameters, name, new)

    def mask(self, at: str, change: Mapping[str, Any], place: str) -> None:
        """A parameter gets a mask, or loses it."""
        full = at + as_text(change.get("tensor"), place)
        parameter = self._tensor(full, place)
        if not isinstance(parameter, nn.Parameter) or type(change.get("on")) is not bool:
            raise _unlike(place, f"'{full}', which cannot have a mask"[:200])
        mask = torch.empty(parameter.shape, dtype=torch.bool, device=_META)
        self.homes[id(mask)] = self._home(parameter)
        for module in self.model.modules():
            for name, held in list(module._parameters.items()):
                if held is parameter:
                    self._set_mask(module, f"{MASK}{name}", mask if change["on"] else None)

    def _set_mask(self, module: nn.Module, name: str, mask: Tensor | None) -> None:
        if mask is None:
            drop_item(self.ledger, module._buffers, name)
        elif name not in module._buffers:
            put_item(self.ledger, module._buffers, name, mask)
        set_class(self.ledger, module, fitting_class(module))

    def decay(self, at: str, change: Mapping[str, Any], place: str) -> None:
        """Weight decay is the optimizer's: its own record has it."""

    def settle(self, forms: Mapping[str, Form], transient: Collection[str] = ()) -> None:
        """Give every tensor its final form, on the device where it belongs, without values.

        Buffers that no state dict holds are often caches, made and resized by forwards: one that
        the model does not have yet, or has in another shape, is no contradiction.

        Args:
            forms: the form of every tensor by name.
            transient: which of these were in no state dict.

        Raises:
            CheckpointError: names or shapes are others than those of the model.
        """
        named, own = named_tensors(self.model), set(transient_buffers(self.model))
        odd = sorted(
            (named.keys() - forms.keys() - own) | (forms.keys() - named.keys() - {*transient})
        )
        if odd:
            there = "in the model" if odd[0] in named else "in the checkpoint"
            count = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
            raise _unlike(odd[0], f"a tensor that is {there} alone{count}")
        for name, tensor in named.items():
            if name in forms:
                self._settle(name, tensor, forms[name], free=name in own)
        renew(self.ledger, recurrent_owners(self.model, named.values()))

    def _settle(self, name: str, tensor: Tensor, form: Form, *, free: bool) -> None:
        if tuple(tensor.shape) != form.shape and not free:
            raise _unlike(
                name, f"shape {form.shape} in the file, {tuple(tensor.shape)} in the model"
            )
        inserted = any(is_branch(part) for part in name.split("."))
        if tensor.dtype != form.dtype and not (inserted or free):
            raise CheckpointError(
                name,
                seen=f"{form.dtype} in the file, {tensor.dtype} in the model",
                needed="one dtype",
                next_step="convert the model inside the factory as it was converted for the run",
            )
        device = self.homes.get(id(tensor), tensor.device)
        device = torch.device("cpu") if device.type == "meta" else device
        like = Form(tuple(tensor.shape), tensor.dtype, tensor.stride())
        if (tensor.device, like) != (device, Form(form.shape, form.dtype, strides(form))):
            new = empty(form, device)
            check_swappable({name: tensor})
            swap(self.ledger, tensor, alike(tensor, new), name)


_STEPS: dict[str, Callable[[Redo, str, Mapping[str, Any], str], None]] = {
    "resize": Redo.resize,
    "set": Redo.attribute,
    "insert": Redo.insert,
    "remove": Redo.remove,
    "drop": Redo.drop,
    "give": Redo.give,
    "mask": Redo.mask,
    "decay": Redo.decay,
}


def in_order(at: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Path, number and contents of each entry, in the order in which they were made.

    Raises:
        CheckpointError: an entry is not as it was written.
    """
    return _sorted({path: list(enumerate(entries, 1)) for path, entries in at.items()})


def _sorted(
    at: Mapping[str, Sequence[tuple[int, str]]],
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    found = []
    for path, entries in at.items():
        for number, text in entries:
            entry = _parsed(text, f"edit {number}")
            when = as_count(entry.get("time"), f"edit {number}: time", 2**63)
            found.append(((when, path, number), entry))
    for (_, path, number), entry in sorted(found, key=lambda pair: pair[0]):
        yield path, number, entry


def _parsed(text: str, place: str) -> dict[str, Any]:
    try:
        return as_dict(json.loads(text), place)
    except (ValueError, RecursionError) as error:
        raise _damaged(place, str(error)[:200], "JSON") from error


def _unlike(place: str, seen: str) -> CheckpointError:
    return CheckpointError(
        place,
        seen=seen,
        needed="the model that was edited, as its factory builds it",
        next_step="check that the factory is the one of the run, with the same arguments",
    )


def _damaged(place: str, seen: str, needed: str) -> CheckpointError:
    return CheckpointError(
        place,
        seen=seen,
        needed=needed,
        next_step="the file is damaged or foreign: load another checkpoint",
    )
