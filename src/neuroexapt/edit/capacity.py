"""IncreaseCapacity: width and depth grow together, to a number of parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from neuroexapt.capture.flops import batch_of
from neuroexapt.couple import AxisMap, Expr, Product, leaves, size_of
from neuroexapt.edit.amount import Amounts
from neuroexapt.edit.base import Edit
from neuroexapt.edit.branches import Spec
from neuroexapt.edit.doors import ROOT
from neuroexapt.edit.insert import ConvSpec, InsertConv
from neuroexapt.edit.layer import InsertLayer, MlpSpec
from neuroexapt.edit.patch import Insertion, Patch
from neuroexapt.edit.places import output_of
from neuroexapt.edit.widen import stiff, widened
from neuroexapt.errors import EditError

_ACTIVATIONS = {
    *("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish"),
    *("Hardswish", "Tanh", "Sigmoid", "Softplus"),
}


@dataclass(frozen=True)
class Place:
    """Where a new layer can stand: an insertion, and what its number of channels is made of."""

    insertion: Insertion
    channels: Expr
    positions: int

    def sized(self, sizes: Mapping[str, int], seed: int) -> Insertion:
        """The insertion for other sizes of the widths."""
        spec, channels = self.insertion.spec, size_of(self.channels, sizes)
        if isinstance(spec, ConvSpec):
            return replace(self.insertion, spec=replace(spec, channels=channels, seed=seed))
        assert isinstance(spec, MlpSpec)
        spec = replace(spec, features=channels, hidden=channels, seed=seed)
        return replace(self.insertion, spec=spec)


@dataclass(frozen=True)
class Growth:
    """A model's sizes after growing: those of its widths, and its new layers."""

    sizes: Mapping[str, int]
    insertions: tuple[Insertion, ...]
    parameters: int
    flops: int


@dataclass(frozen=True)
class IncreaseCapacity(Edit):
    """Grow width and depth together until the model has ``factor`` times its parameters.

    One number says how much, as in EfficientNet: with ``depth=0.5`` half of the growth (on a
    logarithmic scale) goes into new layers and half into wider ones. All widths that can grow
    exactly grow by one ratio; of several that make up one dimension (heads and their size) only
    one does. New layers are zero-gated residual convolutions, or residual MLPs where features
    come last, spread evenly behind blocks and activations. Which sizes fit is found by a search
    over the map: arithmetic, nothing is run.

    Promise: exact. Parameters come out within ``tolerance`` of ``factor`` times those before,
    and never above a limit; otherwise the edit is refused with the nearest that can be reached.

    Args:
        factor: parameters after beside parameters before, above 1.
        depth: share of the growth that goes into depth, 0 to 1.
        parameters: upper limit on the parameters after.
        flops: upper limit on the FLOPs of one sample's forward after.
        tolerance: how far from the target the parameters may end, relative to the target.
        seed: seed of the new layers' random weights.

    Raises:
        EditError: from :meth:`plan`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import IncreaseCapacity, apply
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
        ...                     nn.Linear(32, 4))
        >>> done = apply(net, IncreaseCapacity(2.0), (torch.randn(5, 8),))
        >>> done.parameters_before, abs(done.parameters_after / done.parameters_before - 2) < 0.1
        (1476, True)
        >>> done.max_difference < 1e-6
        True

    Tan and Le 2019 (EfficientNet) for compound scaling; Chen et al. 2016 (Net2Net) for growing
    a trained network.
    """

    factor: float
    depth: float = 0.5
    parameters: int | None = None
    flops: int | None = None
    tolerance: float = 0.05
    seed: int = 0

    @property
    def place(self) -> str:
        return ""

    def check(self, axes: AxisMap) -> list[EditError]:
        """Numbers out of range; nothing that can grow; limits and targets that cannot be met.

        Widths whose norms' scales have grown apart may be found only when it is planned.
        """
        problems = self._wrong_numbers()
        if problems:
            return problems
        try:
            self.search(axes, {})
        except EditError as error:
            return [error]
        return []

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """Widths one after the other, then the new layers in the widths' new sizes."""
        problems = self._wrong_numbers()
        if problems:
            raise problems[0]
        found = self.search(axes, tensors)
        steps, attributes = widened(axes, tensors, found.sizes)
        before = Amounts(axes).parameters({})
        ratios = [n / axes.widths[name].size for name, n in found.sizes.items()]
        wider = f"{len(ratios)} widths by {min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        deeper = f"{len(found.insertions)} new layers" if found.insertions else ""
        text = (
            f"grow from {before:,} to {found.parameters:,} parameters: "
            f"{', '.join(filter(None, (wider, deeper)))}"
        )
        return Patch(self, "exact", text, steps, attributes=attributes, insertions=found.insertions)

    def _wrong_numbers(self) -> list[EditError]:
        numbers = (
            ("factor", self.factor, _is_number(self.factor) and self.factor > 1, "above 1"),
            ("depth", self.depth, _is_number(self.depth) and 0 <= self.depth <= 1, "from 0 to 1"),
            (
                "tolerance",
                self.tolerance,
                _is_number(self.tolerance) and 0 < self.tolerance < 1,
                "between 0 and 1",
            ),
            *(
                (name, limit, limit is None or (isinstance(limit, Integral) and limit > 0), "whole")
                for name, limit in (("parameters", self.parameters), ("flops", self.flops))
            ),
        )
        return [
            EditError(
                ROOT,
                seen=f"{name}={value!r}",
                needed=f"a number {needed}" if needed != "whole" else "a positive whole number",
                next_step=f"pass another {name}",
            )
            for name, value, good, needed in numbers
            if not good
        ]

    def search(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Growth:
        """The sizes nearest to the depth asked for whose parameters are near the target.

        Raises:
            EditError: there are none.
        """
        amounts, widths = Amounts(axes), _widths(axes, tensors)
        places = list(_places(axes)) if self.depth > 0 else []
        if not widths and not places:
            raise EditError(
                ROOT,
                seen="no width that can grow exactly, and no place for a new layer",
                needed="one of them",
                next_step="see `map_axes(...).widths`, and why Widen refuses them",
            )
        before = amounts.parameters({})
        target = self.factor * before
        wanted = round(_layers(axes) * (self.factor**self.depth - 1)) if places else 0
        if self.depth > 0 and places:
            wanted = max(1, wanted)
        most = 2 * wanted + 1 if widths else _MOST_LAYERS
        best: Growth | None = None
        for count in sorted(range(most + 1 if places else 1), key=lambda n: abs(n - wanted)):
            found = self._grown(_Search(amounts, widths, _spread(places, count), self.seed), target)
            if found is None:
                continue
            if abs(found.parameters - target) <= self.tolerance * target:
                return found
            if best is None or abs(found.parameters - target) < abs(best.parameters - target):
                best = found
        raise self._unmet(amounts, best, target)

    def _grown(self, search: _Search, target: float) -> Growth | None:
        """The widest that fits, or None where the new layers alone are too much."""
        most = int(target * (1 + self.tolerance / 2))
        most = most if self.parameters is None else min(most, self.parameters)

        def fits(growth: Growth) -> bool:
            return growth.parameters <= most and (self.flops is None or growth.flops <= self.flops)

        found = search.at(1.0)
        if not fits(found):
            return None
        low, high = 1.0, 1.0 + self.factor
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            trial = search.at(middle)
            if fits(trial) and trial.parameters <= target:
                low, found = middle, trial
            else:
                high = middle
        for larger in search.one_more(found):
            if fits(larger) and abs(larger.parameters - target) < abs(found.parameters - target):
                return larger
        return found if found.sizes or found.insertions else None

    def _unmet(self, amounts: Amounts, best: Growth | None, target: float) -> EditError:
        before, limits = amounts.parameters({}), []
        if self.parameters is not None:
            limits.append(f"at most {self.parameters:,} parameters")
        if self.flops is not None:
            limits.append(f"at most {self.flops:,} FLOPs (now {amounts.flops({}):,})")
        bound = f", {' and '.join(limits)}" if limits else ""
        if best is None:
            seen = f"{before:,} parameters, and nothing larger that can be reached"
            step = "raise the limit or the factor"
        else:
            seen = f"{before:,} parameters; the nearest that can be reached is {best.parameters:,}"
            step = f"use factor={best.parameters / before:.3g}, or a larger tolerance or limit"
        needed = f"{target:,.0f} within {self.tolerance:.0%}{bound}"
        return EditError(ROOT, seen=seen, needed=needed, next_step=step)


_HALVINGS = 24
_MOST_LAYERS = 64  # tried where no width can make up the rest


@dataclass(frozen=True)
class _Search:
    """Sizes for one choice of new layers."""

    amounts: Amounts
    widths: tuple[str, ...]
    places: Sequence[Place]
    seed: int

    def at(self, ratio: float) -> Growth:
        """Every width times a ratio, rounded to what its kernels take."""
        sizes = {}
        for name in self.widths:
            width = self.amounts.axes.widths[name]
            size = round(width.size * ratio / width.multiple) * width.multiple
            if size > width.size:
                sizes[name] = size
        return self._growth(sizes)

    def one_more(self, growth: Growth) -> Iterator[Growth]:
        """The growth with one step more in some widths, those that lag behind first."""
        axes = self.amounts.axes
        sizes = dict(growth.sizes)
        now = {name: sizes.get(name, axes.widths[name].size) for name in self.widths}
        grown = []
        for name in sorted(self.widths, key=lambda n: now[n] / axes.widths[n].size):
            grown.append(self._growth({**sizes, name: now[name] + axes.widths[name].multiple}))
        yield from sorted(grown, key=lambda one: -one.parameters)

    def _growth(self, sizes: Mapping[str, int]) -> Growth:
        insertions = tuple(
            place.sized(sizes, self.seed + number) for number, place in enumerate(self.places)
        )
        parameters, flops = self.amounts.parameters(sizes), self.amounts.flops(sizes)
        batch = batch_of(self.amounts.axes.traces[0])
        for place, insertion in zip(self.places, insertions, strict=True):
            shapes = _shapes(replace(insertion.spec, seed=0))
            parameters += sum(prod(shape) for shape in shapes)
            weights = sum(prod(shape) for shape in shapes if len(shape) > 1)
            flops += 2 * weights * place.positions // batch
        return Growth(sizes, insertions, parameters, flops)


@functools.lru_cache(maxsize=1024)
def _shapes(spec: Spec) -> tuple[torch.Size, ...]:
    """Of the parameters that will be made; none of them is."""
    with torch.device("meta"):
        made = spec.make(nn.Identity())
    return tuple(parameter.shape for parameter in made.parameters())


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _layers(axes: AxisMap) -> int:
    """How many weights make a width: the depth that new layers add to."""
    makers = {
        place.tensor
        for width in axes.widths.values()
        for place in width.appearances
        if "producer" in place.roles
    }
    return len(makers)


def _widths(axes: AxisMap, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The widths that grow: one of those that make up a dimension together."""
    able = {name for name in axes.widths if stiff(axes, tensors, name) is None}
    held, chosen = set[str](), set[str]()
    for dims in axes.tensors.values():
        for expr in dims:
            for product in _products(expr):
                parts = [
                    leaf.name
                    for part in product.parts
                    for leaf in leaves(part)
                    if leaf.name in able
                ]
                parts = [name for name in dict.fromkeys(parts) if name not in held]
                if len(parts) > 1:
                    first = min(parts, key=lambda n: (n not in chosen, _is_head_size(axes, n)))
                    chosen.add(first)
                    held.update(name for name in parts if name != first)
    return tuple(name for name in axes.widths if name in able - held)


def _is_head_size(axes: AxisMap, name: str) -> bool:
    """Kernels like a head size as it is: heads grow in number instead."""
    return any(mixer.kind == "dot" for mixer in axes.widths[name].mixers)


def _products(expr: Expr) -> Iterator[Product]:
    if isinstance(expr, Product):
        yield expr
    for part in getattr(expr, "parts", ()):
        yield from _products(part)


def _places(axes: AxisMap) -> Iterator[Place]:
    """Behind blocks that hold several layers, else behind activations and single layers."""
    once = [
        path
        for path in axes.modules
        if path and all([r.path for r in t.runs].count(path) == 1 for t in axes.traces)
    ]
    blocks = [path for path in once if _is_block(axes, path)]
    inner = [path for path in blocks if not any(p.startswith(f"{path}.") for p in blocks)]
    active = [path for path in once if axes.kinds.get(path) in _ACTIVATIONS]
    for paths in (inner, active, once):
        found = [place for path in paths if (place := _place(axes, path)) is not None]
        if found:
            yield from found
            return


def _is_block(axes: AxisMap, path: str) -> bool:
    """A module that stands in a list, holds two layers or more, and hands on what it was given."""
    last = path.rpartition(".")[2]
    weights = [n for n in axes.parameters if n.startswith(f"{path}.") and len(axes.tensors[n]) > 1]
    doors = axes.modules[path]
    same = bool(doors.inputs and doors.outputs) and doors.inputs[0] == doors.outputs[0]
    return last.isdigit() and len(weights) > 1 and same


def _place(axes: AxisMap, path: str) -> Place | None:
    for edit in (InsertConv(path), InsertLayer(path)):
        if not edit.check(axes):
            output = output_of(axes, path)
            channels = output.dims[output.channel]
            if any(leaf.name in axes.widths for leaf in leaves(channels)):
                insertion = edit.plan(axes, {}).insertions[0]
                positions = prod(output.sizes) // output.channels
                return Place(insertion, channels, positions)
    return None


def _spread(places: Sequence[Place], count: int) -> list[Place]:
    """So many of the places, as evenly as can be; several at one where there are not enough."""
    return [places[(2 * n + 1) * len(places) // (2 * count)] for n in range(count)]
