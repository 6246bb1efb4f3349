"""Whoever watches a run is told every event once, in order; a failing one cannot stop the run."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from neuroexapt import Evolver
from neuroexapt.record import Audience, Journal, LiveView


class Notes:
    """Remembers; fails at the event of this number."""

    failures = (OSError,)

    def __init__(self, fail_at: int | None = None, error: type[Exception] = OSError) -> None:
        self.taken: list[Any] = []
        self.closed = 0
        self._fail_at, self._error = fail_at, error

    def take(self, event: Mapping[str, Any]) -> None:
        if len(self.taken) == self._fail_at:
            raise self._error("the disk is full")
        self.taken.append(event)

    def close(self) -> None:
        self.closed += 1


def test_everyone_is_told_everything_once() -> None:
    """Also what was written before; closed once."""
    journal, first, late = Journal(None), Notes(), Notes()
    audience = Audience(journal)
    audience.add(first)
    journal.write("start")
    audience.tell()
    journal.write("epoch", epoch=1)
    audience.add(late)
    journal.write("end")
    audience.close()
    audience.close()
    assert first.taken == late.taken == journal.events
    assert (first.closed, late.closed) == (1, 1)


def test_a_failing_watcher_is_let_go_with_a_warning() -> None:
    """The others and the journal go on; an error it does not name comes through."""
    journal, broken, whole = Journal(None), Notes(fail_at=1), Notes()
    audience = Audience(journal)
    for watcher in (broken, whole):
        audience.add(watcher)
    journal.write("start")
    audience.tell()
    journal.write("epoch")
    with pytest.warns(RuntimeWarning, match="Notes is not told.*OSError: the disk is full"):
        audience.tell()
    journal.write("end")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audience.close()
    assert [len(broken.taken), len(whole.taken), broken.closed, whole.closed] == [1, 3, 0, 1]
    faulty = Notes(fail_at=0, error=KeyError)
    with pytest.raises(KeyError):
        audience.add(faulty)


def test_a_run_tells_its_watchers() -> None:
    """One call; each epoch's events are there when it is done, the end after close."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = list(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)).split(8))
    evolver = Evolver(
        model, optimizer, loss_fn=lambda m, x: m(x).square().mean(), holdout=batches
    )  # fmt: skip
    notes = Notes()
    evolver.watch(notes)
    assert [event["event"] for event in notes.taken] == ["start"]
    evolver.end_epoch()
    assert notes.taken == evolver.journal.events
    evolver.close()
    assert notes.taken == evolver.journal.events
    assert notes.taken[-1]["event"] == "end"
    assert notes.closed == 1


EVENTS: list[dict[str, Any]] = [
    {"event": "start", "time": 5.0, "run": "Net[/]", "settings": {"epochs": 9},
     "model": {"parameters": 200, "flops": 10}},
    {"event": "epoch", "time": 7.0, "epoch": 1, "holdout_loss": 0.75, "parameters": 100,
     "flops": 20, "memory_bytes": 2048},
    {"event": "proposal", "id": 1, "kind": "Widen", "at": "fc[red]", "reason": "it {is} [full]"},
    {"event": "verdict", "id": 1, "verdict": "rolled_back", "why": "worse [by] {much}"},
    {"event": "proposal", "id": 2, "kind": "Narrow", "at": "head", "reason": "idle"},
]  # fmt: skip


def shown(events: list[dict[str, Any]], **options: Any) -> str:
    """What a terminal of 100 columns received, controls left out."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    view = LiveView(console, **options)
    for event in events:
        view.take(event)
    view.close()
    view.close()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_live_view_shows_where_the_run_is() -> None:
    """Epoch, score, sizes with their change, the trial, the last decisions; names stay text."""
    output = shown(EVENTS)
    for word in (
        "Net[/]", "1 of 9, 2 s for the last one", "0.75", "100  -50.0% since the start",
        "20  +100.0% since the start", "2 KiB", "on trial #2 Narrow at head: idle",
        "#1 rolled back Widen at fc[red]: worse [by] {much}",
    ):  # fmt: skip
        assert word in output, output
    # The cursor is hidden while the panel is there, and given back in the end.
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1


def test_the_live_view_keeps_the_last_decisions_only() -> None:
    """As many as asked for; a run without any event yet says so."""
    verdicts = [
        {"event": "verdict", "id": number, "verdict": "kept", "why": f"w{number}"}
        for number in range(5)
    ]
    last = shown([*EVENTS, *verdicts], last=2).rpartition("╭")[2]
    assert [f"w{number}" in last for number in range(5)] == [False] * 3 + [True] * 2
    assert "the first one is under way" in shown(EVENTS[:1])


def test_the_live_view_is_quiet_where_there_is_no_terminal() -> None:
    """Not a character in a pipe or a file."""
    console = Console(file=io.StringIO(), force_terminal=False)
    view = LiveView(console)
    for event in EVENTS:
        view.take(event)
    view.close()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""
