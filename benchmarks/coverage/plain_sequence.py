"""The sequence cases of plain user code, collected."""

from __future__ import annotations

from benchmarks.coverage import (
    plain_sequence_recurrent,
    plain_sequence_signal,
    plain_sequence_video,
)
from benchmarks.coverage.case import Case

CASES: tuple[Case, ...] = (
    *plain_sequence_recurrent.CASES,
    *plain_sequence_signal.CASES,
    *plain_sequence_video.CASES,
)
