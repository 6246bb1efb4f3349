"""A trial: an edit that can still be taken back after training has gone on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import AxisMap
from neuroexapt.edit import Edit
from neuroexapt.guard.transaction import Applied, Transaction


class Trial:
    """Make an edit, train on, then :meth:`keep` it or :meth:`roll_back` to the moment before.

    The snapshot holds every parameter, buffer and optimizer state; rolling back restores them
    bit for bit, with the structure. Learning-rate schedules go on.

    Args:
        model: the model the user holds.
        optimizer: the optimizer that trains it.

    Example:
        >>> from neuroexapt import Widen
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> trial = Trial(net, optimizer)
        >>> done = trial.apply(Widen("0", to=5), (torch.ones(4, 2),))
        >>> net(torch.ones(4, 2)).sum().backward(); optimizer.step()
        >>> trial.roll_back(); net[0].weight.shape
        torch.Size([3, 2])
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._transaction = Transaction(model, optimizer)
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._buffers: list[tuple[nn.Module, str, Tensor | None]] = []
        self._state: dict[Tensor, dict[str, Any]] = {}

    @property
    def model(self) -> nn.Module:
        """The module that is edited."""
        return self._transaction.model

    def apply(
        self,
        edit: Edit,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        axes: AxisMap | None = None,
    ) -> Applied:
        """Snapshot, then make the edit; see :meth:`Transaction.apply` for what it raises."""
        if len(self._transaction.ledger):
            return self._transaction.apply(edit, args, kwargs, axes=axes)
        self._snapshot()
        try:
            return self._transaction.apply(edit, args, kwargs, axes=axes)
        except BaseException:
            self._forget()  # no edit, no trial: there is nothing to go back to
            raise

    def keep(self) -> None:
        """End the trial with the edit; the snapshot and the old tensors are released."""
        self._transaction.commit()
        self._forget()

    def roll_back(self) -> None:
        """End the trial without the edit: everything is as it was when it began.

        Gradients are dropped, being those of a model that no longer exists. Without an edit
        there is nothing to do.
        """
        if not len(self._transaction.ledger):
            return
        self._transaction.roll_back()
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        with torch.no_grad():
            for tensor, old in self._tensors:
                tensor.copy_(old)
        optimizer = self._transaction.optimizer
        if optimizer is not None:
            optimizer.state.clear()
            optimizer.state.update(self._state)
            optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        self._forget()

    def _snapshot(self) -> None:
        tensors = {id(t): t for t in named_tensors(self.model).values()}
        self._tensors = [(t, t.detach().clone()) for t in tensors.values()]
        # A forward may put another tensor in a buffer's place.
        self._buffers = [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
        ]
        optimizer = self._transaction.optimizer
        if optimizer is not None:
            self._state = {p: _copied(state) for p, state in optimizer.state.items()}

    def _forget(self) -> None:
        self._tensors, self._buffers, self._state = [], [], {}


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
