"""The journal keeps every event that was written, and reads back nothing else."""

from __future__ import annotations

import enum
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from neuroexapt.errors import RecordError
from neuroexapt.record import SCHEMA, Journal, read_journal


class Colour(str, enum.Enum):
    """A text enumeration, as settings often hold."""

    RED = "red"


@dataclass(frozen=True)
class Edit:
    """A small record with a nested one."""

    at: str
    by: object = 4


def write_some(path: Path, number: int = 3) -> list[dict[str, object]]:
    with Journal(path) as journal:
        for step in range(number):
            journal.write("epoch", epoch=step, step=10 * step)
        return journal.events


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    """The returned events, the file and ``events`` agree; folders are made."""
    path = tmp_path / "a" / "b" / "run.jsonl"
    written = write_some(path)
    assert read_journal(path) == written
    assert [list(e)[:4] for e in written] == [["schema", "seq", "event", "time"]] * 3
    assert [e["seq"] for e in written] == [0, 1, 2]
    assert {e["schema"] for e in written} == {SCHEMA}


def test_field_order_is_kept(tmp_path: Path) -> None:
    """Fields stand in the file in the order of the call."""
    with Journal(tmp_path / "j") as journal:
        journal.write("epoch", zeta=1, alpha=2)
    line = (tmp_path / "j").read_text()
    assert line.index("zeta") < line.index("alpha")
    assert line.endswith("\n")


@pytest.mark.parametrize("path", ["", "run.jsonl"])
def test_values_become_plain_json(tmp_path: Path, path: str) -> None:
    """In memory and on disk alike, an event holds exact JSON types only."""
    journal = Journal(tmp_path / path if path else None)
    event = journal.write(
        "proposal",
        nan=math.nan,
        inf=[math.inf, -math.inf],
        numpy=(np.float32(0.5), np.int64(3), np.bool_(True), np.float64("nan"), np.array(2.0)),
        edit=Edit("fc1", by=(1, Edit("x"))),
        text=Colour.RED,
        nested={"a": {"b": None}},
    )
    journal.close()
    assert event["nan"] is None
    assert event["inf"] == [None, None]
    assert event["numpy"] == [0.5, 3, True, None, 2.0]
    assert [type(v) for v in event["numpy"]] == [float, int, bool, type(None), float]
    assert event["edit"] == {"at": "fc1", "by": [1, {"at": "x", "by": 4}]}
    assert type(event["text"]) is str
    assert event["text"] == "red"
    assert json.loads(json.dumps(event, allow_nan=False)) == event
    if path:
        assert read_journal(tmp_path / path) == [event]


def test_torch_scalars_are_written() -> None:
    """A one-element tensor counts as a number, also while it needs a gradient."""
    torch = pytest.importorskip("torch")
    loss = torch.tensor([0.25], requires_grad=True)
    event = Journal(None).write("epoch", holdout_loss=loss, step=torch.tensor(7))
    assert (event["holdout_loss"], event["step"]) == (0.25, 7)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (object(), "'edit'"),
        ({"sizes": [1, {2}]}, "'edit.sizes[1]'"),
        ({"a": b"raw"}, "'edit.a'"),
        ({3: 1}, "'edit'"),
        (np.zeros(2), "'edit'"),
        (np.complex64(1), "'edit'"),
        (Edit("x", by=range(2)), "'edit.by'"),
        (Edit, "'edit'"),
    ],
)
def test_a_field_that_is_not_json_is_named(tmp_path: Path, value: object, place: str) -> None:
    """The error names the field, nothing is appended, and the journal goes on."""
    with Journal(tmp_path / "j") as journal:
        with pytest.raises(RecordError, match="field") as caught:
            journal.write("proposal", id=1, edit=value)
        assert place in str(caught.value)
        assert journal.write("proposal", id=1)["seq"] == 0
    assert len(read_journal(tmp_path / "j")) == 1


def test_a_list_that_holds_itself_is_refused() -> None:
    """Endless nesting gives a clear error, not a crash of the interpreter's stack."""
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(RecordError, match="deeper"):
        Journal(None).write("epoch", value=endless)


@pytest.mark.parametrize("name", ["schema", "seq", "time", "event"])
def test_reserved_names_are_refused(name: str) -> None:
    """A field cannot stand in for what the journal itself writes."""
    with pytest.raises(RecordError, match=name):
        Journal(None).write("epoch", **{name: 1})


def test_seq_continues_in_a_second_journal(tmp_path: Path) -> None:
    """Appending to an existing file goes on counting; ``events`` holds this process's own."""
    write_some(tmp_path / "j")
    with Journal(tmp_path / "j") as journal:
        assert journal.write("end")["seq"] == 3
        assert len(journal.events) == 1
    assert [e["seq"] for e in read_journal(tmp_path / "j")] == [0, 1, 2, 3]


def test_a_journal_cut_at_any_byte_is_read_and_continued(tmp_path: Path) -> None:
    """Whatever prefix a crash leaves, whole events survive and the next one follows them."""
    whole = tmp_path / "whole"
    events = write_some(whole)
    raw = whole.read_bytes()
    for size in range(len(raw)):
        cut = tmp_path / f"cut{size}"
        cut.write_bytes(raw[:size])
        # An event counts as soon as its last brace is there, with or without the line's end.
        survived = (raw[:size] + b"|").replace(b"}|", b"}\n|").count(b"\n")
        assert read_journal(cut) == events[:survived]
        with Journal(cut) as journal:
            journal.write("end")
        assert [e["seq"] for e in read_journal(cut)] == list(range(survived + 1))


def test_zeros_after_a_power_loss_count_as_torn(tmp_path: Path) -> None:
    """Some file systems leave zeros where the last write was promised."""
    events = write_some(tmp_path / "j")
    with open(tmp_path / "j", "ab") as file:
        file.write(b"\0" * 40)
    assert read_journal(tmp_path / "j") == events
    write_some(tmp_path / "j", 1)
    assert b"\0" not in (tmp_path / "j").read_bytes()


@pytest.mark.parametrize("damage", [b'{"schema":1,"seq":1', b"", b"[]", b'{"schema":1}', b"\xff"])
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path, damage: bytes) -> None:
    """Reading and appending both name file and line, and leave the file as it was."""
    path = tmp_path / "j"
    write_some(path)
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(RecordError, match=r"j:2"):
        read_journal(path)
    with pytest.raises(RecordError, match=r"j:2"):
        Journal(path)
    assert path.read_bytes() == before


def test_another_file_is_not_cut(tmp_path: Path) -> None:
    """Opening a file that is no journal refuses and changes nothing."""
    path = tmp_path / "notes.txt"
    path.write_text("my only copy")
    with pytest.raises(RecordError, match="notes"):
        Journal(path)
    assert path.read_text() == "my only copy"


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    """A journal from the future is not guessed at."""
    path = tmp_path / "j"
    path.write_text(json.dumps({"schema": SCHEMA + 1, "seq": 0, "event": "start"}) + "\n")
    with pytest.raises(RecordError, match=f"schema {SCHEMA + 1}"):
        read_journal(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """Reading makes no file."""
    with pytest.raises(RecordError, match="missing"):
        read_journal(tmp_path / "missing")
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    """A folder in place of the file, or a file in place of a folder."""
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "file" / "run.jsonl"):
        with pytest.raises(RecordError):
            Journal(path)


def test_writing_after_close_is_an_error(tmp_path: Path) -> None:
    """Closing twice is fine, writing afterwards is not."""
    for path in (None, tmp_path / "j"):
        journal = Journal(path)
        journal.close()
        journal.close()
        with pytest.raises(RecordError, match="close"):
            journal.write("end")


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused write is taken back, so that the next one does not follow half an event."""

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    with Journal(tmp_path / "j") as journal:
        journal.write("start", run="one")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(RecordError, match="No space left"):
                journal.write("applied", id=1)
        journal.write("applied", id=1)
    assert [e["seq"] for e in read_journal(tmp_path / "j")] == [0, 1]


def test_commits_are_synced_and_epochs_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the events that decide about the model pay for the disk."""
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    with Journal(tmp_path / "j") as journal:
        for kind in ("start", "epoch", "proposal", "applied", "verdict", "result", "end"):
            journal.write(kind)
    assert len(calls) == 4


def test_events_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    """After ``os._exit`` every event whose write returned is in the file."""
    code = (
        "import os, sys\n"
        "from neuroexapt.record import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for kind in ('start', 'epoch', 'applied', 'verdict', 'epoch'):\n"
        "    journal.write(kind)\n"
        "os._exit(9)\n"
    )
    path = tmp_path / "j"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=120)
    assert done.returncode == 9
    kinds = [e["event"] for e in read_journal(path)]
    assert kinds == ["start", "epoch", "applied", "verdict", "epoch"]
