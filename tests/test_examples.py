"""Every example runs as a user runs it: a process of its own, warnings as errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# What each must print: the point that it makes. Figures may change.
POINT = {
    "inspect_model": ["stem.out: 16 units", "x.view(-1, 128)", "without a rule: none"],
    "one_edit": ["every bit is as before: True", "24 channels, as before", "PinnedError: 5"],
    "plain_loop": ["test accuracy", "deciding took"],
}


def run(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The script's outcome, from an empty folder, with this checkout's library."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_example_is_tested() -> None:
    """The table names the files that are there."""
    assert sorted(POINT) == [script.stem for script in EXAMPLES]


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs_and_makes_its_point(script: Path, tmp_path: Path) -> None:
    """It ends well, says nothing on stderr, leaves no file behind."""
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert [text for text in POINT[script.stem] if text not in done.stdout] == [], done.stdout
    assert list(tmp_path.iterdir()) == []
