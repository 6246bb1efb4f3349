"""Carry out a patch: the one place where parameters, modules and optimizers change."""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from neuroexapt.capture.attributes import Attribute
from neuroexapt.capture.masks import mask_of, masks_among
from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import (
    Insertion,
    Patch,
    Refold,
    Removal,
    Rewrite,
    build,
    fitting_class,
    folded,
    free_name,
    is_branch,
    resized,
)
from neuroexapt.errors import GuardError
from neuroexapt.guard.caches import drop_caches
from neuroexapt.guard.decay import set_decay
from neuroexapt.guard.holders import check_swappable
from neuroexapt.guard.hooked import drop_graphs
from neuroexapt.guard.ledger import (
    Ledger,
    add_child,
    drop_item,
    put_item,
    set_attribute,
    set_class,
    swap,
)
from neuroexapt.guard.masking import held_mask, set_mask
from neuroexapt.guard.numbered import renumber
from neuroexapt.guard.optimizer import abandon, adopt, convert, migrate, reset
from neuroexapt.guard.recurrent import recurrent_owners, release, renew
from neuroexapt.guard.skips import settle_skips
from neuroexapt.guard.values import alike, set_values

Optimizer = torch.optim.Optimizer | None


def write(ledger: Ledger, model: nn.Module, optimizer: Optimizer, patch: Patch) -> None:
    """Carry out a patch, in the order of its attributes.

    Raises:
        GuardError: a live graph or weak reference forbids it; the caller takes back the rest.
        EditError: a removal that a cache could not follow; likewise.
    """
    named = named_tensors(model)
    touched = {name: named[name] for name in _touched(patch) if name in named}
    recurrent = recurrent_owners(model, touched.values())
    release(ledger, recurrent)
    drop_graphs(ledger, model)
    check_swappable(touched)
    _resize(ledger, model, optimizer, patch)
    for refold in patch.refolds:
        _refold(ledger, model, optimizer, refold)
    for edit in patch.attributes:
        set_attribute(ledger, model, Attribute(edit.module, edit.name), edit.value)
    for removal in patch.removals:
        _remove(ledger, model, optimizer, removal)
    for insertion in patch.insertions:
        _insert(ledger, model, optimizer, insertion)
    for masking in patch.maskings:
        set_mask(ledger, model, optimizer, masking)
    _rewrite_all(ledger, model, optimizer, patch.rewrites)
    renew(ledger, recurrent)
    for decay in patch.decays:
        set_decay(ledger, model, optimizer, decay)


def _touched(patch: Patch) -> Iterator[str]:
    """The names of all tensors that get another content."""
    yield from patch.tensors
    yield from (refold.tensor for refold in patch.refolds)
    for masking in patch.maskings:
        yield masking.tensor
        yield mask_of(masking.tensor)
    yield from (rewrite.tensor for rewrite in patch.rewrites)


def _resize(ledger: Ledger, model: nn.Module, optimizer: Optimizer, patch: Patch) -> None:
    named = named_tensors(model)
    touched = {name: named[name] for name in patch.tensors}
    if optimizer is not None:
        _warn_unless_held(optimizer, touched)
    done, masks = set[int](), masks_among(named)
    for name in patch.tensors:
        if id(named[name]) not in done:  # a tied tensor goes by its first name
            done.add(id(named[name]))
            # Whatever an edit says of a mask: an entry shut out from birth would never learn.
            fill = "one" if name in masks else None
            _resize_tensor(ledger, optimizer, (name, named[name]), patch, fill)
    if touched:
        drop_caches(ledger, model)


def _resize_tensor(
    ledger: Ledger,
    optimizer: Optimizer,
    item: tuple[str, Tensor],
    patch: Patch,
    fill: str | None,
) -> None:
    name, tensor = item
    # A generator of its own keeps the user's random state as it is. Seeded by name and shape it
    # is the same on every rank, and another one when the same width grows again: units drawn
    # alike would get the same gradient for ever.
    seed = zlib.crc32(f"{name} {tuple(tensor.shape)}".encode())
    generator = torch.Generator().manual_seed(seed)
    new = alike(tensor, resized(tensor, patch.steps, name, generator=generator, fill=fill))
    if isinstance(tensor, nn.Parameter):
        if tensor.grad is not None:
            new.grad = resized(
                tensor.grad, patch.steps, name, generator=generator, fill="zero", power=1
            )
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


def _refold(ledger: Ledger, model: nn.Module, optimizer: Optimizer, refold: Refold) -> None:
    tensor = named_tensors(model)[refold.tensor]
    new = alike(tensor, folded(tensor, refold))
    if tensor.grad is not None:
        new.grad = folded(tensor.grad, refold, mean=True)
    if optimizer is not None and isinstance(tensor, nn.Parameter):
        convert(ledger, optimizer, tensor, partial(_folded_state, refold=refold), refold.tensor)
    swap(ledger, tensor, new, refold.tensor)


def _folded_state(key: str, value: Tensor, refold: Refold) -> Tensor:
    # Moments are of the size of one entry's gradient, not of a sum of them.
    return folded(value, refold, mean=True)


def _remove(ledger: Ledger, model: nn.Module, optimizer: Optimizer, removal: Removal) -> None:
    module = model.get_submodule(removal.module)
    before = list(model.parameters())
    if removal.passage is None:
        renumber(ledger, model, removal.module)
        parent, _, name = removal.module.rpartition(".")
        holder = model.get_submodule(parent)
        drop_item(ledger, holder._modules, name)
        set_class(ledger, holder, fitting_class(holder))
        ledger.note({"do": "drop", "module": removal.module})
    else:
        _check_own_forward(module, removal.module)
        renumber(ledger, model, removal.module)
        passage = build(removal.passage, model).train(module.training)
        for held in (module._parameters, module._buffers, module._modules):
            for name in [n for n in held if not is_branch(n)]:
                drop_item(ledger, held, name)
        add_child(ledger, module, free_name(module, "nx_pass"), passage)
        set_class(ledger, module, fitting_class(module))
        ledger.note({"do": "remove", "module": removal.module, "spec": removal.passage})
    settle_skips(ledger, model, removal.module)
    if optimizer is not None:
        left = {id(p) for p in model.parameters()}  # a tied parameter may live on elsewhere
        abandon(ledger, optimizer, [p for p in before if id(p) not in left])


def _check_own_forward(module: nn.Module, path: str) -> None:
    if "forward" in vars(module):
        raise GuardError(
            path,
            seen="a forward that was replaced on this instance",
            needed="a forward that belongs to the module's class",
            next_step="choose a child of this module",
        )


def _insert(ledger: Ledger, model: nn.Module, optimizer: Optimizer, insertion: Insertion) -> None:
    module = model.get_submodule(insertion.module)
    _check_own_forward(module, insertion.module)
    near = dict(model.named_parameters()).get(insertion.neighbour or "")
    order = list(model.parameters())
    branch = build(insertion.spec, model)
    if insertion.spec.fresh:
        if near is not None:
            branch = branch.to(device=near.device, dtype=insertion.dtype or near.dtype)
        branch.train(module.training)
    child = free_name(module, insertion.child)
    add_child(ledger, module, child, branch)
    set_class(ledger, module, fitting_class(module))
    ledger.note(
        {
            "do": "insert",
            "module": insertion.module,
            "child": child,
            "spec": insertion.spec,
            "neighbour": insertion.neighbour,
            "dtype": insertion.dtype,
        }
    )
    _stay_dense(ledger, model, insertion.module)
    if optimizer is not None:
        prefix = f"{insertion.module}.{child}".lstrip(".")
        before = {id(p) for p in order}
        named = dict(model.named_parameters(remove_duplicate=False))
        groups: dict[str | None, dict[str, nn.Parameter]] = {}
        for name, parameter in branch.named_parameters():
            if id(parameter) not in before:
                beside = insertion.spec.origin(name) or insertion.neighbour
                groups.setdefault(beside, {})[f"{prefix}.{name}"] = parameter
        for beside, added in groups.items():
            adopt(ledger, optimizer, added, named.get(beside or ""), order)


def _stay_dense(ledger: Ledger, model: nn.Module, path: str) -> None:
    """Encoders around an insertion no longer pack padded batches, in evaluation mode, into
    nested tensors: hardly any module but torch's own layer works on these."""
    around = itertools.accumulate(path.split("."), lambda outer, name: f"{outer}.{name}")
    for outer in ["", *around]:
        if outer != path and isinstance(model.get_submodule(outer), nn.TransformerEncoder):
            set_attribute(ledger, model, Attribute(outer, "use_nested_tensor"), False)


def _rewrite_all(
    ledger: Ledger, model: nn.Module, optimizer: Optimizer, rewrites: Sequence[Rewrite]
) -> None:
    named = named_tensors(model)
    for rewrite in rewrites:
        if rewrite.tensor in named:
            _rewrite(ledger, model, optimizer, rewrite)
        else:
            _give(ledger, model, optimizer, rewrite)


def _rewrite(ledger: Ledger, model: nn.Module, optimizer: Optimizer, rewrite: Rewrite) -> None:
    tensor = named_tensors(model)[rewrite.tensor]
    if tensor.shape != rewrite.values.shape and not rewrite.resizes:
        raise GuardError(
            rewrite.tensor,
            seen=f"new values of shape {tuple(rewrite.values.shape)}",
            needed=f"values of its own shape {tuple(tensor.shape)}",
            next_step="plan them for the shape the tensor has after all steps",
        )
    values, mask = rewrite.values.to(tensor), held_mask(model, tensor)
    if tensor.shape != values.shape:
        swap(ledger, tensor, alike(tensor, values.clone()), rewrite.tensor)
        if optimizer is not None:
            reset(ledger, optimizer, tensor)
        return
    values = values if mask is None else values.masked_fill(~mask, 0)
    set_values(ledger, tensor, values, rewrite.tensor, grad=tensor.grad)


def _give(ledger: Ledger, model: nn.Module, optimizer: Optimizer, rewrite: Rewrite) -> None:
    """A parameter that a layer was built without (its bias), beside the one it has."""
    path, _, name = rewrite.tensor.rpartition(".")
    module = model.get_submodule(path)
    beside = next((p for p in module._parameters.values() if p is not None), None)
    if name not in module._parameters or beside is None:
        raise GuardError(
            rewrite.tensor,
            seen=f"no place for it in {type(module).__name__}",
            needed="a parameter, or one that the layer was built without",
            next_step="plan it for a layer of torch.nn",
        )
    new = alike(beside, rewrite.values.to(beside))
    assert isinstance(new, nn.Parameter)
    order = list(model.parameters())
    put_item(ledger, module._parameters, name, new)
    ledger.note({"do": "give", "tensor": rewrite.tensor, "shape": list(new.shape)})
    if optimizer is not None:
        adopt(ledger, optimizer, {rewrite.tensor: new}, beside, order)
