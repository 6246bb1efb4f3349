"""The convolutional cases of plain user code, collected."""

from __future__ import annotations

from benchmarks.coverage import (
    plain_cnn_branches,
    plain_cnn_classic,
    plain_cnn_dense,
    plain_cnn_diffusion,
    plain_cnn_generative,
    plain_cnn_mobile,
    plain_cnn_modern,
    plain_cnn_special,
)
from benchmarks.coverage.case import Case

CASES: tuple[Case, ...] = (
    *plain_cnn_classic.CASES,
    *plain_cnn_branches.CASES,
    *plain_cnn_mobile.CASES,
    *plain_cnn_modern.CASES,
    *plain_cnn_dense.CASES,
    *plain_cnn_generative.CASES,
    *plain_cnn_diffusion.CASES,
    *plain_cnn_special.CASES,
)
