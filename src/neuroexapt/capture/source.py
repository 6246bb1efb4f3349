"""Which line of the user's code is running."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path

import torch

from neuroexapt.capture.trace import Source

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent.parent)
# These run inside of a forward: the recorder, and what edits put into a model.
_INSIDE = tuple(str(Path(__file__).parent.parent / room) for room in ("capture", "edit"))


def user_line() -> Source | None:
    """The innermost line that is neither torch's nor ours; None when we called the model."""
    frame = sys._getframe(1)
    while frame is not None:
        whose = _whose(frame.f_code.co_filename)
        if whose == "caller":
            return None
        if whose == "user":
            return Source(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


@functools.cache
def _whose(file: str) -> str:
    if file.startswith(_OURS) and not file.startswith(_INSIDE):
        return "caller"
    inner = file.startswith((_TORCH, _OURS, "<")) or file == contextlib.__file__
    return "between" if inner else "user"
