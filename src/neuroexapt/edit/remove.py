"""RemoveLayer: a layer, a block or half of a block goes, and its input passes in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuroexapt.couple import AxisMap
from neuroexapt.edit.absorb import (
    Affine,
    Layer,
    affine_at,
    as_tensor,
    check_adjacent,
    folded_before,
    folded_behind,
    layer_at,
    run_of,
    with_bias,
)
from neuroexapt.edit.base import Edit
from neuroexapt.edit.doors import ROOT
from neuroexapt.edit.graft import HOLD, NEXT, PASS, THEN, is_branch
from neuroexapt.edit.passage import Nothing, PassSpec, held, passage_of
from neuroexapt.edit.patch import AttributeEdit, Patch, Removal, Rewrite
from neuroexapt.errors import EditError


@dataclass(frozen=True)
class RemoveLayer(Edit):
    """A layer goes; from now on its input passes in its place.

    Promise: approximate; ``Applied.max_difference`` says how far the outputs moved. The module
    object stays where it was, under its name and index, and lets its input through; its
    parameters, buffers and children are gone, from the optimizer too. What was inserted beside
    it stays.

    - A layer that keeps its input's shape (an activation, a norm, dropout, a convolution, a
      residual block, a transformer block) passes its input. Further outputs must be inputs, or
      read by nobody.
    - What is added to a stream that it is computed from (the attention or the MLP of a block)
      gives zeros: the stream goes on without it.
    - What an edit inserted (``"features.2.nx_after"``) is taken away again.

    With ``into`` a neighbour absorbs what the layer did. A linear layer, a 1x1 convolution or a
    batch norm directly before or behind a linear or convolution layer goes without a trace: the
    promise is then exact, for a batch norm exact in evaluation mode. Any other module needs the
    affine map that comes nearest to it on data, ``matrix`` and ``offset``, as
    :func:`neuroexapt.measure.affine_fit` gives it; a later layer ``into`` absorbs it.

    In models with a key-value cache another block takes over the index of a removed one where
    the cache looks at it.

    Args:
        at: path of a module that runs in the forward.
        into: path of the linear or convolution layer that absorbs it.
        matrix: what ``into`` read is this times what it reads without the module, (before, now).
        offset: and this added, (before,).

    Raises:
        UnknownPlaceError, EditError: from :meth:`plan`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import RemoveLayer, apply
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
        >>> done = apply(net, RemoveLayer("2"), args=(torch.randn(5, 3),))
        >>> len(net), len(list(net.parameters())), done.max_difference > 0
        (4, 2, True)

        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
        >>> done = apply(net, RemoveLayer("1", into="0"), args=(torch.randn(5, 3, 6, 6),))
        >>> net[0].bias.shape, [name for name, _ in net.named_parameters()]
        (torch.Size([4]), ['0.weight', '0.bias'])

    Gromov et al. 2024; Men et al. 2024 (ShortGPT).
    """

    at: str
    into: str | None = None
    matrix: Tensor | None = field(default=None, compare=False, repr=False)
    offset: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> str:
        return self.at

    def check(self, axes: AxisMap) -> list[EditError]:
        """A module that runs, holds its tensors alone, and whose output something can replace."""
        sizes = {
            name: torch.empty(ref.shape, dtype=ref.dtype, device="meta")
            for trace in axes.traces
            for name, ref in trace.tensors.items()
        }
        try:
            self.plan(axes, sizes)
        except EditError as error:
            return [error]
        return []

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """One removal, and new values for the layer that absorbs it."""
        if self.into is not None or self.matrix is not None or self.offset is not None:
            return self._absorbed(axes, tensors)
        removal = self._removal(axes)
        zeros = isinstance(removal.passage, PassSpec) and Nothing in _kinds(removal.passage.answer)
        way = " (its branch adds nothing any more)" if zeros else ""
        return Patch(self, "approximate", f"remove '{self.at}'{way}", removals=(removal,))

    def _absorbed(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        _check_place(axes, self.at)
        if self.into is None:
            raise EditError(
                self.at,
                seen="a matrix or an offset, and no layer that absorbs it",
                needed="the path of a linear or convolution layer as `into`",
                next_step="pass the `into` it was fitted for",
            )
        _check_place(axes, self.into)
        layer = layer_at(axes, self.into)
        starts = [run_of(axes.traces[0], path).start for path in (self.at, self.into)]
        weight = tensors[layer.weight]
        bias = None if layer.bias is None else tensors[layer.bias]
        if self.matrix is not None and starts[0] < starts[1]:
            affine = self._given(layer)
            new, shift = folded_before(layer, affine, weight)
        else:
            affine = affine_at(axes, self.at, tensors)
            if starts[0] > starts[1]:
                check_adjacent(axes, self.into, self.at)
                new, shift = folded_behind(layer, affine, weight, bias)
                bias = None
            else:
                check_adjacent(axes, self.at, self.into)
                self._check_border(layer, affine)
                new, shift = folded_before(layer, affine, weight)
        rewrites = [Rewrite(layer.weight, new, resizes=new.shape != weight.shape)]
        if shift is not None:
            shift = shift if bias is None else bias.detach().to(shift) + shift
            size = None if layer.bias is None else tensors[layer.bias].shape
            resizes = size is not None and size != shift.shape
            rewrites.append(Rewrite(with_bias(axes, layer), shift, resizes=resizes))
        _check_held(axes, self.at)
        return Patch(
            self,
            affine.preserves,
            f"remove '{self.at}', which '{self.into}' absorbs",
            attributes=_sizes(axes, layer, new.shape),
            removals=(Removal(self.at, passage_of(axes, self.at, absorbed=True)),),
            rewrites=tuple(rewrites),
        )

    def _given(self, layer: Layer) -> Affine:
        """The map fitted to data, which stands for what the layer read before."""
        units = layer.shape[layer.in_dim] * layer.groups
        matrix = as_tensor(self.matrix, self.at, "matrix", (units,))
        offset = self.offset
        if offset is not None:
            offset = as_tensor(offset, self.at, "offset", (units,))
        return Affine(matrix, offset, "approximate")

    def _check_border(self, layer: Layer, affine: Affine) -> None:
        if layer.padded and affine.offset is not None:
            raise EditError(
                self.at,
                seen=f"a shift in front of '{layer.path}', which reads zeros beyond the border",
                needed="a layer without padding, or no shift",
                next_step="fold it into the layer before it, if there is one",
            )

    def _removal(self, axes: AxisMap) -> Removal:
        _check_place(axes, self.at)
        name = self.at.rpartition(".")[2]
        if is_branch(name):
            _check_inserted(axes, self.at, name)
            return Removal(self.at, None)
        try:
            return _passing(axes, self.at)
        except EditError as error:
            around = _removable_parent(axes, self.at)
            if around is None:
                raise
            raise EditError(
                self.at,
                seen=error.seen,
                needed=error.needed,
                next_step=f"remove '{around}', which holds it and can be removed",
            ) from error


def _passing(axes: AxisMap, path: str) -> Removal:
    _check_held(axes, path)
    return Removal(path, passage_of(axes, path))


def _removable_parent(axes: AxisMap, path: str) -> str | None:
    """The nearest module around that could be removed."""
    while "." in path:
        path = path.rpartition(".")[0]
        if path in axes.modules:
            try:
                _passing(axes, path)
            except EditError:
                continue
            return path
    return None


def _sizes(axes: AxisMap, layer: Layer, shape: Sequence[int]) -> tuple[AttributeEdit, ...]:
    """The numbers of channels that a layer holds, where its weight has others now."""
    found = []
    ends = {("in_features", "in_channels"): layer.in_dim}
    ends[("out_features", "out_channels")] = layer.out_dim
    for names, dim in ends.items():
        held = [a for a in axes.attributes if a.module == layer.path and a.name in names]
        if shape[dim] != layer.shape[dim]:
            found += [AttributeEdit(a.module, a.name, shape[dim]) for a in held]
    return tuple(found)


def _kinds(answer: object) -> set[type]:
    if isinstance(answer, (tuple, list)):
        return {kind for item in answer for kind in _kinds(item)}
    return _kinds(list(answer.values())) if isinstance(answer, dict) else {type(answer)}


def _check_place(axes: AxisMap, path: str) -> None:
    if not path or not isinstance(path, str):
        raise EditError(
            ROOT,
            seen=f"at={path!r}",
            needed="the path of a part of it",
            next_step="name the layer or block to remove",
        )
    if f"{path}.{PASS}" in axes.modules:
        raise EditError(
            path,
            seen="a layer that is removed already",
            needed="one that still does something",
            next_step="choose another layer",
        )
    if path in axes.modules:
        return
    inside = [name for name in axes.modules if name.startswith(f"{path}.")]
    if path in axes.kinds or inside or held(axes, path):
        raise EditError(
            path,
            seen="a module that is not called in the forward on this example input",
            needed="one that is",
            next_step=f"name one of its parts, such as '{inside[0]}'"
            if inside
            else "name the module around it",
        )
    axes.find(path)  # raises with near names, unless it is a width
    raise EditError(
        path,
        seen="a width",
        needed="the path of a module",
        next_step="name the module that makes it",
    )


def _check_inserted(axes: AxisMap, path: str, name: str) -> None:
    if name.startswith((PASS, HOLD)):
        raise EditError(
            path,
            seen="what stands in for a removed layer"
            if name.startswith(PASS)
            else "the beginning of a skip",
            needed="a layer, or an inserted branch",
            next_step="undo the removal instead"
            if name.startswith(PASS)
            else "remove the skip's end, the nx_join that belongs to it",
        )
    if name.startswith((THEN, NEXT)):
        _check_same_shape(axes, path)


def _check_same_shape(axes: AxisMap, path: str) -> None:
    """Without what stands in a row, what went into it comes out: readers know another size."""
    for trace in axes.traces:
        for run in trace.runs:
            shapes = [tuple(ref.shape) for ref in (*run.inputs[:1], *run.outputs[:1])]
            if run.path == path and shapes[0] != shapes[-1]:
                raise EditError(
                    path,
                    seen=f"an input of shape {shapes[0]} and an output of shape {shapes[-1]}",
                    needed="one shape: the layers behind it would read its input",
                    next_step="bring both widths to one size first (Narrow or Widen)",
                )


def _check_held(axes: AxisMap, path: str) -> None:
    """What goes must not be read, or called, from elsewhere."""
    prefix = f"{path}."
    for trace in axes.traces:
        inside = [range(run.start, run.stop) for run in trace.runs if run.path == path]
        own = {trace.tensors[name]: name for name in held(axes, path)}
        for name, ref in trace.tensors.items():
            if not name.startswith(prefix):
                own.pop(ref, None)  # tied: it lives on under another name
        for number, call in enumerate(trace.calls):
            if any(number in calls for calls in inside):
                continue
            for ref in call.inputs:
                if ref in own:
                    raise EditError(
                        path,
                        seen=f"'{own[ref]}', which {call.place} reads outside of it",
                        needed="parameters that only this module reads",
                        next_step="remove the module that reads them",
                    )
