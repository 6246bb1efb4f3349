"""How much memory an edit will need, and whether the device has it, before it is written."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture import Trace
from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import size_of
from neuroexapt.edit import Patch
from neuroexapt.errors import GuardError

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Forecast:
    """What an edit adds to the memory in use, in bytes; negative where it frees.

    Attributes:
        weights: parameters, buffers and gradients.
        optimizer: state of the optimizers.
        transient: what is held besides until the edit is kept, for the way back.
    """

    weights: int
    optimizer: int
    transient: int

    @property
    def peak(self) -> int:
        """The most that is needed at once while the edit is made."""
        return max(self.weights + self.optimizer, 0) + self.transient


def forecast(
    patch: Patch, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> Forecast:
    """The memory a patch will need, from shapes alone; nothing is allocated for it.

    Invariant: ``weights`` and ``optimizer`` equal what is measured afterwards, for optimizers
    whose state has the parameter's shape.

    Args:
        patch: what will be written.
        model: the model it will be written on.
        optimizers: their state follows.
    """
    named = named_tensors(model)
    states = _states(optimizers)
    weights = optimizer = transient = 0
    for tensor, shape in _new_shapes(patch, named):
        copies = 1 + (tensor.grad is not None)
        new, old = prod(shape), tensor.numel()
        per_entry = states.get(id(tensor), 0) / max(1, old)
        weights += (new - old) * tensor.element_size() * copies
        optimizer += round((new - old) * per_entry)
        # Old and new content are both alive: the smaller of both comes on top of the difference.
        transient += min(new, old) * (tensor.element_size() * copies + round(per_entry))
    gone = _removed(patch, model)
    weights -= sum(_bytes(t) * (1 + (t.grad is not None)) for t in gone)
    optimizer -= sum(states.get(id(tensor), 0) for tensor in gone)
    # Nothing of it is free until the edit is kept.
    transient += sum(_bytes(t) * (1 + (t.grad is not None)) + states.get(id(t), 0) for t in gone)
    added = _inserted(patch, model) + _given(patch, named)
    # Until it has met them an optimizer keeps nothing of new parameters; it will keep as much.
    per_byte = sum(states.values()) / max(1, _trained_bytes(named.values()))
    optimizer += round(per_byte * _trained_bytes(added))
    return Forecast(weights + sum(map(_bytes, added)), optimizer, transient)


def _new_shapes(patch: Patch, named: Mapping[str, Tensor]) -> list[tuple[Tensor, list[int]]]:
    """Every tensor object that gets a new content, with its new shape."""
    shapes = {name: list(named[name].shape) for name in patch.tensors}
    for step in patch.steps:
        for edit in step.dims:
            size = size_of(edit.expr, {step.width: len(step.positions)})
            shapes[edit.tensor][edit.dim] = size
    for refold in patch.refolds:
        shapes.setdefault(refold.tensor, list(named[refold.tensor].shape))
        shapes[refold.tensor][refold.dim] = len(refold.groups)
    for rewrite in patch.rewrites:
        if rewrite.tensor in named:
            shapes.setdefault(rewrite.tensor, list(rewrite.values.shape))
    objects = {id(named[name]): (named[name], shape) for name, shape in shapes.items()}
    return list(objects.values())


def _inserted(patch: Patch, model: nn.Module) -> list[Tensor]:
    """The tensors of the modules that will be inserted; without data where they can be."""
    own = {id(tensor) for tensor in named_tensors(model).values()}
    tensors = [tensor for new in patch.insertions for tensor in new.spec.preview(model)]
    return [tensor for tensor in tensors if id(tensor) not in own]


def _removed(patch: Patch, model: nn.Module) -> list[Tensor]:
    """The tensors that leave the model with the modules that hold them."""
    prefixes = tuple(f"{path}." for path in patch.gone)
    named = named_tensors(model)
    left = {id(tensor) for name, tensor in named.items() if not name.startswith(prefixes)}
    gone = {id(t): t for name, t in named.items() if name.startswith(prefixes)}
    return [tensor for key, tensor in gone.items() if key not in left]


def _given(patch: Patch, named: Mapping[str, Tensor]) -> list[Tensor]:
    """Parameters that layers were built without and get now."""
    return [
        torch.empty_like(rewrite.values, dtype=beside.dtype, device="meta").requires_grad_()
        for rewrite in patch.rewrites
        if rewrite.tensor not in named
        and (beside := named.get(f"{rewrite.tensor.rpartition('.')[0]}.weight")) is not None
    ]


def _states(optimizers: Iterable[torch.optim.Optimizer]) -> dict[int, int]:
    """Bytes of optimizer state for each parameter, scalars apart."""
    return {
        id(parameter): sum(
            value.numel() * value.element_size()
            for value in state.values()
            if isinstance(value, Tensor) and value.dim()
        )
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        if isinstance(parameter, Tensor)
    }


def _trained_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(_bytes(tensor) for tensor in tensors if tensor.requires_grad)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def activation_bytes(trace: Trace) -> int:
    """Bytes that the operators of a run put out: an upper bound on what a step keeps for its
    backward. What an operator only looks at in another way, or writes in place, is not counted."""
    return sum(
        prod(ref.shape) * ref.dtype.itemsize
        for call in trace.calls
        if not _aliases(call.op, call.overload)
        for ref in call.outputs
    )


@functools.cache
def _aliases(op: str, overload: str) -> bool:
    space, _, name = op.partition(".")
    schema = getattr(getattr(getattr(torch.ops, space), name), overload)._schema
    return any(value.alias_info is not None for value in schema.returns)


def available(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; ``None`` where the system does not say.

    What the allocator keeps in its cache counts: it gives that to whoever asks.
    """
    if device.type not in ("cpu", "meta"):
        free = _accelerator("get_memory_info", device)
        cached = _accelerator("memory_reserved", device), _accelerator("memory_allocated", device)
        return None if free is None else free[0] + (cached[0] or 0) - (cached[1] or 0)
    known = [free for free in (_free_in_group(), _free_in_system()) if free is not None]
    return min(known, default=None)


def _accelerator(name: str, *args: Any) -> Any:
    """What ``torch.accelerator`` says; None where this torch or this device cannot say it."""
    ask = getattr(torch.accelerator, name, None)
    if ask is None or torch.accelerator.current_accelerator() is None:
        return None
    try:
        return ask(*args)
    except (NotImplementedError, RuntimeError):
        return None  # a backend without such statistics


def release_cached() -> None:
    """Give what the accelerator's allocator caches back to the device; others may need it."""
    _accelerator("empty_cache")


def in_use() -> dict[str, int | None]:
    """Bytes in use now and at most so far, by this process and on its accelerator.

    Example:
        >>> sorted(in_use())
        ['accelerator', 'accelerator_peak', 'resident', 'resident_peak']
    """
    return {
        "resident": resident(),
        "resident_peak": _resident_peak(),
        "accelerator": _accelerator("memory_allocated"),
        "accelerator_peak": _accelerator("max_memory_allocated"),
    }


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was not the memory, on a device or in the process.

    Example:
        >>> ran_out(torch.OutOfMemoryError("CUDA out of memory")), ran_out(RuntimeError("shape"))
        (True, False)
    """
    # What torch raises for main memory is a plain RuntimeError.
    told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return told or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def _free_in_system() -> int | None:
    if not _MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _free_in_group() -> int | None:
    """What a container may still take; page cache, which gives way, is not counted as taken."""
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return None
    stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    return int(limit.read_text()) - int(used.read_text()) + int(stat.get("inactive_file", 0))


def resident() -> int | None:
    """Bytes of this process in memory; ``None`` where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def out_of_memory(what: str, error: BaseException) -> GuardError:
    """The error for what turned out not to fit, and was taken back."""
    told = str(error).splitlines() or [type(error).__name__]
    return GuardError(
        what,
        seen=f"no memory left: {told[0]}",
        needed="memory for the change and for checking it",
        next_step="make a smaller change, or free memory first; everything is as it was",
    )


def _resident_peak() -> int | None:
    if not _STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_room(needs: Mapping[torch.device, int], what: str, limit: int | None) -> None:
    """Refuse what would not fit; nothing has been written.

    Args:
        needs: for each device, bytes on top of what is in use.
        what: what needs them, for the message.
        limit: the most that may be added, on all devices together; ``None`` for all that each
            device has.

    Raises:
        GuardError: it does not fit, with the figures.
    """
    where = " and ".join(map(str, needs))
    rooms = [(sum(needs.values()), limit, where, "allowed")]
    if limit is None:
        rooms = [(need, available(device), str(device), "free") for device, need in needs.items()]
    for needed, free, place, word in rooms:
        if free is not None and needed > free:
            raise GuardError(
                what,
                seen=f"{readable(needed)} needed on {place}",
                needed=f"at most the {readable(free)} that are {word} there",
                next_step="make a smaller change, a smaller batch, or free memory first",
            )


def readable(size: float) -> str:
    """A number of bytes for people.

    Example:
        >>> readable(1536)
        '1.5 KiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
