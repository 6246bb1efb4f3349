"""Widen: new units on a width, with the function kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

from torch import Tensor

from neuroexapt.couple import Appearance, AxisMap, Mixer, Width
from neuroexapt.edit.base import (
    Edit,
    found_widths,
    is_glob,
    not_a_multiple,
    one_of_to_and_by,
    units_of,
)
from neuroexapt.edit.initial import misfits, split_step, unknown_init, unsplittable, with_rows
from neuroexapt.edit.patch import (
    AttributeEdit,
    DimEdit,
    Drawing,
    Patch,
    Scaling,
    WidthStep,
    query_scalings,
    scales_of,
)
from neuroexapt.edit.unfit import (
    dead_end,
    literal_epsilon,
    moved_on_the_way,
    no_scale,
    tied_to_a_mean,
)
from neuroexapt.errors import EditError

# Norms over a width need other new entries; what they share is a mean that must not move.
_NORMS = {"layer_norm", "mean_square"}


@dataclass(frozen=True)
class Widen(Edit):
    """Add units to a width: channels, neurons, heads, an MLP's hidden layer, a residual stream.

    Promise: exact. How new units start is ``init``: with ``"zero_out"`` their incoming weights
    are random with the layer's own deviation (so they answer as strongly as their siblings) and
    their outgoing weights are zero: the output is the same, and every new unit gets gradient from
    the second step on (one that a ReLU shuts on all data stays still, as any random unit may).
    With ``"split"`` they are copies of old units, and the readers share out, in unequal parts,
    what they took from one. ``rows`` gives incoming weights that were chosen by data (see
    :func:`neuroexapt.measure.growth_directions`); outgoing ones are zero then.

    Where a normaliser mixes over the width, new entries
    sit where they leave its statistics alone: at the mean of their siblings for LayerNorm, at
    zero for RMSNorm, with the scale corrected by ``sqrt(d / (d + k))`` and epsilon by
    ``d / (d + k)``. A wider attention head gets zero query rows and keeps the scale of its
    logits. GroupNorm grows by whole groups.

    Args:
        at: module path (its output width), a width's name, or a glob over both. With a glob
            widths that cannot grow exactly stay as they are; the description says which.
        by: number of new units (int) or fraction of the present size (float).
        to: the new size; exactly one of ``by`` and ``to``.
        init: ``"zero_out"`` or ``"split"``; the latter where only weights read the units.
        rows: for tensors that make the units, or hold one number a unit, the entries of the new
            ones: the tensor's shape, with their number at the width's dimension.

    Raises:
        UnknownPlaceError, PinnedError, EditError: from :meth:`plan`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import Widen, apply
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> done = apply(net, Widen("0", by=4), args=(torch.randn(5, 4),))
        >>> net[0].weight.shape, net[2].weight.shape, done.max_difference < 1e-6
        (torch.Size([12, 4]), torch.Size([2, 12]), True)

    Chen et al. 2016 (Net2Net) for the idea and the split; zero outgoing weights as in Evci et al.
    2022; unequal shares as in Wang et al. 2024 (LEMON).
    """

    at: str
    by: int | float | None = None
    to: int | None = None
    init: str = "zero_out"
    rows: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def place(self) -> str:
        return self.at

    def check(self, axes: AxisMap) -> list[EditError]:
        """Place, sizes, and operators over which new units could not stay silent."""
        problems = one_of_to_and_by(self.at, self.to, self.by)
        widths, missing = found_widths(axes, self.at)
        problems += missing + unknown_init(self.at, self.init, self.rows)
        if problems:
            return problems
        for width in widths:
            try:
                size = self._new_size(width)
            except EditError as error:
                problems.append(error)
            else:
                problems += misfits(axes, width, size, self.rows)
        left = [problem for width in widths for problem in self._unmixable(width)]
        every = len({problem.place for problem in left}) == len(widths)
        return problems + (left if every or not is_glob(self.at) else [])

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """New positions are -1, after the old ones."""
        problems = self.check(axes)
        if problems:
            raise problems[0]
        drawing, steps, left = Drawing(axes), list[WidthStep](), list[EditError]()
        for found in found_widths(axes, self.at)[0]:
            problem = next(iter(self._unmixable(found)), None) or _uneven(found, tensors)
            if problem is not None:
                left.append(problem)
                continue
            width = drawing.width(found.name)
            step = self._step(drawing, width)
            drawing.record(step)
            steps.append(step)
        if not steps:
            raise left[0]
        sizes = ", ".join(f"{s.width} to {len(s.positions)}" for s in steps)
        attributes = (*drawing.attributes(axes), *_epsilons(axes, steps))
        kept = "".join(f"; '{error.place}' stays: {error.seen}" for error in left)
        return Patch(self, "exact", f"widen {sizes}{kept}", tuple(steps), attributes=attributes)

    def _step(self, drawing: Drawing, width: Width) -> WidthStep:
        size = self._new_size(width)
        if self.init == "split":
            return split_step(drawing, width, size)
        return with_rows(_step(drawing, width, size), self.rows)

    def _new_size(self, width: Width) -> int:
        if self.to is None:
            size = width.size + units_of(self.at, self.by, width.size)
            if isinstance(self.by, float) or is_glob(self.at):
                size = -(-size // width.multiple) * width.multiple
            if size % width.multiple:
                raise not_a_multiple(width, size)
            return size
        if self.to % width.multiple:
            raise not_a_multiple(width, self.to)
        if self.to <= width.size:
            raise EditError(
                self.at,
                seen=f"to={self.to}",
                needed=f"more than the present size of '{width.name}', {width.size}",
                next_step=f"use to={width.size + 1} or more, or Narrow to shrink",
            )
        return self.to

    def _unmixable(self, width: Width) -> list[EditError]:
        if self.init == "split":
            return unsplittable(width)
        kinds = {mixer.kind for mixer in width.mixers}
        if not kinds and _is_dead_end(width):
            return [dead_end(width)]
        supported = kinds - {"dot"} in ({"layer_norm"}, {"mean_square"}, set())
        tied = [p for p in width.appearances if {"producer", "consumer"} <= p.roles]
        if "layer_norm" in kinds and not all(place.behind_norm for place in tied):
            return [tied_to_a_mean(width)]
        scaleless = [m for m in width.mixers if m.kind in _NORMS and not scales_of(width, m)]
        if supported and scaleless:
            return [no_scale(width, scaleless[0])]
        literal = [m for m in width.mixers if m.kind in _NORMS and not m.eps_attribute]
        if supported and literal:
            return [literal_epsilon(width, literal[0])]
        moved = [m for m in width.mixers if _moves(m)]
        if supported and moved:
            return [moved_on_the_way(width, moved[0])]
        if supported and all(_dot_is_known(m) for m in width.mixers if m.kind == "dot"):
            return []
        mixer = next((m for m in width.mixers if m.kind not in (*_NORMS, "dot")), width.mixers[-1])
        return [
            EditError(
                width.name,
                seen=f"'{mixer.kind}' mixes over this width ({mixer.place})",
                needed="a width over which new units can stay silent",
                next_step="widen another width; Narrow works on this one",
            )
        ]


def _moves(mixer: Mixer) -> bool:
    """Whether new entries reach a norm as something else than what they were made."""
    if mixer.kind == "layer_norm":
        return mixer.centred == "no"
    return mixer.kind == "mean_square" and not mixer.silent


def _uneven(width: Width, tensors: Mapping[str, Tensor]) -> EditError | None:
    """Behind a scale that differs between units, the mean of the units depends on the data."""
    if not _feeds_itself(width):
        return None
    for name in sorted(_norm_tensors(width)[0]):
        scale = tensors[name].detach()
        if not scale.is_meta and bool((scale != scale.flatten()[0]).any()):
            return EditError(
                width.name,
                seen=f"'{name}', a norm's scale that differs between units, before another norm",
                needed="one scale for all units (as before training), or norms before the layers",
                next_step="widen another width; Narrow works on this one",
            )
    return None


def _is_dead_end(width: Width) -> bool:
    """Every maker of the width is tied to a reader: new units would be zero on both sides."""
    makers = [place.roles for place in width.appearances if "producer" in place.roles]
    return bool(makers) and all("consumer" in roles for roles in makers)


def _dot_is_known(mixer: Mixer) -> bool:
    """Both operands of the product are known and made by different parameters."""
    left, right = (
        {(s.tensor, s.dim, p) for s in side if not s.factor for p in s.positions}
        for side in mixer.sides
    )
    return bool(left) and bool(right) and not left & right


def _step(drawing: Drawing, width: Width, size: int) -> WidthStep:
    positions = (*range(width.size), *([-1] * (size - width.size)))
    kinds = {mixer.kind for mixer in width.mixers}
    dims = tuple(_dim(drawing, width, place, kinds) for place in width.appearances)
    return WidthStep(
        width.name, positions, dims, _scalings(width, size, kinds, drawing.axes.offsets)
    )


def _dim(drawing: Drawing, width: Width, place: Appearance, kinds: set[str]) -> DimEdit:
    expr = drawing.expr(place.tensor, place.dim)
    silent: tuple[int, ...] = ()
    if "dot" in kinds:
        silent = _query_positions(width, place)
    if not kinds & _NORMS:
        return DimEdit(place.tensor, place.dim, expr, _plain_fill(place), silent)
    fill = _fill_beside_norms(width, place, kinds)
    along = {name for mixer in width.mixers if mixer.kind == "layer_norm" for name in mixer.over}
    return DimEdit(place.tensor, place.dim, expr, fill, silent, tuple(sorted(along)))


def _plain_fill(place: Appearance) -> str:
    """Readers are silent, makers random; scales, shifts and statistics neutral."""
    return {"consumer": "zero", "producer": "random"}.get(place.role, place.fill)


def _fill_beside_norms(width: Width, place: Appearance, kinds: set[str]) -> str:
    """New entries stay at the norm's centre: the mean for LayerNorm, zero for RMSNorm."""
    centre = "mean" if "layer_norm" in kinds else "zero"
    weights, biases = _norm_tensors(width)
    if place.tensor in weights:
        return "mean"
    if place.tensor in biases:
        return _shift_fill(width)
    made = {maker for m in width.mixers if m.kind in _NORMS for maker in m.makers}
    streams = {read for read in place.reads if read[0] not in weights | biases}
    if place.roles == {"consumer"} and streams <= made:
        return _reader_fill(width, met_as_mean=centre == "mean" and not place.behind_norm)
    # Tied to the normalised axis in size only (the heads behind it, say): no need for a centre.
    return centre if (place.tensor, place.dim) in made else _plain_fill(place)


def _shift_fill(width: Width) -> str:
    """A small shift lets the readers' zero columns receive gradient at once."""
    if _feeds_itself(width):
        return "mean"
    return "spark" if _sparks(width) else "zero"


def _reader_fill(width: Width, *, met_as_mean: bool) -> str:
    """Where new entries are exactly zero, readers may be random: were both zero, none would move.

    Where all new entries are equal (the mean, read before a norm takes it off or behind one whose
    output is normalised again), columns that add up to nothing are silent and tell units apart.
    """
    if met_as_mean or _feeds_itself(width):
        return "balanced"
    return "zero" if _sparks(width) else "random"


def _sparks(width: Width) -> bool:
    """Whether every norm over the width has a shift of its own and no reader is tied to a maker."""
    tied = any({"producer", "consumer"} <= place.roles for place in width.appearances)
    norms = [m for m in width.mixers if m.kind in _NORMS]
    return not tied and all(m.kind == "layer_norm" and m.bias for m in norms)


def _feeds_itself(width: Width) -> bool:
    """Whether what one norm over the width puts out is normalised by another one."""
    return any(m.kind == "layer_norm" and m.centred == "evenly" for m in width.mixers)


def _norm_tensors(width: Width) -> tuple[set[str], set[str]]:
    """Names of the scales and of the shifts of the norms over a width."""
    weights, biases = set[str](), set[str]()
    for mixer in width.mixers:
        if mixer.kind not in _NORMS:
            continue
        weights |= scales_of(width, mixer)
        biases |= mixer.bias
    return weights, biases


def _query_positions(width: Width, place: Appearance) -> tuple[int, ...]:
    """Positions of the left operand of the dot product inside this dimension."""
    return tuple(
        position
        for mixer in width.mixers
        for side in mixer.sides[0]
        if (side.tensor, side.dim) == (place.tensor, place.dim) and not side.factor
        for position in side.positions
    )


def widened(
    axes: AxisMap, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> tuple[tuple[WidthStep, ...], tuple[AttributeEdit, ...]]:
    """Steps and attributes that bring several widths to sizes of their own, exactly.

    Raises:
        EditError: one of them cannot grow exactly.
    """
    drawing, steps = Drawing(axes), list[WidthStep]()
    for name, size in sizes.items():
        problem = stiff(axes, tensors, name)
        if problem is not None:
            raise problem
        step = _step(drawing, drawing.width(name), size)
        drawing.record(step)
        steps.append(step)
    return tuple(steps), (*drawing.attributes(axes), *_epsilons(axes, steps))


def stiff(axes: AxisMap, tensors: Mapping[str, Tensor], name: str) -> EditError | None:
    """Why a width cannot grow exactly by random units with silent readers; None if it can."""
    width = axes.widths[name]
    problems = Widen(name, by=width.multiple).check(axes)
    return problems[0] if problems else _uneven(width, tensors) if tensors else None


def _epsilons(axes: AxisMap, steps: Sequence[WidthStep]) -> list[AttributeEdit]:
    """Epsilon is added to a mean over more entries now: it shrinks with that mean."""
    values: dict[tuple[str, str], float] = {}
    for step in steps:
        shrink = axes.widths[step.width].size / len(step.positions)
        norms = [m for m in axes.widths[step.width].mixers if m.kind in _NORMS and m.eps_attribute]
        # A norm that is called twice shrinks once; for two widths (heads and their size) twice.
        for held, eps in {(m.module, m.eps_attribute): m.eps for m in norms}.items():
            values[held] = values.get(held, eps) * shrink
    return [AttributeEdit(module, name, value) for (module, name), value in values.items()]


def _scalings(
    width: Width, size: int, kinds: set[str], offsets: Mapping[str, float]
) -> tuple[Scaling, ...]:
    # k silent entries lower the mean square of d entries by d / (d + k).
    factor = sqrt(width.size / size)
    norms = sorted(_norm_tensors(width)[0]) if kinds & _NORMS else ()
    scaled = [Scaling(name, factor, offset=offsets.get(name, 0.0)) for name in norms]
    return (*scaled, *query_scalings(width, size))
