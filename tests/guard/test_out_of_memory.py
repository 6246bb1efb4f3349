"""No memory left, at any allocation: everything is as it was, and the run goes on."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuroexapt import (
    AxisMap,
    Budget,
    Evolver,
    InsertConv,
    Narrow,
    Settings,
    Widen,
    apply,
    map_axes,
    transaction,
)
from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import Edit
from neuroexapt.errors import GuardError, NeuroExaptError
from neuroexapt.guard import Transaction, Trial
from neuroexapt.guard.memory import available, forecast, in_use, ran_out
from neuroexapt.measure import tensor_bytes
from neuroexapt.testing import changes, snapshot
from neuroexapt.train import Epoch
from neuroexapt.train import changes as deciding
from neuroexapt.train.survey import Surveyor

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TRANSACTION = importlib.import_module("neuroexapt.guard.transaction")
EVERY = 1 if os.environ.get("NEUROEXAPT_ALL_FAULTS") else 17


class NoMemory(TorchDispatchMode):
    """Every operator with a real result asks for memory; the one with this number gets none."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        real = any(map(_is_real, tree_leaves(result)))
        self.count += real
        if real and self.count == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return result


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and not is_fake(value) and value.device.type != "meta"


def net() -> nn.Sequential:
    """Two convolutions, a norm and a head."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 2),
        )


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One of training."""
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def world() -> tuple[nn.Module, torch.optim.Optimizer, AveragedModel]:
    """A model in training, its optimizer and its average."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step(model, optimizer)
    average = AveragedModel(model)
    step(model, optimizer)
    optimizer.zero_grad()
    return model, optimizer, average


EDITS: list[Edit] = [Widen("0", by=3), Narrow("0", by=2), InsertConv("2")]
each = pytest.mark.parametrize("edit", EDITS, ids=lambda edit: type(edit).__name__)


def refused(tx: Transaction, edit: Edit, axes: AxisMap) -> str:
    """What an edit is refused with; nothing if it is made."""
    try:
        tx.apply(edit, (X,), axes=axes)
    except NeuroExaptError as error:
        return str(error)
    return ""


@each
def test_an_edit_without_memory_is_taken_back(edit: Edit) -> None:
    """Whichever allocation fails: model, optimizer and average are bit for bit what they were."""
    model, optimizer, average = world()
    axes = map_axes(model, (X,))
    before = snapshot(model, optimizer), snapshot(average)
    with NoMemory() as counted, transaction(model, optimizer, copies=[average]) as tx:
        tx.apply(edit, (X,), axes=axes)
        tx.roll_back()
    assert counted.count > 100
    for number in range(1, counted.count, EVERY):
        tx = transaction(model, optimizer, copies=[average])
        with NoMemory(number) as failing:
            told = refused(tx, edit, axes)
        assert "CUDA out of memory" in told or failing.count < number, told
        tx.roll_back()
        assert not changes(before[0], snapshot(model, optimizer)), number
        assert not changes(before[1], snapshot(average)), number
    apply(model, edit, (X,), optimizer=optimizer, copies=[average])
    step(model, optimizer)


def fails(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step finds no memory."""
    try:
        step(model, optimizer)
    except torch.OutOfMemoryError:
        return True
    return False


@each
def test_a_step_of_a_trial_without_memory_is_taken_back_with_it(edit: Edit) -> None:
    """Half-way through a forward, a backward or the optimizer's step."""
    number, failed = 1, True
    while failed:
        # Each time another model: an error inside a backward may leave parts of its graph in torch.
        model, optimizer, average = world()
        before = snapshot(model, optimizer), snapshot(average)
        trial = Trial(model, optimizer, copies=[average])
        trial.apply(edit, (X,))
        step(model, optimizer)
        average.update_parameters(model)
        with NoMemory(number):
            failed = fails(model, optimizer)
        trial.roll_back()
        assert not changes(before[0], snapshot(model, optimizer)), number
        assert not changes(before[1], snapshot(average)), number
        number += EVERY
    assert number > 100
    step(model, optimizer)


class FakeAccelerator:
    """What ``torch.accelerator`` says of a device that is not there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.emptied = 0
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        patch.setattr(torch.accelerator, "empty_cache", self._empty, raising=False)
        told = {"get_memory_info": (700, 10_000), "memory_reserved": 500, "memory_allocated": 200}
        for name, value in {**told, "max_memory_allocated": 300}.items():
            patch.setattr(torch.accelerator, name, lambda *_, value=value: value, raising=False)

    def _empty(self) -> None:
        self.emptied += 1


def test_caches_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an edit is kept, taken back, or fails; never without one."""
    model, optimizer, _ = world()
    device = FakeAccelerator(monkeypatch)
    transaction(model, optimizer).commit()
    transaction(model, optimizer).roll_back()
    assert device.emptied == 0
    apply(model, EDITS[0], (X,), optimizer=optimizer)
    assert device.emptied == 1
    tx = transaction(model, optimizer)
    tx.apply(EDITS[1], (X,))
    tx.roll_back()
    assert device.emptied == 2
    monkeypatch.setattr(TRANSACTION, "verify", failing)
    with pytest.raises(GuardError, match="no memory left"):
        apply(model, EDITS[1], (X,), optimizer=optimizer)
    assert device.emptied >= 3


def failing(*args: Any, **kwargs: Any) -> Any:
    """No memory."""
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_an_accelerator_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory and what the allocator keeps without using it; unknown where it does not say."""
    assert in_use()["accelerator"] is None or torch.accelerator.is_available()
    FakeAccelerator(monkeypatch)
    assert available(torch.device("cuda")) == 700 + 500 - 200
    assert in_use()["accelerator"] == 200
    assert in_use()["accelerator_peak"] == 300

    def silent(*_: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(torch.accelerator, "get_memory_info", silent, raising=False)
    assert available(torch.device("cuda")) is None


def test_main_memory_runs_out_too() -> None:
    """torch says it by a plain RuntimeError."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert ran_out(caught.value)
    assert not ran_out(RuntimeError("shapes cannot be multiplied"))


# --- copies --------------------------------------------------------------------------------------


@each
def test_copies_are_counted(edit: Edit) -> None:
    """What the average will hold is measured, and a limit that forgets it refuses."""
    model, optimizer, average = world()
    patch = edit.plan(map_axes(model, (X,)), named_tensors(model))
    alone, beside = forecast(patch, model, [optimizer]), forecast(patch, average.module)
    before = tensor_bytes(average.module)
    tx = transaction(model, optimizer, copies=[average], memory=alone.peak + beside.peak - 1)
    with pytest.raises(GuardError, match="allowed there"):
        tx.apply(edit, (X,))
    apply(model, edit, (X,), optimizer=optimizer, copies=[average])
    assert tensor_bytes(average.module) - before == beside.weights


# --- a run ---------------------------------------------------------------------------------------

DATA = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    """The sum of the inputs is to be learnt."""
    return (model(batch) - batch.sum(1, keepdim=True)).square().mean()


class Run:
    """A small net that shrinks to half its size."""

    def __init__(self, budget: Budget) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            self.model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.ends: list[Epoch] = []
        self.evolver = Evolver(
            self.model,
            self.optimizer,
            loss_fn=loss_fn,
            holdout=list(DATA[64:].split(8)),
            budget=budget,
            settings=Settings(cool_down=0),
        )

    def epochs(self, count: int) -> Run:
        """Train and decide."""
        for _ in range(count):
            for batch in DATA[:64].split(8):
                self.optimizer.zero_grad()
                loss_fn(self.model, batch).backward()
                self.optimizer.step()
                self.evolver.step()
            self.ends.append(self.evolver.end_epoch())
        return self

    def verdicts(self) -> list[dict[str, Any]]:
        """What came of proposals."""
        return [e for e in self.evolver.journal.events if e["event"] == "verdict"]


def test_a_limit_on_memory_refuses_with_figures() -> None:
    """Every change that adds bytes is refused and written down; training goes on."""
    run = Run(Budget(params=0.5, memory=1000)).epochs(6)
    assert run.evolver.journal.events[0]["budget"]["memory"] == 1000
    assert run.verdicts()
    for verdict in run.verdicts():
        assert verdict["verdict"] == "refused"
        assert "needed at most the 0 bytes that are allowed" in verdict["why"]
    assert sum(p.numel() for p in run.model.parameters()) == 193
    wide = Run(Budget(params=0.5, memory=10**6)).epochs(6)
    free = Run(Budget(params=0.5)).epochs(6)
    assert any(v["verdict"] == "kept" for v in wide.verdicts())
    assert [v["why"] for v in wide.verdicts()] == [v["why"] for v in free.verdicts()]


def fails_once(real: Any, at: int) -> Any:
    """A function that finds no memory at one of its calls."""
    calls: Iterator[int] = iter(range(1, 10**6))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            failing()
        return real(*args, **kwargs)

    return called


PLACES: dict[str, tuple[Any, str]] = {
    "the edit": (TRANSACTION, "verify"),
    "the survey": (Surveyor, "sized"),
    "the first check": (deciding, "bearable"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_without_memory_for_a_change_goes_on(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written down, nothing of it stays, and a later change is made."""
    run, (owner, name) = Run(Budget(params=0.5)), PLACES[place]
    monkeypatch.setattr(owner, name, fails_once(getattr(owner, name), 1))
    run.epochs(10)
    told = [end.why for end in run.ends] + [verdict["why"] for verdict in run.verdicts()]
    assert any("out of memory" in why for why in told)
    assert any(verdict["verdict"] == "kept" for verdict in run.verdicts())


def test_leaving_the_block_by_a_failed_step_takes_the_trial_back() -> None:
    """A training step that the widened model has no memory for ends the loop, not the model."""
    run = Run(Budget(params=0.5))
    while run.evolver.trial is None:
        before = copy.deepcopy(run.model)
        run.epochs(1)
    assert run.evolver.trial is not None
    with pytest.raises(torch.OutOfMemoryError), run.evolver, NoMemory(60):
        run.epochs(1)
    assert run.evolver.trial is None
    assert [p.shape for p in run.model.parameters()] == [p.shape for p in before.parameters()]
