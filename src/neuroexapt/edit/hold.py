"""The two ends of a skip over several modules: one keeps its input, another adds a branch of it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.edit.branches import Spec
from neuroexapt.edit.graft import HOLD


class Hold(nn.Module):
    """Keeps a tensor from where a skip begins to where it ends, and no longer.

    Invariant: after a forward that ran both ends nothing is kept alive.

    Example:
        >>> import torch
        >>> hold = Hold()
        >>> x = hold(torch.ones(2)); hold.take() is x, hold.held
        (True, [])
    """

    def __init__(self) -> None:
        super().__init__()
        # In a list: a parameter set as an attribute would become one of this module's.
        self.held: list[Tensor] = []
        self.seen: weakref.ref[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Keep the input; it passes unchanged."""
        self.held = [x]
        if not torch.compiler.is_compiling():
            if _in_backward():
                # A checkpointed part runs again, perhaps without the end of the skip.
                torch.autograd.Variable._execution_engine.queue_callback(self.drop)
            elif not isinstance(x, nn.Parameter):  # which must stay free of weak references
                self.seen = weakref.ref(x)
        return x

    def take(self) -> Tensor:
        """The tensor kept, once.

        Raises:
            RuntimeError: the end of the skip ran without its beginning.
        """
        if self.held:
            (x,) = self.held
            self.held = []
            return x
        if not torch.compiler.is_compiling() and _in_backward() and self.seen is not None:
            # The end runs again in a checkpoint of its own: the checkpoint of the beginning still
            # keeps that one's input. (A reentrant one would walk its graph twice: torch refuses.)
            again = self.seen()
            if again is not None:
                return again
        raise RuntimeError(
            "the end of a residual connection (nx_join) ran without its beginning (nx_hold): call "
            "the modules from one to the other in one forward"
        )

    def drop(self) -> None:
        """Keep nothing."""
        self.held = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": [], "seen": None}


class Join(nn.Module):
    """A branch of the tensor that a :class:`Hold` keeps.

    Args:
        hold: where the skip begins.
        branch: what the tensor goes through.
    """

    def __init__(self, hold: Hold, branch: nn.Module) -> None:
        super().__init__()
        self.hold = hold
        self.branch = branch

    def forward(self) -> Tensor:
        """The branch's output, to be added."""
        return torch.as_tensor(self.branch(self.hold.take()))


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


@dataclass(frozen=True)
class HoldSpec(Spec):
    """The beginning of a skip."""

    def make(self, model: nn.Module) -> nn.Module:
        """A module that returns its input."""
        return Hold()


@dataclass(frozen=True, kw_only=True)
class JoinSpec(Spec):
    """The end of a skip.

    Attributes:
        first: path of the module at which it begins, whose last hold it takes from.
        branch: what is added.
    """

    first: str
    branch: Spec

    def make(self, model: nn.Module) -> nn.Module:
        """A module without inputs."""
        children = model.get_submodule(self.first)._modules
        holds = [child for name, child in children.items() if name.startswith(HOLD)]
        # It may be made for its size alone, before the beginning is there.
        hold = holds[-1] if holds else Hold()
        assert isinstance(hold, Hold)
        return Join(hold, self.branch.make(model))
