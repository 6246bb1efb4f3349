"""The attention cases of plain user code, collected."""

from __future__ import annotations

from benchmarks.coverage import (
    plain_attention_blocks,
    plain_attention_language,
    plain_attention_llama,
    plain_attention_vision,
)
from benchmarks.coverage.case import Case

CASES: tuple[Case, ...] = (
    *plain_attention_language.CASES,
    *plain_attention_llama.CASES,
    *plain_attention_vision.CASES,
    *plain_attention_blocks.CASES,
)
