"""Units that do not exist yet, tried in the places of those that do.

The makers' entries are replaced, for one forward, by those of as many candidates as there are
units; whatever stands between makers and readers (norms, activations, pools, gates) treats them as
it treats the old ones. What a reader's new columns would get as gradient follows from the
candidates' answers and the gradient that the real model sends to the reader's output.

Shapes in names: K units (old or candidates), R rows (samples times positions), P reader entries a
unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuroexapt.capture.masks import masks_among
from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import Appearance, AxisMap, Width, leaves, unit_of
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Batch, LossFn, plain_attention, scalar_loss, undisturbed

_ROWS = 2048  # rows of each reader and batch that correlations are taken over
_ENTRIES = 4096  # reader entries a unit that gradients are compared on
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Reader:
    """A linear layer that reads the units.

    Attributes:
        path: of the module.
        module: the layer.
        dim: of its weight, along which it reads.
        order: for each unit its positions along the input's dimension of units; shape (units, q).
    """

    path: str
    module: nn.Module
    dim: int
    order: Tensor

    @property
    def channels(self) -> int:
        """Where the units are in the input, from the end."""
        return -1 - len(getattr(self.module, "kernel_size", ()))


@dataclass(frozen=True)
class Site:
    """A width whose new units can be tried: who makes, holds and reads its units."""

    model: nn.Module
    loss_fn: LossFn
    axes: AxisMap
    width: Width
    makers: tuple[Appearance, ...]
    holders: tuple[Appearance, ...]
    readers: tuple[Reader, ...]

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the model."""
        return named_tensors(self.model)[name].detach()

    def unit(self, place: Appearance) -> Tensor:
        """For each position of a dimension its unit, or -1."""
        expr = self.axes.tensors[place.tensor][place.dim]
        return torch.from_numpy(unit_of(expr, self.width.name))


@dataclass
class Seen:
    """What a forward of the model showed.

    ``inputs`` and ``outputs`` of the readers, call by call; ``doors``, the inputs of the makers'
    modules, and ``made``, their outputs.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    doors: dict[str, list[Tensor]] = field(default_factory=dict)
    made: dict[str, list[Tensor]] = field(default_factory=dict)


def site_of(model: nn.Module, loss_fn: LossFn, axes: AxisMap, at: str) -> Site:
    """Who makes and reads the units of a width.

    Raises:
        EditError: no such width.
        MeasureError: candidates cannot be tried there; the message says why.
    """
    width = axes.one(at)
    for mixer in width.mixers[:1]:
        _refuse(
            width.name,
            f"'{mixer.kind}' mixing over this width ({mixer.place})",
            "a width whose new units may start anywhere",
        )
    masks = masks_among(axes.tensors)
    places = [place for place in width.appearances if place.tensor not in masks]
    readers = [place for place in places if "consumer" in place.roles]
    makers = [place for place in places if place.roles == {"producer"}]
    holders = [place for place in places if place.roles == {"elementwise"}]
    tied = [place for place in readers if len(place.roles) > 1]
    if tied or not makers or not readers:
        seen = f"'{tied[0].tensor}', which makes and reads the units" if tied else "none"
        _refuse(width.name, seen, "layers that make the units and others that read them")
    found = tuple(_reader(model, axes, width, place) for place in readers)
    return Site(model, loss_fn, axes, width, tuple(makers), tuple(holders), found)


def _reader(model: nn.Module, axes: AxisMap, width: Width, place: Appearance) -> Reader:
    path, _, own = place.tensor.rpartition(".")
    module = model.get_submodule(path)
    # The linear layer of GPT-2 in transformers, which is no dependency, has its weight transposed.
    transposed = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    transposed = transposed or isinstance(module, _TRANSPOSED)
    plain = (transposed or isinstance(module, _PLAIN)) and own == "weight"
    dim = 0 if transposed else 1
    if (
        not plain
        or place.dim != dim
        or getattr(module, "groups", 1) != 1
        or list(module.children())
    ):
        kind = type(module).__name__
        _refuse(
            width.name, f"'{place.tensor}' of a {kind}, which reads the units", "Linear or Conv"
        )
    unit = torch.from_numpy(unit_of(axes.tensors[place.tensor][place.dim], width.name))
    order = torch.stack([torch.nonzero(unit == u).flatten() for u in range(width.size)])
    return Reader(path, module, dim, order)


def _refuse(place: str, seen: str, needed: str) -> None:
    raise MeasureError(
        place,
        seen=seen,
        needed=needed,
        next_step="grow it without rows (Widen's default), which needs none of this",
    )


# --- running the model ---------------------------------------------------------------------------


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    values = (*args, *kwargs.values())
    return next((value for value in values if isinstance(value, Tensor)), None)


def _read(seen: Seen, path: str, _module: nn.Module, args: Any, kwargs: Any, out: Any) -> Tensor:
    """Keep a reader's input and output; what goes on is a copy, which others may overwrite."""
    given = args[0] if args else kwargs["input"]
    if not out.requires_grad and torch.is_grad_enabled():
        out = out.detach().requires_grad_()
    seen.inputs.setdefault(path, []).append(given.detach())
    seen.outputs.setdefault(path, []).append(out)
    return torch.clone(out)


def _make(seen: Seen, path: str, _module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
    given = _first(args, kwargs)
    if given is not None:
        seen.doors.setdefault(path, []).append(given.detach().clone())
    if isinstance(out, Tensor):
        seen.made.setdefault(path, []).append(out.detach().clone())


@contextmanager
def _watched(site: Site) -> Iterator[Seen]:
    seen, handles = Seen(), []
    try:
        for reader in site.readers:
            hook = partial(_read, seen, reader.path)
            handles.append(reader.module.register_forward_hook(hook, with_kwargs=True))
        for path in dict.fromkeys(place.tensor.rpartition(".")[0] for place in site.makers):
            maker = site.model.get_submodule(path)
            handles.append(
                maker.register_forward_hook(partial(_make, seen, path), with_kwargs=True)
            )
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_place_of(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """For the block other tensors stand where the model's parameters and buffers are."""
    named = named_tensors(model)
    wanted = {id(named[name]): value for name, value in values.items()}
    held = [
        (slots, own, tensor)
        for module in model.modules()
        for slots in (module._parameters, module._buffers)
        for own, tensor in slots.items()
        if tensor is not None and id(tensor) in wanted
    ]
    try:
        for slots, own, tensor in held:
            slots[own] = wanted[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for slots, own, tensor in held:
            slots[own] = tensor  # type: ignore[assignment]


def masks_opened(site: Site) -> dict[str, Tensor]:
    """The masks of the units' makers and holders, without a zero."""
    names = masks_among(site.axes.tensors) & {place.tensor for place in site.width.appearances}
    return {name: torch.ones_like(site.tensor(name)) for name in names}


def look(site: Site, batch: Batch, values: Mapping[str, Tensor] | None = None) -> Seen:
    """One forward with other values in place of the model's, without a graph."""
    replaced = _in_place_of(site.model, values or {})
    with undisturbed(site.model), plain_attention(), torch.no_grad(), replaced:
        with _watched(site) as seen:
            site.loss_fn(site.model, batch)
        return seen


def real(site: Site, batch: Batch) -> tuple[Seen, dict[str, list[Tensor]]]:
    """A forward of the model as it is, and the loss's gradients at its readers' outputs."""
    with undisturbed(site.model), plain_attention(), torch.enable_grad():
        with _watched(site) as seen:
            loss = scalar_loss(site.loss_fn(site.model, batch))
        outs = [out for reader in site.readers for out in seen.outputs.get(reader.path, ())]
        if not outs or not loss.requires_grad:
            _refuse(site.width.name, "a loss that no reader of the units takes part in", "one")
        found = iter(torch.autograd.grad(loss, outs, allow_unused=True, materialize_grads=True))
    gradients = {
        reader.path: [next(found).detach() for _ in seen.outputs.get(reader.path, ())]
        for reader in site.readers
    }
    return seen, gradients


def check_no_feedback(site: Site, before: Seen, after: Seen) -> None:
    """The makers' inputs must not depend on the units that were replaced.

    A layer that handles each unit by itself (a depthwise convolution) is one more step on the way.

    Raises:
        MeasureError: they do, as in a residual stream.
    """
    for path, doors in before.doors.items():
        others = after.doors.get(path, [])
        same = len(doors) == len(others) and all(map(_alike, doors, others))
        if not same and not _passes(site, path):
            _refuse(
                site.width.name,
                f"units on which '{path}', which makes them, depends (a residual stream, say)",
                "layers that make the units from others",
            )


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=1e-3, atol=1e-5, equal_nan=True
    )


def _passes(site: Site, path: str) -> bool:
    """Whether a maker's own input has the width, and it reads no unit but the one it makes."""
    entering = [
        leaf.name for dims in site.axes.modules[path].inputs for e in dims for leaf in leaves(e)
    ]
    return site.width.name in entering and path not in {reader.path for reader in site.readers}


# --- comparing -----------------------------------------------------------------------------------


def answers(site: Site, seen: Seen) -> Tensor:
    """A sample of rows of the units' answers at all readers; float64, shape (units, R)."""
    parts = []
    for reader in site.readers:
        for given in seen.inputs.get(reader.path, ()):
            front = given.movedim(reader.channels, 0).flatten(1)
            rows = front[reader.order.to(front.device).flatten()].view(len(reader.order), -1)
            parts.append(rows[:, _sample(rows.shape[1], _ROWS).to(rows.device)].cpu().double())
    return torch.cat(parts, 1)


def _open(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that shut nothing out: those of new units do not."""
    return {name: torch.ones_like(buffers[name]) for name in masks_among(buffers)}


def _sample(count: int, limit: int) -> Tensor:
    """Always the same ones of ``count``."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return order[:limit]


def reader_gradients(site: Site, seen: Seen, gradients: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """What the readers' entries would get if these answers were read; shape (units, P)."""
    parts = []
    for reader in site.readers:
        held = reader.module._parameters["weight"]
        if held is None:
            continue
        weight, total = held.detach().requires_grad_(), torch.zeros_like(held)
        values = {"weight": weight, **_open(dict(reader.module.named_buffers()))}
        for given, grad in zip(
            seen.inputs.get(reader.path, ()), gradients[reader.path], strict=True
        ):
            with torch.enable_grad():
                out = functional_call(reader.module, values, (given,))
            total = total + torch.autograd.grad(out, weight, grad)[0]
        columns = total.movedim(reader.dim, 0)[reader.order.to(total.device).flatten()]
        parts.append(columns.reshape(len(reader.order), -1).cpu().double())
    every = torch.cat(parts, 1)
    return every[:, _sample(every.shape[1], _ENTRIES)]
