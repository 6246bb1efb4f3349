"""What the units of a width are worth, from data: scores that `Narrow` ranks by.

Shapes in names: M micro-batches, U units, B blocks of a weight, C inputs of a block, O the rest of
a weight's entries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import AxisMap, Reader, Width, find_readers, first_names, unit_of
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Batch, LossFn, batch_size_of, undisturbed
from neuroexapt.measure.inputs import no_batches, reader_inputs, visible_products
from neuroexapt.measure.mode import measuring
from neuroexapt.measure.removal import removal_loss
from neuroexapt.measure.sampling import gradients

KINDS = ("taylor", "fisher", "removal", "redundancy", "reconstruction")
_RIDGE = 1e-3


def unit_scores(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    axes: AxisMap,
    kind: str = "reconstruction",
    widths: Collection[str] | None = None,
) -> dict[str, tuple[float, ...]]:
    """One score a unit, higher is more important; for ``Narrow(scores=...)``.

    Picture a gate of value 1 on what each unit gives to its readers, s being the derivative of the
    loss with respect to it: the sum of gradient times weight over all weights that read the unit
    (with a head size, those that make its queries too; of a unit that no weight reads, such as an
    expert, over all weights it has).

    - ``"taylor"``: the absolute mean of s, the first-order change of the loss.
    - ``"fisher"``: the mean over samples of s squared, estimated without bias from micro-batches
      (exact with batches of one sample).
    - ``"removal"``: the absolute mean of s plus half the Fisher score: the expected rise of the
      loss to second order.
    - ``"redundancy"``: the share of the unit's variance that the reader's other inputs do not
      explain; labels play no part.
    - ``"reconstruction"``: what would be missing in the readers' results after they were fitted
      anew by least squares (optimal brain surgeon on units).

    The last two are means over the readers, each relative to its mean over units for
    ``"reconstruction"``. Units of different widths compare for the first three alone.

    Invariant: as :func:`undisturbed`; the model runs in evaluation mode. Frozen weights count.

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of the batch.
        batches: micro-batches of one size.
        axes: the model's present map.
        kind: one of the five; the default is the one that did best in ``docs/operations.md``.
        widths: names of widths; by default every width that has such a score.

    Raises:
        MeasureError: unknown kind or width, too few batches, or a width named that has no reader
            to judge by.

    Example:
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = net[1].weight.copy_(torch.tensor([[1.0, 0.0]]))
        >>> x = torch.ones(4, 1)
        >>> axes = map_axes(net, (x,))
        >>> found = unit_scores(net, lambda model, x: model(x).square().mean(), [x], axes)
        >>> found["0.out"][0] > found["0.out"][1] == 0
        True

    Molchanov et al. 2019 (Taylor, on gates); Theis et al. 2018 (Fisher); Frantar, Kurtic and
    Alistarh 2023 (ZipLM) for the reconstruction of groups.
    """
    _check(axes, kind, widths)
    batches = list(batches)
    if not batches:
        raise no_batches("unit_scores")
    if kind in ("redundancy", "reconstruction"):
        scores = _from_inputs(model, loss_fn, batches, axes, kind, widths)
    else:
        slopes = gate_slopes(model, loss_fn, batches, axes, widths)
        scores = {name: _from_slopes(sums_MU, kind, batches) for name, sums_MU in slopes.items()}
    missing = [name for name in widths or () if name not in scores]
    if missing:
        raise MeasureError(
            missing[0],
            seen="no weight whose reading of this width could be measured",
            needed=f"a width with such a reader for kind='{kind}'",
            next_step="leave it out: Narrow ranks it by its weights",
        )
    return {name: tuple(float(value) for value in score_U) for name, score_U in scores.items()}


def _check(axes: AxisMap, kind: str, widths: Collection[str] | None) -> None:
    if kind not in KINDS:
        raise MeasureError(
            "unit_scores",
            seen=f"kind={kind!r}",
            needed=f"one of {', '.join(KINDS)}",
            next_step="use kind='taylor', or a norm or random by Narrow(score=...)",
        )
    unknown = [name for name in widths or () if name not in axes.widths]
    if unknown:
        raise MeasureError(
            "unit_scores",
            seen=repr(unknown[0]),
            needed="names of widths, such as 'features.0.out'",
            next_step="take the names from `map_axes(...).widths`",
        )


# --- gates ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entries:
    """Positions of a weight's dimension, and the unit each of them belongs to."""

    tensor: str
    dim: int
    positions: Tensor
    units: Tensor


def gate_slopes(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    axes: AxisMap,
    widths: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """(M, U) by width: the derivative of each batch's loss by a gate on each unit.

    See :func:`unit_scores`. Widths that no parameter reads are absent.
    """
    parameters = dict(model.named_parameters())
    gates = gates_of(axes, parameters, widths)
    only = {entry.tensor for entries in gates.values() for entry in entries}
    rows: dict[str, list[Tensor]] = {name: [] for name in gates}
    if not only:
        return {}
    with undisturbed(model), visible_products(model), _open(parameters[n] for n in only):
        batches = list(batches)
        measuring(model, min(map(batch_size_of, batches), default=0))
        for grads in gradients(model, loss_fn, batches, only=only):
            sums: dict[tuple[str, int], Tensor] = {}
            for name in only:
                sums.update(sums_along(gates, name, grads[name], parameters[name].detach()))
            for name, sums_U in sums_of_gates(axes, gates, sums).items():
                rows[name].append(sums_U)
    return {name: torch.stack(found) for name, found in rows.items() if found}


Gates = Mapping[str, Sequence["_Entries"]]


def gates_of(
    axes: AxisMap, parameters: Mapping[str, nn.Parameter], widths: Collection[str] | None = None
) -> Gates:
    """By width the entries of parameters that a gate on its units would multiply."""
    gates = {
        name: [e for e in _gate(axes, axes.widths[name]) if e.tensor in parameters]
        for name in (axes.widths if widths is None else widths)
    }
    return {name: entries for name, entries in gates.items() if entries}


def sums_of_gates(
    axes: AxisMap, gates: Gates, sums: Mapping[tuple[str, int], Tensor]
) -> dict[str, Tensor]:
    """(U,) by width: slope of the loss by each gate; ``sums`` are those of :func:`sums_along`."""
    slopes = {}
    for name, entries in gates.items():
        total_U = torch.zeros(axes.widths[name].size, dtype=torch.float64)
        for entry in entries:
            total_U.index_add_(0, entry.units, sums[entry.tensor, entry.dim][entry.positions])
        slopes[name] = total_U
    return slopes


def sums_along(
    gates: Gates, tensor: str, gradient: Tensor, parameter: Tensor
) -> dict[tuple[str, int], Tensor]:
    """Gradient times parameter, summed over all but each dimension that a gate looks at."""
    dims = {e.dim for entries in gates.values() for e in entries if e.tensor == tensor}
    found = {}
    product = gradient * parameter if dims else gradient
    for dim in dims:
        other = [d for d in range(product.dim()) if d != dim]
        wide = torch.float32 if product.device.type == "mps" else torch.float64
        flat = product.sum(other, dtype=wide) if other else product
        found[tensor, dim] = flat.double().cpu() if wide is torch.float64 else flat.cpu().double()
    return found


def _gate(axes: AxisMap, width: Width) -> Iterator[_Entries]:
    first = first_names(axes)
    places = [place for place in width.appearances if first[place.tensor] == place.tensor]
    for place in [p for p in places if "consumer" in p.roles] or places:
        yield _entries(axes, width, place.tensor, place.dim, None)
    own = {(place.tensor, place.dim) for place in width.appearances}
    for mixer in width.mixers:
        sides = [
            side
            for side in (mixer.sides[0] if mixer.kind == "dot" else ())
            if (side.tensor, side.dim) in own
            and side.tensor in axes.parameters
            and first[side.tensor] == side.tensor
        ]
        # Queries that are normalised forget the scale of what made them: theirs is the norm's.
        for side in [s for s in sides if s.factor] or sides:
            yield _entries(axes, width, side.tensor, side.dim, side.positions)


def _entries(
    axes: AxisMap, width: Width, tensor: str, dim: int, positions: Sequence[int] | None
) -> _Entries:
    units = torch.from_numpy(unit_of(axes.tensors[tensor][dim], width.name))
    at = torch.nonzero(units >= 0)[:, 0]
    if positions is not None:
        at = at[torch.isin(at, torch.tensor(positions))]
    return _Entries(tensor, dim, at, units[at])


@contextmanager
def _open(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let frozen parameters have gradients for the block."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _from_slopes(sums_MU: Tensor, kind: str, batches: Sequence[Batch]) -> Tensor:
    mean_U = sums_MU.mean(0)
    if kind == "taylor":
        return mean_U.abs()
    size, count = batch_size_of(batches[0]), len(sums_MU)
    if count < 3:
        raise MeasureError(
            "unit_scores",
            seen=f"{count} batches",
            needed=f"at least 3 for kind='{kind}', which rests on how they differ",
            next_step="pass smaller batches",
        )
    if kind == "removal":
        return removal_loss(sums_MU, size)[0]
    # A mean over `size` samples varies by 1 / size of what single samples do.
    variance_U = sums_MU.var(0)
    return size * variance_U + mean_U.square() - variance_U / count


# --- inputs of readers ---------------------------------------------------------------------------


def _from_inputs(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    axes: AxisMap,
    kind: str,
    widths: Collection[str] | None,
) -> dict[str, Tensor]:
    products = reader_inputs(model, loss_fn, batches, axes, widths, products=True).products
    readers, weights = find_readers(axes), named_tensors(model)
    scores: dict[str, Tensor] = {}
    for name in axes.widths if widths is None else widths:
        width = axes.widths[name]
        parts = [
            _of_reader(axes, width, reader, products[tensor], weights[tensor], kind)
            for tensor, reader in readers.items()
            if tensor in products
            and any((p.tensor, p.dim) == (tensor, reader.dim) for p in width.appearances)
        ]
        if parts:
            scores[name] = torch.stack(parts).mean(0)
    return scores


def _of_reader(
    axes: AxisMap, width: Width, reader: Reader, products_BCC: Tensor, weight: Tensor, kind: str
) -> Tensor:
    """One score a unit from one reader: the sum over its blocks."""
    units = torch.from_numpy(unit_of(axes.tensors[reader.tensor][reader.dim], width.name))
    units = units.reshape(-1, reader.inner)[:, 0]
    units_BC = units.reshape(reader.blocks, -1) if reader.dim == 0 else units[None]
    units_BC = units_BC.expand(reader.blocks, -1)
    score_U = torch.zeros(width.size, dtype=torch.float64)
    for units_C, products_CC, weight_CO in zip(
        units_BC, products_BCC, _by_inputs(weight, reader), strict=True
    ):
        moments_CC, rows = _moments(products_CC, centred=kind == "redundancy" or reader.shifted)
        if kind == "redundancy":
            values_U = _unexplained(moments_CC, rows, units_C, reader.tensor)
        else:
            values_U = _unfitted(moments_CC, units_C, weight_CO)
        for unit, value in values_U.items():
            score_U[unit] += value
    if kind == "redundancy":
        return score_U / max(1, sum(int(0 in units_C) for units_C in units_BC))
    return score_U / score_U.mean() if bool(score_U.mean() > 0) else score_U


def _by_inputs(weight: Tensor, reader: Reader) -> Tensor:
    """(B, C, O)."""
    wide = weight.detach().float().cpu().double()
    blocks = wide.reshape(reader.blocks, wide.shape[0] // reader.blocks, *wide.shape[1:])
    rows_BJO = blocks.movedim(reader.dim + 1, 1).flatten(2)
    return rows_BJO.reshape(reader.blocks, rows_BJO.shape[1] // reader.inner, -1)


def _moments(products_CC: Tensor, *, centred: bool) -> tuple[Tensor, int]:
    """Covariance (or second moment) of the inputs, and the number of rows."""
    rows = products_CC[-1, -1]
    moments_CC = products_CC[:-1, :-1] / rows
    if centred:
        mean_C = products_CC[:-1, -1] / rows
        moments_CC = moments_CC - mean_C[:, None] * mean_C[None, :]
    return moments_CC, int(rows)


def _unexplained(
    covariance_CC: Tensor, rows: int, units_C: Tensor, reader: str
) -> dict[int, float]:
    """Share of each unit's variance that the other inputs leave over; 0 for a constant unit."""
    deviation_C = covariance_CC.diagonal().clamp(min=0).sqrt()
    # Rounding leaves a constant input a variance of some 1e-16 of its square.
    alive_C = deviation_C > 1e-7 * deviation_C.max()
    count = int(alive_C.sum())
    if rows <= count:
        raise MeasureError(
            reader,
            seen=f"{rows} rows for {count} inputs",
            needed="more rows (samples times positions) than inputs, better ten times as many",
            next_step="pass more batches",
        )
    scale_C = deviation_C.where(alive_C, 1.0)
    correlation_CC = covariance_CC / (scale_C[:, None] * scale_C[None, :])
    identity_CC = torch.eye(len(scale_C), dtype=correlation_CC.dtype)
    # A constant input explains nothing: off the diagonal it is zero, and stands alone.
    correlation_CC = correlation_CC.where(alive_C[:, None] & alive_C[None, :], identity_CC)
    shrunk_CC = (1 - _RIDGE) * correlation_CC + _RIDGE * identity_CC
    # Theil's adjustment for what as many inputs explain by chance, as in `unit_redundancy`.
    chance = (rows - 1) / (rows - count) if rows > count else 1.0
    values = {}
    for unit, rest_UU in _left_over(shrunk_CC, units_C):
        mine = alive_C[units_C == unit]
        share = float((rest_UU.diagonal() * mine).mean()) * chance
        values[unit] = min(1.0, max(0.0, share))
    return values


def _unfitted(moments_CC: Tensor, units_C: Tensor, weight_CO: Tensor) -> dict[int, float]:
    """What least squares on the other inputs leaves over of each unit's contribution, squared."""
    ridge = _RIDGE * float(moments_CC.diagonal().mean()) or 1.0
    held_CC = moments_CC + ridge * torch.eye(len(moments_CC), dtype=moments_CC.dtype)
    return {
        unit: float((weight_CO[units_C == unit] * (rest_UU @ weight_CO[units_C == unit])).sum())
        for unit, rest_UU in _left_over(held_CC, units_C)
    }


def _left_over(moments_CC: Tensor, units_C: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each unit's own moments once the other inputs have explained what they can."""
    precision_CC = torch.cholesky_inverse(torch.linalg.cholesky(moments_CC))
    for unit in units_C.unique().tolist():
        if unit >= 0:
            at = torch.nonzero(units_C == unit)[:, 0]
            yield unit, torch.linalg.inv(precision_CC[at][:, at])
