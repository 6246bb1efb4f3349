"""Runs on disk, as a user names them: a folder with a journal in it, or the journal itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuroexapt.errors import RecordError
from neuroexapt.record.journal import read_journal

JOURNAL = "journal.jsonl"


def find_journal(run: str | os.PathLike[str]) -> Path:
    """The journal of a run, given as its folder or as the file.

    Raises:
        RecordError: nothing is there, or the folder has no journal.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "journal.jsonl").write_text("")
        ...     find_journal(folder).name
        'journal.jsonl'
    """
    path = Path(run)
    if path.is_dir():
        if (path / JOURNAL).is_file():
            return path / JOURNAL
        seen = f"a folder without {JOURNAL}"
    elif path.is_file():
        return path
    else:
        seen = "nothing there"
    raise RecordError(
        str(path),
        seen=seen,
        needed=f"a folder with {JOURNAL} in it, or a journal",
        next_step="pass Evolver(..., journal='RUN/journal.jsonl') and then RUN",
    )


def read_runs(runs: Sequence[str | os.PathLike[str]]) -> dict[str, list[dict[str, Any]]]:
    """The events of runs by name: the folder's, or the file's without its ending.

    Where two would be called the same, their paths are their names; a run given twice is there
    twice.

    Raises:
        RecordError: a run has no journal, or one that cannot be read.
    """
    paths = [find_journal(run) for run in runs]
    short = [_name(path) for path in paths]
    names = [
        name if short.count(name) == 1 else str(path.parent if path.name == JOURNAL else path)
        for name, path in zip(short, paths, strict=True)
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, path in zip(names, paths, strict=True):
        count = 2
        unique = name
        while unique in found:
            unique, count = f"{name} ({count})", count + 1
        found[unique] = read_journal(path)
    return found


def _name(path: Path) -> str:
    return path.resolve().parent.name if path.name == JOURNAL else path.stem
