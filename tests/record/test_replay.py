"""A run's decisions come out of its journal again; a journal that says otherwise is found out."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.record import test_resume as runs
from typer.testing import CliRunner

from neuroexapt import Settings, load, save
from neuroexapt.cli import app
from neuroexapt.errors import RecordError
from neuroexapt.record import Journal, read_journal
from neuroexapt.record.replay import replay
from neuroexapt.record.schema import FIELDS, problems


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a run with changes kept and taken back."""
    path = tmp_path_factory.mktemp("run") / "journal.jsonl"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        run = runs.factory(path)
        runs.train(run, runs.EPOCHS)
        run["evolver"].close()
    return path


def test_every_decision_is_derived_from_the_journal_alone(journal: Path) -> None:
    """As many as the run made; the file is all there is."""
    found = replay(read_journal(journal))
    verdicts = [e for e in read_journal(journal) if e["event"] == "verdict"]
    assert found.difference is None
    assert found.calls >= 2 * runs.EPOCHS
    assert found.decisions >= len(verdicts) > 1


def test_every_event_is_as_the_table_says(journal: Path) -> None:
    """And the table knows every kind that an evolver writes."""
    events = read_journal(journal)
    assert list(problems(events)) == []
    assert {event["event"] for event in events} <= FIELDS.keys()


def plans(events: list[dict[str, Any]], call: str) -> list[dict[str, Any]]:
    return [c for e in events if e["event"] == "plan" for c in e["calls"] if c["call"] == call]


def lower_a_loss(events: list[dict[str, Any]]) -> None:
    plans(events, "observed")[3]["given"]["point"]["loss"] *= 0.5


def turn_a_verdict_round(events: list[dict[str, Any]]) -> None:
    outcome = next(c["outcome"] for c in plans(events, "judge") if c["outcome"])
    outcome["kept"] = not outcome["kept"]


def hide_a_candidate(events: list[dict[str, Any]]) -> None:
    chosen = next(c for c in plans(events, "choose") if c["outcome"]["candidate"])
    place = chosen["outcome"]["candidate"]
    chosen["given"]["candidates"] = [c for c in chosen["given"]["candidates"] if c != place]


def change_a_setting(events: list[dict[str, Any]]) -> None:
    events[0]["plan"]["settings"]["price"] = 9.0


def leave_a_call_out(events: list[dict[str, Any]]) -> None:
    event = next(e for e in events for c in e.get("calls", []) if c["call"] == "started")
    event["calls"] = [c for c in event["calls"] if c["call"] != "started"]


@pytest.mark.parametrize(
    "tamper",
    [
        lower_a_loss,
        turn_a_verdict_round,
        hide_a_candidate,
        change_a_setting,
        leave_a_call_out,
    ],
)
def test_the_first_difference_is_told(tamper: Any, journal: Path, tmp_path: Path) -> None:
    """Where, what the journal says, and what comes out; the command ends with 1."""
    events = read_journal(journal)
    tamper(events)
    found = replay(events)
    assert found.difference is not None
    assert "in the journal" in found.difference
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    result = CliRunner().invoke(app, ["replay", str(path)])
    assert result.exit_code == 1
    assert "differs" in result.output


def test_the_command_says_that_all_is_as_written(journal: Path) -> None:
    """`neuroexapt replay RUN`, with the folder of the run."""
    result = CliRunner().invoke(app, ["replay", str(journal.parent)])
    assert result.exit_code == 0, result.output
    assert "all as written" in result.output
    assert "note" not in result.output


def test_a_resumed_run_replays_across_the_cut(tmp_path: Path) -> None:
    """Also where the settings are others from there on."""
    path = tmp_path / "journal.jsonl"
    run = runs.factory(path)
    runs.train(run, 4)
    save(tmp_path / "run", **run)
    runs.train(run, 6, start=4)
    run["evolver"].journal.close()

    def cautious() -> dict[str, Any]:
        built = runs.factory(path)
        built["evolver"].settings = Settings(significance=0.0, price=0.001)
        return built

    again = load(cautious, tmp_path / "run")
    runs.train(again, runs.EPOCHS, start=4)
    again["evolver"].close()
    events = read_journal(path)
    assert "resume" in [event["event"] for event in events]
    assert list(problems(events)) == []
    assert replay(events).difference is None
    spoilt = copy.deepcopy(events)
    resumed = next(event for event in spoilt if event["event"] == "resume")
    resumed["plan"]["settings"]["price"] = 5.0
    assert replay(spoilt).difference is not None


@pytest.mark.parametrize(
    "events",
    [
        [],
        [{"event": "start", "seq": 0}],
        [{"event": "start", "seq": 0, "plan": 3}],
        [{"event": "start", "seq": 0, "plan": {"state": {"$kind": "Popen"}}}],
        [{"event": "plan", "seq": 0, "calls": [{"call": "observed"}]}],
        [{"event": "plan", "seq": 0, "calls": 7}],
    ],
)
def test_what_is_no_record_of_decisions_is_refused(events: list[dict[str, Any]]) -> None:
    """No crash, no guess."""
    with pytest.raises(RecordError):
        replay(events)


def test_a_call_of_anything_else_is_refused(journal: Path) -> None:
    """Only the pure functions of the room `plan` are called."""
    for name in ("Settings", "__import__", "propose.__globals__", 3):
        events = read_journal(journal)
        next(e for e in events if e["event"] == "plan")["calls"][0]["call"] = name
        with pytest.raises(RecordError, match="the call"):
            replay(events)


def test_a_long_journal_is_several_files_and_one_journal(tmp_path: Path) -> None:
    """Numbered parts; reading and appending take them together, from any process."""
    path = tmp_path / "journal.jsonl"
    with Journal(path, part=400) as journal:
        written = [journal.write("epoch", epoch=number) for number in range(20)]
    parts = sorted(p.name for p in tmp_path.iterdir())
    assert parts[:3] == ["journal.jsonl", "journal.jsonl.000001", "journal.jsonl.000002"]
    assert all((tmp_path / name).stat().st_size < 600 for name in parts)
    assert read_journal(path) == written
    with Journal(path, part=400) as journal:
        assert journal.write("end")["seq"] == 20
    path.rename(tmp_path / "journal.jsonl.000099")  # died between two files
    assert len(read_journal(path)) == 21
    with Journal(path, part=400) as journal:
        assert journal.write("epoch")["seq"] == 21
    (tmp_path / "journal.jsonl.backup").write_text("not a part")
    assert [event["seq"] for event in read_journal(path)] == list(range(22))
