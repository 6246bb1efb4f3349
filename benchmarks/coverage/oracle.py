"""Two numerical oracles for an axis map, by plain indexing and without the rooms that edit.

*Silent units*: units that nothing reads are taken out; the outputs stay. *Permutation*: the units
of a width change their order everywhere; the outputs stay, whatever norms or softmaxes mix over
them. A map that ties wrong positions together, misses a tensor, or takes a dimension with a
positional meaning for a width fails one of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from benchmarks.coverage.outputs import Args, Kwargs, difference, run
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuroexapt.couple import AxisMap, Width, leaves, size_of, source_index, unit_of

Positions = NDArray[np.int64]
Order = Mapping[str, Positions]
# Largest relative difference in double precision, and for models that refuse it.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


@dataclass(frozen=True)
class Verdict:
    """What an oracle found.

    Attributes:
        checked: number of widths it looked at.
        wrong: per width that failed the largest relative difference, or the error.
    """

    checked: int
    wrong: Mapping[str, str]


Make = Callable[[], nn.Module]


def permutation(make: Make, axes: AxisMap, args: Args, kwargs: Kwargs) -> Verdict:
    """Change the order of the units of every width.

    Args:
        make: makes the model, always with the same weights.
        axes: its map.
        args: positional example input.
        kwargs: keyword example input.
    """
    orders = {width.name: _shuffled(width) for width in axes.widths.values() if width.size > 1}
    return _judge(orders, Exam(make, axes, args, kwargs).permuted)


def silent_units(make: Make, axes: AxisMap, args: Args, kwargs: Kwargs) -> Verdict:
    """Take a quarter of the units out of every width that no operator mixes over."""
    widths = [w for w in axes.widths.values() if w.size > w.multiple and not w.mixers]
    kept = {width.name: _three_quarters(width) for width in widths}
    return _judge(kept, Exam(make, axes, args, kwargs).thinned)


def _random(width: Width) -> np.random.Generator:
    """Seeded by name: were the orders of equal sizes equal, a mix-up would not show."""
    return np.random.default_rng(zlib.crc32(width.name.encode()))


def _shuffled(width: Width) -> Positions:
    """A permutation that moves every unit: a cycle through all of them."""
    cycle = _random(width).permutation(width.size)
    order = np.empty(width.size, dtype=np.int64)
    order[cycle] = np.roll(cycle, 1)
    return order


def _three_quarters(width: Width) -> Positions:
    """What stays, in order, when a quarter of the units or the least that is allowed goes."""
    least = max(1, width.size // 4)
    number = -(-least // width.multiple) * width.multiple
    gone = _random(width).permutation(width.size)[:number]
    return np.setdiff1d(np.arange(width.size, dtype=np.int64), gone)


def _judge(orders: Order, measure: Callable[[Order], str | None]) -> Verdict:
    """All widths at once, then each half of them; if one fails, each alone, to name the wrong ones.

    Halves, because two widths of two units have one permutation only and could hide each other.
    """
    names = sorted(orders, key=lambda name: zlib.crc32(name.encode()))
    rounds = [part for part in (names, names[::2], names[1::2]) if part]
    found = [measure({name: orders[name] for name in part}) for part in rounds]
    failed = next((text for text in found if text is not None), None)
    if failed is None:
        return Verdict(len(orders), {})
    alone = {name: measure({name: order}) for name, order in orders.items()}
    wrong = {name: text for name, text in alone.items() if text is not None}
    return Verdict(len(orders), wrong or {"several widths together": failed})


class Exam:
    """A model in double precision where it allows that, with its outputs.

    Each look takes a fresh one: some models keep what they computed from their weights.
    """

    def __init__(self, make: Make, axes: AxisMap, args: Args, kwargs: Kwargs) -> None:
        self.axes = axes
        self.tolerance = TOLERANCE[torch.float64]
        self.make: Make = lambda: make().double()
        self.args, self.kwargs = _doubled((args, dict(kwargs)))
        try:
            self.outputs = self._run(self.make())
        except (RuntimeError, ValueError, TypeError):
            self.tolerance = TOLERANCE[torch.float32]
            self.make, self.args, self.kwargs = make, args, dict(kwargs)
            self.outputs = self._run(self.make())

    def permuted(self, orders: Order) -> str | None:
        """What differs when units change their order; None if nothing does."""
        model = self.make()
        reindex(model, self.axes, orders)
        return self._compare(model, self.outputs)

    def thinned(self, kept: Order) -> str | None:
        """What differs when silent units are taken out; None if nothing does."""
        before = self._run(self._silenced(kept))
        model = self._silenced(kept)
        reindex(model, self.axes, kept)
        return self._compare(model, before)

    def _silenced(self, kept: Order) -> nn.Module:
        model = self.make()
        for name, order in kept.items():
            silence(model, self.axes, self.axes.widths[name], order)
        return model

    def _run(self, model: nn.Module) -> list[Tensor]:
        return run(model, self.args, self.kwargs)

    def _compare(self, model: nn.Module, before: list[Tensor]) -> str | None:
        try:
            gap = difference(self._run(model), before)
        except Exception as error:  # whatever user code raises is the finding
            return f"{type(error).__name__}: {error}"[:300]
        return None if gap <= self.tolerance else f"relative difference {gap:.1e}"


def _doubled(example: Any) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t.clone(), example
    )


def silence(model: nn.Module, axes: AxisMap, width: Width, kept: Positions) -> None:
    """Zero what reads the units that are not kept."""
    tensors = _named(model)
    for place in width.appearances:
        if "consumer" in place.roles:
            units = unit_of(axes.tensors[place.tensor][place.dim], width.name)
            at = np.flatnonzero((units >= 0) & ~np.isin(units, kept))
            with torch.no_grad():
                tensors[place.tensor].index_fill_(place.dim, torch.from_numpy(at), 0)


def reindex(model: nn.Module, axes: AxisMap, orders: Order) -> None:
    """Give each width named the units of ``orders``, in every tensor and number that has it."""
    made: dict[int, Tensor] = {}
    for name, tensor in _named(model).items():
        new = made.setdefault(id(tensor), _indexed(tensor, axes, name, orders))
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        held: dict[str, Any] = module._parameters
        held = held if leaf in held else module._buffers
        held[leaf] = new
    sizes = {name: len(order) for name, order in orders.items()}
    for bound in axes.attributes:
        if _names(leaf.name for expr in bound.exprs for leaf in leaves(expr)) & sizes.keys():
            values = tuple(size_of(expr, sizes) for expr in bound.exprs)
            _put(
                model.get_submodule(bound.module),
                bound.name.split("."),
                values if bound.is_tuple else values[0],
            )


def _put(holder: Any, way: list[str], value: Any) -> Any:
    """The holder with a value at the end of a way through objects, dictionaries and sequences."""
    if not way:
        return value
    step, *rest = way
    if isinstance(holder, tuple):
        at = int(step)
        return (*holder[:at], _put(holder[at], rest, value), *holder[at + 1 :])
    if isinstance(holder, list):
        holder[int(step)] = _put(holder[int(step)], rest, value)
    elif isinstance(holder, dict):
        holder[step] = _put(holder[step], rest, value)
    else:
        setattr(holder, step, _put(getattr(holder, step), rest, value))
    return holder


def _names(names: Iterable[str]) -> set[str]:
    return set(names)


def _indexed(tensor: Tensor, axes: AxisMap, name: str, orders: Order) -> Tensor:
    result = tensor.detach()
    for dim, expr in enumerate(axes.tensors[name]):
        if _names(leaf.name for leaf in leaves(expr)) & orders.keys():
            index = torch.from_numpy(source_index(expr, orders))
            result = result.index_select(dim, index)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(result, requires_grad=tensor.requires_grad)
    return result


def _named(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors
