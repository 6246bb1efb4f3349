"""The other cases of plain user code, collected."""

from __future__ import annotations

from benchmarks.coverage import (
    plain_other_density,
    plain_other_layers,
    plain_other_python,
    plain_other_science,
    plain_other_state,
    plain_other_tabular,
)
from benchmarks.coverage.case import Case

CASES: tuple[Case, ...] = (
    *plain_other_tabular.CASES,
    *plain_other_science.CASES,
    *plain_other_layers.CASES,
    *plain_other_density.CASES,
    *plain_other_python.CASES,
    *plain_other_state.CASES,
)
