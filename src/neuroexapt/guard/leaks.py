"""Name what still holds the memory of a tensor that an edit replaced.

Nothing of the library keeps an old tensor once an edit is kept or taken back. A user's own list,
a logger or a loss may, and then the memory of a run grows with every edit.
"""

from __future__ import annotations

import gc
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
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
    return {cdata: tuple(dict.fromkeys(_named(held, skipped))) for cdata, held in tensors.items()}


def _storage_of(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or without data
        return 0


def _named(tensors: Iterable[Tensor], skipped: set[int]) -> Iterator[str]:
    frames = list(_running())
    for tensor in tensors:
        for referrer in gc.get_referrers(tensor):
            if id(referrer) in skipped or referrer is tensors:
                continue
            if not isinstance(referrer, types.FrameType):
                yield from _place(referrer, tensor)
        for frame in frames:  # what runs keeps its variables where the collector does not look
            for name in _variables(frame, tensor):
                where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                yield f"variable {name} of {frame.f_code.co_name} ({where})"


def _variables(frame: types.FrameType, tensor: Tensor) -> list[str]:
    held = frame.f_locals
    names = [name for name, value in held.items() if value is tensor]
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and type(held) is dict:
        held.clear()  # a copy that the frame keeps (until Python 3.12): it would hold them alive
    return names


def _running() -> Iterator[types.FrameType]:
    """The frames of every thread, this file's apart."""
    for innermost in sys._current_frames().values():
        frame: types.FrameType | None = innermost
        while frame is not None:
            if frame.f_code.co_filename != __file__:
                yield frame
            frame = frame.f_back


def _place(holder: Any, tensor: Tensor) -> Iterator[str]:
    if isinstance(holder, dict):
        keys = [key for key, value in holder.items() if value is tensor]
        owners = [o for o in gc.get_referrers(holder) if getattr(o, "__dict__", None) is holder]
        for key in keys:
            where = f"attribute of {type(owners[0]).__name__}" if owners else "item of a dict"
            yield f"'{key}', {where}"
    elif isinstance(holder, (list, tuple, set)):
        yield f"a {type(holder).__name__} of {len(holder)}"
    else:
        yield f"a {type(holder).__name__}"
