"""Which whole numbers of a config set which sizes of the model that is built from it.

Nobody says which numbers those are, so the model is built: once as the config is, then with one
number changed at a time. What each number does to each size is read off, and the numbers that
give the sizes wanted are solved for. A build tells for certain; this only proposes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import random
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neuroexapt.capture.attributes import Attribute, write
from neuroexapt.capture.masks import is_mask

# A place in the state of a model: tensor name and dimension.
Sizes: TypeAlias = Mapping[tuple[str, int], int]
# Paths of a config that hold one number: most often one, two where a build wants them equal.
Paths: TypeAlias = tuple[str, ...]

_MOST_NUMBERS = 24
# Choices of numbers to change, few first: more than this no one edit asks for.
_MOST_TRIALS = 2000
_LONGEST = 8  # lists beyond are no sizes of stages
# How names of sizes end, for those that may be left out (None) and then follow others.
_SIZE_NAME = re.compile(r"(size|dim|dims|inner|width|heads|channels|features|rank|ff|ffn)$")
SECONDS = 10.0  # for all builds of a model together


class NotBuilt(Exception):
    """The model cannot be built from its config, or not in time; the text says why."""


class _WithoutWeights(TorchFunctionMode):
    """``torch.empty`` makes nothing: weights have shapes alone, while buffers keep their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """No random state moves, no warning and no log is left."""
    states, disabled = (random.getstate(), np.random.get_state()), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        random.setstate(states[0])
        np.random.set_state(states[1])


def build(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model without weights from a copy of a config.

    Raises:
        NotBuilt: its class does not build it.
    """
    try:
        with _unnoticed(), torch.device("cpu"), _WithoutWeights():
            return kind(copied(config))
    except Exception as error:
        raise _not_built(error) from error


def copied(config: Any) -> Any:
    """A deep copy.

    Raises:
        NotBuilt: the config cannot be copied.
    """
    try:
        return copy.deepcopy(config)
    except Exception as error:
        raise _not_built(error) from error


def reloaded(config: Any) -> Any:
    """The config as it would come back from a file: its class derives and checks numbers anew.

    Raises:
        NotBuilt: its class refuses it.
    """
    load = getattr(type(config), "from_dict", None)
    if load is None:
        return config
    try:
        with _unnoticed():
            return load(copied(config).to_dict())
    except Exception as error:
        raise _not_built(error) from error


def described(config: Any) -> str:
    """All that a config says, its whole numbers apart.

    Raises:
        NotBuilt: it cannot say.
    """
    try:
        return re.sub(r"(?<![\w.])\d+(?![\w.])", "#", repr(config.to_dict()))
    except Exception as error:
        raise _not_built(error) from error


def _not_built(error: Exception) -> NotBuilt:
    lines = str(error).strip().splitlines()
    return NotBuilt(f"{type(error).__name__}: {lines[-1].strip()}" if lines else repr(error))


def sizes_of(model: nn.Module) -> dict[tuple[str, int], int]:
    """Every size in the state of a model; masks are no matter of a config."""
    state = model.state_dict(keep_vars=True)
    return {
        (name, dim): size
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and not is_mask(name)
        for dim, size in enumerate(tensor.shape)
    }


def values_of(config: Any) -> dict[str, Any]:
    """Every number of a config and of the configs and short lists in it, by path; None too."""
    return dict(_values(config, "", set()))


def _values(holder: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    seen.add(id(holder))
    items = enumerate(holder) if isinstance(holder, (list, tuple)) else vars(holder).items()
    for key, value in items:
        if str(key).startswith("_") or "." in str(key):
            continue
        if value is None or type(value) in (int, float):
            yield f"{prefix}{key}", value
        elif _is_inside(value) and id(value) not in seen:
            yield from _values(value, f"{prefix}{key}.", seen)


def _is_inside(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= _LONGEST
    return is_config(value)


def is_config(value: Any) -> bool:
    """Whether a value is a config: an object that can say in a dictionary what it holds."""
    plain = hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module))
    return plain and callable(getattr(value, "to_dict", None))


def changed(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a config with other numbers."""
    holder = nn.Module()
    holder.config = copied(config)
    for path, value in values.items():
        write(holder, Attribute("", f"config.{path}"), value)
    return holder.config


@dataclass(frozen=True)
class _Effect:
    """What one number does: from one value to another, these sizes become those."""

    old: int
    new: int
    sizes: Sizes


@dataclass(frozen=True)
class _Row:
    """A size as a function of numbers: ``(base + sum of slopes * steps) * product of ratios``.

    A number has a slope where doubling it adds to the size, and none where it doubles it.
    """

    base: int
    terms: tuple[tuple[Paths, int, Fraction | None], ...]
    target: int

    def size(self, values: Mapping[Paths, int]) -> Fraction:
        total, factor = Fraction(self.base), Fraction(1)
        for paths, old, slope in self.terms:
            if slope is None:
                factor *= Fraction(values[paths], old)
            else:
                total += slope * (values[paths] - old)
        return total * factor

    def solved(self, values: Mapping[Paths, int], paths: Paths) -> int | None:
        """The value of one number that gives the target, the others being known."""
        zero, one = (self.size({**values, paths: value}) for value in (0, 1))
        if zero == one:
            return None
        value = (self.target - zero) / (one - zero)
        return int(value) if value.denominator == 1 and value > 0 else None


@dataclass
class SizeTable:
    """What is known of a model class and a config, and more on demand.

    Raises:
        NotBuilt: the class does not build a model from this config.
    """

    kind: type[nn.Module]
    config: Any
    seconds: float = 0.0
    base: Sizes = field(default_factory=dict)
    effects: dict[Paths, _Effect | None] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    tried: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = self._built(self.config)

    def _built(self, config: Any) -> dict[tuple[str, int], int]:
        if self.seconds > SECONDS:
            raise NotBuilt(f"building it takes too long ({self.seconds:.0f} s so far)")
        started = time.perf_counter()
        try:
            return sizes_of(build(self.kind, config))
        finally:
            self.seconds += time.perf_counter() - started

    def look(self, target: Sizes) -> None:
        """See what every number does that may set one of the sizes to be changed.

        Raises:
            NotBuilt: it takes too long.
        """
        wanted = {size for place, size in self.base.items() if size != target[place]}
        self._give_left_out(wanted)
        numbers = {
            path: value
            for path, value in values_of(self.config).items()
            if type(value) is int and value > 0 and any(size % value == 0 for size in wanted)
        }
        order = sorted(numbers, key=lambda path: (numbers[path] not in wanted, -numbers[path]))
        alone = [path for path in order[:_MOST_NUMBERS] if not self._looked(path, numbers[path])]
        # Some builds want numbers to be equal: what fails alone is tried together.
        for value in sorted({numbers[path] for path in alone}, reverse=True):
            together = tuple(path for path in alone if numbers[path] == value)
            if len(together) > 1:
                self._look_at(together, value)

    def _give_left_out(self, wanted: Set[int]) -> None:
        """Say the numbers that are None and follow others, so that these set their own sizes."""
        values = values_of(self.config)
        heads = {v for path, v in values.items() if path.endswith("heads") and v}
        parts = {size // value for size in wanted for value in heads if size % value == 0}
        absent = [path for path in values if values[path] is None and _SIZE_NAME.search(path)]
        for path in absent[:_MOST_NUMBERS]:
            for size in sorted((wanted | parts) - self.tried.setdefault(path, set())):
                self.tried[path].add(size)
                if self._with((path,), size) == self.base != self._with((path,), 2 * size):
                    self.config = changed(self.config, {path: size})
                    self.effects.clear()
                    self.left_out[path] = size
                    break

    def _looked(self, path: str, value: int) -> bool:
        self._look_at((path,), value)
        return self.effects[path,] is not None

    def _look_at(self, paths: Paths, value: int) -> None:
        if paths in self.effects:
            return
        effect = None
        for new in (2 * value, 3 * value, *([value // 2] if value % 2 == 0 else [])):
            sizes = self._with(paths, new)
            if sizes:
                moved = {k: size for k, size in sizes.items() if size != self.base.get(k)}
                effect = _Effect(value, new, moved) if sizes.keys() == self.base.keys() else None
                break
        self.effects[paths] = effect

    def _with(self, paths: Paths, value: int) -> Sizes:
        """The sizes with another number; none where that cannot be built, which says nothing."""
        try:
            return self._built(changed(self.config, dict.fromkeys(paths, value)))
        except NotBuilt:
            if self.seconds > SECONDS:
                raise
            return {}

    def rows(self, target: Sizes) -> dict[_Row, tuple[str, int]]:
        """Every size as a function of the numbers, alike ones once, each with a place."""
        found: dict[_Row, tuple[str, int]] = {}
        for place, base in self.base.items():
            terms = tuple(
                (paths, effect.old, _slope(effect, base, effect.sizes[place]))
                for paths, effect in self.effects.items()
                if effect is not None and place in effect.sizes
            )
            found.setdefault(_Row(base, terms, target[place]), place)
        return found

    def solutions(self, target: Sizes, now: Any) -> Iterator[dict[str, int]]:
        """Numbers that may give the sizes wanted, those with the fewest changes first.

        Args:
            target: sizes wanted, at the places of ``base``.
            now: the config to start from.
        """
        rows, held = list(self.rows(target)), values_of(now)
        olds = {paths: old for row in rows for paths, old, _ in row.terms}
        start = {paths: held.get(paths[0]) or old for paths, old in olds.items()}
        given = {path: size for path, size in self.left_out.items() if held.get(path) is None}
        choices = itertools.chain.from_iterable(
            itertools.combinations(start, count) for count in range(len(start) + 1)
        )
        for vary in itertools.islice(choices, _MOST_TRIALS):
            values = _solve(rows, {p: v for p, v in start.items() if p not in vary}, vary)
            if values is not None and all(values[p] != start[p] for p in vary):
                new = {path: values[paths] for paths in vary for path in paths}
                yield new
                if given.keys() - new.keys():  # what was left out may no longer follow
                    yield {**given, **new}

    def conflicts(self, target: Sizes) -> dict[str, tuple[int, ...]]:
        """For each number that alone sets sizes: the values these want, where they differ."""
        wanted: dict[str, set[int | None]] = {}
        for row in self.rows(target):
            if len(row.terms) == 1:
                (paths, *_), *_ = row.terms
                wanted.setdefault(paths[0], set()).add(row.solved({}, paths))
        return {
            path: tuple(sorted((v for v in values if v), reverse=True))
            for path, values in wanted.items()
            if len(values) > 1
        }


def _slope(effect: _Effect, base: int, size: int) -> Fraction | None:
    if size * effect.old == base * effect.new:
        return None
    return Fraction(size - base, effect.new - effect.old)


def _solve(
    rows: Sequence[_Row], known: Mapping[Paths, int], vary: Iterable[Paths]
) -> dict[Paths, int] | None:
    """Values for all numbers; None where the rows contradict one another or do not tell."""
    values, pending, unknown = dict(known), list(rows), set(vary)
    while pending:
        left = []
        for row in pending:
            missing = [paths for paths, *_ in row.terms if paths in unknown]
            if len(missing) > 1:
                left.append(row)
            elif not missing:
                if row.size(values) != row.target:
                    return None
            else:
                value = row.solved(values, missing[0])
                if value is None:
                    return None
                values[missing[0]] = value
                unknown.discard(missing[0])
        if len(left) == len(pending):
            return None
        pending = left
    return None if unknown else values
