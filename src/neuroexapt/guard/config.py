"""Keep configs in step: the objects that models are built from, and saved with.

Many libraries build a model as ``Kind(config)`` and save the config beside the weights; after an
edit that config would build another model. Where some numbers in it give every size of the edited
model, and a model built with them and given its weights computes the same, they are set. Where
there are none, the config stays and a note says why. Nothing fails because of a config.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from neuroexapt.capture.attributes import Attribute
from neuroexapt.capture.masks import is_mask
from neuroexapt.edit import original_class
from neuroexapt.errors import CaptureError
from neuroexapt.guard.config_sizes import (
    NotBuilt,
    Sizes,
    SizeTable,
    build,
    changed,
    copied,
    described,
    is_config,
    reloaded,
    sizes_of,
    values_of,
)
from neuroexapt.guard.ledger import Ledger, set_attribute
from neuroexapt.guard.verify import Behaviour, behaviour, same_outputs

_MOST_SOLUTIONS = 8
# What was learnt of each model; where it cannot be built, why.
_TABLES: weakref.WeakKeyDictionary[nn.Module, tuple[str, SizeTable | str]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class Run:
    """An example input, and the modes in which the model runs on it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    modes: tuple[bool, ...]


@dataclass(frozen=True)
class Owner:
    """A module that is built from its config, and the config as it was before an edit."""

    path: str
    module: nn.Module
    before: Any


def owners(model: nn.Module) -> tuple[Owner, ...]:
    """The outermost modules that are built from a config, before an edit."""
    found: list[Owner] = []
    for path, module in model.named_modules():
        inside = any(not one.path or path.startswith(f"{one.path}.") for one in found)
        if not inside and _is_built_from(module):
            try:
                found.append(Owner(path, module, copied(module.config)))
            except NotBuilt as reason:
                found.append(Owner(path, module, reason))
    return tuple(found)


def _is_built_from(module: nn.Module) -> bool:
    config = vars(module).get("config")
    if not is_config(config):
        return False
    try:
        inspect.signature(original_class(module)).bind(config)
    except (TypeError, ValueError):
        return False
    return True


def follow(
    ledger: Ledger, model: nn.Module, before: tuple[Owner, ...], run: Run
) -> tuple[str, ...]:
    """Bring configs in step with a model that was edited and verified; say where that fails.

    Args:
        ledger: takes every write.
        model: the model the user holds.
        before: its :func:`owners` before the edit.
        run: an example of what it computes.
    """
    return tuple(note for owner in before for note in _follow(ledger, model, owner, run))


def _follow(ledger: Ledger, model: nn.Module, owner: Owner, run: Run) -> Iterator[str]:
    place = ".".join(filter(None, (owner.path, "config")))
    try:
        table = _table(owner)
        note = _bring_in_step(ledger, model, owner, table, run)
    except NotBuilt as reason:
        note = f"cannot build {original_class(owner.module).__name__} from it: {reason}"
    if note:
        yield f"{place}: left as it is, the model itself is the truth; {note}"


def _table(owner: Owner) -> SizeTable:
    if isinstance(owner.before, NotBuilt):
        raise owner.before
    kind = original_class(owner.module)
    content = f"{kind} {described(owner.before)}"
    known, table = _TABLES.get(owner.module, ("", None))
    if table is None or known != content:
        try:
            table = SizeTable(kind, owner.before)
        except NotBuilt as reason:
            table = str(reason)  # the error itself would keep the model alive
        _TABLES[owner.module] = content, table
    if isinstance(table, str):
        raise NotBuilt(table)
    return table


def _bring_in_step(
    ledger: Ledger, model: nn.Module, owner: Owner, table: SizeTable, run: Run
) -> str:
    """Set the config where numbers fit; why not, where none do."""
    target = sizes_of(owner.module)
    if target.keys() != table.base.keys():
        odd = sorted({name for name, _ in target.keys() ^ table.base.keys()})
        gone = odd[0] in {name for name, _ in table.base}
        where = "the edited model" if gone else "a model built from it"
        return f"{odd[0]} has no counterpart in {where}"
    table.look(target)
    refused: list[str] = []
    fitting = list(_fitting(owner, table, target, refused))
    if not fitting:
        return refused[0] if refused else _contradiction(table, target)
    if any(values_of(fit.config) == values_of(owner.before) for fit in fitting):
        return ""  # it was in step, and nothing that it holds has moved
    now = behaviour(model, run.args, run.kwargs, run.modes)
    for fit in fitting:
        for built in (fit.built, build(table.kind, _with_factors(owner, fit))):
            same = _computes_the_same(model, owner, built, run, now)
            if same and _set(ledger, model, owner, built, run, now):
                return ""
        refused.append(f"{fit.said} gives every size and another function{_odd(owner, fit)}")
    return " and ".join(refused[:2])


@dataclass(frozen=True)
class _Fit:
    """A config that gives every size of the model."""

    said: str
    config: Any
    built: nn.Module


def _fitting(owner: Owner, table: SizeTable, target: Sizes, refused: list[str]) -> Iterator[_Fit]:
    """Configs that build the sizes wanted, those that also repeat the modules' numbers first."""
    fits: list[_Fit] = []
    for values in itertools.islice(table.solutions(target, owner.module.config), _MOST_SOLUTIONS):
        said = " and ".join(f"{path} = {value}" for path, value in values.items()) or "it"
        try:
            config = _derived(changed(owner.module.config, values))
            built = build(table.kind, config)
        except NotBuilt as reason:
            refused.append(f"{said} gives every size and is refused: {reason}")
            continue
        if sizes_of(built) == target:
            fits.append(_Fit(said, config, built))
    return iter(sorted(fits, key=lambda fit: len(list(_differing(owner.module, fit.built, int)))))


def _derived(config: Any) -> Any:
    """A config with the whole numbers that its class derives from others as after a reload."""
    own, loaded = values_of(config), values_of(reloaded(config))
    return changed(config, {p: v for p, v in loaded.items() if type(own.get(p)) is int is type(v)})


def _differing(
    module: nn.Module, built: nn.Module, kind: type
) -> Iterator[tuple[Attribute, Any, Any]]:
    """Numbers that modules hold where those of another model are not the same."""
    others = dict(built.named_modules())
    for path, part in module.named_modules():
        theirs = vars(others[path]) if path in others else {}
        for name, value in vars(part).items():
            if type(value) is kind is type(theirs.get(name)) and value != theirs[name]:
                yield Attribute(path, name), value, theirs[name]


def _with_factors(owner: Owner, fit: _Fit) -> Any:
    """The config with factors that the edit changed in all modules, such as a norm's epsilon."""
    wanted: dict[float, set[float]] = {}
    for _, ours, theirs in _differing(owner.module, fit.built, float):
        wanted.setdefault(theirs, set()).add(ours)
    values = values_of(fit.config)
    agreed = {old: min(new) for old, new in wanted.items() if len(new) == 1}
    return changed(fit.config, {p: agreed[v] for p, v in values.items() if v in agreed})


def _odd(owner: Owner, fit: _Fit) -> str:
    for at, ours, theirs in _differing(owner.module, fit.built, float):
        return f" ({at.module}.{at.name} would be {theirs:.3g}, is {ours:.3g})"
    return ""


def _contradiction(table: SizeTable, target: Sizes) -> str:
    conflicts = table.conflicts(target)
    if conflicts:
        path, values = next(iter(conflicts.items()))
        layers = ", ".join(str(value) for value in values)
        return f"no value of {path} fits: widths differ ({layers})"
    moved = [place for place, size in table.base.items() if size != target[place]]
    name, dim = moved[0] if moved else next(iter(target))
    return f"no numbers give {target[name, dim]} at dimension {dim} of {name} and fit all others"


def _computes_the_same(
    model: nn.Module, owner: Owner, built: nn.Module, run: Run, now: Behaviour
) -> bool:
    """Whether what is built from a config, given the weights, does what the model does."""
    try:
        state = owner.module.state_dict()  # what masks shut out is zero there
        unmasked = {name: value for name, value in state.items() if not is_mask(name)}
        built.load_state_dict(unmasked, assign=True)
        _cast_buffers(built, like=owner.module)
        with _in_place_of(model, owner.path, built) as whole:
            return same_outputs(now, behaviour(whole, run.args, run.kwargs, run.modes))
    except (CaptureError, RuntimeError):  # what it is built as may not take the weights
        return False


def _cast_buffers(built: nn.Module, like: nn.Module) -> None:
    kinds = {name: (buffer.device, buffer.dtype) for name, buffer in like.named_buffers()}
    for path, part in built.named_modules():
        for name, buffer in part._buffers.items():
            kind = kinds.get(f"{path}.{name}".lstrip("."))
            if kind is not None and buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to(*kind)


@contextlib.contextmanager
def _in_place_of(model: nn.Module, path: str, part: nn.Module) -> Iterator[nn.Module]:
    """The model with another module at a path, for the duration of the block."""
    if not path:
        yield part
        return
    parent, _, name = path.rpartition(".")
    children = model.get_submodule(parent)._modules
    old = children[name]
    try:
        children[name] = part
        yield model
    finally:
        children[name] = old


def _set(
    ledger: Ledger, model: nn.Module, owner: Owner, built: nn.Module, run: Run, now: Behaviour
) -> bool:
    """Set the numbers, in copies that parts of the model hold too; not if a forward minds."""
    mark = len(ledger)
    for at, value in list(_stale(owner, built)):
        set_attribute(ledger, model, at, value)
    try:
        same = same_outputs(now, behaviour(model, run.args, run.kwargs, run.modes))
    except CaptureError:
        same = False
    if not same:
        ledger.roll_back(to=mark)
    return same


def _stale(owner: Owner, built: nn.Module) -> Iterator[tuple[Attribute, Any]]:
    others = dict(built.named_modules())
    for path, part in owner.module.named_modules():
        old, new = (vars(m).get("config") for m in (part, others.get(path, part)))
        if is_config(old) and type(old) is type(new):
            at = ".".join(filter(None, (owner.path, path)))
            values = values_of(new)
            for name, value in values_of(old).items():
                if values.get(name, value) != value:
                    yield Attribute(at, f"config.{name}"), values[name]
    yield from _repeated(owner, built)


def _repeated(owner: Owner, built: nn.Module) -> Iterator[tuple[Attribute, Any]]:
    """Whole numbers that modules took from the config when they were made, and still hold.

    A forward with other inputs may read one: the number of experts, for a loss that balances them.
    """
    apart = list(_differing(owner.module, built, int))
    if apart:
        first = dict(build(type(built), owner.before).named_modules())
        for at, ours, theirs in apart:
            held = vars(first[at.module]) if at.module in first else {}
            if held.get(at.name) == ours:
                yield Attribute(f"{owner.path}.{at.module}".strip("."), at.name), theirs
