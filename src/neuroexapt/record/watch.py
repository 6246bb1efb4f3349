"""Show a run elsewhere while it goes on: whoever watches is handed each event of the journal."""

from __future__ import annotations

import warnings
from typing import Protocol

from neuroexapt.record.journal import Journal
from neuroexapt.record.story import Event


class Watcher(Protocol):
    """Takes the events of one run, in order, each once.

    Attributes:
        failures: what a broken disk, server or terminal raises in ``take`` or ``close``. A watcher
            that fails so is let go with a warning, and the run goes on; any other error is a fault
            in the watcher and comes through.
    """

    failures: tuple[type[Exception], ...]

    def take(self, event: Event) -> None:
        """Show one event; kinds it does not know are passed over."""

    def close(self) -> None:
        """The run is over: finish what is open."""


class Audience:
    """Hands the events of a journal to its watchers.

    Args:
        journal: the journal; events written before a watcher came are told to it first.

    Example:
        >>> class Names:
        ...     failures = ()
        ...     def take(self, event): print(event["event"])
        ...     def close(self): print("closed")
        >>> journal = Journal(None)
        >>> audience = Audience(journal)
        >>> audience.add(Names())
        >>> _ = journal.write("start", run="demo")
        >>> audience.tell()
        start
        >>> audience.close()
        closed
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._told: list[tuple[Watcher, int]] = []

    def add(self, watcher: Watcher) -> None:
        """Tells a new watcher all so far, and from now on with the others."""
        self._told.append((watcher, 0))
        self.tell()

    def tell(self) -> None:
        """Everything written since the last time, to everyone who is still there."""
        if not self._told:
            return
        events = self._journal.events
        stay = []
        for watcher, told in self._told:
            try:
                for event in events[told:]:
                    watcher.take(event)
            except watcher.failures as error:
                _let_go(watcher, error)
            else:
                stay.append((watcher, len(events)))
        self._told = stay

    def close(self) -> None:
        """Tells the rest and closes everyone; a second call does nothing."""
        self.tell()
        told, self._told = self._told, []
        for watcher, _ in told:
            try:
                watcher.close()
            except watcher.failures as error:
                _let_go(watcher, error)


def _let_go(watcher: Watcher, error: Exception) -> None:
    warnings.warn(
        f"{type(watcher).__name__} is not told of this run any more: "
        f"{type(error).__name__}: {error}. The journal goes on.",
        RuntimeWarning,
        stacklevel=4,
    )
