"""Values as plain data and back: what a file may hold, and nothing that could run.

Data are JSON values. What JSON has no word for is an object with one key that begins with ``$``:

=============== ==================================================================
``$tuple``      a list of items
``$dict``       a list of pairs (keys that are no text, or begin with ``$``)
``$counter``    likewise, for ``collections.Counter``
``$float``      ``"nan"``, ``"inf"`` or ``"-inf"``
``$dtype``      a name in torch, such as ``"float32"``
``$tensor``     the name of a tensor that is kept beside the data
``$kind``       a name of the registry, with its fields beside it: a frozen dataclass
=============== ==================================================================

Reading makes these and no others, so a hostile file can name no class, function or attribute.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuroexapt.errors import CheckpointError

_DEEPEST = 48
_SINGLE = ("$tuple", "$dict", "$counter", "$float", "$dtype", "$tensor")
DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}

Keep = Callable[[str, Tensor], str]
Fetch = Callable[[str, str], Tensor]


@dataclass(frozen=True)
class Writer:
    """Turns values into data.

    Args:
        kinds: dataclasses by the name they are written under.
        keep: stores a tensor, given its place, and says its name; None refuses tensors.

    Example:
        >>> Writer({}).data((1, float("inf"), torch.float16), "x")
        {'$tuple': [1, {'$float': 'inf'}, {'$dtype': 'float16'}]}
    """

    kinds: Mapping[str, type] = field(default_factory=dict)
    keep: Keep | None = None

    def data(self, value: object, place: str, depth: int = 0) -> Any:
        """The value as data; ``place`` is named where that is impossible.

        Raises:
            CheckpointError: a part of it is none of what can be written.
        """
        if depth > _DEEPEST:
            raise _unwritable(place, f"nesting deeper than {_DEEPEST}")
        if value is None or isinstance(value, (bool, str)):
            return value if value is None or isinstance(value, bool) else str.__str__(value)
        if isinstance(value, (int, np.integer)):
            return int(value)
        if isinstance(value, (float, np.floating)):
            number = float(value)
            return number if math.isfinite(number) else {"$float": str(number)}
        if isinstance(value, Tensor):
            if self.keep is None:
                raise _unwritable(place, "a tensor")
            return {"$tensor": self.keep(place, value)}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        return self._nested(value, place, depth + 1)

    def _nested(self, value: object, place: str, depth: int) -> Any:
        kind = type(value)
        if isinstance(value, (list, tuple)) and kind in (list, tuple, torch.Size):
            items = [self.data(v, f"{place}[{i}]", depth) for i, v in enumerate(value)]
            return items if kind is list else {"$tuple": items}
        if isinstance(value, Mapping) and kind in (dict, OrderedDict, Counter):
            plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
            if plain and kind is not Counter:
                return {k: self.data(v, f"{place}.{k}", depth) for k, v in value.items()}
            pairs = [
                [self.data(k, place, depth), self.data(v, f"{place}.{k}", depth)]
                for k, v in value.items()
            ]
            return {"$counter" if kind is Counter else "$dict": pairs}
        if is_dataclass(value) and self.kinds.get(kind.__name__) is kind:
            held = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
            parts = {k: self.data(v, f"{place}.{k}", depth) for k, v in held.items()}
            return {"$kind": kind.__name__, **parts}
        raise _unwritable(place, f"a {kind.__module__}.{kind.__qualname__}")


def _unwritable(place: str, seen: str) -> CheckpointError:
    return CheckpointError(
        place,
        seen=seen,
        needed="numbers, text, tuples, lists, mappings, dtypes, or a registered kind",
        next_step="register its dataclass with neuroexapt.edit.register, or leave it out",
    )


@dataclass(frozen=True)
class Reader:
    """Turns data into values.

    Args:
        kinds: dataclasses by name; no others are made.
        fetch: a tensor by name (and the place that asks); None refuses tensors.

    Example:
        >>> Reader({}).value({"$tuple": [1, {"$float": "inf"}]}, "x")
        (1, inf)
    """

    kinds: Mapping[str, type] = field(default_factory=dict)
    fetch: Fetch | None = None

    def value(self, data: Any, place: str, depth: int = 0) -> Any:
        """The value that data describe; ``place`` is named where they describe none.

        Raises:
            CheckpointError: an unknown word, a missing or unknown field, a wrong type.
        """
        if depth > 2 * _DEEPEST:
            raise _unreadable(place, f"nesting deeper than {2 * _DEEPEST}", "less")
        if data is None or isinstance(data, (bool, int, float, str)):
            return data
        if isinstance(data, list):
            return [self.value(d, f"{place}[{i}]", depth + 1) for i, d in enumerate(data)]
        if not isinstance(data, dict):
            raise _unreadable(place, f"a {type(data).__name__}", "a JSON value")
        words = [key for key in data if key.startswith("$")]
        if not words:
            return {k: self.value(d, f"{place}.{k}", depth + 1) for k, d in data.items()}
        if words == ["$kind"]:
            return self._made(data, place, depth + 1)
        if len(data) != 1 or words[0] not in _SINGLE:
            raise _unreadable(place, f"the word {words[0]!r}", f"one of {', '.join(_SINGLE)}")
        return self._single(words[0], data[words[0]], place, depth + 1)

    def _single(self, word: str, held: Any, place: str, depth: int) -> Any:
        if word == "$tuple":
            return tuple(self.value(as_list(held, place), place, depth))
        if word in ("$dict", "$counter"):
            pairs = [self._pair(pair, place, depth) for pair in as_list(held, place)]
            return Counter(dict(pairs)) if word == "$counter" else dict(pairs)
        name = as_text(held, place)
        if word == "$tensor":
            if self.fetch is None:
                raise _unreadable(place, "a tensor", "a value without tensors")
            return self.fetch(name, place)
        if word == "$float" and name in ("nan", "inf", "-inf"):
            return float(name)
        if word == "$dtype" and name in DTYPES:
            return DTYPES[name]
        raise _unreadable(place, repr(name)[:80], f"a name that {word} knows")

    def _pair(self, pair: Any, place: str, depth: int) -> tuple[Any, Any]:
        key, value = (self.value(d, place, depth) for d in as_list(pair, place, 2))
        try:
            hash(key)
        except TypeError as error:
            raise _unreadable(place, f"a key of type {type(key).__name__}", "a key") from error
        return key, value

    def _made(self, data: Mapping[str, Any], place: str, depth: int) -> Any:
        name = as_text(data["$kind"], place)
        kind = self.kinds.get(name)
        if kind is None:
            raise CheckpointError(
                place,
                seen=f"the kind {name!r}"[:120],
                needed="a registered kind",
                next_step="import the module that calls neuroexapt.edit.register on it",
            )
        known = {f.name: f for f in fields(kind) if f.init}
        strange = [key for key in data if key != "$kind" and key not in known]
        missing = [
            key
            for key, f in known.items()
            if key not in data and f.default is MISSING and f.default_factory is MISSING
        ]
        if strange or missing:
            seen = f"the field {strange[0]!r}"[:120] if strange else f"no field {missing[0]!r}"
            raise _unreadable(place, seen, f"the fields of {name}: {', '.join(known)}")
        held = {k: self.value(d, f"{place}.{k}", depth) for k, d in data.items() if k != "$kind"}
        try:
            return kind(**held)
        except Exception as error:  # a class of the user's may raise anything
            raise _unreadable(place, f"{type(error).__name__}: {error}", f"a {name}") from error


def as_list(data: Any, place: str, length: int | None = None) -> list[Any]:
    """Data that must be a list.

    Raises:
        CheckpointError: they are none, or not of this length.
    """
    if isinstance(data, list) and (length is None or len(data) == length):
        return data
    wanted = "a list" if length is None else f"a list of {length}"
    raise _unreadable(place, _short(data), wanted)


def as_text(data: Any, place: str) -> str:
    """Data that must be text."""
    if isinstance(data, str):
        return data
    raise _unreadable(place, _short(data), "text")


def as_dict(data: Any, place: str) -> dict[str, Any]:
    """Data that must be an object."""
    if isinstance(data, dict):
        return data
    raise _unreadable(place, _short(data), "an object")


def as_count(data: Any, place: str, most: int = 2**48) -> int:
    """Data that must be a whole number from 0 to ``most``."""
    if type(data) is int and 0 <= data <= most:
        return data
    raise _unreadable(place, _short(data), f"a whole number from 0 to {most}")


def as_shape(data: Any, place: str) -> tuple[int, ...]:
    """Data that must be the shape of a tensor."""
    sizes = tuple(as_count(size, place) for size in as_list(data, place))
    if len(sizes) > 64 or math.prod(max(size, 1) for size in sizes) > 2**48:
        raise _unreadable(place, _short(data), "a shape that memory can hold")
    return sizes


def _short(data: Any) -> str:
    text = repr(data) if isinstance(data, (str, int, float, bool, type(None))) else ""
    return f"{text[:80]} ({type(data).__name__})" if text else f"a {type(data).__name__}"


def _unreadable(place: str, seen: str, needed: str) -> CheckpointError:
    return CheckpointError(
        place,
        seen=seen,
        needed=needed,
        next_step="the file is damaged or foreign: load another checkpoint",
    )
