"""Rows of widths and the targets of their samples, brought together.

Shapes in names: N rows, S samples, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.evidence import Evidence
from neuroexapt.measure.information import Information, usable_information
from neuroexapt.measure.probe import Kind
from neuroexapt.measure.rows import Rows
from neuroexapt.measure.targets import Wanted


def information_of(
    seen: Evidence, *, probe: Literal["linear", "hidden"] = "linear"
) -> dict[str, dict[str, Information]]:
    """Usable information by width and target; what cannot be paired is absent.

    Targets of one value a sample are asked of whole samples' features, targets of one value a
    position of the rows at that position (of language models the last position has none; maps of
    another resolution are met at the nearest place).
    """
    if probe not in seen.memo:
        seen.memo[probe] = _asked(seen, probe)
    found: dict[str, dict[str, Information]] = seen.memo[probe]
    return found


def _asked(seen: Evidence, probe: Literal["linear", "hidden"]) -> dict[str, dict[str, Information]]:
    found: dict[str, dict[str, Information]] = {}
    for name, rows in seen.rows.items():
        for target, batches in seen.targets.items():
            paired = pair(rows, batches)
            if paired is None:
                seen.refused.append(_unpaired(name, rows, batches[0]))
                continue
            features_NF, wanted_N, sample_N, kind = paired
            try:
                information = usable_information(
                    features_NF,
                    wanted_N,
                    kind=kind,
                    groups_N=sample_N,
                    probe=probe,
                )
            except MeasureError as error:
                seen.refused.append(error)
                continue
            found.setdefault(name, {})[target] = information
    return found


def pair(rows: Rows, batches: Sequence[Wanted]) -> tuple[Tensor, Tensor, Tensor, Kind] | None:
    """Features, targets and samples, row by row, and the kind of target; None where none fit."""
    space, kind = batches[0].space, batches[0].kind
    if not rows.matched or any(one.space != space for one in batches):
        return None
    values = torch.cat([one.values for one in batches]).cpu()
    if values.shape[1] == 1:
        sample_S = rows.pooled_sample_S
        return rows.pooled_SF, values[sample_S, 0], sample_S, kind
    at_N = _position(rows, space)
    if at_N is None:
        return None
    kept = at_N < values.shape[1]
    sample_N = rows.sample_N[kept]
    return rows.features_NF[kept], values[sample_N, at_N[kept]], sample_N, kind


def _unpaired(name: str, rows: Rows, wanted: Wanted) -> MeasureError:
    return MeasureError(
        name,
        seen=f"positions {rows.space} of {'known' if rows.matched else 'unknown'} samples, "
        f"targets at {wanted.space}",
        needed="rows and targets of the same samples and places",
        next_step="pass targets=... with one row a sample",
    )


def _position(rows: Rows, space: tuple[int, ...]) -> Tensor | None:
    """Where among the targets' positions each row is; beyond their number: nowhere."""
    own = rows.space
    if own == space or (len(own) == len(space) == 1 and own[0] == space[0] + 1):
        return rows.position_N
    if len(own) != 2 or len(space) != 2:
        return None
    row_N, column_N = rows.position_N // own[1], rows.position_N % own[1]
    at_row = ((row_N + 0.5) * space[0] / own[0]).long()
    at_column = ((column_N + 0.5) * space[1] / own[1]).long()
    return at_row * space[1] + at_column
