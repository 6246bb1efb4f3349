"""Damaged, hostile and foreign files: our error, no code, nothing written, memory bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# `make nightly` sets a larger number.
COUNT = os.environ.get("NEUROEXAPT_HOSTILE", "120")


def test_damaged_checkpoints_and_journals_meet_our_error(tmp_path: Path) -> None:
    """A corpus drawn anew: bytes flipped, cut and repeated, JSON changed with digests made good."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "tests.record.hostile", COUNT, "1"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=7200,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "CheckpointError" in done.stdout
    assert "RecordError" in done.stdout
