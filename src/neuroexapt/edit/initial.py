"""What new units of a width start with, where it is not random values beside zero readers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from neuroexapt.couple import Appearance, AxisMap, Width, size_of, source_index
from neuroexapt.edit.base import is_glob
from neuroexapt.edit.patch import DimEdit, Drawing, WidthStep
from neuroexapt.errors import EditError

INITS = ("zero_out", "split")
UNEVEN = 0.3  # how far the mean shares of two copies are from one half, relative to it


def unknown_init(at: str, init: str, rows: Mapping[str, Tensor]) -> list[EditError]:
    """Errors of the two arguments by themselves."""
    if init not in INITS:
        return [
            EditError(
                at,
                seen=f"init={init!r}",
                needed=f"one of {', '.join(map(repr, INITS))}",
                next_step='use init="zero_out", with `rows` for weights chosen by data',
            )
        ]
    if rows and (init == "split" or is_glob(at)):
        what = 'init="split"' if init == "split" else f"the pattern '{at}'"
        return [
            EditError(
                at,
                seen=f"rows together with {what}",
                needed="rows for one width, whose new units have zero readers",
                next_step="leave out one of both",
            )
        ]
    return []


# --- rows chosen by data -------------------------------------------------------------------------


def misfits(axes: AxisMap, width: Width, size: int, rows: Mapping[str, Tensor]) -> list[EditError]:
    """Every row tensor that does not fit what the new units are made of."""
    if rows and width.mixers:
        mixer = width.mixers[0]
        seen = f"rows for a width over which '{mixer.kind}' mixes ({mixer.place})"
        return [_row_error(width.name, seen, "a width whose new units may start anywhere")]
    places = {name: [p for p in width.appearances if p.tensor == name] for name in rows}
    errors = [_misfit(axes, width, size, name, places[name], rows[name]) for name in rows]
    return [error for error in errors if error is not None]


def _misfit(
    axes: AxisMap, width: Width, size: int, name: str, places: list[Appearance], row: Tensor
) -> EditError | None:
    if len(places) != 1 or "consumer" in places[0].roles:
        makers = [p.tensor for p in width.appearances if "consumer" not in p.roles]
        where = f"one that makes '{width.name}' or holds a number a unit: {', '.join(makers)}"
        return _row_error(name, "rows for this tensor", where)
    dim = places[0].dim
    positions = np.array([*range(width.size), *([-1] * (size - width.size))])
    index = source_index(axes.tensors[name][dim], {width.name: positions})
    shape = [size_of(expr, {}) for expr in axes.tensors[name]]
    shape[dim] = int((index < 0).sum())
    if list(row.shape) != shape or not bool(torch.isfinite(row).all()):
        finite = "finite" if bool(torch.isfinite(row).all()) else "not all finite"
        seen = f"rows of shape {tuple(row.shape)}, {finite}"
        return _row_error(name, seen, f"finite rows of shape {tuple(shape)}")
    return None


def _row_error(place: str, seen: str, needed: str) -> EditError:
    return EditError(
        place,
        seen=seen,
        needed=needed,
        next_step="take rows of `neuroexapt.measure.growth_directions` for the units added",
    )


def with_rows(step: WidthStep, rows: Mapping[str, Tensor]) -> WidthStep:
    """The step with values in place of the fills of the tensors named."""
    dims = [replace(dim, values=_value(dim.values, rows.get(dim.tensor))) for dim in step.dims]
    return replace(step, dims=tuple(dims))


def _value(own: Tensor | None, row: Tensor | None) -> Tensor | None:
    return own if row is None else row.detach()


# --- splitting -----------------------------------------------------------------------------------


def split_positions(size: int, to: int) -> tuple[int, ...]:
    """Old positions for a width that grows by splitting: all, then random ones, evenly often.

    Example:
        >>> positions = split_positions(3, 8)
        >>> positions[:3], sorted(positions[3:6]), len(positions)
        ((0, 1, 2), [0, 1, 2], 8)
    """
    generator = torch.Generator().manual_seed(size)
    added: list[int] = []
    while len(added) < to - size:
        added += torch.randperm(size, generator=generator).tolist()
    return (*range(size), *added[: to - size])


def mean_shares(positions: tuple[int, ...]) -> tuple[float, ...]:
    """For each copy of a unit a share of its own; those of one unit add up to 1.

    Example:
        >>> mean_shares((0, 1, 1))
        (1.0, 0.65, 0.35)
    """
    count = np.bincount(positions)
    seen = np.zeros_like(count)
    shares = []
    for unit in positions:
        copies = int(count[unit])
        lean = 1 - 2 * int(seen[unit]) / (copies - 1) if copies > 1 else 0.0
        shares.append((1 + UNEVEN * lean) / copies)
        seen[unit] += 1
    return tuple(shares)


def split_step(drawing: Drawing, width: Width, size: int) -> WidthStep:
    """Makers and numbers of a unit are copied, its readers shared out."""
    positions = split_positions(width.size, size)
    dims = tuple(
        DimEdit(
            place.tensor,
            place.dim,
            drawing.expr(place.tensor, place.dim),
            "zero",
            shared="consumer" in place.roles and place.tensor in drawing.axes.parameters,
        )
        for place in width.appearances
    )
    return WidthStep(width.name, positions, dims, shares=mean_shares(positions))


def unsplittable(width: Width) -> list[EditError]:
    """Why copies of its units would not add up to what they were; empty if they would."""
    return [
        EditError(
            width.name,
            seen=seen,
            needed=f"{needed}, to split units",
            next_step='use init="zero_out", or another width',
        )
        for seen, needed in _counted_twice(width)
    ]


def _counted_twice(width: Width) -> Iterator[tuple[str, str]]:
    for mixer in width.mixers:
        seen = f"'{mixer.kind}' mixes over this width ({mixer.place}), where a copy counts again"
        yield seen, "a width that is only read by weights"
    for place in width.appearances:
        if "consumer" in place.roles and len(place.roles) > 1:
            seen = f"'{place.tensor}' both makes and reads the units (tied)"
            yield seen, "makers to copy and readers to share out"
        elif "consumer" in place.roles and ".parametrizations." in f".{place.tensor}":
            seen = f"'{place.tensor}', a reader that is computed from a parametrization"
            yield seen, "readers whose entries are the weights"
