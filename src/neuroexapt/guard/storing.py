"""Where the tensors of a snapshot wait: beside the model, in main memory, or in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from neuroexapt.errors import GuardError
from neuroexapt.guard.memory import available, readable

Place = Literal["auto", "device", "cpu"] | os.PathLike[str]


def stored(tensors: Iterable[Tensor], place: Place, limit: int | None) -> list[Tensor]:
    """A copy of every tensor, equal to the last bit.

    Args:
        tensors: what to copy.
        place: ``"device"`` (beside the original), ``"cpu"``, a directory (memory-mapped files,
            which vanish with the copies), or ``"auto"``: beside the original unless that would
            take more than half of what its device has free.
        limit: the most bytes that may be stored.

    Raises:
        GuardError: they exceed the limit; the figures are given.
    """
    tensors = list(tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if limit is not None and size > limit:
        raise GuardError(
            "the snapshot of a trial",
            seen=f"{readable(size)}",
            needed=f"at most {readable(limit)}",
            next_step="raise the limit, or keep the edit without a trial",
        )
    if place == "auto":
        place = "cpu" if _tight(tensors, size) else "device"
    return [_copied(tensor, place) for tensor in tensors]


def _tight(tensors: list[Tensor], size: int) -> bool:
    devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
    free = [available(device) for device in devices]
    return any(room is not None and 2 * size > room for room in free)


def _copied(tensor: Tensor, place: Place) -> Tensor:
    data = tensor.detach()
    if place == "device" or not data.numel():
        return data.clone()
    if isinstance(place, str):
        return data.to("cpu", copy=True)
    return _in_file(data, Path(place))


def _in_file(data: Tensor, folder: Path) -> Tensor:
    """A copy in a mapped file that has no name any more: it is freed with the tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix="neuroexapt-")
    os.close(handle)
    try:
        flat = torch.from_file(name, shared=True, size=data.numel(), dtype=data.dtype)
    finally:
        os.unlink(name)
    return flat.view(data.shape).copy_(data)
