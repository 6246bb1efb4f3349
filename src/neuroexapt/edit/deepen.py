"""Where a model can become deeper, and what that costs: copies of its blocks, or new layers."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from neuroexapt.capture.flops import batch_of
from neuroexapt.couple import AxisMap, Expr, leaves, size_of
from neuroexapt.edit.amount import Amounts, is_within
from neuroexapt.edit.branches import Spec
from neuroexapt.edit.copies import CopySpec
from neuroexapt.edit.insert import ConvSpec, InsertConv
from neuroexapt.edit.layer import InsertLayer, MlpSpec, copies_of, copy_spec
from neuroexapt.edit.patch import AttributeEdit, Insertion
from neuroexapt.edit.places import output_of

_ACTIVATIONS = {
    *("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish"),
    *("Hardswish", "Tanh", "Sigmoid", "Softplus"),
}


class Place(abc.ABC):
    """Where one more layer can stand, whatever sizes the widths have then."""

    @abc.abstractmethod
    def parameters(self, amounts: Amounts, sizes: Mapping[str, int]) -> int:
        """How many it adds."""

    @abc.abstractmethod
    def flops(self, amounts: Amounts, sizes: Mapping[str, int]) -> int:
        """FLOPs that it adds to one sample's forward."""


@dataclass(frozen=True)
class NewLayer(Place):
    """A residual branch: its insertion, and what its number of channels is made of."""

    insertion: Insertion
    channels: Expr
    positions: int

    def sized(self, sizes: Mapping[str, int], seed: int = 0) -> Insertion:
        """The insertion for other sizes of the widths."""
        spec, channels = self.insertion.spec, size_of(self.channels, sizes)
        if isinstance(spec, ConvSpec):
            return replace(self.insertion, spec=replace(spec, channels=channels, seed=seed))
        assert isinstance(spec, MlpSpec)
        spec = replace(spec, features=channels, hidden=channels, seed=seed)
        return replace(self.insertion, spec=spec)

    def parameters(self, amounts: Amounts, sizes: Mapping[str, int]) -> int:
        return sum(prod(shape) for shape in _shapes(self.sized(sizes).spec))

    def flops(self, amounts: Amounts, sizes: Mapping[str, int]) -> int:
        weights = sum(prod(s) for s in _shapes(self.sized(sizes).spec) if len(s) > 1)
        return 2 * weights * self.positions // batch_of(amounts.axes.traces[0])


@dataclass(frozen=True)
class BlockCopy(Place):
    """A copy of a block behind it, and what the number of channels of its gate is made of."""

    spec: CopySpec
    channels: Expr

    def parameters(self, amounts: Amounts, sizes: Mapping[str, int]) -> int:
        gate = 0 if self.spec.silent else size_of(self.channels, sizes)
        own = (n for n in amounts.axes.parameters if is_within(n, self.spec.source))
        return gate + sum(amounts.numel(name, sizes) for name in own)

    def flops(self, amounts: Amounts, sizes: Mapping[str, int]) -> int:
        return amounts.flops(sizes, inside=self.spec.source)

    def sized(self, insertion: Insertion, axes: AxisMap, sizes: Mapping[str, int]) -> Insertion:
        """The insertion of the copy, made of a block that has other sizes by then."""
        prefix = f"{self.spec.source}."
        shapes = tuple(
            (name.removeprefix(prefix), tuple(size_of(expr, sizes) for expr in dims))
            for name, dims in axes.tensors.items()
            if is_within(name, self.spec.source)
        )
        assert isinstance(insertion.spec, CopySpec)
        channels = size_of(self.channels, sizes)
        return replace(insertion, spec=replace(insertion.spec, channels=channels, shapes=shapes))


def deepened(
    axes: AxisMap, places: Sequence[Place], sizes: Mapping[str, int], seed: int
) -> tuple[tuple[Insertion, ...], tuple[AttributeEdit, ...]]:
    """What is inserted when the widths have other sizes, and the configs' counts of layers."""
    blocks = [place for place in places if isinstance(place, BlockCopy)]
    twins, counts = copies_of(axes, [block.spec.source for block in blocks])
    copies = [block.sized(twin, axes, sizes) for block, twin in zip(blocks, twins, strict=True)]
    layers = [
        place.sized(sizes, seed + number)
        for number, place in enumerate(places)
        if isinstance(place, NewLayer)
    ]
    return (*copies, *layers), counts


def block_copies(axes: AxisMap) -> tuple[BlockCopy, ...]:
    """The blocks of lists that can stand twice in a row, the innermost ones, in their order."""
    found = []
    for path in _blocks(axes):
        if not InsertLayer(path, kind="copy").check(axes) and not _is_shared(axes, path):
            output = output_of(axes, path)
            found.append(BlockCopy(copy_spec(axes, path), output.dims[output.channel]))
    return tuple(found)


def new_layers(axes: AxisMap) -> tuple[NewLayer, ...]:
    """Behind blocks that hold several layers, else behind activations and single layers."""
    once = _called_once(axes)
    active = [path for path in once if axes.kinds.get(path) in _ACTIVATIONS]
    for paths in (_blocks(axes), active, once):
        found = [place for path in paths if (place := _new_layer(axes, path)) is not None]
        if found:
            return tuple(found)
    return ()


def _called_once(axes: AxisMap) -> list[str]:
    return [
        path
        for path in axes.modules
        if path and all([r.path for r in t.runs].count(path) == 1 for t in axes.traces)
    ]


def _blocks(axes: AxisMap) -> list[str]:
    blocks = [path for path in _called_once(axes) if _is_block(axes, path)]
    return [path for path in blocks if not any(p.startswith(f"{path}.") for p in blocks)]


def _is_block(axes: AxisMap, path: str) -> bool:
    """A module that stands in a list, holds two layers or more, and hands on what it was given."""
    last = path.rpartition(".")[2]
    weights = [n for n in axes.parameters if n.startswith(f"{path}.") and len(axes.tensors[n]) > 1]
    doors = axes.modules[path]
    same = bool(doors.inputs and doors.outputs) and doors.inputs[0] == doors.outputs[0]
    return last.isdigit() and len(weights) > 1 and same


def _is_shared(axes: AxisMap, path: str) -> bool:
    """Whether a tensor of a block is known by a name outside of it too: is it copied or shared?"""
    names = axes.traces[0].tensors
    inside = {ref for name, ref in names.items() if name.startswith(f"{path}.")}
    return any(ref in inside for name, ref in names.items() if not name.startswith(f"{path}."))


def _new_layer(axes: AxisMap, path: str) -> NewLayer | None:
    for edit in (InsertConv(path), InsertLayer(path)):
        if not edit.check(axes):
            output = output_of(axes, path)
            channels = output.dims[output.channel]
            if any(leaf.name in axes.widths for leaf in leaves(channels)):
                insertion = edit.plan(axes, {}).insertions[0]
                return NewLayer(insertion, channels, prod(output.sizes) // output.channels)
    return None


@functools.lru_cache(maxsize=1024)
def _shapes(spec: Spec) -> tuple[torch.Size, ...]:
    """Of the parameters that will be made; none of them is."""
    with torch.device("meta"):
        made = spec.make(nn.Identity())
    return tuple(parameter.shape for parameter in made.parameters())
