"""What an edit decides, as data: which positions, which fills, which attributes, what is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuroexapt.couple import AxisMap, Expr, Mixer, Side, Width, resize_expr, size_of
from neuroexapt.edit.resize import siblings

if TYPE_CHECKING:
    from neuroexapt.edit.base import Edit
    from neuroexapt.edit.branches import Spec


@dataclass(frozen=True)
class DimEdit:
    """One dimension of one tensor that follows a width.

    Attributes:
        tensor: name of the parameter or buffer.
        dim: its dimension.
        expr: what the dimension is made of before the step.
        fill: what new entries hold: ``"zero"``, ``"one"``, ``"mean"`` of their siblings,
            ``"random"`` with the tensor's own deviation, ``"spark"`` (small random values),
            ``"balanced"`` (random, adding up to zero over the new units).
        silent: old positions; new entries beside these are zero whatever ``fill`` says.
        along: the atoms over which siblings are averaged; the width's own if empty.
        values: what new entries hold instead of a fill, in their order along ``dim``.
        shared: whether these entries read the units, and copies of one share what it was read by
            (see :attr:`WidthStep.shares`).
    """

    tensor: str
    dim: int
    expr: Expr
    fill: str
    silent: tuple[int, ...] = ()
    along: tuple[str, ...] = ()
    values: Tensor | None = field(default=None, compare=False)
    shared: bool = False


@dataclass(frozen=True)
class Scaling:
    """Old entries of a tensor are multiplied: all of them, or some positions of a dimension.

    With an ``offset`` it is ``offset + entry`` that is multiplied, as the forward uses it. What
    stands beside it makes up for the factor, so gradients are divided by it.
    """

    tensor: str
    factor: float
    dim: int = 0
    positions: tuple[int, ...] | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class WidthStep:
    """One width gets new positions: for each, the old position it comes from, or -1 (new).

    Attributes:
        width: its name.
        positions: the old position of each new one; one that is named several times is split.
        dims: the dimensions that follow.
        scalings: old entries that are multiplied first.
        shares: for each new position its mean share in reading the old one; copies of one add up
            to 1. Empty where no unit is split.
    """

    width: str
    positions: tuple[int, ...]
    dims: tuple[DimEdit, ...]
    scalings: tuple[Scaling, ...] = ()
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class AttributeEdit:
    """A module attribute gets the value that fits the new sizes."""

    module: str
    name: str
    value: Any


@dataclass(frozen=True)
class Insertion:
    """A module is added to another one under a reserved name (see :mod:`neuroexapt.edit.graft`).

    Attributes:
        module: path of the module it is added to.
        child: the reserved prefix that says where it takes part.
        spec: what is added.
        neighbour: name of the parameter whose optimizer group, device and dtype it takes.
        dtype: the dtype it takes instead.
    """

    module: str
    child: str
    spec: Spec
    neighbour: str | None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Removal:
    """A module loses what it holds, and a pass-through answers in its place.

    Its object, name and attributes stay. What was inserted under a reserved name is taken away
    altogether; then there is no ``passage``.
    """

    module: str
    passage: Spec | None


@dataclass(frozen=True)
class Refold:
    """Positions of a dimension become groups: a new entry is the sum of the old ones."""

    tensor: str
    dim: int
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A tensor gets other values, in the shape it has after all other steps.

    A parameter that its layer was built without (``bias=None``) comes into being. With
    ``resizes`` the shape may be another one; gradient and optimizer state then start anew.
    """

    tensor: str
    values: Tensor
    resizes: bool = False


@dataclass(frozen=True, eq=False)
class Masking:
    """Entries of a parameter are held at zero where a mask says ``False``; ``None`` ends that."""

    tensor: str
    mask: Tensor | None


@dataclass(frozen=True)
class Decay:
    """Parameters that shrink by ``lr * strength`` at each step of their optimizer; 0 ends it."""

    tensors: tuple[str, ...]
    strength: float


@dataclass(frozen=True)
class Patch:
    """All that an edit changes, decided before anything is written.

    It is carried out in the order of the attributes.

    Attributes:
        edit: the edit that made it.
        preserves: ``"exact"`` (same function), ``"evaluation"`` (the same in evaluation mode),
            ``"approximate"`` or ``"none"``.
        description: one sentence for people.
        steps: widths, one after the other.
        refolds: dimensions whose positions are added up in groups.
        attributes: Python numbers that follow.
        removals: modules that pass their input through from now on.
        insertions: new modules.
        maskings: parameters that get, change or lose a mask.
        rewrites: new values.
        decays: weight decay beside the optimizer's own.
    """

    edit: Edit
    preserves: str
    description: str
    steps: tuple[WidthStep, ...] = ()
    refolds: tuple[Refold, ...] = ()
    attributes: tuple[AttributeEdit, ...] = ()
    removals: tuple[Removal, ...] = ()
    insertions: tuple[Insertion, ...] = ()
    maskings: tuple[Masking, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    decays: tuple[Decay, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every parameter and buffer the patch resizes or scales, each once."""
        names = [name for step in self.steps for name in _touched(step)]
        return tuple(dict.fromkeys(names))

    @property
    def gone(self) -> tuple[str, ...]:
        """Paths of the modules whose tensors the patch takes away."""
        return tuple(removal.module for removal in self.removals)


def _touched(step: WidthStep) -> list[str]:
    return [*(edit.tensor for edit in step.dims), *(scaling.tensor for scaling in step.scalings)]


@dataclass
class Drawing:
    """A map that follows a plan step by step, so that later steps see what earlier ones did."""

    axes: AxisMap
    sizes: dict[str, int] = field(default_factory=dict)

    def width(self, name: str) -> Width:
        """A width as the steps so far have left it."""
        return self.axes.widths[name]

    def expr(self, tensor: str, dim: int) -> Expr:
        """A dimension's expression as the steps so far have left it."""
        return self.axes.tensors[tensor][dim]

    def record(self, step: WidthStep) -> None:
        """Take over a step: sizes, expressions and the positions of dot-product sides."""
        watched = {
            (side.tensor, side.dim)
            for width in self.axes.widths.values()
            for mixer in width.mixers
            for sides in mixer.sides
            for side in sides
        }
        moved = {
            (edit.tensor, edit.dim): siblings(edit.expr, step.width, step.positions)
            for edit in step.dims
            if (edit.tensor, edit.dim) in watched
        }
        size = len(step.positions)
        self.sizes[step.width] = size
        self.axes = replace(
            self.axes,
            widths={
                name: replace(
                    width,
                    size=size if name == step.width else width.size,
                    mixers=tuple(_moved(mixer, moved) for mixer in width.mixers),
                )
                for name, width in self.axes.widths.items()
            },
            tensors={
                name: tuple(resize_expr(expr, step.width, size) for expr in dims)
                for name, dims in self.axes.tensors.items()
            },
        )

    def attributes(self, original: AxisMap) -> tuple[AttributeEdit, ...]:
        """The attributes whose value the steps so far have changed."""
        found = []
        for attribute in original.attributes:
            old = tuple(size_of(expr, {}) for expr in attribute.exprs)
            new = tuple(size_of(expr, self.sizes) for expr in attribute.exprs)
            if old != new:
                value = new if attribute.is_tuple else new[0]
                found.append(AttributeEdit(attribute.module, attribute.name, value))
        return tuple(found)


def scales_of(width: Width, mixer: Mixer) -> set[str]:
    """A decomposed norm does not name its scale: it is the module's own elementwise tensor."""
    return set(mixer.weight) or {
        place.tensor
        for place in width.appearances
        if place.tensor.rpartition(".")[0] == mixer.module and place.roles == {"elementwise"}
    }


def query_scalings(width: Width, size: int) -> tuple[Scaling, ...]:
    """Keep the logits of attention when a head gets another size.

    Where scores are divided by the square root of the head size, the queries make up for it.
    """
    # A side may name other dimensions of the same weight (its heads, say): those stay.
    own = {(place.tensor, place.dim) for place in width.appearances}
    mixers = [mixer for mixer in width.mixers if mixer.kind in ("layer_norm", "mean_square")]
    norms = {name for mixer in mixers for name in scales_of(width, mixer)}
    found: dict[tuple[str, int], set[int]] = {}
    for mixer in width.mixers:
        if mixer.kind == "dot" and mixer.scale == "inverse_sqrt":
            sides = [side for side in mixer.sides[0] if (side.tensor, side.dim) in own]
            # Queries that are normalised forget the scale of what made them.
            scales = [side for side in sides if side.factor and side.tensor in norms]
            for side in scales or [side for side in sides if not side.factor]:
                found.setdefault((side.tensor, side.dim), set()).update(side.positions)
    factor = sqrt(size / width.size)
    return tuple(
        Scaling(tensor, factor, dim, tuple(sorted(positions)))
        for (tensor, dim), positions in found.items()
    )


def _moved(mixer: Mixer, moved: Mapping[tuple[str, int], Sequence[Sequence[int]]]) -> Mixer:
    left, right = (tuple(_moved_side(side, moved) for side in s) for s in mixer.sides)
    return replace(mixer, sides=(left, right))


def _moved_side(side: Side, moved: Mapping[tuple[str, int], Sequence[Sequence[int]]]) -> Side:
    old = moved.get((side.tensor, side.dim))
    if old is None:
        return side
    inside = set(side.positions)
    positions = tuple(p for p, origin in enumerate(old) if origin and origin[0] in inside)
    return replace(side, positions=positions)
