"""What is kept of activations: a bounded sample of rows, each knowing its sample and position.

Shapes in names: B samples of a batch, Q positions of a sample, N rows (samples times positions),
C units, S samples, F pooled features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from neuroexapt.errors import MeasureError
from neuroexapt.measure.places import Place
from neuroexapt.measure.sampling import Reservoir

UNITS = 128
FEATURES = 128


@dataclass(frozen=True, eq=False)
class Rows:
    """A sample of what was seen at a place.

    Attributes:
        place: where.
        values_NC: activations, float32; of more than 128 units a sample of 128.
        features_NF: all units of the same rows, for probes; of more than 128 a sketch of 128.
        sample_N: the sample that each row belongs to.
        position_N: its position there, row-major over ``space``.
        space: sizes of the dimensions of positions; empty for one row a sample.
        pooled_SF: features of whole samples: the units themselves, all of a map that is read
            flattened; else, where a sample has positions, first, mean and last of a line and the
            quarters of a map; of more than 128 a sketch of 128.
        pooled_sample_S: the sample of each.
        matched: whether samples are those of the batches; else each row counts as one.
    """

    place: Place
    values_NC: Tensor
    features_NF: Tensor
    sample_N: Tensor
    position_N: Tensor
    space: tuple[int, ...]
    pooled_SF: Tensor
    pooled_sample_S: Tensor
    matched: bool = True

    @property
    def scale(self) -> float:
        """Units of the width for each one that was kept."""
        return self.place.units / self.values_NC.shape[1]


class Keeper:
    """Collects :class:`Rows` of one place, batch by batch, within a number of rows.

    Rows are chosen before anything is copied, so a large map costs no more than a small one.
    """

    def __init__(self, place: Place, limit: int) -> None:
        self.place = place
        self.values = Reservoir(limit)
        self.pooled = Reservoir(limit)
        self.space: tuple[int, ...] = ()
        self.matched = True
        self._alone = 0
        generator = torch.Generator().manual_seed(place.units)
        order = torch.randperm(place.units, generator=generator)
        self.kept = order[:UNITS].sort().values if place.units > UNITS else None

    def add(self, tensor: Tensor, first: int, samples: int) -> None:
        """Take a tensor of a batch of so many samples, which are numbered from `first`.

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
        batch = place.batch if place.batch is not None else -1
        batch -= batch > place.dim
        if batch > 0:
            spread = spread.movedim(batch, 0)
        if place.inner > 1:
            # A view where there is one.
            spread = spread.reshape(*spread.shape[:-1], place.units, place.inner).transpose(-1, -2)
        if batch < 0 or not samples or len(spread) % samples:
            # Tokens sent to an expert, say: who they belong to is not known.
            self.matched, spread = False, spread.flatten(0, -2)
            first, self._alone = self._alone, self._alone + len(spread)
        elif len(spread) != samples:
            spread = spread.reshape(samples, -1, *spread.shape[1:])
        self.space = tuple(spread.shape[1:-1])
        self.values.add_from(prod(spread.shape[:-1]), lambda at: self._rows(spread, at, first))
        whole = spread.flatten(1) if place.inner > 1 and len(self.space) == 1 else None
        self._add_pooled(spread, first, whole)

    def _rows(self, spread: Tensor, at_K: Tensor, first: int) -> Tensor:
        """(K, ...): chosen rows: kept units, sketch of all, sample and position."""
        positions = prod(self.space)
        at_K = at_K.to(spread.device)
        units_KC = spread[torch.unravel_index(at_K, spread.shape[:-1])].float()
        # Numbers up to 2^24 are exact in float32; beyond, samples would be told apart less well.
        told_K2 = torch.stack([first + at_K // positions, at_K % positions], 1).float()
        if self.kept is None:
            return torch.cat([units_KC, told_K2], 1)
        values_KC = units_KC[:, self.kept.to(spread.device)]
        return torch.cat([values_KC, sketched(units_KC), told_K2], 1)

    def _add_pooled(self, spread: Tensor, first: int, whole: Tensor | None) -> None:
        if whole is not None:
            features = whole
        elif prod(self.space) == 1:
            features = spread.reshape(len(spread), -1)
        elif len(self.space) == 2:
            maps = spread.movedim(-1, 1)
            features = F.adaptive_avg_pool2d(maps, 2).flatten(1)
        else:
            line = spread.flatten(1, -2)
            features = torch.cat([line[:, 0], line.mean(1), line[:, -1]], 1)
        features = sketched(features.float())
        number = torch.arange(first, first + len(spread), device=features.device)[:, None]
        self.pooled.add(torch.cat([features, number], 1))

    def held_bytes(self) -> int:
        """Bytes that it keeps at present."""
        held = [part.rows_NC for part in (self.values, self.pooled) if part.rows_NC is not None]
        return sum(rows_NC.numel() * rows_NC.element_size() + 8 * len(rows_NC) for rows_NC in held)

    def rows(self) -> Rows | None:
        """What was kept, or None where nothing came."""
        held, pooled = self.values.rows_NC, self.pooled.rows_NC
        if held is None or pooled is None:
            return None
        units = held.shape[1] - 2 if self.kept is None else len(self.kept)
        return Rows(
            self.place,
            held[:, :units],
            held[:, :units] if self.kept is None else held[:, units:-2],
            held[:, -2].long(),
            held[:, -1].long(),
            self.space,
            pooled[:, :-1],
            pooled[:, -1].long(),
            self.matched,
        )


def sketched(features_NF: Tensor) -> Tensor:
    """At most 128 features: of more, each is added to one of 128 with a random sign.

    Distances are kept on average, and no matrix is held. The same ones are added each time.
    Charikar, Chen and Farach-Colton 2002 (count sketch).

    Example:
        >>> sketched(torch.ones(2, 1000)).shape
        torch.Size([2, 128])
    """
    count = features_NF.shape[1]
    if count <= FEATURES:
        return features_NF
    generator = torch.Generator().manual_seed(count)
    bucket_F = torch.randint(FEATURES, (count,), generator=generator).to(features_NF.device)
    sign_F = torch.randint(2, (count,), generator=generator).to(features_NF) * 2 - 1
    empty = features_NF.new_zeros(len(features_NF), FEATURES)
    return empty.index_add(1, bucket_F, features_NF * sign_F)


def rows_within(cap: int, places: Iterable[Place]) -> int:
    """How many rows of each place fit where these share `cap` bytes; 64 at least."""
    a_row = sum(map(_bytes_a_row, places))
    # A reservoir holds its rows and the newcomers at once.
    return max(64, cap // (2 * max(1, a_row)))


def _bytes_a_row(place: Place) -> int:
    kept = place.units if place.units <= UNITS else UNITS + FEATURES
    pooled = min(FEATURES, 4 * place.units * place.inner)
    return 4 * (kept + 2) + 8 + 4 * (pooled + 1) + 8
