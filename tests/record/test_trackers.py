"""Every tracker, read back from its own files, holds the same numbers and sentences.

A new one is a row of ``TRACKERS``: how to make it in a folder, and how to read a folder.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from neuroexapt.errors import SettingsError
from neuroexapt.record import Audience, Journal, MLflow, TensorBoard, WandB, Watcher

Points = dict[str, list[tuple[int, float]]]


class Told(NamedTuple):
    """What a tracker's files say: values over steps, settings, sentences."""

    points: Points
    settings: dict[str, str]
    sentences: list[str]


def read_tensorboard(folder: Path) -> Told:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    found.Reload()
    points = {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }
    texts = {
        tag: [event.tensor_proto.string_val[0].decode().replace("\\", "") for event in events]
        for tag in found.Tags()["tensors"]
        for events in [found.Tensors(tag)]
    }
    (run,) = texts["neuroexapt/run/text_summary"]
    settings = dict(line.removeprefix("- ").split(": ", 1) for line in run.splitlines())
    return Told(points, settings, texts["neuroexapt/decisions/text_summary"])


def make_mlflow(folder: Path) -> Watcher:
    return MLflow(tracking_uri=f"file:{folder}")


def read_mlflow(folder: Path) -> Told:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"file:{folder}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "neuroexapt")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    points = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    settings = {k.removeprefix("neuroexapt."): v for k, v in run.data.params.items()}
    tags = [value for name, value in sorted(run.data.tags.items()) if name.startswith("neuroexapt")]
    return Told(points, settings, tags)


def wandb_records(raw: bytes) -> Iterator[bytes]:
    """W&B's file is a LevelDB log behind a head of 7 bytes: blocks of 32 KiB, parts of records."""
    assert raw[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(raw):
        rest = 32768 - at % 32768
        if rest < 7:
            at += rest
            continue
        length, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


def read_wandb(folder: Path) -> Told:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its own process writes the file; now it is done
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    points: Points = {}
    settings, sentences = {}, []
    for data in wandb_records(path.read_bytes()):
        record = Record.FromString(data)
        for item in (*record.run.config.update, *record.config.update):
            key = item.key or item.nested_key[0]
            if key.startswith("neuroexapt."):
                settings[key.removeprefix("neuroexapt.")] = json.loads(item.value_json)
        row = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        step = row.pop("neuroexapt/step", None)
        if "neuroexapt/decision" in row:
            sentences.append(row.pop("neuroexapt/decision"))
        for name, value in row.items():
            if name.startswith("neuroexapt/"):
                points.setdefault(name, []).append((step, value))
    return Told(points, settings, sentences)


class Row(NamedTuple):
    """A tracker: the module it needs, how to make one, how to read what it wrote."""

    needs: str
    make: Callable[[Path], Watcher]
    read: Callable[[Path], Told]


TRACKERS = {
    "tensorboard": Row("tensorboard", TensorBoard, read_tensorboard),
    "mlflow": Row("mlflow", make_mlflow, read_mlflow),
    "wandb": Row(
        "wandb", lambda folder: WandB(project="p", mode="offline", dir=folder), read_wandb
    ),
}
every_tracker = pytest.mark.parametrize("name", TRACKERS)


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def tell(watcher: Watcher) -> None:
    """A run with every kind of event, a number missing, and names that need care."""
    journal = Journal(None)
    audience = Audience(journal)
    audience.add(watcher)
    budget = {"params": 20, "flops": None}
    journal.write("start", run="Net_a", budget=budget, settings={"seed": 7, "note": "x" * 9})
    for epoch in (1, 2):
        journal.write(
            "epoch", epoch=epoch, step=10 * epoch, holdout_loss=1 / epoch, holdout_error=math.nan,
            parameters=100 * epoch, flops=8, memory_bytes=64,
        )  # fmt: skip
    readings = [
        {"signal": "effective_rank", "at": "layer1.0.out", "value": 3.5},
        {"signal": "effective_rank", "at": "../a:b", "value": 1.5},
        {"signal": "gain", "at": "fc", "value": None},
    ]
    journal.write("survey", epoch=2, step=20, readings=readings)
    predicted = {"loss": -0.25, "parameters": 5}
    journal.write(
        "proposal", id=1, step=20, kind="Widen", at="layer1.0.out", reason="it_is *full*",
        predicted=predicted,
    )  # fmt: skip
    journal.write("verdict", id=1, step=30, verdict="kept", why="it fell", realised={"loss": -0.5})
    journal.write("end", step=30, seconds=4.0, overhead_seconds=0.5)
    audience.close()


@every_tracker
def test_what_was_written_is_read_back(name: str, tmp_path: Path) -> None:
    """All numbers at their steps, what is not measured left out, settings, decisions."""
    row = TRACKERS[name]
    pytest.importorskip(row.needs, reason=f"needs the package {row.needs}")
    tell(row.make(tmp_path))
    points, settings, sentences = row.read(tmp_path)
    outside = "effective_rank/_/a_b" if name == "mlflow" else "effective_rank/../a:b"
    assert points == {
        f"neuroexapt/{key}": [(step, pytest.approx(value)) for step, value in values]
        for key, values in {
            "holdout_loss": [(10, 1.0), (20, 0.5)],
            "parameters": [(10, 100.0), (20, 200.0)],
            "flops": [(10, 8.0), (20, 8.0)],
            "memory_bytes": [(10, 64.0), (20, 64.0)],
            "effective_rank/layer1.0.out": [(20, 3.5)],
            outside: [(20, 1.5)],
            "predicted_loss": [(20, -0.25)],
            "realised_loss": [(30, -0.5)],
            "seconds": [(30, 4.0)],
            "overhead_seconds": [(30, 0.5)],
        }.items()
    }
    assert settings == {
        "run": "Net_a", "budget.params": "20", "settings.seed": "7", "settings.note": "x" * 9
    }  # fmt: skip
    assert sentences == ["#1 Widen at layer1.0.out: it_is *full*", "#1 kept: it fell"]


@every_tracker
def test_without_its_package_the_extra_is_named(name: str, tmp_path: Path) -> None:
    """An error before the run begins, with the command to type."""
    row = TRACKERS[name]
    gone = [m for m in sys.modules if m == row.needs or m.startswith(f"{row.needs}.")]
    gone += [row.needs, "torch.utils.tensorboard"]
    with (
        mock.patch.dict(sys.modules, dict.fromkeys(gone)),
        pytest.raises(SettingsError, match=rf"pip install 'neuroexapt\[{name}\]'"),
    ):
        row.make(tmp_path)


def test_a_run_of_the_user_is_written_into_and_left_open(tmp_path: Path) -> None:
    """Their writer, their W&B run, their active MLflow run: told, never ended."""

    class Theirs:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: self.calls.append(name)

    for make in (TensorBoard, WandB):
        theirs = Theirs()
        theirs.config = Theirs()  # type: ignore[misc]
        tell(make(theirs))
        assert {"add_scalar", "log"} & set(theirs.calls)
        assert not {"close", "finish"} & set(theirs.calls)


def test_the_active_mlflow_run_is_used(tmp_path: Path) -> None:
    """What ``mlflow.start_run`` began goes on afterwards."""
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"file:{tmp_path}/store")
    try:
        with mlflow.start_run() as run:
            tell(MLflow())
            assert mlflow.active_run().info.run_id == run.info.run_id
            mlflow.log_metric("mine", 1.0)
        client = mlflow.MlflowClient()
        found = client.get_run(run.info.run_id)
        assert {"mine", "neuroexapt/holdout_loss"} <= set(found.data.metrics)
    finally:
        mlflow.set_tracking_uri(before)
