"""What an optimizer keeps, by parameter name: written down, and put back into another optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.edit import Decay, Reader, Writer
from neuroexapt.edit.data import as_dict, as_list, as_text
from neuroexapt.errors import CheckpointError
from neuroexapt.guard.decay import decays_of, set_decay
from neuroexapt.guard.ledger import Ledger
from neuroexapt.guard.several import Optimizers, Several

_NOT_OPTIONS = ("params", "param_names")
Groups = Sequence[Sequence[Tensor]]
States = Mapping[Tensor, Mapping[str, Any]]


@dataclass(frozen=True)
class Held:
    """What one optimizer holds at one moment, by reference.

    Attributes:
        groups: the parameters of each group.
        state: the state of each parameter.
        decays: parameters with a decay beside the optimizer's own, and its strength.
    """

    groups: Groups
    state: States
    decays: Mapping[Tensor, float] = field(default_factory=dict)


def each(optimizers: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers that were given, one by one."""
    if optimizers is None:
        return ()
    if isinstance(optimizers, Several):
        return optimizers.optimizers
    return tuple(optimizers) if isinstance(optimizers, Sequence) else (optimizers,)


def held_by(optimizer: torch.optim.Optimizer) -> Held:
    """What an optimizer holds now; lists and dictionaries are copied, tensors are not."""
    return Held(
        [list(group["params"]) for group in optimizer.param_groups],
        dict(optimizer.state),
        decays_of(optimizer),
    )


@dataclass(frozen=True)
class Names:
    """Parameters by name: those of the model by theirs, others by their place in the optimizer."""

    names: Mapping[int, str]

    @staticmethod
    def of(parameters: Mapping[str, Tensor], groups: Groups) -> Names:
        """Names for the parameters of a model and what else an optimizer's groups hold."""
        names: dict[int, str] = {}
        for name, parameter in parameters.items():
            names.setdefault(id(parameter), name)
        others = [p for group in groups for p in group if id(p) not in names]
        names.update((id(p), f"#{number}") for number, p in enumerate(others))
        return Names(names)

    def __getitem__(self, parameter: Tensor) -> str:
        return self.names.get(id(parameter), "")


def record_of(
    optimizer: torch.optim.Optimizer,
    held: Held,
    parameters: Mapping[str, Tensor],
    writer: Writer,
    place: str,
) -> dict[str, Any]:
    """An optimizer as data.

    Args:
        optimizer: gives the options of its groups.
        held: its parameters and state, now or at another moment.
        parameters: the model's parameters by name, at that moment.
        writer: takes the tensors.
        place: where in the file this will stand.

    Raises:
        CheckpointError: an option or a state can be no data.
    """
    names = Names.of(parameters, held.groups)
    groups = [
        {
            "params": [names[p] for p in parameters_of_group],
            "options": writer.data(
                {k: v for k, v in group.items() if k not in _NOT_OPTIONS},
                f"{place}.groups[{number}]",
            ),
            **({"param_names": list(group["param_names"])} if "param_names" in group else {}),
        }
        for number, (group, parameters_of_group) in enumerate(
            zip(optimizer.param_groups, held.groups, strict=True)
        )
    ]
    state = {}
    for parameter, values in held.state.items():
        name = names[parameter] if isinstance(parameter, Tensor) else ""
        if not name:
            raise CheckpointError(
                f"{place} ({type(optimizer).__name__})",
                seen="state of something that is in none of its groups",
                needed="state of parameters of its groups",
                next_step="del optimizer.state[...] of what it trains no more",
            )
        away = [
            k for k, v in values.items() if isinstance(v, Tensor) and v.device != parameter.device
        ]
        state[name] = {
            "values": writer.data(dict(values), f"{place}.state.{name}"),
            **({"away": away} if away else {}),
        }
    decays = {names[p]: strength for p, strength in held.decays.items() if names[p]}
    kind = type(optimizer).__name__
    return {"class": kind, "groups": groups, "state": state, "decays": decays}


@dataclass(frozen=True)
class Restorer:
    """Puts a record back into an optimizer that was built on the model as its factory makes it.

    Args:
        optimizer: the optimizer.
        model: the model, its structure made again already.
        record: from :func:`record_of`.
        outside: what the optimizer held besides the model's parameters, when it was built.
        place: where in the file the record stands.
    """

    optimizer: torch.optim.Optimizer
    model: nn.Module
    record: Mapping[str, Any]
    outside: Sequence[Tensor]
    place: str

    def __post_init__(self) -> None:
        kind = self.record.get("class")
        if kind != type(self.optimizer).__name__:
            raise self._unlike(
                f"a {type(self.optimizer).__name__}", f"the {str(kind)[:60]} of the run"
            )

    def members(self, ledger: Ledger) -> None:
        """The groups hold the parameters they held; through a ledger that can take it back.

        Raises:
            CheckpointError: a group more or less, or a parameter that is not there.
        """
        groups = as_list(self.record.get("groups"), self.place)
        if len(groups) != len(self.optimizer.param_groups):
            raise self._unlike(
                f"{len(self.optimizer.param_groups)} parameter groups", f"{len(groups)} of them"
            )
        seen: set[str] = set()
        for group, data in zip(self.optimizer.param_groups, groups, strict=True):
            entry = as_dict(data, self.place)
            names = [as_text(n, self.place) for n in as_list(entry.get("params"), self.place)]
            twice = [name for name in names if name in seen]
            if twice or len(set(names)) < len(names):
                raise self._unlike(f"'{(twice or names)[0]}' twice"[:100], "each parameter once")
            seen.update(names)
            _set_list(ledger, group["params"], [self._parameter(name) for name in names])
            if "param_names" in group:
                told = [
                    as_text(n, self.place) for n in as_list(entry.get("param_names"), self.place)
                ]
                _set_list(ledger, group["param_names"], told)
        decays = as_dict(self.record.get("decays"), self.place)
        wanted = {name: strength for name, strength in decays.items() if type(strength) is float}
        for name in {*wanted, *self._decayed()}:
            strength = wanted.get(name, 0.0)
            set_decay(ledger, self.model, self.optimizer, Decay((name,), strength))

    def _decayed(self) -> Iterator[str]:
        held = decays_of(self.optimizer)
        yield from (n for n, p in self.model.named_parameters() if p in held)

    def values(self, reader: Reader) -> None:
        """Options of the groups, and the state of each parameter.

        Raises:
            CheckpointError: an option of another kind, or state that is no dictionary.
        """
        groups = zip(self.optimizer.param_groups, self.record["groups"], strict=True)
        for number, (group, entry) in enumerate(groups):
            place = f"{self.place}.groups[{number}]"
            for key, value in as_dict(reader.value(entry.get("options"), place), place).items():
                _set_option(group, key, value, f"{place}.{key}"[:200])
        state = as_dict(self.record.get("state"), self.place)
        found: dict[Tensor, dict[str, Any]] = {}
        for name, entry in state.items():
            parameter, place = self._parameter(name), f"{self.place}.state.{name}"
            entry = as_dict(entry, place)
            held = as_dict(reader.value(entry.get("values"), place), place)
            away = as_list(entry.get("away", []), place)
            found[parameter] = {
                key: self._beside(parameter, key, value, key in away) for key, value in held.items()
            }
        self.optimizer.state.clear()
        self.optimizer.state.update(found)

    def _beside(self, parameter: Tensor, key: str, value: Any, away: bool) -> Any:
        """A state on the device where the optimizer wants it."""
        if not isinstance(value, Tensor):
            return value
        group = next(
            g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"])
        )
        follows = group.get("capturable") or group.get("fused")
        # Counters that were beside a parameter on the CPU say nothing about another device.
        stays = not value.dim() and not follows and (away or key == "step")
        return value if stays else value.to(parameter.device)

    def _parameter(self, name: str) -> Tensor:
        if name.startswith("#") and name[1:].isdecimal() and len(name) < 10:
            number = int(name[1:])
            if number < len(self.outside):
                return self.outside[number]
        parameter = dict(self.model.named_parameters(remove_duplicate=False)).get(name)
        if parameter is None:
            raise self._unlike(f"no parameter '{name}'"[:200], "those of the run")
        return parameter

    def _unlike(self, seen: str, needed: str) -> CheckpointError:
        return CheckpointError(
            self.place,
            seen=seen,
            needed=needed,
            next_step="build the optimizer in the factory as it was built for the run",
        )


def outsiders(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer holds besides a model's parameters, in its order."""
    own = {id(p) for p in model.parameters()}
    return [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]


def _set_option(group: dict[str, Any], key: str, value: Any, place: str) -> None:
    old = group.get(key)
    if key in _NOT_OPTIONS or not _alike(old, value):
        raise CheckpointError(
            place,
            seen=f"a {type(value).__name__}",
            needed=f"a {type(old).__name__}, as the optimizer of the factory has",
            next_step="the file is damaged or foreign: load another checkpoint",
        )
    if isinstance(old, Tensor) and isinstance(value, Tensor):
        old.copy_(value)
    else:
        group[key] = value


def _alike(old: Any, new: Any) -> bool:
    number = (bool, int, float)
    if old is None or new is None or (isinstance(old, number) and isinstance(new, number)):
        return True
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return len(old) == len(new) and all(map(_alike, old, new))
    return type(old) is type(new)


def _set_list(ledger: Ledger, held: list[Any], new: Iterable[Any]) -> None:
    ledger.do(partial(_become, held, list(new)), partial(_become, held, list(held)))


def _become(held: list[Any], contents: list[Any]) -> None:
    held[:] = contents
