"""What can go wrong, as a tree. A class stands for what the user can do about it.

::

    NeuroExaptError
    +-- CaptureError        the model did not run on the example input: fix the input or the model
    +-- EditError           the edit does not fit this model: ask for another place or size
    |   +-- UnknownPlaceError   no such module or width: pick one of the near names
    |   +-- PinnedError         this width cannot change: the reason and the source line say why
    +-- GuardError          the moment is wrong for an edit: end the step, drop the live graph
    +-- VerifyError         the edit was made, failed its check, and has been rolled back
    +-- MeasureError        a signal cannot be computed from what it was given
    +-- SettingsError       a setting of the evolver or of the budget is out of range
    +-- RecordError         a journal or report cannot be read or written
        +-- CheckpointError     a checkpoint cannot be written, read, or does not fit the model
            +-- NoCheckpointError   there is none at this path: begin the run, or check the path

Every message names the place, the value seen, the value needed and the next step.
"""

from __future__ import annotations


class NeuroExaptError(Exception):
    """Base of every error this library raises on purpose.

    Args:
        place: module path, width, file and line, or setting the error is about.
        seen: the value that was met.
        needed: what would have been accepted.
        next_step: what the user can do now.

    Example:
        >>> error = EditError("features.0", seen="to=0", needed="at least 1", next_step="use to=1")
        >>> print(error)
        features.0: got to=0; needed at least 1. Next step: use to=1.
    """

    def __init__(self, place: str, *, seen: str, needed: str, next_step: str) -> None:
        self.place = place
        self.seen = seen
        self.needed = needed
        self.next_step = next_step
        super().__init__(f"{place}: got {seen}; needed {needed}. Next step: {next_step}.")

    def __reduce__(self) -> tuple[object, ...]:
        # The default rebuilds from `args` alone, which would lose the keyword-only fields.
        fields = {"seen": self.seen, "needed": self.needed, "next_step": self.next_step}
        return _rebuild, (type(self), self.place, fields)


def _rebuild(kind: type[NeuroExaptError], place: str, fields: dict[str, str]) -> NeuroExaptError:
    return kind(place, **fields)


class CaptureError(NeuroExaptError):
    """The model did not run on the example input."""


class EditError(NeuroExaptError):
    """The edit does not fit this model; the model is untouched."""


class UnknownPlaceError(EditError):
    """No module path or width has this name."""


class PinnedError(EditError):
    """The width cannot change; the message says why and where."""


class GuardError(NeuroExaptError):
    """The model or optimizer is in a state in which it must not be edited."""


class VerifyError(NeuroExaptError):
    """An edit was applied, failed verification, and was rolled back bit for bit."""


class MeasureError(NeuroExaptError):
    """A signal cannot be computed from what it was given."""


class SettingsError(NeuroExaptError):
    """A setting is out of range."""


class RecordError(NeuroExaptError):
    """A journal or report cannot be read or written."""


class CheckpointError(RecordError):
    """A checkpoint cannot be written, is damaged, or does not fit what the factory builds."""


class NoCheckpointError(CheckpointError):
    """There is no checkpoint at this path."""
