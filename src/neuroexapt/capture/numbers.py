"""Numbers that remember where they came from: which attribute, which size of which tensor.

A model is full of Python numbers that repeat a width (``view(B, T, self.heads, C // self.heads)``).
During the run the model's integer attributes and the sizes it reads off tensors are replaced by
a subclass of ``int`` that keeps, through arithmetic, an expression of its origin; a mode
that sees each torch function before its arguments become plain numbers hands the origins to
the operator calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neuroexapt.capture.attributes import integers, read, write
from neuroexapt.capture.trace import Combined, OfAttribute, OfSize, Origin, Place, TensorRef

# Sizes are computed in a few steps; and only while a run is watched do numbers remember.
_DEEPEST = 16
_RUNNING: list[nn.Module] = []


class Number(int):
    """A whole number with its origin.

    Example:
        >>> from neuroexapt.capture.attributes import Attribute
        >>> n = Number.of(6, OfAttribute(Attribute("attend", "heads"), 6))
        >>> n + 1, n.origin.at.name
        (7, 'heads')
    """

    origin: Origin
    depth: int = 0

    @classmethod
    def of(cls, value: int, origin: Origin) -> Number:
        """The value with its origin."""
        number = cls(value)
        number.origin = origin
        return number

    def __add__(self, other: int) -> int:
        return _combined("+", self, other, int.__add__(self, other))

    def __radd__(self, other: int) -> int:
        return _combined("+", other, self, int.__radd__(self, other))

    def __sub__(self, other: int) -> int:
        return _combined("-", self, other, int.__sub__(self, other))

    def __rsub__(self, other: int) -> int:
        return _combined("-", other, self, int.__rsub__(self, other))

    def __mul__(self, other: int) -> int:
        return _combined("*", self, other, int.__mul__(self, other))

    def __rmul__(self, other: int) -> int:
        return _combined("*", other, self, int.__rmul__(self, other))

    def __floordiv__(self, other: int) -> int:
        return _combined("//", self, other, int.__floordiv__(self, other))

    def __rfloordiv__(self, other: int) -> int:
        return _combined("//", other, self, int.__rfloordiv__(self, other))

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def _combined(sign: str, left: int, right: int, value: Any) -> int:
    if type(value) is not int:  # a float, or not a number at all
        return value  # type: ignore[no-any-return]
    depth = 1 + max(getattr(left, "depth", 0), getattr(right, "depth", 0))
    if not _RUNNING or depth > _DEEPEST:
        return value  # a counter that the user's code keeps must not grow a history
    number = Number.of(value, Combined(sign, _origin(left), _origin(right)))
    number.depth = depth
    return number


def _origin(value: int) -> Origin:
    return value.origin if isinstance(value, Number) else int(value)


@contextlib.contextmanager
def attributes_tracked(model: nn.Module) -> Iterator[None]:
    """Let every whole number that the model holds remember its name, for the block."""
    found = list(integers(model))
    _RUNNING.append(model)
    try:
        for integer in found:
            write(
                model, integer.at, Number.of(integer.value, OfAttribute(integer.at, integer.value))
            )
        yield
    finally:
        _RUNNING.pop()
        for integer in found:
            # The forward may have counted it on meanwhile, or dropped it.
            with contextlib.suppress(AttributeError, KeyError, IndexError):
                now = read(model, integer.at)
                if type(now) is Number:
                    write(model, integer.at, int(now))


class Watch(TorchFunctionMode):
    """Hands out sizes with their origin, and keeps the numbers given to the running function."""

    # It runs several operators inside, and compares its own numbers before.
    _OPAQUE = (torch.nn.functional.multi_head_attention_forward,)

    def __init__(self, ref: Callable[[Tensor], TensorRef]) -> None:
        super().__init__()
        self._ref = ref
        self._given: tuple[int, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _SHAPE:
            return self._sizes(args[0], func(*args))
        if func is Tensor.size:
            return self._size(func, args, kwargs)
        before, self._given = self._given, self._numbers(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self._given = before

    def _numbers(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        if func in self._OPAQUE:
            return ()
        numbers = tuple(_ints((args, tuple(kwargs.values()))))
        if func is Tensor.narrow and len(numbers) == 3:
            # The operator below is told where to stop, not how many to take.
            dim, start, length = numbers
            numbers = (dim, start, start + length)
        return numbers if any(isinstance(n, Number) for n in numbers) else ()

    def _size(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if not isinstance(result, int):
            return self._sizes(args[0], result)
        dim = int(args[1] if len(args) > 1 else kwargs["dim"]) % max(args[0].dim(), 1)
        return Number.of(result, OfSize(self._ref(args[0]), dim))

    def _sizes(self, tensor: Tensor, shape: Any) -> Any:
        ref = self._ref(tensor)
        return torch.Size(Number.of(int(n), OfSize(ref, dim)) for dim, n in enumerate(shape))

    def origins(self, args: Sequence[Any]) -> dict[Place, Origin]:
        """Which numbers of an operator's arguments came from where."""
        return matched(self._given, args) if self._given else {}


_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]


def _ints(value: Any) -> Iterator[int]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _ints(item)
    elif isinstance(value, slice):
        yield from _ints((value.start, value.stop, value.step))


def matched(given: Sequence[int], args: Sequence[Any]) -> dict[Place, Origin]:
    """Give each plain number of ``args`` the origin of the number it was made from.

    One by one where a list of ``args``, or all its numbers, are those given (-1 stands for
    any); else by value, unless two numbers given have that value and different origins. In a
    list of sizes that torch made itself, only a size that repeats something is one given.

    Example:
        >>> from neuroexapt.capture.attributes import Attribute
        >>> heads = Number.of(4, OfAttribute(Attribute("", "heads"), 4))
        >>> sorted(matched((2, heads, -1), (None, [2, 4, 8])))
        [(1, 1)]
    """
    places = dict(_places(args))
    for candidate in (list(places), *_lists(places)):
        values = [places[place] for place in candidate]
        if len(values) == len(given) and all(
            a in (b, -1) for a, b in zip(given, values, strict=True)
        ):
            pairs = zip(candidate, given, strict=True)
            return {place: n.origin for place, n in pairs if isinstance(n, Number)}
    by_value: dict[int, set[Origin]] = {}
    for number in given:
        by_value.setdefault(int(number), set()).add(_origin(number))
    return {
        place: next(iter(by_value[value]))
        for place, value in places.items()
        if len(by_value.get(value, ())) == 1
        and not isinstance(next(iter(by_value[value])), int)
        and (len(place) == 1 or _repeats(args, place))
    }


def _repeats(args: Sequence[Any], place: Place) -> bool:
    """Whether a size in a list stands for one position of the tensor before, repeated."""
    tensor = args[0] if args else None
    return (
        isinstance(tensor, Tensor)
        and tensor.dim() == len(args[place[0]])
        and tensor.shape[place[1]] == 1
    )


def _places(args: Iterable[Any]) -> Iterator[tuple[Place, int]]:
    for position, value in enumerate(args):
        if isinstance(value, (tuple, list)):
            for number, item in enumerate(value):
                if isinstance(item, int) and not isinstance(item, bool):
                    yield (position, number), item
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (position,), value


def _lists(places: Iterable[Place]) -> Iterator[list[Place]]:
    found: dict[int, list[Place]] = {}
    for place in places:
        if len(place) == 2:
            found.setdefault(place[0], []).append(place)
    yield from found.values()
