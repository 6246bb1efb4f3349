"""A run in the terminal while it goes on."""

from __future__ import annotations

import atexit
from collections import deque

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from neuroexapt.record.story import Event, mapping
from neuroexapt.record.trackers.told import sentence
from neuroexapt.record.wording import (
    count,
    duration,
    number,
    percent,
    share,
    size,
    text,
    with_error,
)

_STYLES = {"kept": "green", "rolled_back": "red", "refused": "magenta"}


class LiveView:
    """A panel that stays at the bottom of the terminal while other output scrolls above it.

    It shows the epoch, the held-out loss and accuracy, parameters, FLOPs and memory with their
    change since the start, the change on trial, and the last decisions. Where the output is no
    terminal (a pipe, a file, a batch job) it shows nothing at all.

    Args:
        console: where to; the standard output without one.
        last: how many decisions to show.

    Example:
        >>> import io
        >>> view = LiveView(Console(file=io.StringIO()))
        >>> view.take({"event": "epoch", "epoch": 3, "holdout_loss": 0.25})
        >>> view.close()
    """

    failures = (OSError,)

    def __init__(self, console: Console | None = None, *, last: int = 4) -> None:
        self._console = console or Console()
        self._live: Live | None = None
        self._start: Event = {}
        self._epoch: Event = {}
        self._trial: Event = {}
        self._best: float | None = None
        self._made: dict[str, str] = {}
        self._decisions: deque[Text] = deque(maxlen=last)
        self._last: Event = {}
        self._seconds: float | None = None

    def take(self, event: Event) -> None:
        """Show one event."""
        self._note(event)
        if not self._console.is_terminal:
            return
        if self._live is None:
            # No thread beside the training: the panel moves when there is something new.
            self._live = Live(self, console=self._console, auto_refresh=False)
            self._live.start()
            # A run that dies must not leave the terminal without its cursor.
            atexit.register(self.close)
        self._live.refresh()

    def _note(self, event: Event) -> None:
        kind = event.get("event")
        if kind == "start":
            self._start = self._start or event
            self._last = event
        elif kind == "epoch":
            self._seconds, self._last = _between(self._last, event), event
            self._epoch = event
            loss = number(event.get("holdout_loss"))
            if loss is not None and (self._best is None or loss < self._best):
                self._best = loss
        elif kind == "proposal":
            self._trial = event
            what = f"{text(event.get('kind'), 'Mutation')} at {text(event.get('at'), 'the model')}"
            self._made[text(event.get("id"))] = what
        elif kind == "verdict":
            self._trial = {}
            what = self._made.pop(text(event.get("id")), "")
            style = _STYLES.get(str(event.get("verdict")), "")
            head, _, why = sentence(event).partition(": ")
            told = Text.assemble((f"{head} {what}".strip(), style), f": {why}")
            self._decisions.append(told)

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
            atexit.unregister(self.close)

    def __rich__(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        for name, told in self._figures():
            grid.add_row(Text(name, style="dim"), Text(told))
        parts: list[RenderableType] = [grid]
        if self._trial:
            parts.append(Text.assemble(("on trial ", "bold yellow"), sentence(self._trial)))
        parts += self._decisions
        name = text(self._start.get("run"), "neuroexapt")
        return Panel(Group(*parts), title=escape(name), title_align="left", border_style="dim")

    def _figures(self) -> list[tuple[str, str]]:
        epoch, model = self._epoch, mapping(self._start.get("model"))
        if not epoch:
            return [("epoch", "the first one is under way")]
        loss = with_error(epoch.get("holdout_loss"), epoch.get("holdout_error"))
        if self._best is not None:
            loss += f"   best {with_error(self._best, None)}"
        of = number(mapping(self._start.get("settings")).get("epochs"))
        last = count(epoch.get("epoch")) + ("" if of is None else f" of {count(of)}")
        if self._seconds is not None:
            last += f", {duration(self._seconds)} for the last one"
        told = [("epoch", last), ("holdout loss", loss)]
        if number(epoch.get("holdout_accuracy")) is not None:
            told.append(("accuracy", percent(epoch.get("holdout_accuracy"))))
        for name in ("parameters", "flops"):
            change = share(model.get(name), epoch.get(name))
            since = "" if change is None else f"  {change} since the start"
            label = "FLOPs" if name == "flops" else name
            told.append((label, count(epoch.get(name)) + since))
        told.append(("memory", size(epoch.get("memory_bytes"))))
        return told


def _between(before: Event, after: Event) -> float | None:
    """Seconds from one event to another."""
    first, last = number(before.get("time")), number(after.get("time"))
    return None if first is None or last is None or last < first else last - first
