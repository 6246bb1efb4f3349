"""Runs beside each other: every figure from the right event, differences to the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from neuroexapt.cli import app
from neuroexapt.errors import RecordError
from neuroexapt.record import Journal, read_runs
from neuroexapt.record.compare import as_data, figures, recorded
from neuroexapt.record.story import read_story

RUNNER = CliRunner()


def write_run(folder: Path, loss: float, parameters: int, *, finished: bool = True) -> None:
    with Journal(folder / "journal.jsonl") as journal:
        journal.write("start", run="Net", model={"parameters": 100, "flops": 10})
        journal.write("epoch", epoch=1, step=5, holdout_loss=9.0, parameters=100, memory_bytes=2048)
        journal.write("proposal", id=1, epoch=1, step=5, kind="Widen", at="fc[bold]")
        journal.write("verdict", id=1, step=9, verdict="kept")
        journal.write(
            "epoch", epoch=2, step=10, holdout_loss=loss, holdout_error=0.01,
            holdout_accuracy=0.5, parameters=parameters, flops=20, memory_bytes=1024,
        )  # fmt: skip
        if finished:
            model = {"parameters": parameters, "flops": 20}
            journal.write("end", step=10, model=model, seconds=4.0, overhead_seconds=1.0)


def test_each_figure_is_of_its_own_model() -> None:
    """The last epoch's loss, the baseline's last point, test results by name, counts by verdict."""
    events: list[dict[str, Any]] = [
        {"event": "start"},
        {"event": "epoch", "step": 1, "holdout_loss": 3.0, "parameters": 7},
        {"event": "epoch", "step": 2, "holdout_loss": 2.0, "holdout_error": 0.5, "parameters": 8},
        {"event": "proposal", "id": 1},
        {"event": "verdict", "id": 1, "verdict": "refused"},
        {"event": "baseline", "name": "still", "parameters": 4,
         "points": [{"step": 1, "holdout_loss": 5.0}, {"step": 2, "holdout_loss": 4.0}]},
        {"event": "result", "rows": [
            {"name": "still", "test_accuracy": 0.5, "proposed": None, "parameters": 4},
            {"name": "grown", "test_accuracy": 0.75, "proposed": 1, "parameters": 8},
            {"name": "other", "test_accuracy": 0.25, "proposed": None},
        ]},
    ]  # fmt: skip
    run, still, other = figures([read_story(events, "mine")])
    assert (run.name, still.name, other.name) == ("mine", "still", "other")
    assert run.values["test_accuracy"] == 0.75
    assert (run.values["holdout_loss"], run.values["holdout_error"]) == (2.0, 0.5)
    assert run.told("holdout_loss") == "2 ± 0.5"
    assert (run.values["proposed"], run.values["kept"], run.values["refused"]) == (1, 0, 1)
    assert (still.values["holdout_loss"], still.values["test_accuracy"]) == (4.0, 0.5)
    assert still.told("kept") == other.told("proposed") == "n/a"
    assert still.against(run, "parameters") == "-50.0%"
    assert still.against(run, "test_accuracy") == "-25.00 points"
    assert run.against(run, "parameters") == run.against(still, "kept") == ""
    assert recorded([run]) == [
        "test_accuracy", "holdout_loss", "parameters", "proposed", "kept", "rolled_back", "refused"
    ]  # fmt: skip
    assert [row["name"] for row in as_data([run, still])] == ["mine", "still"]


def test_the_commands_compare_and_report(tmp_path: Path) -> None:
    """Folders or files, finished or not; a torn last line is no obstacle; JSON for programs."""
    write_run(tmp_path / "one", 0.5, 50)
    write_run(tmp_path / "two", 0.25, 80, finished=False)
    with open(tmp_path / "two" / "journal.jsonl", "ab") as file:
        file.write(b'{"schema":1,"se')
    one, two = str(tmp_path / "one"), str(tmp_path / "two" / "journal.jsonl")
    done = RUNNER.invoke(app, ["compare", one, two, "--json"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    first, second = json.loads(done.output)
    assert (first["name"], second["name"]) == ("one", "two")
    assert (first["holdout_loss"], second["holdout_loss"]) == (0.5, 0.25)
    assert (first["seconds"], second["seconds"]) == (4.0, None)
    shown = RUNNER.invoke(app, ["compare", one, two], env={"COLUMNS": "200"}).output
    for word in ("0.5 ± 0.01", "-50.0%", "+60.0%", "1 KiB"):
        assert word in shown
    done = RUNNER.invoke(app, ["report", two, "--against", one], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    path = tmp_path / "two" / "report.html"
    assert done.output.strip() == str(path)
    page = path.read_text()
    assert "Unfinished" in page
    assert '"name":"one"' in page
    assert '"name":"two"' in page


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """By their paths, or by number."""
    for folder in ("a/run", "b/run", "c"):
        write_run(tmp_path / folder, 1.0, 1)
    runs = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "c", tmp_path / "c"]
    c = str(tmp_path / "c")
    assert list(read_runs(runs)) == [str(runs[0]), str(runs[1]), c, f"{c} (2)"]


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_run_that_is_none_is_an_error_with_its_name(command: str, tmp_path: Path) -> None:
    """Nothing there, an empty folder, a file of something else."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.txt").write_text("hello\nworld\n")
    for name in ("nowhere", "empty", "other.txt"):
        done = RUNNER.invoke(app, [command, str(tmp_path / name)], env={"COLUMNS": "200"})
        assert done.exit_code == 1
        assert name in done.output
        assert "Next step" in done.output
    with pytest.raises(RecordError, match="nowhere"):
        read_runs([tmp_path / "nowhere"])
