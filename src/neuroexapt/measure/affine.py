"""The affine map that comes nearest to a module, for the layer that is to absorb it.

Shapes in names: N rows (samples times positions), C units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Batch, LossFn, plain_attention, undisturbed
from neuroexapt.measure.sampling import Reservoir, module_at


@dataclass(frozen=True, eq=False)
class AffineFit:
    """What a layer reads with a module, as ``matrix @ what it reads without + offset``.

    Attributes:
        matrix: shape (units before, units now), float64.
        offset: shape (units before,).
        explained: share of the variance that the fit explains, at most 1.
        samples: rows it was fitted on.
    """

    matrix: Tensor
    offset: Tensor
    explained: float
    samples: int


class _Reached(Exception):
    """The layer that absorbs is about to run: all that matters has been seen."""


def affine_fit(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    at: str,
    into: str,
    *,
    limit: int = 8192,
) -> AffineFit:
    """Fit what a layer reads while a module works to what it reads while it passes its input.

    Everything between the two takes part, an activation too: where the module passes its input,
    the activation gets that input. The fit is the least-squares one over all rows, the one of
    smallest norm where several are best. Invariant: as `undisturbed`; the model runs in
    evaluation mode.

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch)``; its value is not used.
        batches: batches to run, each twice.
        at: path of the module that is to go.
        into: path of the linear or convolution layer that is to absorb it; it runs later.
        limit: most rows kept, a uniform sample.

    Raises:
        MeasureError: an unknown path, a layer that does not run behind the module, inputs
            without a floating-point tensor, or too few rows for a fit.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
        >>> batches = [torch.randn(20, 3, dtype=torch.float64)]
        >>> fit = affine_fit(net, lambda model, x: model(x).mean(), batches, "0", "1")
        >>> torch.allclose(fit.matrix, net[0].weight), round(fit.explained, 6)
        (True, 1.0)
    """
    module, reader = module_at(model, at), module_at(model, into)
    before, now = Reservoir(limit, torch.float64), Reservoir(limit, torch.float64)
    with undisturbed(model), plain_attention(), torch.no_grad():
        model.eval()
        for batch in batches:
            _collect(model, loss_fn, batch, reader, into, before)
            handle = module.register_forward_hook(_passing(at), with_kwargs=True)
            try:
                _collect(model, loss_fn, batch, reader, into, now)
            finally:
                handle.remove()
    return _fitted(into, before.rows_NC, now.rows_NC)


def _collect(
    model: nn.Module, loss_fn: LossFn, batch: Batch, reader: nn.Module, into: str, kept: Reservoir
) -> None:
    def read(_module: nn.Module, args: Any, kwargs: Any) -> None:
        rows = next((t for t in [*args, *kwargs.values()] if isinstance(t, Tensor)), None)
        if rows is None or not rows.is_floating_point() or rows.dim() < 2:
            raise _no_fit(into, "an input without rows of floating-point numbers")
        conv = isinstance(_module, nn.modules.conv._ConvNd)
        kept.add((rows.movedim(1, -1) if conv else rows).flatten(0, -2))
        raise _Reached

    handle = reader.register_forward_pre_hook(read, with_kwargs=True)
    try:
        loss_fn(model, batch)
    except _Reached:
        return
    finally:
        handle.remove()
    raise _no_fit(into, "a layer that does not run")


def _passing(at: str) -> Callable[[nn.Module, Any, Any, Any], Any]:
    """A hook that answers with the module's input: one in the shape of its output, if any."""

    def answer(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        several = isinstance(output, (tuple, list))
        first = output[0] if several else output
        tensors = [t for t in [*args, *kwargs.values()] if isinstance(t, Tensor)]
        if not isinstance(first, Tensor) or not tensors:
            raise _no_fit(at, f"an output of type {type(output).__name__}, or no input")
        alike = [t for t in tensors if (t.shape, t.dtype) == (first.shape, first.dtype)]
        given = [*alike, *tensors][0].clone()
        return type(output)([given, *output[1:]]) if several else given

    return answer


def _fitted(into: str, before_NC: Tensor | None, now_NC: Tensor | None) -> AffineFit:
    if before_NC is None or now_NC is None or len(before_NC) != len(now_NC) or len(now_NC) < 2:
        raise _no_fit(into, "no rows, or other rows without the module than with it")
    if not (before_NC.isfinite().all() and now_NC.isfinite().all()):
        raise _no_fit(into, "values that are not finite")
    centre_C, target_C = now_NC.mean(0), before_NC.mean(0)
    away_NC = before_NC - target_C
    solution = torch.linalg.lstsq(now_NC - centre_C, away_NC, driver="gelsd").solution
    left = (away_NC - (now_NC - centre_C) @ solution).square().sum()
    total = away_NC.square().sum()
    explained = 1.0 if total == 0 else 1.0 - float(left / total)
    return AffineFit(solution.T, target_C - solution.T @ centre_C, explained, len(now_NC))


def _no_fit(place: str, seen: str) -> MeasureError:
    return MeasureError(
        place,
        seen=seen,
        needed="a linear or convolution layer that runs behind the module, and a few batches",
        next_step="name another layer as `into`",
    )
