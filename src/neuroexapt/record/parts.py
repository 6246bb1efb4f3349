"""A journal in several files: the one that is written, and full ones with a number behind it."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NUMBER = re.compile(r"\.(\d{6})")


def full_parts(path: Path) -> list[Path]:
    """The full files of a journal, oldest first: ``run.jsonl.000001``, ``run.jsonl.000002``, ..."""
    if not path.parent.is_dir():
        return []
    names = (other for other in path.parent.iterdir() if other.name.startswith(f"{path.name}."))
    return sorted(other for other in names if _NUMBER.fullmatch(other.name[len(path.name) :]))


def put_aside(path: Path) -> None:
    """Give the file that is written the next number; its place is free then."""
    parts = full_parts(path)
    number = int(parts[-1].name[-6:]) + 1 if parts else 1
    os.rename(path, path.with_name(f"{path.name}.{number:06d}"))
