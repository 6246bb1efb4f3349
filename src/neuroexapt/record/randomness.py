"""The random states of a process: Python, NumPy, torch, and every accelerator."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuroexapt.errors import CheckpointError


def random_states() -> dict[str, Any]:
    """The states of all global generators, as plain values and tensors."""
    version, words, gauss = random.getstate()
    name, keys, at, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), at, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        module: Any = torch.get_device_module(accelerator)
        states["accelerator"] = [
            module.get_rng_state(number).cpu() for number in range(torch.accelerator.device_count())
        ]
    return states


def set_random_states(states: Any, place: str) -> None:
    """Put the states back; those of accelerators where this machine has as many.

    Raises:
        CheckpointError: they are no states.
    """
    try:
        version, words, gauss = states["python"]
        name, keys, at, has_gauss, cached = states["numpy"]
        python = version, tuple(words.tolist()), gauss
        numpy = name, keys.numpy().astype(np.uint32), at, has_gauss, cached
        _try(python, numpy, states["torch"])
    except Exception as error:  # each generator has errors of its own
        raise CheckpointError(
            place,
            seen=f"{type(error).__name__}: {str(error)[:200]}",
            needed="states of random generators",
            next_step="the file is damaged or foreign: load another checkpoint",
        ) from error
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(states["torch"])
    accelerator = torch.accelerator.current_accelerator()
    held = states.get("accelerator", [])
    if accelerator is not None and len(held) == torch.accelerator.device_count():
        module: Any = torch.get_device_module(accelerator)
        for number, state in enumerate(held):
            module.set_rng_state(state, number)


def _try(python: Any, numpy: Any, state: Tensor) -> None:
    """Set them in generators of our own first, so that bad ones change nothing."""
    random.Random().setstate(python)
    np.random.RandomState().set_state(numpy)
    torch.Generator().set_state(state)
