"""Which incoming weights new units should start with, from activations and gradients.

Shapes in names: K units (old or candidates), R rows (samples times positions), P reader entries a
unit, M basis filters, F entries of one filter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from neuroexapt.couple import Appearance, AxisMap, resize_expr, unit_of
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Batch, LossFn
from neuroexapt.measure.newcomers import (
    Seen,
    Site,
    answers,
    check_no_feedback,
    look,
    masks_opened,
    reader_gradients,
    real,
    site_of,
)

KINDS = ("candidates", "gradient")
_POOL = 16  # candidates drawn for each unit wanted
_RUNS = 32  # forwards a batch that candidates may take
_RIDGE = 1e-2  # share of the mean power that is added to every direction
_WHITENING = 0.1  # as _RIDGE, for the input: directions that hardly occur are not blown up
_FAINT = 0.05  # least strength of an input direction beside the largest: fainter ones are noise
_BASIS = 512  # most input directions a gradient direction is made of

Pool = list[dict[str, Tensor]]
"""Values of the makers, run by run; each run holds as many candidates as there are units."""


def growth_directions(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    axes: AxisMap,
    at: str,
    units: int,
    kind: str = "candidates",
) -> dict[str, Tensor]:
    """Choose incoming weights for new units by what their zero outgoing weights would learn first.

    With zero outgoing weights, the gradient of a reader's column for a unit with answers a is
    E[g a], g being the loss's gradient at the reader's output. A unit is worth
    ``|E[g a']|^2 / E[a'^2]``, where a' is what its answers add to those of the old units and of
    the new ones already chosen (the residual of a least-squares fit).

    - ``"candidates"``: the best ones of a pool of random units, 16 for each one wanted, drawn as
      ``Widen`` draws them. Works for every maker, through every norm, activation, pool or gate.
    - ``"gradient"``: the input directions in which the missing update is largest (left singular
      vectors of E[h g'] without what the old units can do, whitened by the input), both signs,
      each as strong as the old units are; the best of these. For one linear layer or convolution
      as maker. Activations count by their odd part, which is the identity for ReLU, GELU and SiLU.

    Invariant: measuring leaves the model, gradients, buffers, flags and random generators as they
    were. The train/eval flags are used as they are: call it in training mode, so that norms treat
    the candidates as they will treat the new units.

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of the batch.
        batches: some training batches; held in memory, so pass a few.
        axes: the model's map.
        at: a width's name or a module path, as for ``Widen``.
        units: how many new units.
        kind: ``"candidates"`` or ``"gradient"``.

    Returns:
        For each tensor that makes the units or holds a number a unit the new entries, to be passed
        on as ``Widen(at, by=units, rows=...)``: the tensor's shape, dtype and device, with the
        number of new positions at the width's dimension.

    Raises:
        EditError: no such width.
        MeasureError: the kind or number is not known; candidates cannot be tried at this width
            (attention heads, recurrent layers, residual streams, tied weights, readers that are
            no plain linear layer or convolution).

    Example:
        >>> from neuroexapt import Widen, apply, map_axes
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [torch.randn(16, 4) for _ in range(2)]
        >>> def loss_fn(model, x):
        ...     return (model(x) - x[:, :2] * x[:, 2:]).square().mean()
        >>> axes = map_axes(net, (batches[0],))
        >>> rows = growth_directions(net, loss_fn, batches, axes, "0", units=3)
        >>> {name: tuple(row.shape) for name, row in rows.items()}
        {'0.weight': (3, 4), '0.bias': (3,)}
        >>> apply(net, Widen("0", by=3, rows=rows), (batches[0],)).max_difference < 1e-6
        True

    Maile et al. 2022 (candidates by orthogonality), Evci et al. 2022 (GradMax), Verbockhaven et
    al. 2024 (TINY), for the parts; the odd part and the deflation are ours.
    """
    held = list(batches)
    _check(kind, units, held)
    site = site_of(model, loss_fn, axes, at)
    if kind == "gradient":
        pool = _gradient_pool(site, held, units)
    else:
        count = min(_POOL * units, max(_RUNS * site.width.size, 2 * units))
        pool = _random_pool(site, count)
    trial = _tried(site, held, pool)
    chosen = _greedy(trial, site.width.size, units)
    return _rows(site, pool, chosen)


def _check(kind: str, units: int, batches: Sequence[Batch]) -> None:
    if kind not in KINDS or units < 1 or not batches:
        raise MeasureError(
            "growth_directions",
            seen=f"kind={kind!r}, units={units}, {len(batches)} batches",
            needed=f"a kind of {KINDS}, at least one unit and one batch",
            next_step='use kind="candidates" with some training batches',
        )


# --- pools of candidates -------------------------------------------------------------------------


def _random_pool(site: Site, count: int) -> Pool:
    """Candidates drawn as `Widen` draws new units: the deviation of each maker's own entries."""
    generator = torch.Generator().manual_seed(site.width.size)
    runs = -(-count // site.width.size)
    pool: Pool = [{} for _ in range(runs)]
    for place in site.makers:
        old = site.tensor(place.tensor)
        deviation = float(old.float().std()) if old.numel() > 1 else 0.0
        deviation = deviation or sqrt(2.0 / max(1, old[0].numel()))
        for run in pool:
            drawn = deviation * torch.randn(old.shape, generator=generator)
            run[place.tensor] = _on_units(site, place, old, drawn)
    for run in pool:
        run.update(_plain_holders(site))
    return pool


def _plain_holders(site: Site) -> dict[str, Tensor]:
    """Biases, scales and statistics as new units get them."""
    values = masks_opened(site)
    for place in site.holders:
        old = site.tensor(place.tensor)
        fills = {"one": torch.ones_like(old), "mean": old.mean().expand_as(old)}
        fill = fills.get(place.fill, torch.zeros_like(old))
        values[place.tensor] = _on_units(site, place, old, fill)
    return values


def _on_units(site: Site, place: Appearance, old: Tensor, new: Tensor) -> Tensor:
    """New entries where the units are, old ones in other segments of the dimension."""
    on = (site.unit(place) >= 0).view(-1, *[1] * (old.dim() - place.dim - 1))
    return torch.where(on.to(old.device), new.to(old), old)


# --- trying them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """Means over batches, old units first: readers' gradients and products of answers."""

    gradients_KP: Tensor
    products_KK: Tensor


def _tried(site: Site, batches: Sequence[Batch], pool: Pool, *, odd: bool = False) -> _Trial:
    """The old units and all candidates on all batches; with ``odd`` of each its odd part."""
    gradients, products = [], []
    for batch in batches:
        before, sent = real(site, batch)
        rows, columns = [answers(site, before)], [reader_gradients(site, before, sent)]
        for run in pool:
            after = look(site, batch, run)
            check_no_feedback(site, before, after)
            row, column = answers(site, after), reader_gradients(site, after, sent)
            if odd:
                other = look(site, batch, _negated(site, run))
                row = (row - answers(site, other)) / 2
                column = (column - reader_gradients(site, other, sent)) / 2
            rows.append(row)
            columns.append(column)
        rows_KR = torch.cat(rows)
        gradients.append(torch.cat(columns))
        products.append(rows_KR @ rows_KR.T / rows_KR.shape[1])
    trial = _Trial(torch.stack(gradients).mean(0), torch.stack(products).mean(0))
    if not bool(trial.gradients_KP.isfinite().all() and trial.products_KK.isfinite().all()):
        raise MeasureError(
            site.width.name,
            seen="NaN or infinite activations or gradients",
            needed="finite ones",
            next_step="lower the learning rate, or leave out the batches that diverge",
        )
    return trial


def _negated(site: Site, run: Mapping[str, Tensor]) -> dict[str, Tensor]:
    makers = {place.tensor for place in site.makers}
    return {name: -value if name in makers else value for name, value in run.items()}


def _greedy(trial: _Trial, old: int, units: int) -> list[int]:
    """The best candidates one after the other, each without what the earlier ones can do."""
    gradients_KP, products_KK = _beside(trial, old)
    ridge = _RIDGE * float(products_KK.diagonal().mean())
    chosen: list[int] = []
    for _ in range(min(units, len(products_KK))):
        power_K = products_KK.diagonal().clamp(min=0) + ridge
        worth_K = gradients_KP.square().sum(1) / power_K.clamp(min=1e-300)
        worth_K[chosen] = -1.0
        best = int(worth_K.argmax())
        chosen.append(best)
        share_K = products_KK[:, best] / power_K[best].clamp(min=1e-300)
        gradients_KP = gradients_KP - share_K[:, None] * gradients_KP[best]
        products_KK = products_KK - share_K[:, None] * products_KK[best]
    return chosen


def _beside(trial: _Trial, old: int) -> tuple[Tensor, Tensor]:
    """Candidates without what a least-squares fit of the old units can do."""
    whole_KK = trial.products_KK
    inner = whole_KK[:old, :old]
    ridge = _RIDGE * inner.diagonal().mean().clamp(min=1e-300)
    fit = torch.linalg.solve(
        inner + ridge * torch.eye(old, dtype=inner.dtype), whole_KK[:old, old:]
    )
    gradients_KP = trial.gradients_KP[old:] - fit.T @ trial.gradients_KP[:old]
    return gradients_KP, whole_KK[old:, old:] - whole_KK[old:, :old] @ fit


# --- directions of the gradient ------------------------------------------------------------------


def _gradient_pool(site: Site, batches: Sequence[Batch], units: int) -> Pool:
    """Both signs of the input directions in which the missing update is largest."""
    maker = _one_maker(site)
    entries = site.tensor(maker).shape[1:].numel()
    basis_MF = _basis(entries, min(entries, _BASIS, _RUNS * site.width.size))
    basis_MF = basis_MF / _strengths(site, batches[0], maker, basis_MF)[:, None]
    trial = _tried(site, batches, _pool_of(site, maker, basis_MF), odd=True)
    missing_MP, products_MM = _beside(trial, site.width.size)
    missing_MP, products_MM = (
        missing_MP[: len(basis_MF)],
        products_MM[: len(basis_MF)][:, : len(basis_MF)],
    )
    values, vectors = torch.linalg.eigh(products_MM)
    ridge = _WHITENING * values.clamp(min=0).mean()
    white_MM = vectors / (values.clamp(min=0) + ridge).clamp(min=1e-30).sqrt()
    left, _, _ = torch.linalg.svd(white_MM.T @ missing_MP, full_matrices=False)
    best_MF = (white_MM @ left[:, :units]).T @ basis_MF.double()
    filters = torch.cat([best_MF, -best_MF]).to(basis_MF.dtype)
    strong = _as_strong(site, batches[0], maker, filters)
    pool = _pool_of(site, maker, strong)
    # A layer with fewer inputs than units wanted has no more directions: the rest is random.
    return pool if len(filters) >= 2 * units else [*pool, *_random_pool(site, 2 * units)]


def _one_maker(site: Site) -> str:
    names = [place.tensor for place in site.makers]
    path, _, own = names[0].rpartition(".")
    module = site.model.get_submodule(path)
    plain = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and own == "weight"
    plain = plain and not site.makers[0].dim and getattr(module, "groups", 1) == 1
    rows = int((site.unit(site.makers[0]) >= 0).sum())
    if len(names) > 1 or not plain or rows != site.width.size:
        raise MeasureError(
            site.width.name,
            seen=f"units made by {', '.join(names)}, {rows} rows for {site.width.size} units",
            needed="one plain linear layer or convolution with a row a unit",
            next_step='use kind="candidates", which works for every maker',
        )
    return names[0]


def _basis(entries: int, count: int) -> Tensor:
    """All input directions, or orthogonal random ones; shape (count, entries)."""
    if count == entries:
        return torch.eye(entries)
    drawn = torch.randn(entries, count, generator=torch.Generator().manual_seed(entries))
    orthogonal: Tensor = torch.linalg.qr(drawn)[0].T
    return orthogonal.contiguous()


def _pool_of(site: Site, maker: str, filters_MF: Tensor) -> Pool:
    """Runs that hold these filters, the last one filled up with the first ones again."""
    (place,) = (place for place in site.makers if place.tensor == maker)
    old, unit = site.tensor(maker), site.unit(place)
    where = torch.nonzero(unit >= 0).flatten()
    holders, pool = _plain_holders(site), list[dict[str, Tensor]]()
    runs = -(-len(filters_MF) // site.width.size)
    every = torch.arange(runs * site.width.size) % len(filters_MF)
    for part in filters_MF[every].split(site.width.size):
        new = part.to(old).view(-1, *old.shape[1:])
        pool.append({maker: old.index_copy(0, where.to(old.device), new), **holders})
    return pool


def _strengths(site: Site, batch: Batch, maker: str, filters_MF: Tensor) -> Tensor:
    """The deviation of each filter's answers right behind the maker; never zero."""
    runs = _pool_of(site, maker, filters_MF)
    found = torch.cat([_made(site, look(site, batch, run), maker) for run in runs])
    found = found[: len(filters_MF)]
    largest = float(found.max())
    if not largest > 0:  # one row, or constant inputs: nothing to go by
        return torch.ones_like(found, dtype=filters_MF.dtype)
    return found.clamp(min=_FAINT * largest).to(filters_MF.dtype)


def _as_strong(site: Site, batch: Batch, maker: str, filters_MF: Tensor) -> Tensor:
    """Scaled to answer like the old units, and not longer than the longest of these."""
    own = float(_made(site, look(site, batch), maker).median())
    # Old units that never move have no strength to go by: then only the length below holds.
    scaled = filters_MF * ((own or 1.0) / _strengths(site, batch, maker, filters_MF))[:, None]
    place = site.makers[0]
    old = site.tensor(maker)[(site.unit(place) >= 0)].flatten(1)
    lengths: Tensor = scaled.norm(dim=1, keepdim=True).clamp(min=1e-30)
    shorter: Tensor = (old.norm(dim=1).max() / lengths).clamp(max=1.0)
    return scaled * shorter


def _made(site: Site, seen: Seen, maker: str) -> Tensor:
    (place,) = (place for place in site.makers if place.tensor == maker)
    where = torch.nonzero(site.unit(place) >= 0).flatten()
    module = site.model.get_submodule(maker.rpartition(".")[0])
    behind = len(getattr(module, "kernel_size", ()))
    outs = seen.made[maker.rpartition(".")[0]]
    rows = torch.cat([out.movedim(-1 - behind, 0).flatten(1) for out in outs], 1)
    deviation: Tensor = rows[where.to(rows.device)].cpu().double().std(1, correction=0)
    return deviation


# --- the rows of those chosen --------------------------------------------------------------------


def _rows(site: Site, pool: Pool, chosen: Sequence[int]) -> dict[str, Tensor]:
    """The chosen candidates' entries, in the order of the new positions."""
    rows = {}
    for place in (*site.makers, *site.holders):
        expr = site.axes.tensors[place.tensor][place.dim]
        if place.tensor in rows:
            continue
        wanted = torch.from_numpy(
            unit_of(resize_expr(expr, site.width.name, len(chosen)), site.width.name)
        )
        order = wanted[wanted >= 0]
        slices = torch.empty(0)
        for number, candidate in enumerate(chosen):
            run, slot = divmod(candidate, site.width.size)
            value = pool[run][place.tensor]
            where = torch.nonzero(site.unit(place) == slot).flatten().to(value.device)
            entries = value.index_select(place.dim, where)
            if not number:
                shape = list(value.shape)
                shape[place.dim] = len(order)
                slices = value.new_empty(shape)
            at = torch.nonzero(order == number).flatten().to(value.device)
            slices.index_copy_(place.dim, at, entries)
        rows[place.tensor] = slices
    return rows
