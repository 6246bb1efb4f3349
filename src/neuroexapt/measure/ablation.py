"""What the loss would be without a layer: measured by a skip, one forward a batch.

The judge among removal signals: for `plan`, the rise of the loss of ``RemoveLayer(path)`` before
anything is changed or repaired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture import ModuleRun, TensorRef
from neuroexapt.capture.flow import Flow
from neuroexapt.capture.interrupts import breathe
from neuroexapt.couple import AxisMap
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import (
    Batch,
    LossFn,
    Reading,
    batch_size_of,
    plain_attention,
    scalar_loss,
    undisturbed,
)
from neuroexapt.measure.places import first_floating
from neuroexapt.measure.sampling import module_at


@dataclass(frozen=True)
class Skip:
    """How a module is skipped: its argument ``at`` is its answer, or zeros of that shape."""

    path: str
    at: int | str
    zeros: bool


def skips(axes: AxisMap) -> dict[str, Skip]:
    """Every module with parameters that can be skipped, in the order in which they run.

    One whose output is all that is added to a stream it is computed from gives zeros; any other
    that keeps the shape of an input passes that on. A module that several runs would skip in
    different ways is absent.

    Example:
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU())
        >>> list(skips(map_axes(net, (torch.zeros(2, 3),))))
        ['1']
    """
    found: dict[str, set[Skip | None]] = {}
    for trace in axes.traces:
        flow = Flow(trace)
        for run in sorted(trace.runs, key=lambda run: (run.start, -run.stop)):
            if run.path and any(name.startswith(f"{run.path}.") for name in axes.parameters):
                found.setdefault(run.path, set()).add(_skip(axes, flow, run))
    single = {path: next(iter(ways)) for path, ways in found.items() if len(ways) == 1}
    return {path: way for path, way in single.items() if way is not None}


def _skip(axes: AxisMap, flow: Flow, run: ModuleRun) -> Skip | None:
    out = first_floating(run)
    given: dict[TensorRef, int | str] = {}
    items: list[tuple[int | str, Any]] = [*enumerate(run.args), *run.kwargs.items()]
    for at, value in items:
        if out is not None and isinstance(value, TensorRef) and _alike(value, out):
            given.setdefault(value, at)
    if out is None or not given:
        return None
    inside = range(run.start, run.stop)
    away = {ref: flow.distance(ref, out, inside) for ref in given}
    entry = min(given, key=lambda ref: math.inf if away[ref] is None else away[ref] or 0)
    stream = None
    if out not in run.inputs and _holds_matrix(axes, run.path):
        stream = flow.stream(run, entry, out)
    zeros = stream is not None and flow.distance(stream, entry, range(run.start)) == 0
    return Skip(run.path, given[entry], zeros)


def _alike(one: TensorRef, other: TensorRef) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def _holds_matrix(axes: AxisMap, path: str) -> bool:
    names = (name for name in axes.parameters if name.startswith(f"{path}."))
    return any(len(axes.tensors[name]) > 1 for name in names)


@contextmanager
def skipped(model: nn.Module, skip: Skip) -> Iterator[None]:
    """For the block the module answers without itself; it still runs, so nothing else changes.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> x = torch.ones(1, 2)
        >>> with skipped(net, Skip("0", 0, zeros=False)):
        ...     net(x)
        tensor([[1., 1.]])
    """
    handle = module_at(model, skip.path).register_forward_hook(_answer(skip), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _answer(skip: Skip) -> Callable[[nn.Module, Any, Any, Any], Any]:
    def answer(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        value = args[skip.at] if isinstance(skip.at, int) else kwargs[skip.at]
        given = torch.zeros_like(value) if skip.zeros else value.clone()
        return _replaced(output, given)

    return answer


def _replaced(output: Any, given: Tensor) -> Any:
    """The output with its first floating-point tensor replaced."""
    if isinstance(output, Tensor):
        return given
    if isinstance(output, tuple | list):
        items = list(output)
        at = next(n for n, item in enumerate(items) if isinstance(item, Tensor))
        items[at] = given
        return type(output)(items)
    at = next(key for key, item in output.items() if isinstance(item, Tensor))
    return {**output, at: given}


def ablation_losses(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    axes: AxisMap,
    paths: Collection[str] | None = None,
) -> dict[str, Reading]:
    """Rise of the mean loss, in nats, when a layer is skipped; one reading a layer.

    The same batches with and without the layer, so the error, over the differences by batch, is
    that of the rise and not of the loss. None with one batch. Biased upwards against what
    removing really costs: nothing is repaired, and training goes on afterwards.

    Invariant: as :func:`undisturbed`; evaluation mode. One forward a batch and layer, and one.

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of the batch.
        batches: held-out batches.
        axes: the model's present map.
        paths: modules to skip one at a time; by default all of :func:`skips`.

    Raises:
        MeasureError: no batch, or a module that cannot be skipped.

    Example:
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False)).requires_grad_(False)
        >>> _ = net[0].weight.copy_(3 * torch.eye(2))
        >>> x = torch.ones(4, 2)
        >>> rises = ablation_losses(net, lambda m, x: m(x).mean(), [x, x], map_axes(net, (x,)))
        >>> rises["0"].value, rises["0"].error
        (-2.0, 0.0)

    Gromov et al. 2024 and Men et al. 2024 compare it with proxies, which mislead.
    """
    ways = skips(axes)
    wrong = [path for path in paths or () if path not in ways]
    if wrong or not batches:
        raise MeasureError(
            wrong[0] if wrong else "ablation_losses",
            seen="a module that cannot be skipped" if wrong else "no batch",
            needed=f"one of {', '.join(ways) or 'none in this model'}" if wrong else "a batch",
            next_step="choose a module that keeps the shape of its input",
        )
    chosen = [ways[path] for path in (ways if paths is None else paths)]
    sizes = torch.tensor([batch_size_of(batch) for batch in batches], dtype=torch.float64)
    with undisturbed(model), plain_attention(), torch.no_grad():
        model.eval()
        whole_M = _losses(model, loss_fn, batches)
        rises = {}
        for skip in chosen:
            with skipped(model, skip):
                rises[skip.path] = _losses(model, loss_fn, batches) - whole_M
    return {path: _reading(path, rise_M, sizes) for path, rise_M in rises.items()}


def _losses(model: nn.Module, loss_fn: LossFn, batches: Sequence[Batch]) -> Tensor:
    found = []
    for batch in batches:
        breathe()
        found.append(scalar_loss(loss_fn(model, batch)).item())
    return torch.tensor(found, dtype=torch.float64)


def _reading(path: str, rise_M: Tensor, sizes_M: Tensor) -> Reading:
    weights_M, count = sizes_M / sizes_M.sum(), len(rise_M)
    value = weights_M @ rise_M
    error = None
    if count > 1:
        away = (weights_M * (rise_M - value)).square().sum()
        error = float((count / (count - 1) * away).sqrt())
    return Reading("ablation_loss", path, float(value), "nats", error, int(sizes_M.sum()))
