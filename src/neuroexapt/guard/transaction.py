"""The only room that writes on a model: apply a patch as a whole, or not at all."""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture.attributes import Attribute
from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import AxisMap, map_axes
from neuroexapt.edit import (
    Edit,
    Insertion,
    Patch,
    build,
    free_name,
    grafted_class,
    original_class,
    resized,
)
from neuroexapt.errors import GuardError
from neuroexapt.guard.config import Run, follow, owners
from neuroexapt.guard.hooked import drop_graphs
from neuroexapt.guard.ledger import (
    Ledger,
    add_child,
    check_swappable,
    set_attribute,
    set_class,
    swap,
)
from neuroexapt.guard.optimizer import adopt, check_optimizer, migrate
from neuroexapt.guard.recurrent import recurrent_owners, release, renew
from neuroexapt.guard.verify import behaviour, verify

# Kinds of module that hold flat or sharded copies of parameters, or compiled code for them.
_WRAPPERS = frozenset(
    {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "FSDPModule"}
)


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

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = inner_module(model)
        self.optimizer = optimizer
        self.ledger = Ledger()
        check_optimizer(self.model, optimizer)

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
            GuardError: a live graph or weak reference forbids it; taken back.
            VerifyError: it was made and failed its check; taken back.
        """
        started = time.perf_counter()
        _check_mode()
        kwargs = dict(kwargs or {})
        axes = axes or map_axes(self.model, args, kwargs)
        patch = edit.plan(axes, named_tensors(self.model))
        modes = tuple(trace.training for trace in axes.traces)
        before = behaviour(self.model, args, kwargs, modes)
        parameters = _count(self.model)
        configs = owners(self.model)
        mark = len(self.ledger)
        try:
            write(self.ledger, self.model, self.optimizer, patch)
            difference = verify(self.model, args, kwargs, before, patch.preserves)
            notes = follow(self.ledger, self.model, configs, Run(args, kwargs, modes))
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

    def stage(self, patch: Patch) -> None:
        """Write a patch without verifying it: for measuring inside a block that is taken back.

        Raises:
            GuardError: a live graph or weak reference forbids it; taken back.
        """
        mark = len(self.ledger)
        try:
            write(self.ledger, self.model, self.optimizer, patch)
        except BaseException:
            self.ledger.roll_back(to=mark)
            raise

    def commit(self) -> None:
        """Keep what was done; old tensors are released."""
        self.ledger.forget()

    def roll_back(self) -> None:
        """Take back every edit of this transaction, bit for bit."""
        self.ledger.roll_back()


def transaction(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Transaction:
    """A block in which edits are made together or not at all.

    Leaving the block by an exception (KeyboardInterrupt too) restores every bit: parameters,
    buffers, gradients, module tree, attributes, optimizer state and groups. The old tensors are
    kept by reference, so the extra memory is that of the tensors touched.

    Args:
        model: the model the user holds; it stays this object.
        optimizer: the optimizer that trains it; its state follows.

    Raises:
        GuardError: the model is wrapped for distributed training, or the optimizer is not its.

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
    return Transaction(model, optimizer)


def apply(
    model: nn.Module,
    edit: Edit,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Applied:
    """Make one edit: planned, written, verified, and taken back bit for bit if anything fails.

    The model, every surviving parameter and the optimizer stay the same objects, with the same
    names. New parameters join the optimizer group of their neighbour.

    Args:
        model: the model, unwrapped.
        edit: what to change.
        args: positional example input, real tensors; a batch of 2 or more.
        kwargs: keyword example input.
        optimizer: the optimizer that trains the model.

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
    with transaction(model, optimizer) as tx:
        return tx.apply(edit, args, kwargs)


def write(
    ledger: Ledger, model: nn.Module, optimizer: torch.optim.Optimizer | None, patch: Patch
) -> None:
    """Carry out a patch. The one place where parameters, modules and optimizers change."""
    named = named_tensors(model)
    touched = {name: named[name] for name in patch.tensors}
    recurrent = recurrent_owners(model, touched.values())
    release(ledger, recurrent)
    drop_graphs(ledger, model)
    check_swappable(touched)
    if optimizer is not None:
        _warn_unless_held(optimizer, touched)
    done: set[int] = set()
    for name in patch.tensors:
        if id(named[name]) not in done:  # a tied tensor goes by its first name
            done.add(id(named[name]))
            _write_tensor(ledger, optimizer, named[name], name, patch)
    for edit in patch.attributes:
        set_attribute(ledger, model, Attribute(edit.module, edit.name), edit.value)
    for insertion in patch.insertions:
        _insert(ledger, model, optimizer, insertion)
    renew(ledger, recurrent)


def _write_tensor(
    ledger: Ledger,
    optimizer: torch.optim.Optimizer | None,
    tensor: Tensor,
    name: str,
    patch: Patch,
) -> None:
    # A generator of its own keeps the user's random state as it is. Seeded by name and shape it
    # is the same on every rank, and another one when the same width grows again: units drawn
    # alike would get the same gradient for ever.
    seed = zlib.crc32(f"{name} {tuple(tensor.shape)}".encode())
    generator = torch.Generator().manual_seed(seed)
    data = resized(tensor, patch.steps, name, generator=generator)
    new: Tensor = data
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(data, requires_grad=tensor.requires_grad)
        if tensor.grad is not None:
            new.grad = resized(tensor.grad, patch.steps, name, generator=generator, fill="zero")
        if optimizer is not None:
            migrate(ledger, optimizer, tensor, patch.steps, name)
    swap(ledger, tensor, new, name)


def _warn_unless_held(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = [name for name, t in tensors.items() if t.requires_grad and id(t) not in held]
    if others:
        warnings.warn(
            f"{', '.join(others)}: resized and trainable, but not in the optimizer given; if "
            "another optimizer trains them, their state there no longer fits",
            stacklevel=2,
        )


def _insert(
    ledger: Ledger, model: nn.Module, optimizer: torch.optim.Optimizer | None, insertion: Insertion
) -> None:
    module = model.get_submodule(insertion.module)
    if "forward" in vars(module):
        raise GuardError(
            insertion.module,
            seen="a forward that was replaced on this instance",
            needed="a forward that belongs to the module's class",
            next_step="insert at a child of this module",
        )
    near = dict(model.named_parameters()).get(insertion.neighbour or "")
    branch = build(insertion.spec)
    if near is not None:
        branch = branch.to(device=near.device, dtype=near.dtype)
    branch.train(module.training)
    child = free_name(module, insertion.child)
    add_child(ledger, module, child, branch)
    set_class(ledger, module, grafted_class(original_class(module)))
    if optimizer is not None:
        prefix = f"{insertion.module}.{child}".lstrip(".")
        added = {f"{prefix}.{name}": p for name, p in branch.named_parameters()}
        adopt(ledger, optimizer, added, near)


def inner_module(model: nn.Module) -> nn.Module:
    """The module to edit: the one inside a compiled wrapper; other wrappers are refused.

    Raises:
        GuardError: the model, or a part of it, is wrapped for several devices or scripted.
    """
    for path, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & _WRAPPERS or isinstance(module, torch.jit.ScriptModule):
            raise GuardError(
                path or type(module).__name__,
                seen=f"a wrapped or scripted model ({type(module).__name__})",
                needed="the module itself",
                next_step="edit the inner module (model.module) on every rank, then wrap it again",
            )
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _check_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise GuardError(
            "apply",
            seen="inference mode",
            needed="ordinary tensors: those made in inference mode can never be trained",
            next_step="leave torch.inference_mode() first; torch.no_grad() is fine",
        )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
