"""The only room that writes on a model: apply a patch as a whole, or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture import Trace
from neuroexapt.capture.interrupts import breathe, held_back
from neuroexapt.capture.run import named_tensors
from neuroexapt.capture.trace import same_computation
from neuroexapt.couple import AxisMap, map_axes
from neuroexapt.edit import Edit, Patch
from neuroexapt.guard.config import Run, follow, owners
from neuroexapt.guard.copies import inner_copies
from neuroexapt.guard.holders import check_checkpoints
from neuroexapt.guard.ledger import Ledger
from neuroexapt.guard.lineage import remember
from neuroexapt.guard.memory import (
    activation_bytes,
    check_room,
    device_of,
    forecast,
    out_of_memory,
    ran_out,
    release_cached,
)
from neuroexapt.guard.optimizer import check_optimizer
from neuroexapt.guard.seeding import SecondMoments, check_policy, new_entries, seed_moments
from neuroexapt.guard.several import Optimizers, as_one
from neuroexapt.guard.statistics import LossFn, renew_statistics
from neuroexapt.guard.verify import behaviour, verify
from neuroexapt.guard.wrapped import check_mode, inner_module, is_compiled
from neuroexapt.guard.writing import write


@dataclass(frozen=True)
class Applied:
    """What an edit did.

    Attributes:
        edit: the edit.
        description: one sentence.
        parameters_before: number of parameters before it.
        parameters_after: number of parameters after it.
        max_difference: largest absolute difference of any output on the example input, in
            evaluation and training mode.
        seconds: time for planning, writing and verifying.
        notes: what the edit could not bring in step, such as a config.
    """

    edit: Edit
    description: str
    parameters_before: int
    parameters_after: int
    max_difference: float
    seconds: float
    notes: tuple[str, ...] = ()


class Transaction:
    """A block in which edits are made; see :func:`transaction`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers = None,
        *,
        copies: Iterable[nn.Module] = (),
        memory: int | None = None,
        second_moments: SecondMoments = "siblings",
    ) -> None:
        check_policy(second_moments)
        self.model = inner_module(model)
        self._compiled = is_compiled(model)
        self.given = tuple(copies)
        self.copies = inner_copies(self.model, self.given)
        self.optimizer = as_one(optimizer)
        self.memory = memory
        self.second_moments = second_moments
        self.ledger = Ledger()
        check_optimizer(self.model, self.optimizer)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.roll_back()

    def apply(
        self,
        edit: Edit,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        axes: AxisMap | None = None,
    ) -> Applied:
        """Plan, write and verify one edit; an error takes back this edit alone and is raised.

        Args:
            edit: what to change.
            args: positional example input, real tensors.
            kwargs: keyword example input.
            axes: the model's present map, if the caller has it already.

        Raises:
            EditError, CaptureError: it cannot be made; nothing was written.
            GuardError: a live graph or weak reference forbids it, or there is not the memory for
                it, beforehand or when it came to it; taken back.
            VerifyError: it was made and failed its check; taken back.
        """
        with held_back():
            try:
                return self._apply(edit, args, dict(kwargs or {}), axes)
            except (RuntimeError, MemoryError) as error:
                release_cached()
                if ran_out(error):
                    raise out_of_memory(f"{type(edit).__name__}({edit.place!r})", error) from error
                raise

    def _apply(
        self, edit: Edit, args: tuple[Any, ...], kwargs: dict[str, Any], axes: AxisMap | None
    ) -> Applied:
        started = time.perf_counter()
        check_mode()
        check_checkpoints()
        axes = axes or map_axes(self.model, args, kwargs)
        patch = edit.plan(axes, named_tensors(self.model))
        needs = self._check_memory(patch, edit)
        modes = tuple(trace.training for trace in axes.traces)
        once = same_computation(axes.traces)
        before = behaviour(self.model, args, kwargs, modes, once=once)
        parameters = _count(self.model)
        configs = owners(self.model)
        breathe()
        new = {} if self.second_moments == "siblings" else new_entries(self.model, patch)
        mark = len(self.ledger)
        try:
            write(self.ledger, self.model, self.optimizer, patch)
            changes = self.ledger.changes(since=mark)
            breathe()
            check = partial(self._check_activations, axes.traces, edit, needs)
            difference = verify(self.model, args, kwargs, before, patch, check)
            breathe()
            self._seed(new)
            for copy in self.copies:
                self._write_remembered(copy, None, _for_copy(edit, axes, patch, copy))
            behind = len(self.ledger)
            notes = follow(self.ledger, self.model, configs, Run(args, kwargs, modes))
            changes += self.ledger.changes(since=behind)
            remember(self.ledger, self.model, patch, changes)
        except BaseException:
            self.ledger.roll_back(to=mark)
            raise
        return Applied(
            edit,
            patch.description,
            parameters,
            _count(self.model),
            difference,
            time.perf_counter() - started,
            notes,
        )

    def _seed(self, new: Mapping[str, Tensor]) -> None:
        """What is measured of new entries sets their second moments, if the user wants it so."""
        if self.second_moments != "siblings" and self.optimizer is not None and new:
            breathe()
            squares = self.second_moments(self.model)
            seed_moments(self.ledger, self.optimizer, self.model, new, squares)

    def _check_memory(self, patch: Patch, edit: Edit) -> dict[torch.device, int]:
        """What the edit will add on each device, which must have it."""
        optimizers = [] if self.optimizer is None else [self.optimizer]
        needs = {device_of(self.model): forecast(patch, self.model, optimizers).peak}
        for copy in self.copies:
            device = device_of(copy)
            needs[device] = needs.get(device, 0) + forecast(patch, copy).peak
        check_room(needs, f"{type(edit).__name__}({edit.place!r})", self.memory)
        return needs

    def _check_activations(
        self,
        before: Sequence[Trace],
        edit: Edit,
        needs: Mapping[torch.device, int],
        after: Sequence[Trace],
    ) -> None:
        """What a step on the example keeps for its backward, beyond what it kept before.

        What the edit itself needs is taken from a device by now, but not from a limit.
        """
        more = max(map(activation_bytes, after)) - max(map(activation_bytes, before))
        device = device_of(self.model)
        added = {device: more} if self.memory is None else {**needs, device: needs[device] + more}
        what = f"activations of a step after {type(edit).__name__}({edit.place!r})"
        check_room(added, what, self.memory)

    def stage(self, patch: Patch) -> None:
        """Write a patch without verifying it: for measuring inside a block that is taken back.

        Raises:
            GuardError: a live graph or weak reference forbids it; taken back.
        """
        mark = len(self.ledger)
        try:
            self._write_remembered(self.model, self.optimizer, patch)
        except BaseException:
            self.ledger.roll_back(to=mark)
            raise

    def _write_remembered(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, patch: Patch
    ) -> None:
        mark = len(self.ledger)
        write(self.ledger, model, optimizer, patch)
        remember(self.ledger, model, patch, self.ledger.changes(since=mark))

    def reestimate(self, loss_fn: LossFn, batches: Iterable[Any]) -> tuple[str, ...]:
        """Measure batch norm statistics anew, as a part of this transaction.

        See :func:`neuroexapt.guard.reestimate`; an error takes back this alone and is raised.
        """
        mark = len(self.ledger)
        try:
            return renew_statistics(self.ledger, self.model, loss_fn, batches)
        except BaseException:
            self.ledger.roll_back(to=mark)
            raise

    def commit(self) -> None:
        """Keep what was done; old tensors are released, and the accelerator's cache of them.

        A compiled model is compiled anew at its next call.
        """
        if len(self.ledger) and self._compiled:
            # Each edit is one more shape: behind the eighth torch would silently run it uncompiled.
            torch.compiler.reset()
        if len(self.ledger):
            self.ledger.forget()
            release_cached()

    def roll_back(self) -> None:
        """Take back every edit of this transaction, bit for bit."""
        if len(self.ledger):
            self.ledger.roll_back()
            release_cached()


def _for_copy(edit: Edit, axes: AxisMap, patch: Patch, copy: nn.Module) -> Patch:
    """The patch for a copy of the model: new values are computed from the copy's own weights."""
    patch = replace(patch, decays=())  # no optimizer trains a copy: nothing decays its weights
    if not patch.rewrites:
        return patch
    own = edit.plan(axes, named_tensors(copy))
    same = (own.steps, own.refolds, own.removals) == (patch.steps, patch.refolds, patch.removals)
    return replace(patch, rewrites=own.rewrites) if same else patch


def transaction(
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    copies: Iterable[nn.Module] = (),
    memory: int | None = None,
    second_moments: SecondMoments = "siblings",
) -> Transaction:
    """A block in which edits are made together or not at all.

    Leaving the block by an exception (KeyboardInterrupt too) restores every bit: parameters,
    buffers, gradients, module tree, attributes, optimizer state and groups. The old tensors are
    kept by reference, so the extra memory is that of the tensors touched.

    Args:
        model: the model the user holds; it stays this object.
        optimizer: the optimizer that trains it, or several; their state follows.
        copies: moving averages (``AveragedModel``), teachers, the best so far: each follows every
            edit by name, on its own weights.
        memory: bytes that an edit may add to the weights (of copies too), the optimizer and, on
            top, the activations of a step; by default what each device has free.
        second_moments: where the optimizer's second moments of new entries start:
            ``"siblings"``, the mean of their siblings', or measured, by
            ``neuroexapt.measure.Probe(loss_fn, batches)``.

    Raises:
        GuardError: the model is wrapped for distributed training, the optimizer is not its, or a
            copy has other parameters.

    Example:
        >>> from neuroexapt import Widen, transaction
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> try:
        ...     with transaction(net) as tx:
        ...         done = tx.apply(Widen("0", to=12), (torch.randn(5, 4),))
        ...         raise ValueError("changed my mind")
        ... except ValueError:
        ...     print(net[0].out_features)
        8
    """
    return Transaction(
        model, optimizer, copies=copies, memory=memory, second_moments=second_moments
    )


def apply(
    model: nn.Module,
    edit: Edit,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer: Optimizers = None,
    copies: Iterable[nn.Module] = (),
    second_moments: SecondMoments = "siblings",
) -> Applied:
    """Make one edit: planned, written, verified, and taken back bit for bit if anything fails.

    The model, every surviving parameter and the optimizer stay the same objects, with the same
    names. New parameters join the optimizer group of their neighbour.

    Args:
        model: the model, unwrapped.
        edit: what to change.
        args: positional example input, real tensors; a batch of 2 or more.
        kwargs: keyword example input.
        optimizer: the optimizer that trains the model, or several.
        copies: moving averages and the like, which follow; see :func:`transaction`.
        second_moments: of new entries in the optimizer; see :func:`transaction`.

    Raises:
        NeuroExaptError: the edit was not made; the subclass says why. The model is untouched.

    Example:
        >>> from neuroexapt import Widen, apply
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> done = apply(net, Widen("0", by=0.5), (torch.randn(5, 4),), optimizer=optimizer)
        >>> done.parameters_before, done.parameters_after
        (58, 86)
    """
    with transaction(model, optimizer, copies=copies, second_moments=second_moments) as tx:
        return tx.apply(edit, args, kwargs)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
