"""Name what still holds the memory of a tensor that an edit replaced.

Nothing of the library keeps an old tensor once an edit is kept or taken back. A user's own list,
a logger or a loss may, and then the memory of a run grows with every edit.
"""

from __future__ import annotations

import gc
import inspect
import sys
import types
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from neuroexapt.capture.run import named_tensors


@dataclass(frozen=True)
class Leak:
    """Memory of a tensor that is no longer the model's or the optimizer's.

    Attributes:
        tensor: what it was: a parameter's name, ``gradient of ...`` or ``state ... of ...``.
        bytes: its size.
        holders: what refers to it, as far as Python knows.
    """

    tensor: str
    bytes: int
    holders: tuple[str, ...]


class LeakWatch:
    """Remembers the memory a model and its optimizer hold; later tells what should be gone.

    It holds none of it alive. The model is neither read nor written.

    Args:
        model: the model, before edits.
        optimizer: the optimizer that trains it.

    Example:
        >>> from neuroexapt import Widen, apply
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> watch, mine = LeakWatch(net), [net[0].weight.data]
        >>> done = apply(net, Widen("0", by=2), (torch.randn(5, 4),))
        >>> [(leak.tensor, leak.bytes) for leak in watch.found()]
        [('0.weight', 128)]
        >>> del mine
        >>> watch.found()
        ()
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self._model, self._optimizer = model, optimizer
        self._seen = {
            StorageWeakRef(storage).cdata: (name, StorageWeakRef(storage), storage.nbytes())
            for name, tensor in self._held()
            for storage in [tensor.untyped_storage()]
            if storage.nbytes()
        }

    def found(self) -> tuple[Leak, ...]:
        """What was held, is no longer, and has not been freed; collects garbage first."""
        gc.collect()
        present = {tensor.untyped_storage()._cdata for _, tensor in self._held()}
        lost = {
            cdata: (name, size)
            for cdata, (name, ref, size) in self._seen.items()
            if cdata not in present and not ref.expired()
        }
        if not lost:
            return ()
        holders = _holders(set(lost))
        return tuple(
            Leak(name, size, holders.get(cdata) or ("an autograd graph, or what is not Python's",))
            for cdata, (name, size) in lost.items()
        )

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        names = {}
        for name, tensor in named_tensors(self._model).items():
            names[id(tensor)] = name
            yield name, tensor
            if tensor.grad is not None:
                yield f"gradient of {name}", tensor.grad
        for parameter, state in (self._optimizer.state if self._optimizer else {}).items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"state {key} of {names.get(id(parameter), 'a parameter')}", value


def _holders(storages: set[int]) -> dict[int, tuple[str, ...]]:
    """For each storage, what refers to tensors on it."""
    tensors: dict[int, list[Tensor]] = {}
    for thing in gc.get_objects():
        # By its type: looking at an attribute of a stranger may run its code.
        kind = type(thing)
        if issubclass(kind, Tensor) and kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
            cdata = _storage_of(thing)
            if cdata in storages:
                tensors.setdefault(cdata, []).append(thing)
    skipped = {id(tensors), *(id(held) for held in tensors.values())}
    return {cdata: tuple(dict.fromkeys(held_by(held, skipped))) for cdata, held in tensors.items()}


def _storage_of(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or without data
        return 0


def held_by(things: Sequence[object], skipped: Set[int] = frozenset()) -> Iterator[str]:
    """What refers to some objects, in words: variables of running functions, items, attributes.

    Args:
        things: a list that nobody else holds; it is not named itself.
        skipped: ids of other holders that are not worth naming.
    """
    frames = list(_running())
    for thing in things:
        for referrer in gc.get_referrers(thing):
            if id(referrer) in skipped or referrer is things:
                continue
            if not isinstance(referrer, types.FrameType):
                yield from _place(referrer, thing)
        for frame in frames:  # what runs keeps its variables where the collector does not look
            for name in _variables(frame, thing):
                where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                yield f"variable {name} of {frame.f_code.co_name} ({where})"


def _variables(frame: types.FrameType, thing: object) -> list[str]:
    held = frame.f_locals
    names = [name for name, value in held.items() if value is thing]
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and type(held) is dict:
        held.clear()  # a copy that the frame keeps (until Python 3.12): it would hold them alive
    return names


def _running() -> Iterator[types.FrameType]:
    """The frames of every thread, this room's apart."""
    for innermost in sys._current_frames().values():
        frame: types.FrameType | None = innermost
        while frame is not None:
            if frame.f_globals.get("__package__") != __package__:
                yield frame
            frame = frame.f_back


def _place(holder: Any, thing: object) -> Iterator[str]:
    if isinstance(holder, dict):
        owners = [type(owner).__name__ for owner in _owners(holder)]
        where = f"attribute of {owners[0]}" if owners else "item of a dict"
        keys = [key for key, value in holder.items() if value is thing]
        yield from (f"'{key}', {where}" for key in keys)
        if not keys:
            yield f"a key of a {_mapping(holder)}"
    elif isinstance(holder, (list, tuple, set)):
        yield f"a {type(holder).__name__} of {len(holder)}"
    else:
        # Straight from the object: a class may compute its attributes.
        held = _attributes(holder)
        keys = [key for key, value in held.items() if value is thing]
        yield from (f"'{key}', attribute of {type(holder).__name__}" for key in keys)
        if not keys:
            yield f"a {type(holder).__name__}"


def _attributes(thing: object) -> dict[str, Any]:
    has = type(thing).__dictoffset__ and not isinstance(thing, type)
    return object.__getattribute__(thing, "__dict__") if has else {}


def _owners(held: dict[Any, Any]) -> list[object]:
    """The objects whose attributes a dictionary holds."""
    return [o for o in gc.get_referrers(held) if _attributes(o) is held]


def _mapping(inner: dict[Any, Any]) -> str:
    """The kind of mapping that keeps its items in a dictionary (of weak references)."""
    holders = gc.get_referrers(inner)
    holders += [owner for held in holders if type(held) is dict for owner in _owners(held)]
    return next((k for k in (type(h).__name__ for h in holders) if "Dict" in k), "dict")
