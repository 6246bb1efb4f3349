"""Measure a model at one moment: what each unit is worth, what new weights would earn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuroexapt.capture import capture
from neuroexapt.capture.attributes import Attribute
from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import AxisMap, Leaf, Width, leaves, size_of, source_index
from neuroexapt.edit import Edit, InsertConv, Patch, Widen, is_branch
from neuroexapt.guard import Transaction
from neuroexapt.measure import (
    Batch,
    LossFn,
    Reading,
    activations,
    batch_size_of,
    flops_of,
    gate_slopes,
    gradients,
    growth_gain,
    read_duplicate_units,
    read_effective_rank,
    removal_loss,
    slopes,
    undisturbed,
)
from neuroexapt.plan import GrowOption, ShrinkOption, Survey, WidthSurvey

_SHRINK = (0.125, 0.25, 0.5)  # shares of a width that a proposal may remove
_SMALL = 16  # a width up to this size doubles when it grows; a larger one gains half


@dataclass(frozen=True)
class Surveyor:
    """Everything a survey needs; it leaves the model as it was.

    Args:
        model: the model, unwrapped.
        optimizer: the optimizer that trains it.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batches: at least four held-out batches; signals come from these.
        example: positional and keyword example input.
        axes: the model's present map.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    loss_fn: LossFn
    batches: Sequence[Batch]
    example: tuple[tuple[Any, ...], Mapping[str, Any]]
    axes: AxisMap
    seed: int = 0
    _per_unit: dict[str, float] = field(default_factory=dict)

    def take(self) -> Survey:
        """The survey of this moment."""
        with undisturbed(self.model):
            self.model.eval()
            beside = self.existing_slopes()
            removal = self._removal()
            acts = self._activations()
            flops = flops_of(self.axes.traces[0])
            widths = tuple(
                self._width(self.axes.widths[name], *pair, acts.get(name), flops)
                for name, pair in removal.items()
            )
            grow = tuple(self._growth(flops, beside))
        return Survey(self._parameters({}), flops, widths, grow)

    def existing_slopes(self) -> Tensor:
        """What the parameters that are there already promise on each signal batch."""
        rows = [
            torch.cat([grad.reshape(-1).float().cpu() for grad in grads.values()])
            for grads in gradients(self.model, self.loss_fn, self.batches)
        ]
        return slopes(torch.stack(rows), batch_size_of(self.batches[0]))

    def _parameters(self, sizes: Mapping[str, int]) -> int:
        return sum(
            prod(size_of(expr, sizes) for expr in self.axes.tensors[name])
            for name in self.axes.parameters
        )

    def _removal(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per width the expected loss increase of removing each unit, and its error."""
        size = batch_size_of(self.batches[0])
        slopes_MU = gate_slopes(self.model, self.loss_fn, self.batches, self.axes)
        return {name: removal_loss(rows_MU, size) for name, rows_MU in slopes_MU.items()}

    def _activations(self) -> dict[str, Tensor]:
        """Per width the outputs of the module that makes it, where one dimension is the width."""
        wanted, dims = {}, {}
        for width in self.axes.widths.values():
            found = self.maker(width)
            if found is not None:
                wanted[width.name], dims[found[0]] = found[0], found[1]
        if not wanted:
            return {}
        batches = self.batches[:4]
        acts = activations(self.model, self.loss_fn, batches, list(dims), channel_dim=dims)
        return {name: acts[path] for name, path in wanted.items() if path in acts}

    def maker(self, width: Width) -> tuple[str, int] | None:
        for place in width.appearances:
            path = place.tensor.rpartition(".")[0]
            if "producer" in place.roles and path in self.axes.modules:
                for tensor in self.axes.modules[path].outputs[:1]:
                    for dim, expr in enumerate(tensor):
                        if isinstance(expr, Leaf) and expr.name == width.name:
                            return path, dim
        return None

    def _width(
        self, width: Width, removal: Tensor, error: Tensor, acts: Tensor | None, flops: int
    ) -> WidthSurvey:
        readings: list[Reading] = []
        if acts is not None:
            readings = [
                read_effective_rank(acts, width.name),
                read_duplicate_units(acts, width.name),
            ]
        return WidthSurvey(
            width.name,
            width.size,
            tuple(float(value) for value in removal),
            tuple(float(value) for value in error),
            tuple(readings),
            tuple(self._shrinking(width, flops)),
        )

    def _shrinking(self, width: Width, flops: int) -> Iterator[ShrinkOption]:
        """Smaller sizes and what they save."""
        per_unit = self._unit_flops(width, flops)
        for to in sorted({max(1, int(width.size * (1 - share))) for share in _SHRINK}):
            if to < width.size:
                saved = self._parameters({width.name: to}) - self._parameters({})
                yield ShrinkOption(to, saved, -int(per_unit * (width.size - to)))

    def _unit_flops(self, width: Width, flops: int) -> float:
        """FLOPs of one unit, read off one run at another size: exact for all but square layers."""
        if width.name not in self._per_unit:
            other = max(1, width.size // 2) if width.size > 1 else 2
            difference = flops - self._flops_at({width.name: other})
            self._per_unit[width.name] = difference / (width.size - other)
        return self._per_unit[width.name]

    def _flops_at(self, sizes: Mapping[str, int]) -> int:
        shapes = {
            name: tuple(size_of(expr, sizes) for expr in dims)
            for name, dims in self.axes.tensors.items()
        }
        values: dict[Attribute, Any] = {}
        for attribute in self.axes.attributes:
            if any(leaf.name in sizes for expr in attribute.exprs for leaf in leaves(expr)):
                now = tuple(size_of(expr, sizes) for expr in attribute.exprs)
                key = Attribute(attribute.module, attribute.name)
                values[key] = now if attribute.is_tuple else now[0]
        args, kwargs = self.example
        trace = capture(self.model, args, kwargs, shapes=shapes, attributes=values)
        return flops_of(trace)

    def _growth(self, flops: int, beside: Tensor) -> Iterator[GrowOption]:
        for edit in self._growing_edits():
            option = self.growth_of(edit, flops, beside)
            if option is not None:
                yield option

    def _growing_edits(self) -> Iterator[Edit]:
        """One wider size of each width, and a convolution behind each activation with space."""
        for width in self.axes.widths.values():
            added = width.size if width.size <= _SMALL else width.size // 2
            yield Widen(width.name, by=added)
        for path, module in self.model.named_modules():
            original = not any(is_branch(part) for part in path.split("."))
            if original and path in self.axes.modules and isinstance(module, _ACTIVATIONS):
                yield InsertConv(path, seed=self.seed)

    def growth_of(self, edit: Edit, flops: int, beside: Tensor) -> GrowOption | None:
        """Make the edit, read the gradients of what is new, take it back."""
        if edit.check(self.axes):
            return None
        patch = edit.plan(self.axes, named_tensors(self.model))
        staged = Transaction(self.model, self.optimizer)
        before = {name for name, _ in self.model.named_parameters()}
        try:
            staged.stage(patch)
            rows = self._new_gradients(patch, before)
            added_flops = self._added_flops(patch, flops)
            parameters = sum(p.numel() for p in self.model.parameters()) - self._parameters({})
        finally:
            staged.roll_back()
        if rows is None:
            return None
        size = batch_size_of(self.batches[0])
        gain, error = growth_gain(rows, size, beside_M=beside)
        reading = Reading("growth_gain", edit.place, gain, "nats", error, len(rows))
        return GrowOption(edit, gain, error, parameters, added_flops, (reading,))

    def _added_flops(self, patch: Patch, flops: int) -> int:
        if patch.insertions:
            args, kwargs = self.example
            return flops_of(capture(self.model, args, kwargs)) - flops
        widths = [(self.axes.widths[step.width], len(step.positions)) for step in patch.steps]
        return int(sum(self._unit_flops(w, flops) * (size - w.size) for w, size in widths))

    def _new_gradients(self, patch: Patch, before: set[str]) -> Tensor | None:
        """(M, P): per micro-batch the gradients of the P new entries that receive any."""
        named = dict(self.model.named_parameters())
        masks = {
            name: _new_entries(patch, name, p)
            for name, p in named.items()
            if (p.requires_grad and (name in patch.tensors or name not in before))
        }
        rows = [
            torch.cat([grads[name][mask].reshape(-1) for name, mask in masks.items()])
            for grads in gradients(self.model, self.loss_fn, self.batches, only=set(masks))
        ]
        stacked = torch.stack(rows).float().cpu()
        alive = stacked.abs().sum(0) > 0
        return stacked[:, alive] if bool(alive.any()) else None


_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU)


def _new_entries(patch: Patch, name: str, parameter: Tensor) -> Tensor:
    """True where an entry is new; everywhere for a parameter of an inserted module."""
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    resized = False
    for step in patch.steps:
        for edit in step.dims:
            if edit.tensor == name:
                resized = True
                positions = np.asarray(step.positions, dtype=np.int64)
                index = source_index(edit.expr, {step.width: positions})
                where = torch.from_numpy(np.flatnonzero(index < 0))
                mask.index_fill_(edit.dim, where, True)
    return mask if resized else ~mask
