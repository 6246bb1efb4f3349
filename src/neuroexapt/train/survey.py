"""Measure a model at one moment: what each unit is worth, what new weights would earn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    HoldoutScore,
    LossFn,
    Reading,
    activations,
    batch_size_of,
    chance_modules,
    evaluate,
    flops_of,
    gate_slopes,
    generalisation_gap,
    gradients,
    growth_gain,
    measuring,
    read_chance,
    read_duplicate_units,
    read_effective_rank,
    removal_loss,
    slopes,
    undisturbed,
)
from neuroexapt.plan import (
    SHARES,
    Chance,
    Fitting,
    GrowOption,
    ShrinkOption,
    SqueezeOption,
    Survey,
    WidthSurvey,
    squeezed,
)

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
        recent: batches it was trained on lately; none if the caller gave none.
        places: how many places of growth are measured, the most saturated ones.
        judged: the held-out loss of the model as it is, if it was measured already.
        young: widths that grew lately, and are left out where several shrink together.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    loss_fn: LossFn
    batches: Sequence[Batch]
    example: tuple[tuple[Any, ...], Mapping[str, Any]]
    axes: AxisMap
    seed: int = 0
    recent: Sequence[Batch] = ()
    places: int | None = None
    judged: HoldoutScore | None = None
    young: frozenset[str] = frozenset()
    _per_unit: dict[str, float] = field(default_factory=dict)

    def fitted(self) -> Survey:
        """How training and held-out data are fitted, if the caller gave training batches."""
        fitting = self._fitting() if self.recent else None
        flops = flops_of(self.axes.traces[0])
        return Survey(self._parameters({}), flops, (), (), fitting=fitting)

    def sized(self, survey: Survey) -> Survey:
        """And what each unit of each width is worth."""
        with undisturbed(self.model):
            measuring(self.model, batch_size_of(self.batches[0]))
            removal = self._removal()
            acts = self._activations()
            widths = tuple(
                self._width(self.axes.widths[name], *pair, acts.get(name), survey.flops)
                for name, pair in removal.items()
            )
            squeeze = tuple(self._squeezes(widths, survey.flops))
        return replace(survey, widths=widths, squeeze=squeeze)

    def grown(self, survey: Survey) -> Survey:
        """And what more of anything would earn."""
        with undisturbed(self.model):
            measuring(self.model, batch_size_of(self.batches[0]))
            grow = tuple(self._growth(survey.flops, survey.widths))
        return replace(survey, grow=grow)

    def _fitting(self) -> Fitting:
        """The gap between held-out and training loss, and what dropout has to do with it."""
        train = evaluate(self.model, self.loss_fn, self.recent, fresh=True)
        holdout = self.judged or evaluate(self.model, self.loss_fn, self.batches, fresh=True)
        dropouts = [
            Chance(_host(path), float(module.p), _kind(module))  # type: ignore[arg-type]
            for path, module in chance_modules(self.model).items()
        ]
        if any(one.p > 0 for one in dropouts):
            chance = read_chance(self.model, self.loss_fn, self.recent)
        else:
            chance = Reading("chance", "model", 0.0, "nats", 0.0, 0)  # nothing drops
        return Fitting(
            generalisation_gap(train, holdout),
            train.loss,
            chance,
            tuple(dropouts),
            tuple(self._hidden()),
        )

    def _hidden(self) -> list[str]:
        """Paths of activations, the last one first: dropout belongs in front of the head."""
        runs = dict.fromkeys(run.path for run in self.axes.traces[0].runs)
        modules = dict(self.model.named_modules())
        found = [path for path in runs if isinstance(modules.get(path), _ACTIVATIONS)]
        return [path for path in reversed(found) if not _is_inserted(path)]

    def _squeezes(self, widths: Sequence[WidthSurvey], flops: int) -> Iterator[SqueezeOption]:
        """Several widths at once, in steps of what they would save."""
        now = self._parameters({})
        widths = [width for width in widths if width.name not in self.young]
        costs = {
            width.name: (now - self._parameters({width.name: width.size - 1})) / now
            + self._unit_flops(self.axes.widths[width.name], flops) / max(1, flops)
            for width in widths
        }
        found = [squeezed(widths, costs, share) for share in SHARES]
        for number, sizes in enumerate(found):
            if len(sizes) > 1 and sizes not in found[:number]:
                saved = self._parameters(sizes) - now
                yield SqueezeOption(tuple(sizes.items()), saved, self._flops_at(sizes) - flops)

    def _chances(self, width: str) -> tuple[tuple[str, float], ...]:
        """The modules that drop single units of a width."""
        found = []
        for path, module in chance_modules(self.model).items():
            inputs = self.axes.modules[path].inputs if path in self.axes.modules else ()
            names = {leaf.name for dims in inputs[:1] for dim in dims for leaf in leaves(dim)}
            if width in names and _kind(module) == "dropout":
                found.append((_host(path), float(module.p)))  # type: ignore[arg-type]
        return tuple(found)

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
            width.multiple,
            width.least,
            self._chances(width.name),
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

    def _growth(self, flops: int, widths: Sequence[WidthSurvey]) -> Iterator[GrowOption]:
        """The gain of each growing edit, or of the most promising of them."""
        edits = list(self._growing_edits())
        if self.places is not None:
            fullness = {width.name: _fullness(width) for width in widths}
            edits.sort(key=lambda edit: -fullness.get(edit.place, 0.0))
            edits = edits[: self.places]
        beside = self.existing_slopes() if edits else torch.zeros(0)
        for edit in edits:
            option = self.growth_of(edit, flops, beside)
            if option is not None:
                yield option

    def _growing_edits(self) -> Iterator[Edit]:
        """One wider size of each width, and a convolution behind each activation with space."""
        for width in self.axes.widths.values():
            added = width.size if width.size <= _SMALL else width.size // 2
            yield Widen(width.name, by=added)
        for path, module in self.model.named_modules():
            if (
                not _is_inserted(path)
                and path in self.axes.modules
                and isinstance(module, _ACTIVATIONS)
            ):
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


def _fullness(width: WidthSurvey) -> float:
    """Effective rank over width; 0 where it was not measured."""
    values = [r.value for r in width.readings if r.signal == "effective_rank"]
    return values[0] / width.size if values else 0.0


def _is_inserted(path: str) -> bool:
    return any(is_branch(part) for part in path.split("."))


def _host(path: str) -> str:
    """What was inserted is spoken of by the module that it was inserted behind."""
    parent, _, name = path.rpartition(".")
    return parent if is_branch(name) else path


def _kind(module: nn.Module) -> str:
    return "stochastic_depth" if type(module).__name__ == "StochasticDepth" else "dropout"


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
