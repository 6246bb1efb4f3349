"""Several optimizers of one model (Muon for matrices, AdamW for the rest, say) seen as one."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuroexapt.errors import GuardError

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


class Several(torch.optim.Optimizer):
    """The groups and the state of several optimizers; each keeps its own.

    Args:
        optimizers: which of them trains a parameter is told by their groups.

    Raises:
        GuardError: two of them train the same parameter.

    Example:
        >>> a, b = (torch.zeros(2, requires_grad=True) for _ in "ab")
        >>> both = Several([torch.optim.SGD([a]), torch.optim.Adam([b])])
        >>> both.state[b] = {"step": 1}
        >>> len(both.param_groups), both.optimizers[1].state[b]
        (2, {'step': 1})
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        # Not the base class's: this one has no groups of its own.
        self.optimizers = tuple(optimizers)
        held = [id(p) for group in self.param_groups for p in group["params"]]
        if len(held) > len(set(held)):
            raise GuardError(
                " and ".join(type(optimizer).__name__ for optimizer in optimizers),
                seen=f"{len(held) - len(set(held))} parameters that two of them train",
                needed="one optimizer for each parameter",
                next_step="give each parameter to one of them",
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all of them: the very dictionaries."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        """The state of all of them; what is set goes to the one that trains the parameter."""
        return _States(self.optimizers)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all of them."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def __repr__(self) -> str:
        return f"Several({', '.join(type(o).__name__ for o in self.optimizers)})"


class _States(MutableMapping[Tensor, Any]):
    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    def __getitem__(self, parameter: Tensor) -> Any:
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                return optimizer.state[parameter]
        raise KeyError(parameter)

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        holder_of(self._optimizers, parameter).state[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                del optimizer.state[parameter]
                return
        raise KeyError(parameter)

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in optimizer.state for optimizer in self._optimizers)

    def __iter__(self) -> Iterator[Tensor]:
        for optimizer in self._optimizers:
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


def holder_of(
    optimizers: Sequence[torch.optim.Optimizer], parameter: Tensor
) -> torch.optim.Optimizer:
    """The one that trains a parameter; the last one if none does."""
    for optimizer in optimizers:
        if any(held is parameter for group in optimizer.param_groups for held in group["params"]):
            return optimizer
    return optimizers[-1]


def as_one(optimizers: Optimizers) -> torch.optim.Optimizer | None:
    """One optimizer, whatever was given.

    Raises:
        GuardError: something in a list is no optimizer.
    """
    if not isinstance(optimizers, Sequence):
        return optimizers
    for number, optimizer in enumerate(optimizers):
        if not isinstance(getattr(optimizer, "param_groups", None), list):
            raise GuardError(
                f"optimizer[{number}]",
                seen=f"a {type(optimizer).__name__}",
                needed="a torch.optim.Optimizer",
                next_step="pass the optimizer that trains the model, or a list of such",
            )
    if len(optimizers) < 2:
        return optimizers[0] if optimizers else None
    return Several(optimizers)
