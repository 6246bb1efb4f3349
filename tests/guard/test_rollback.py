"""Whatever fails, wherever: the world is bit for bit as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import (
    AxisMap,
    InsertConv,
    InsertResidual,
    Narrow,
    Widen,
    apply,
    map_axes,
    transaction,
)
from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import Edit
from neuroexapt.errors import EditError, GuardError, VerifyError
from neuroexapt.guard import Transaction, Trial
from neuroexapt.testing import changes, snapshot
from tests import zoo
from tests.laws.world import train

NAME = "conv1d_net"
ARGS = zoo.example(NAME)
AXES: AxisMap = map_axes(zoo.build(NAME), ARGS)

EDITS: dict[str, Edit] = {
    "widen": Widen("net.0", by=2),
    "narrow": Narrow("net.4", by=3),
    "widen_all": Widen("*", by=1),
    "residual": InsertResidual("net.0"),
    "conv": InsertConv("net.2"),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.001),
}

# Every function on the way; `Ledger.do` is each single write.
DO = "neuroexapt.guard.ledger.Ledger.do"
SITES = [
    "neuroexapt.guard.transaction.map_axes",
    "neuroexapt.guard.transaction.named_tensors",
    "neuroexapt.guard.transaction.behaviour",
    "neuroexapt.guard.transaction.write",
    "neuroexapt.guard.writing.check_swappable",
    "neuroexapt.guard.writing.resized",
    "neuroexapt.guard.writing.migrate",
    "neuroexapt.guard.writing.build",
    "neuroexapt.guard.writing.adopt",
    "neuroexapt.guard.transaction.verify",
    "neuroexapt.guard.optimizer.resized",
    "neuroexapt.guard.verify.behaviour",
    "neuroexapt.guard.verify._check_survivors",
    "neuroexapt.guard.verify._difference",
    "neuroexapt.guard.verify._check_gradients",
    "torch.utils.swap_tensors",
]


def world(optimizer: str = "sgd") -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model in mid-training: state, gradients, hooks, tags, mixed flags, two groups."""
    model = zoo.build(NAME)
    head = [(n, p) for n, p in model.named_parameters() if n.startswith("net.9")]
    body = [(n, p) for n, p in model.named_parameters() if not n.startswith("net.9")]
    groups = [{"params": body}, {"params": head, "lr": 0.02}]
    made = OPTIMIZERS[optimizer](groups)
    train(model, ARGS, made, 2)
    zoo.loss(model, ARGS).backward()
    model.get_submodule("net.1").eval()
    model.get_submodule("net.0").register_forward_hook(lambda *_: None)
    weight = model.get_parameter("net.0.weight")
    weight.register_hook(lambda grad: None)
    weight.register_post_accumulate_grad_hook(lambda tensor: None)
    weight.my_tag = "kept"  # type: ignore[attr-defined]
    return model, made


class Fault:
    """Raises at the n-th call of a function, before or after it did its work."""

    def __init__(self, original: Callable[..., Any], at: int, after: bool, error: type) -> None:
        self.original, self.left, self.after, self.error = original, at, after, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left:
            return self.original(*args, **kwargs)
        if self.after:
            self.original(*args, **kwargs)
        raise self.error("injected")


def faults(
    site: str, after: bool, error: type[BaseException], edit: Edit, optimizer: str
) -> Iterator[int]:
    """Inject at the first call, the second, ... until none is left; yield after each."""
    model, made = world(optimizer)
    before = snapshot(model, made)
    for number in range(1, 10_000):
        owner, name = _resolve(site)
        original = getattr(owner, name)
        fault = Fault(original, number, after, error)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, _method(fault) if isinstance(owner, type) else fault)
            axes = None if name == "map_axes" else AXES
            try:
                with transaction(model, made) as tx:
                    tx.apply(edit, ARGS, axes=axes)
            except (error, GuardError, VerifyError):
                pass
        if fault.left > 0:
            return
        assert not changes(before, snapshot(model, made)), (site, number, after)
        yield number


def _resolve(site: str) -> tuple[Any, str]:
    path, _, name = site.rpartition(".")
    module, _, kind = path.rpartition(".")
    if kind[0].isupper():
        return getattr(__import__(module, fromlist=["_"]), kind), name
    return __import__(path, fromlist=["_"]), name


def _method(fault: Fault) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: fault(self, *args, **kwargs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("edit", EDITS)
def test_a_fault_at_any_write_leaves_no_trace(
    edit: str, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors and interruptions before and after each single write take everything back."""
    count = sum(
        1
        for error in (RuntimeError, KeyboardInterrupt)
        for after in (False, True)
        for _ in faults(DO, after, error, EDITS[edit], optimizer)
    )
    with capsys.disabled():
        print(f"\n{edit}, {optimizer}: {count} faults at writes", end=" ")
    assert count >= 4 * 2


@pytest.mark.parametrize("edit", EDITS)
def test_a_fault_at_any_stage_leaves_no_trace(
    edit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same for mapping, planning, building, resizing, migrating and each verification."""
    reached = {
        site: sum(1 for _ in faults(site, after, error, EDITS[edit], "adam"))
        for site in SITES
        for after, error in ((False, KeyboardInterrupt), (True, RuntimeError))
    }
    with capsys.disabled():
        print(f"\n{edit}: {sum(reached.values())} faults at stages", end=" ")
    unreached = {site.rpartition(".")[2] for site, count in reached.items() if not count}
    inserts = isinstance(EDITS[edit], (InsertConv, InsertResidual))
    assert unreached == ({"resized", "migrate", "swap_tensors"} if inserts else {"build", "adopt"})


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_second_fault_while_rolling_back_leaves_no_trace(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption of the way back is raised after the way back is done."""
    model, made = world()
    before, original, count = snapshot(model, made), torch.utils.swap_tensors, 0

    def failing(*args: Any) -> float:
        monkeypatch.setattr(torch.utils, "swap_tensors", fault)
        raise ValueError("the first fault")

    monkeypatch.setattr(*_resolve("neuroexapt.guard.transaction.verify"), failing)
    for number in range(1, 100):
        fault = Fault(original, number, False, error)
        with pytest.raises((ValueError, KeyboardInterrupt)), transaction(model, made) as tx:
            tx.apply(Widen("*", by=1), ARGS, axes=AXES)
        monkeypatch.setattr(torch.utils, "swap_tensors", original)
        assert not changes(before, snapshot(model, made)), number
        if fault.left > 0:
            break
        count += 1
    assert count >= 10


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_leaving_the_block_by_an_exception_takes_back_every_edit(optimizer: str) -> None:
    """Several edits on top of each other, then an error of the user's own."""
    model, made = world(optimizer)
    before = snapshot(model, made)
    with pytest.raises(ZeroDivisionError), transaction(model, made) as tx:
        _edit_all_and_fail(tx)
    assert not changes(before, snapshot(model, made))


def _edit_all_and_fail(tx: Transaction) -> None:
    tx.apply(Widen("net.0", by=2), ARGS)
    tx.apply(InsertResidual("net.4"), ARGS)
    tx.apply(Narrow("net.0", by=3), ARGS)
    tx.apply(InsertConv("net.6"), ARGS)
    tx.apply(Widen("*", by=1), ARGS)
    raise ZeroDivisionError


def test_an_edit_that_fails_takes_back_itself_alone() -> None:
    """A refused edit inside a block leaves the earlier ones of the block."""
    model, made = world()
    with transaction(model, made) as tx:
        tx.apply(Widen("net.0", by=2), ARGS)
        middle = snapshot(model, made)
        with pytest.raises(EditError):
            tx.apply(Narrow("net.0", to=99), ARGS)
        assert not changes(middle, snapshot(model, made))
    assert model.get_parameter("net.0.weight").shape[0] == 10


@pytest.mark.parametrize("backward", [False, True])
def test_a_live_graph_does_not_stop_the_way_back(backward: bool) -> None:
    """With a loss of the edited model still alive all is restored, and training goes on."""
    model, made = world()
    model.eval()
    made.zero_grad()
    before, losses = snapshot(model, made), list[Tensor]()
    with pytest.raises(KeyboardInterrupt), transaction(model, made) as tx:
        _edit_run_and_fail(tx, losses, backward)
    assert not changes(before, snapshot(model, made))
    train(model, ARGS, made, 2)
    assert losses[0].isfinite()


def _edit_run_and_fail(tx: Transaction, losses: list[Tensor], backward: bool) -> None:
    tx.apply(Widen("*", by=2), ARGS)
    losses.append(zoo.loss(tx.model, ARGS))
    if backward:
        losses[0].backward()
        tx.model.zero_grad()
    raise KeyboardInterrupt


def test_a_spent_loss_held_over_a_roll_back_does_no_harm() -> None:
    """The loss of the step before lives on in most loops; the next backward must not meet it."""
    model, made = world()
    twin, twins = copy.deepcopy((model, made))
    made.zero_grad()
    held = zoo.loss(model, ARGS)
    held.backward()
    zoo.loss(twin, ARGS)  # batch statistics move once here too
    with pytest.raises(ZeroDivisionError), transaction(model, made) as tx:
        _edit_all_and_fail(tx)
    assert train(model, ARGS, made, 3) == train(twin, ARGS, twins, 3)
    assert held.isfinite()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_inside_the_block_does_not_reach_what_is_kept(optimizer: str) -> None:
    """Tensors and state an edit replaced come back as they were, ``step`` included."""
    model, made = world(optimizer)
    before = snapshot(model, made)
    touched = AXES.widths["net.0.out"].appearances
    with pytest.raises(KeyboardInterrupt), transaction(model, made) as tx:
        _edit_train_and_fail(tx, made)
    after = snapshot(model, made)
    for place in touched:
        assert after[f"{place.tensor}: value"] == before[f"{place.tensor}: value"]
    kept = {id(model.get_parameter(p.tensor)) for p in touched if "running" not in p.tensor}
    states = [key for key in before if key.startswith("state ") and key != "state keys"]
    seen = [key for key in states if before[key][0] in kept]
    assert len(seen) == len(kept) == 5
    assert all(after[key] == before[key] for key in seen)


def _edit_train_and_fail(tx: Transaction, optimizer: torch.optim.Optimizer) -> None:
    tx.apply(Widen("net.0", by=2), ARGS)
    train(tx.model, ARGS, optimizer, 1)
    raise KeyboardInterrupt


# --- trials ----------------------------------------------------------------------------------


def batches(count: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(4, 4, 32, generator=generator),) for _ in range(count)]


@pytest.mark.parametrize("place", ["device", "cpu", "folder"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("edit", EDITS)
def test_a_trial_rolled_back_never_was(
    edit: str, optimizer: str, place: str, tmp_path: Path
) -> None:
    """After five steps of a trial the model is as before, and trains on as if never tried."""
    model, made = world(optimizer)
    made.zero_grad()
    twin, twins = copy.deepcopy((model, made))
    before = snapshot(model, made)
    trial = Trial(model, made, place=tmp_path if place == "folder" else place)  # type: ignore[arg-type]
    trial.apply(EDITS[edit], ARGS)
    assert not list(tmp_path.iterdir())  # a mapped file has no name: nothing outlives a crash
    for batch in batches(5):
        train(model, batch, made, 1)
    trial.roll_back()
    assert not changes(before, snapshot(model, made))
    assert _states(made) == _states(twins)
    for batch in batches(5):
        assert train(model, batch, made, 1) == train(twin, batch, twins, 1)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


def _states(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: value.tolist() if isinstance(value, Tensor) else value for key, value in s.items()}
        for s in optimizer.state.values()
    ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_trial_taken_back_with_interruptions_is_taken_back_whole(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption of each copy in turn is raised once everything is as it was."""
    model, made = world("adam")
    made.zero_grad()
    before = snapshot(model, made)
    trial = Trial(model, made)
    trial.apply(EDITS["widen"], ARGS)
    train(model, ARGS, made, 2)
    real, calls = Tensor.copy_, iter(range(10_000))

    def failing(self: Tensor, other: Tensor) -> Tensor:
        if next(calls) == 2:
            raise error
        return real(self, other)

    monkeypatch.setattr(Tensor, "copy_", failing)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else GuardError):
        trial.roll_back()
    monkeypatch.undo()
    if error is KeyboardInterrupt:
        assert not changes(before, snapshot(model, made))


def test_a_snapshot_over_its_limit_is_refused_with_the_edit() -> None:
    """What the edit resizes needs no copy and does not count."""
    model, made = world("adam")
    before, edit = snapshot(model, made), EDITS["widen"]
    with pytest.raises(GuardError, match=r"KiB; needed at most 100 bytes"):
        Trial(model, made, limit=100).apply(edit, ARGS)
    assert not changes(before, snapshot(model, made))
    everything = sum(t.nbytes for t in named_tensors(model).values())
    everything += sum(
        value.nbytes
        for state in made.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    touched = edit.plan(AXES, named_tensors(model)).tensors
    saved = sum(named_tensors(model)[name].nbytes for name in touched)
    Trial(model, made, limit=everything - saved).apply(edit, ARGS)


def test_a_trial_kept_goes_on_with_the_edit() -> None:
    """Keeping releases the way back: rolling back afterwards does nothing."""
    model, made = world()
    trial = Trial(model, made)
    trial.apply(Widen("net.0", by=2), ARGS)
    train(model, ARGS, made, 1)
    trial.keep()
    kept = snapshot(model, made)
    trial.roll_back()
    assert not changes(kept, snapshot(model, made))
    assert model.get_parameter("net.0.weight").shape[0] == 10


def test_a_trial_whose_edit_was_refused_has_nothing_to_take_back() -> None:
    """Training after a refused edit is not lost, and neither is the optimizer's state."""
    model, made = world("adam")
    trial = Trial(model, made)
    with pytest.raises(EditError):
        trial.apply(Widen("no such place", by=2), ARGS)
    train(model, ARGS, made, 1)
    after = snapshot(model, made)
    trial.roll_back()
    assert not changes(after, snapshot(model, made))


class Averaging(nn.Module):
    """Keeps a running mean by putting a new tensor in its buffer's place."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return torch.as_tensor(self.outer(torch.relu(self.inner(x - self.mean))))


def test_a_buffer_replaced_during_a_trial_comes_back() -> None:
    """The very tensor that was the buffer is the buffer again, with its value."""
    model, args = Averaging(), (torch.ones(4, 3),)
    mean = model.mean
    trial = Trial(model, None)
    trial.apply(Widen("inner", by=2), args)
    model(*args)
    assert model.mean is not mean
    trial.roll_back()
    assert model.mean is mean
    assert not model.mean.any()


def test_apply_leaves_the_random_states() -> None:
    """A successful edit draws nothing from the user's generators."""
    for edit in EDITS.values():
        model, made = world()
        before = snapshot(model, made)
        apply(model, edit, ARGS, optimizer=made)
        moved = changes(before, snapshot(model, made))
        assert moved
        assert not [name for name in moved if name.endswith("random")]
