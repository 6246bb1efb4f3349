"""Measure which widths of a model hold back what enters them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from neuroexapt.couple import AxisMap, Width, map_axes
from neuroexapt.edit import Squeeze, Widen
from neuroexapt.guard import inner_module
from neuroexapt.measure import (
    Batch,
    LossFn,
    activations,
    effective_rank,
    flops_of,
    undisturbed,
)
from neuroexapt.train.survey import Surveyor


def read_squeezes(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    axes: AxisMap | None = None,
) -> tuple[Squeeze, ...]:
    """The readings that :class:`~neuroexapt.ExpandBottleneck` decides by.

    For each width whose makers can be observed: effective rank of its units' activations, and of
    what enters the layer that makes it (over channels: the taps of a kernel are not counted; of
    several makers, as a residual stream has, the richest counts); for widths that are nearly
    full, the growth gain of widening them. The model, its gradients and the random numbers are
    left as they were.

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batches: at least four batches, better ones the model was not trained on.
        args: positional example input.
        kwargs: keyword example input.
        axes: the model's present map, if the caller has it.

    Raises:
        CaptureError, MeasureError: the model cannot be mapped, or the loss not measured.

    Example:
        >>> import torch
        >>> seeded = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> batches = [torch.randn(64, 8) for _ in range(4)]
        >>> readings = read_squeezes(net, lambda m, x: m(x).square().mean(), batches, (batches[0],))
        >>> [(one.width, one.size, round(one.entering)) for one in readings]
        [('0.out', 2, 8), ('1.out', 8, 2)]
    """
    inner = inner_module(model)
    axes = axes or map_axes(inner, args, kwargs)
    example = (args, dict(kwargs or {}))
    surveyor = Surveyor(inner, None, loss_fn, batches, example, axes)
    with undisturbed(inner):
        inner.eval()
        return tuple(_read(surveyor))


_FULL = 0.5  # where less of a width is in use, nobody asks what more of it would bring


def _read(surveyor: Surveyor) -> Iterator[Squeeze]:
    axes, widths = surveyor.axes, surveyor.axes.widths.values()
    outer: dict[str, tuple[str, int]] = {}
    inner: dict[str, dict[str, int]] = {}
    for width in widths:
        maker, sources = surveyor.maker(width), dict(_sources(axes, width))
        if maker is not None and sources:
            outer[width.name], inner[width.name] = maker, sources
    made = _ranks(surveyor, dict(outer.values()), entering=False)
    came = _ranks(surveyor, {p: d for one in inner.values() for p, d in one.items()}, entering=True)
    beside = surveyor.existing_slopes()
    flops = flops_of(axes.traces[0])
    for name, (path, _) in outer.items():
        entering = [came[source] for source in inner[name] if source in came]
        if path not in made or not entering:
            continue
        size, gain, error = axes.widths[name].size, None, 0.0
        if made[path] >= _FULL * size:
            edit = Widen(name, by=max(axes.widths[name].multiple, size))
            option = surveyor.growth_of(edit, flops, beside)
            gain, error = (option.gain, option.error) if option else (None, 0.0)
        yield Squeeze(name, size, made[path], max(entering), gain, error)


def _ranks(surveyor: Surveyor, dims: Mapping[str, int], *, entering: bool) -> dict[str, float]:
    """Effective rank of what each module puts out, or takes in."""
    if not dims:
        return {}
    found = activations(
        surveyor.model,
        surveyor.loss_fn,
        surveyor.batches,
        list(dims),
        channel_dim=dims,
        entering=entering,
    )
    return {path: effective_rank(acts) for path, acts in found.items() if len(acts) > 1}


def _sources(axes: AxisMap, width: Width) -> Iterator[tuple[str, int]]:
    """The modules that make a width out of a tensor, and the dimension of it that they read."""
    entries = [*axes.widths.values()]
    pinned = [*axes.pinned.values()]
    places = [p for e in entries for p in e.appearances] + [
        p for e in pinned for p in e.appearances
    ]
    for maker in width.appearances:
        path = maker.tensor.rpartition(".")[0]
        runs = [run for trace in axes.traces for run in trace.runs if run.path == path]
        if "producer" not in maker.roles or not runs or any(r.takes != "tensor" for r in runs):
            continue
        read = {
            axes.tensors[p.tensor][p.dim]
            for p in places
            if p.tensor == maker.tensor and p.dim != maker.dim and "consumer" in p.roles
        }
        for dim, expr in enumerate(axes.modules[path].inputs[0]):
            if dim and expr in read:
                yield path, dim
