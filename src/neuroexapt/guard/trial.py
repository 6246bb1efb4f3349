"""A trial: an edit that can still be taken back after training has gone on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture.interrupts import held_back
from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import AxisMap
from neuroexapt.edit import Edit
from neuroexapt.errors import GuardError
from neuroexapt.guard.by_name import Held, each, held_by
from neuroexapt.guard.contents import Contents, contents
from neuroexapt.guard.ledger import Ledger
from neuroexapt.guard.seeding import SecondMoments
from neuroexapt.guard.several import Optimizers
from neuroexapt.guard.statistics import LossFn
from neuroexapt.guard.storing import Place, stored
from neuroexapt.guard.transaction import Applied, Transaction


class Trial:
    """Make an edit, train on, then :meth:`keep` it or :meth:`roll_back` to the moment before.

    Rolling back restores every parameter, buffer and optimizer state bit for bit, with the
    structure, also when it is interrupted. Learning-rate schedules go on. What the edit resizes
    is kept as it was by the edit itself; a snapshot holds the rest.

    Args:
        model: the model the user holds.
        optimizer: the optimizer that trains it, or several.
        copies: moving averages, teachers and the like, which follow each edit.
        memory: bytes an edit may add; see :func:`transaction`.
        second_moments: of new entries in the optimizer; see :func:`transaction`.
        place: where the snapshot waits: ``"device"``, ``"cpu"``, a directory, or ``"auto"``
            (beside the model unless its device is tight).
        limit: the most bytes the snapshot may take.

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

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        *,
        copies: Iterable[nn.Module] = (),
        memory: int | None = None,
        second_moments: SecondMoments = "siblings",
        place: Place = "auto",
        limit: int | None = None,
    ) -> None:
        self._transaction = Transaction(
            model, optimizer, copies=copies, memory=memory, second_moments=second_moments
        )
        self._before: _Moment | None = None
        self._place, self._limit = place, limit

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
        """Make the edit and take the snapshot; see :meth:`Transaction.apply` for what it raises.

        Raises:
            GuardError: besides, the snapshot exceeds its limit; the edit is taken back.
        """
        # Held back: an edit without its snapshot could not be taken back after training.
        with held_back(), self._remembering():
            return self._transaction.apply(edit, args, kwargs, axes=axes)

    def again(self, write: Callable[[Ledger], object]) -> None:
        """Begin as a trial that a checkpoint interrupted, with writes instead of an edit.

        Args:
            write: makes the edit's structure again, on the ledger it is given.
        """
        with held_back(), self._remembering():
            mark = len(self._transaction.ledger)
            try:
                write(self._transaction.ledger)
            except BaseException:
                self._transaction.ledger.roll_back(to=mark)
                raise

    def before(self) -> Before | None:
        """What a roll back would restore, by reference; None without an edit on trial."""
        shadows = self._transaction.ledger.shadows
        return None if self._before is None else self._before.contents(shadows)

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        """A block with an edit; in front of the first one the moment before is kept."""
        before = None if len(self._transaction.ledger) else _Moment(self._transaction)
        yield
        if before is not None:
            self._keep_the_rest(before)
            self._before = before

    def reestimate(self, loss_fn: LossFn, batches: Iterable[Any]) -> tuple[str, ...]:
        """Measure batch norm statistics anew, to be taken back with the trial.

        See :func:`neuroexapt.guard.reestimate`.

        Raises:
            GuardError: no edit is on trial.
        """
        if not len(self._transaction.ledger):
            raise GuardError(
                "reestimate",
                seen="a trial without an edit",
                needed="an edit on trial, to be taken back with it",
                next_step="apply the edit first, or call neuroexapt.guard.reestimate",
            )
        return self._transaction.reestimate(loss_fn, batches)

    def keep(self) -> None:
        """End the trial with the edit; the snapshot and the old tensors are released."""
        self._before = None
        self._transaction.commit()

    def roll_back(self) -> None:
        """End the trial without the edit: everything is as it was when it began.

        Gradients are dropped, being those of a model that no longer exists. Without an edit
        there is nothing to do.
        """
        self._before = None
        self._transaction.roll_back()

    def _keep_the_rest(self, before: _Moment) -> None:
        """Note the way back of what the edit did not touch, to be walked after the edit's own."""
        try:
            restore = before.way_back(self._place, self._limit)
        except BaseException:
            self._transaction.roll_back()
            raise
        self._transaction.ledger.note_first(restore)


@dataclass(frozen=True)
class Before:
    """A run as it was before a trial, by reference.

    Attributes:
        models: the model and its copies.
        optimizers: what trains the model.
        objects: the model's tensors by name, as the optimizers know them: the objects, whatever
            they hold now.
    """

    models: tuple[Contents, ...]
    optimizers: tuple[Held, ...]
    objects: Mapping[str, Tensor]


class _Moment:
    """Everything that training may change, as it was before an edit."""

    def __init__(self, transaction: Transaction) -> None:
        self._models = (transaction.model, *transaction.given)
        self._optimizer = transaction.optimizer
        tensors = {id(t): t for model in self._models for t in named_tensors(model).values()}
        self._tensors = [(tensor, _memory(tensor)) for tensor in tensors.values()]
        # A forward may put another tensor in a buffer's place.
        self._buffers = [
            (module, name, buffer)
            for model in self._models
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self._state: dict[Tensor, dict[str, Any]] = {}
        if self._optimizer is not None:
            self._state.update(self._optimizer.state)
        self._contents = [contents(model) for model in self._models]
        self._held = [held_by(optimizer) for optimizer in each(self._optimizer)]
        self._kept: dict[int, Tensor] = {}
        self._kept_states: dict[Tensor, dict[str, tuple[Any, Tensor | None]]] = {}

    def contents(self, shadows: Mapping[int, Tensor]) -> Before:
        """Everything as it was: in copies, in what an edit put aside, or untouched."""
        old = {**shadows, **self._kept}
        models = [
            replace(one, tensors={n: old.get(id(t), t) for n, t in one.tensors.items()})
            for one in self._contents
        ]
        held = [
            replace(one, state={p: self._old_state(p, s) for p, s in one.state.items()})
            for one in self._held
        ]
        return Before(tuple(models), tuple(held), self._contents[0].tensors)

    def _old_state(self, parameter: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        kept = self._kept_states.get(parameter)
        if kept is None:
            return state
        return {key: value if old is None else old for key, (value, old) in kept.items()}

    def way_back(self, place: Place, limit: int | None) -> partial[None]:
        """Copies of what the edit left as it was, and how to put them back.

        What it resized waits, as it was, in the edit's own way back, and nobody trains it.
        """
        same = [tensor for tensor, memory in self._tensors if _memory(tensor) == memory]
        now: Mapping[Tensor, Any] = self._optimizer.state if self._optimizer is not None else {}
        states = {p: state for p, state in self._state.items() if now.get(p) is state}
        inside = [value for state in states.values() for value in state.values()]
        held = [value for value in inside if isinstance(value, Tensor)]
        copies = stored([*same, *held], place, limit)
        old = dict(zip(map(id, held), copies[len(same) :], strict=True))
        kept = {
            p: {k: (v, old.get(id(v))) for k, v in state.items()} for p, state in states.items()
        }
        self._kept = dict(zip(map(id, same), copies, strict=False))
        self._kept_states = kept
        return partial(self._put_back, list(zip(same, copies, strict=False)), kept)

    def _put_back(
        self,
        tensors: list[tuple[Tensor, Tensor]],
        kept: Mapping[Tensor, Mapping[str, tuple[Any, Tensor | None]]],
    ) -> None:
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        with torch.no_grad():
            for tensor, old in tensors:
                tensor.copy_(old)
        if self._optimizer is not None:
            state = self._optimizer.state
            original = {p: _refilled(s, kept.get(p)) for p, s in self._state.items()}
            state.clear()
            state.update(original)
            self._optimizer.zero_grad(set_to_none=True)
        for model in self._models:
            model.zero_grad(set_to_none=True)


def _refilled(
    state: dict[str, Any], kept: Mapping[str, tuple[Any, Tensor | None]] | None
) -> dict[str, Any]:
    """The very state of that moment, its tensors filled with what they held then."""
    if kept is None:
        return state
    state.clear()
    with torch.no_grad():
        for key, (value, old) in kept.items():
            state[key] = value if old is None else value.copy_(old)
    return state


def _memory(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.untyped_storage()._cdata, tuple(tensor.shape)
