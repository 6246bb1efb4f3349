"""What is kept of activations: a bounded sample of rows, each knowing its sample and position.

Shapes in names: B samples of a batch, Q positions of a sample, N rows (samples times positions),
C units, S samples, F pooled features.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from neuroexapt.errors import MeasureError
from neuroexapt.measure.places import Place
from neuroexapt.measure.sampling import Reservoir

UNITS = 256
FEATURES = 256


@dataclass(frozen=True, eq=False)
class Rows:
    """A sample of what was seen at a place.

    Attributes:
        place: where.
        values_NC: activations, float32; of more than 256 units a sample of 256.
        sample_N: the sample that each row belongs to.
        position_N: its position there, row-major over ``space``.
        space: sizes of the dimensions of positions; empty for one row a sample.
        pooled_SF: features of whole samples: the units themselves, or where a sample has
            positions first, mean and last of a line and the quarters of a map; of more than 256
            a random projection to 256.
        pooled_sample_S: the sample of each.
    """

    place: Place
    values_NC: Tensor
    sample_N: Tensor
    position_N: Tensor
    space: tuple[int, ...]
    pooled_SF: Tensor
    pooled_sample_S: Tensor

    @property
    def scale(self) -> float:
        """Units of the width for each one that was kept."""
        return self.place.units / self.values_NC.shape[1]


class Keeper:
    """Collects :class:`Rows` of one place, batch by batch, within a number of rows."""

    def __init__(self, place: Place, limit: int) -> None:
        self.place = place
        self.values = Reservoir(limit)
        self.pooled = Reservoir(limit)
        self.space: tuple[int, ...] = ()
        generator = torch.Generator().manual_seed(place.units)
        order = torch.randperm(place.units, generator=generator)
        self.kept = order[:UNITS].sort().values if place.units > UNITS else None
        self._projections: dict[tuple[int, torch.device], Tensor] = {}

    def add(self, tensor: Tensor, first: int) -> None:
        """Take a tensor of a batch whose samples are numbered from `first`.

        Raises:
            MeasureError: the tensor has no such dimension of units.
        """
        place = self.place
        size = place.units * place.inner
        if tensor.dim() <= place.dim or tensor.shape[place.dim] != size:
            raise MeasureError(
                place.path,
                seen=f"a tensor of shape {tuple(tensor.shape)}",
                needed=f"{size} entries in dimension {place.dim}, as on the example input",
                next_step="make the map anew, on an input like these batches",
            )
        spread = tensor.detach().movedim(place.dim, -1)
        if place.inner > 1:
            spread = spread.unflatten(-1, (place.units, place.inner)).transpose(-1, -2)
        if self.kept is not None:
            spread = spread[..., self.kept.to(spread.device)]
        self.space = tuple(spread.shape[1:-1])
        rows_BQC = spread.reshape(len(spread), prod(self.space), -1).float()
        self._add_rows(rows_BQC, first)
        self._add_pooled(rows_BQC, first)

    def _add_rows(self, rows_BQC: Tensor, first: int) -> None:
        batch, positions, _ = rows_BQC.shape
        device = rows_BQC.device
        sample_BQ = torch.arange(first, first + batch, device=device)[:, None]
        at_BQ = torch.arange(positions, device=device)[None, :]
        # Numbers up to 2^24 are exact in float32; beyond, samples would be told apart less well.
        told = torch.stack(torch.broadcast_tensors(sample_BQ, at_BQ), -1).float()
        self.values.add(torch.cat([rows_BQC, told], -1).flatten(0, 1))

    def _add_pooled(self, rows_BQC: Tensor, first: int) -> None:
        batch, positions, units = rows_BQC.shape
        if positions == 1:
            features = rows_BQC[:, 0]
        elif len(self.space) == 2:
            maps = rows_BQC.transpose(1, 2).reshape(batch, units, *self.space)
            features = F.adaptive_avg_pool2d(maps, 2).flatten(1)
        else:
            ends = (rows_BQC[:, 0], rows_BQC.mean(1), rows_BQC[:, -1])
            features = torch.cat(ends, 1)
        if features.shape[1] > FEATURES:
            features = features @ self._projection(features.shape[1], features.device)
        number = torch.arange(first, first + batch, device=features.device)[:, None]
        self.pooled.add(torch.cat([features, number], 1))

    def _projection(self, size: int, device: torch.device) -> Tensor:
        key = size, device
        if key not in self._projections:
            generator = torch.Generator().manual_seed(size)
            drawn = torch.randn(size, FEATURES, generator=generator) / size**0.5
            self._projections[key] = drawn.to(device)
        return self._projections[key]

    def rows(self) -> Rows | None:
        """What was kept, or None where nothing came."""
        held, pooled = self.values.rows_NC, self.pooled.rows_NC
        if held is None or pooled is None:
            return None
        return Rows(
            self.place,
            held[:, :-2],
            held[:, -2].long(),
            held[:, -1].long(),
            self.space,
            pooled[:, :-1],
            pooled[:, -1].long(),
        )


def rows_within(cap: int, places: int, units: int) -> int:
    """How many rows of a place fit where so many places share `cap` bytes."""
    bytes_a_row = 4 * (min(units, UNITS) + 2 + FEATURES + 1)
    # A reservoir holds its rows and the newcomers at once.
    return max(64, cap // (2 * max(1, places) * bytes_a_row))
