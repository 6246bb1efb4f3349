"""Example inputs for the plain models: small, seeded, made anew at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Spec = Callable[[torch.Generator], Tensor]
Inputs = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def normal(*shape: int) -> Spec:
    """Normal noise."""
    return lambda generator: torch.randn(shape, generator=generator)


def uniform(*shape: int) -> Spec:
    """Numbers between 0 and 1."""
    return lambda generator: torch.rand(shape, generator=generator)


def integers(high: int, *shape: int) -> Spec:
    """Whole numbers from 0 to high - 1."""
    return lambda generator: torch.randint(0, high, shape, generator=generator)


def constant(value: Any) -> Spec:
    """A tensor of these values."""
    return lambda generator: torch.tensor(value)


def given(*args: Any, **kwargs: Any) -> Inputs:
    """Positional and keyword inputs; specs inside dicts, lists and tuples are drawn too."""

    def inputs() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(1234)
        return _draw(args, generator), _draw(kwargs, generator)

    return inputs


def _draw(spec: Any, generator: torch.Generator) -> Any:
    if isinstance(spec, dict):
        return {key: _draw(value, generator) for key, value in spec.items()}
    if isinstance(spec, list | tuple):
        return type(spec)(_draw(value, generator) for value in spec)
    return spec(generator) if callable(spec) else spec
