"""Ctrl-C waits for a moment at which nothing is half done.

Python raises ``KeyboardInterrupt`` between any two instructions: also between a context manager's
entry and its block, and then torch may go on without gradients, or under a mode of ours, for
ever. Whatever works on a model holds interruptions back, and lets them through at points where
unwinding leads back to where it began.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class _Waiting:
    """An interruption that has arrived, for the outermost block that holds it back."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler
        self.arrived: tuple[int, FrameType | None] | None = None

    def take(self, number: int, frame: FrameType | None) -> None:
        """The first one waits; whoever presses again means now."""
        if self.arrived is not None:
            self.handler(number, frame)
        self.arrived = number, frame

    def deliver(self) -> None:
        """Let it through, if there is one."""
        arrived, self.arrived = self.arrived, None
        if arrived is not None:
            self.handler(*arrived)


_held: list[_Waiting] = []


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended, or until it calls :func:`breathe`.

    A second one goes through at once. Blocks nest; the outermost one delivers. Only in the main
    thread, the one that Python interrupts; elsewhere this does nothing.

    Example:
        >>> try:
        ...     with held_back():
        ...         signal.raise_signal(signal.SIGINT)
        ...         print("the block goes on")
        ... except KeyboardInterrupt:
        ...     print("and is interrupted behind")
        the block goes on
        and is interrupted behind
    """
    handler = signal.getsignal(signal.SIGINT)
    outermost = not _held and threading.current_thread() is threading.main_thread()
    if not outermost or not callable(handler):
        yield
        return
    waiting = _Waiting(handler)
    _held.append(waiting)
    signal.signal(signal.SIGINT, waiting.take)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        _held.clear()
        waiting.deliver()


def breathe() -> None:
    """Let an interruption through that was held back: nothing is half done here.

    Raises:
        KeyboardInterrupt: one has arrived.
    """
    if _held and threading.current_thread() is threading.main_thread():
        _held[0].deliver()
