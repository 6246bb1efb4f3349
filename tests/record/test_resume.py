"""A resumed run ends where the uninterrupted one does, to the bit, wherever it was cut."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from neuroexapt import Budget, Evolver, Settings, load, save
from neuroexapt.errors import CheckpointError
from neuroexapt.record import read_journal
from neuroexapt.testing.snapshot import bits

DATA = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
EPOCHS = 9
BAD = (5,)  # epochs at whose end the held-out data are another's: what is on trial is taken back
WORSE = [0.0]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    target = torch.sin(batch[:, :1]) + batch[:, 1:2] * batch[:, 2:3]
    loss: Tensor = (model(batch) - target).square().mean()
    return loss if model.training else loss + WORSE[0]


def factory(journal: Path | None = None, trial_epochs: int = 1) -> dict[str, Any]:
    """A run as its user builds it, with all that hangs on a model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1)
        )
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.dim() <= 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    evolver = Evolver(
        model,
        optimizer,
        loss_fn=loss_fn,
        holdout=list(DATA[64:].split(8)),
        budget=Budget(params=0.5),
        settings=Settings(trial_epochs=trial_epochs),
        journal=journal,
    )
    evolver.follow(average)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=200),
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "generator": torch.Generator().manual_seed(5),
        "evolver": evolver,
        "copies": [average],
    }


def train(run: dict[str, Any], epochs: int, *, start: int = 0) -> None:
    """The user's loop, shuffled by a generator of its own."""
    model, optimizer = run["model"], run["optimizer"]
    for epoch in range(start, epochs):
        model.train()
        for batch in DATA[:64][torch.randperm(64, generator=run["generator"])].split(16):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            run["scheduler"].step()
            run["evolver"].step()
            run["copies"][0].update_parameters(model)
        WORSE[0] = float(epoch in BAD)
        run["evolver"].end_epoch()


def fingerprint(run: dict[str, Any]) -> dict[str, Any]:
    """All that training goes on from."""
    model, optimizer = run["model"], run["optimizer"]
    seen: dict[str, Any] = {}
    for who, module in (("model", model), ("average", run["copies"][0])):
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        seen.update((f"{who} {name}", bits(tensor)) for name, tensor in tensors.items())
    names = {id(p): name for name, p in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in group.items() if k != "params"}
        seen[f"group {number}"] = [names[id(p)] for p in group["params"]], options
    for parameter, state in optimizer.state.items():
        seen[f"state {names[id(parameter)]}"] = {k: bits(v) for k, v in state.items()}
    seen["scheduler"] = str(run["scheduler"].state_dict())
    seen["controller"] = run["evolver"].state
    seen["random"] = bits(torch.get_rng_state()), bits(run["generator"].get_state())
    return seen


def timeless(event: dict[str, Any]) -> dict[str, Any]:
    drop = {"time", "seconds", "overhead_seconds", "environment", "seq", "schema", "memory_in_use"}
    return {key: value for key, value in event.items() if key not in drop}


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    return [key for key in {**left, **right} if left.get(key) != right.get(key)]


def cut_at(epochs: int, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run that was cut and resumed, and the end of one that was not."""
    torch.manual_seed(1)
    whole = factory(tmp_path / "whole.jsonl")
    train(whole, EPOCHS)
    torch.manual_seed(1)
    first = factory(tmp_path / "cut.jsonl")
    train(first, epochs)
    save(tmp_path / "run", **first, done=epochs)
    train(first, epochs + 1, start=epochs)  # what is lost when the process dies
    first["evolver"].journal.close()
    torch.manual_seed(99)
    again = load(lambda: factory(tmp_path / "cut.jsonl"), tmp_path / "run")
    train(again, EPOCHS, start=again["done"])
    return again, whole


@pytest.mark.parametrize("epochs", range(EPOCHS))
def test_a_run_cut_after_any_epoch_ends_as_the_whole_one(epochs: int, tmp_path: Path) -> None:
    """Before the first change, on trial, after a roll back and after a change that was kept."""
    again, whole = cut_at(epochs, tmp_path)
    assert not differing(fingerprint(again), fingerprint(whole))
    for run in (again, whole):
        run["evolver"].close()  # a trial under way is taken back
    assert not differing(fingerprint(again), fingerprint(whole))
    logs = [read_journal(tmp_path / name) for name in ("cut.jsonl", "whole.jsonl")]
    ours, theirs = ([timeless(e) for e in log if e["event"] != "resume"] for log in logs)
    assert ours == theirs


def test_the_cuts_meet_every_kind_of_moment(tmp_path: Path) -> None:
    """Else the test above would show less than it says."""
    run, moments = factory(), []
    for epoch in range(EPOCHS):
        train(run, epoch + 1, start=epoch)
        moments.append(run["evolver"].trial is not None)
    verdicts = [e["verdict"] for e in run["evolver"].journal.events if e["event"] == "verdict"]
    assert True in moments
    assert "kept" in verdicts
    assert "rolled_back" in verdicts


def test_a_run_that_is_killed_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at random moments and at random writes; `make nightly` takes 200 of them."""
    kills = os.environ.get("NEUROEXAPT_KILLS", "5")
    done = subprocess.run(
        [sys.executable, "-m", "tests.record.killed", str(tmp_path / "runs"), kills, "3"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=3000,
    )
    assert done.stdout.startswith("equal after"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: run.pop("scheduler"), None),
        (lambda run: run.update(loader=torch.optim.SGD([torch.ones(1)], 0.1)), "loader"),
        (lambda run: run.update(optimizer=torch.optim.SGD(run["model"].parameters())), "a SGD"),
        (lambda run: run.update(copies=[]), None),
        (lambda run: run["evolver"].follow(copy.deepcopy(run["model"])), "2 copies"),
    ],
    ids=[
        "no scheduler",
        "another object",
        "another optimizer",
        "copies by the evolver",
        "one more",
    ],
)
def test_what_the_factory_builds_must_be_what_was_saved(
    spoil: Any, message: str | None, tmp_path: Path
) -> None:
    """What it leaves out is passed over; what is new or another kind is refused by name."""
    run = factory()
    train(run, 4)
    save(tmp_path, **run)

    def other() -> dict[str, Any]:
        built = factory()
        spoil(built)
        return built

    if message is None:
        assert load(other, tmp_path)["evolver"].state == run["evolver"].state
    else:
        with pytest.raises(CheckpointError, match=message):
            load(other, tmp_path)


def test_an_evolver_of_another_model_is_refused(tmp_path: Path) -> None:
    """At the save, by identity; at the load, by what it began with."""
    run = factory()
    with pytest.raises(CheckpointError, match="evolver of another model"):
        save(tmp_path, **{**run, "model": nn.Linear(1, 1)})
    save(tmp_path, **run)

    def begun_smaller() -> dict[str, Any]:
        built = factory()
        state = built["evolver"].state
        built["evolver"].state = replace(state, start_parameters=state.start_parameters - 1)
        return built

    with pytest.raises(CheckpointError, match="FLOPs at the start"):
        load(begun_smaller, tmp_path)


def test_the_optimizer_of_the_evolver_is_saved_without_being_named(tmp_path: Path) -> None:
    """Left out, training would go on with fresh moments and nobody would see it."""
    run = factory()
    train(run, 4)
    save(tmp_path, run["model"], evolver=run["evolver"], copies=run["copies"])

    def short() -> dict[str, Any]:
        built = factory()
        return {"model": built["model"], "evolver": built["evolver"]}

    again = load(short, tmp_path)
    held = again["evolver"].optimizer.state
    states = zip(held.values(), run["optimizer"].state.values(), strict=True)
    assert all(bits(a["exp_avg"]) == bits(b["exp_avg"]) for a, b in states)
