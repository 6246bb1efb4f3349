"""The evolver in a plain loop: it decides, keeps its promises, and stays out of the way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import Budget, Evolver, Settings, Widen
from neuroexapt.errors import GuardError, SettingsError, VerifyError
from neuroexapt.guard import Trial
from neuroexapt.plan import Decision, State, Verdict
from neuroexapt.record import read_journal
from neuroexapt.train import changes, judge, room
from neuroexapt.train.epoch import Epoch

DATA = torch.randn(128, 6, generator=torch.Generator().manual_seed(0))


def target(x: Tensor) -> Tensor:
    return torch.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - target(batch)).square().mean()
    return loss


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 1)
        )


def holdout() -> list[Tensor]:
    return list(DATA[64:].split(8))


class Run:
    """A model in training, with or without an evolver."""

    def __init__(self, *, evolve: bool = True, **options: Any) -> None:
        self.model = network()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.evolver: Evolver | None = None
        if evolve:
            options.setdefault("budget", Budget(params=0.5))
            self.evolver = Evolver(
                self.model, self.optimizer, loss_fn=loss_fn, holdout=holdout(), **options
            )
        self.ends: list[Epoch] = []

    def epochs(self, count: int) -> Run:
        for _ in range(count):
            self.model.train()
            for batch in DATA[:64].split(8):
                self.optimizer.zero_grad()
                loss = loss_fn(self.model, batch)
                loss.backward()
                self.optimizer.step()
                if self.evolver:
                    self.evolver.step()
            if self.evolver:
                self.ends.append(self.evolver.end_epoch())  # with `loss` still alive
        return self

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def events(self) -> list[dict[str, Any]]:
        assert self.evolver is not None
        return list(self.evolver.journal.events)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


def test_it_reaches_its_budget_with_the_same_model_and_optimizer_objects() -> None:
    """Half of the parameters go; objects, names and the optimizer's hold on them stay."""
    run = Run()
    names = [name for name, _ in run.model.named_parameters()]
    objects = list(run.model.parameters())
    before = run.parameters()
    run.epochs(10)
    assert run.parameters() <= before / 2
    assert [name for name, _ in run.model.named_parameters()][: len(names)] == names
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}
    assert {id(p) for p in objects} <= held


def test_every_proposal_has_a_reason_readings_and_an_end() -> None:
    """The journal tells what was proposed and what became of each."""
    run = Run().epochs(10)
    assert run.evolver is not None
    run.evolver.close()
    proposals = [e for e in run.events if e["event"] == "proposal"]
    verdicts = {e["id"]: e for e in run.events if e["event"] == "verdict"}
    assert proposals
    assert {p["id"] for p in proposals} == set(verdicts)
    assert all(p["reason"] and p["readings"] for p in proposals)
    assert all(verdict["why"] for verdict in verdicts.values())
    assert run.events[0]["event"] == "start"
    assert run.events[-1]["event"] == "end"


def test_the_same_seed_gives_the_same_journal() -> None:
    """Times aside, two runs decide alike."""
    logs = []
    for _ in range(2):
        torch.manual_seed(1)
        logs.append([_timeless(event) for event in Run().epochs(8).events])
    assert logs[0] == logs[1]


def _timeless(event: dict[str, Any]) -> dict[str, Any]:
    drop = {"time", "seconds", "overhead_seconds", "environment", "memory_in_use"}
    return {key: value for key, value in event.items() if key not in drop}


def test_measuring_leaves_training_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evolver that surveys every epoch and changes nothing trains the very same weights."""

    def nothing(state: State, *_: Any, **__: Any) -> tuple[State, Decision]:
        return state, Decision(None, "not in this test")

    monkeypatch.setattr(changes, "choose", nothing)
    observed = Run(settings=Settings(patience=99)).epochs(6)
    torch.manual_seed(1)
    plain = Run(evolve=False).epochs(6)
    assert any(end.decision for end in observed.ends)
    for a, b in zip(
        observed.model.state_dict().values(), plain.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_a_trial_that_fails_its_verdict_is_taken_back_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After an epoch of training in between: weights, buffers, optimizer state, structure."""
    real = changes.judge

    def condemned(*args: Any) -> tuple[State, Verdict] | None:
        outcome = real(*args)
        if outcome is None:
            return None
        resting = replace(outcome[0], rested=outcome[0].epoch)
        return resting, Verdict(False, "condemned", 0.0)

    monkeypatch.setattr(changes, "judge", condemned)
    run, moments = Run(), list[Any]()

    def noted(self: Trial, *args: Any, **kwargs: Any) -> None:
        moments.append(copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict())))
        Trial.__init__(self, *args, **kwargs)

    monkeypatch.setattr(room, "Trial", type("Noted", (Trial,), {"__init__": noted}))
    for _ in range(9):
        pending = run.evolver is not None and run.evolver.state.trial is not None
        run.epochs(1)
        if pending:
            verdict = run.ends[-1].verdict
            assert verdict is not None
            assert not verdict.kept
            _assert_same(moments[-1], run)
            return
    pytest.fail("no trial was started")


def _assert_same(before: tuple[dict[str, Any], dict[str, Any]], run: Run) -> None:
    after = run.model.state_dict()
    assert set(before[0]) == set(after)
    for name, old in before[0].items():
        assert torch.equal(old, after[name]), name
    state = run.optimizer.state_dict()
    assert state["param_groups"] == before[1]["param_groups"]
    for number, held in before[1]["state"].items():
        for key, value in held.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][number][key]))


def test_an_error_inside_a_change_is_written_down_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The edit is refused with its reason; nothing is on trial; training continues."""

    def broken(self: Trial, edit: Any, *_: Any, **__: Any) -> None:
        raise VerifyError("fc", seen="a fault", needed="none", next_step="nothing")

    monkeypatch.setattr(Trial, "apply", broken)
    run = Run().epochs(6)
    refused = [e for e in run.events if e["event"] == "verdict"]
    assert refused
    assert all(e["verdict"] == "refused" and "a fault" in e["why"] for e in refused)
    assert run.parameters() == sum(p.numel() for p in network().parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_of_the_first_check_takes_the_edit_back(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out pass right after an edit fails: the model is that of the moment before."""
    run = Run()
    real = Trial.apply

    def then_fail(self: Trial, *args: Any, **kwargs: Any) -> Any:
        done = real(self, *args, **kwargs)
        monkeypatch.setattr(judge, "evaluate", _raise(error))
        return done

    monkeypatch.setattr(Trial, "apply", then_fail)
    before = run.parameters()
    with pytest.raises(error):
        run.epochs(6)
    assert run.parameters() == before
    monkeypatch.undo()
    run.epochs(4)
    assert run.parameters() < before


def _raise(error: type[BaseException]) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "model",
    [nn.Linear(6, 1), nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)).requires_grad_(False)],
    ids=["no width", "frozen"],
)
def test_a_model_that_offers_nothing_to_change_trains_on(model: nn.Module) -> None:
    """Nothing is proposed, nothing is raised."""
    extra = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.01)
    evolver = Evolver(model, optimizer, loss_fn=loss_fn, holdout=holdout())
    for _ in range(5):
        end = evolver.end_epoch()
    assert end.decision is not None
    assert end.decision.candidate is None
    evolver.close()
    evolver.close()


def test_close_takes_back_a_trial_that_is_too_young_for_a_verdict() -> None:
    """A run that ends in the middle of a trial ends with a model that was judged."""
    run = Run(settings=Settings(trial_epochs=50))
    while run.evolver is not None and run.evolver.state.trial is None:
        run.epochs(1)
    before = run.ends[-1].parameters
    assert run.evolver is not None
    run.evolver.close()
    assert run.parameters() != before
    assert run.parameters() == sum(p.numel() for p in network().parameters())


def test_a_pending_loss_of_the_user_survives_surveys_and_roll_backs() -> None:
    """The loop variable `loss` keeps the last graph alive into the next epoch."""
    run = Run()
    for _ in range(6):
        loss = loss_fn(run.model, DATA[:8])
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        assert run.evolver is not None
        run.evolver.end_epoch()
    assert torch.isfinite(loss)


def test_the_journal_file_and_the_report_hold_the_run(tmp_path: Path) -> None:
    """What is on disk equals what was kept in memory; the report names each edit's place."""
    path = tmp_path / "run" / "journal.jsonl"
    run = Run(journal=path).epochs(6)
    assert run.evolver is not None
    with run.evolver as evolver:
        report = evolver.report(tmp_path / "report.html")
    events = read_journal(path)
    assert [e["event"] for e in events] == [e["event"] for e in evolver.journal.events]
    html = report.read_text()
    for event in events:
        if event["event"] == "proposal":
            assert event["at"] in html


def test_a_compiled_model_evolves_and_computes_what_the_eager_one_does() -> None:
    """The wrapper the user trains with recompiles after each change."""
    torch._dynamo.reset()
    model = network()
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = torch.optim.Adam(compiled.parameters(), lr=0.02)
    evolver = Evolver(
        compiled, optimizer, loss_fn=loss_fn, holdout=holdout(), budget=Budget(params=0.5)
    )
    before = sum(p.numel() for p in model.parameters())
    for _ in range(8):
        compiled.train()
        for batch in DATA[:64].split(8):
            optimizer.zero_grad()
            loss_fn(compiled, batch).backward()
            optimizer.step()
        evolver.end_epoch()
    assert sum(p.numel() for p in model.parameters()) < before
    compiled.eval()
    assert torch.equal(compiled(DATA[:5]), model(DATA[:5]))


def test_no_hook_stays_on_the_model() -> None:
    """Between epochs the user's model carries nothing of ours."""
    run = Run().epochs(5)
    for module in run.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("holdout", {"holdout": iter(holdout())}),
        ("holdout", {"holdout": holdout()[:3]}),
        ("loss_fn", {"loss_fn": lambda model, batch: batch.sum()}),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(place: str, options: dict[str, Any]) -> None:
    """A loader that can be read once, too few batches, a loss without the model."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given: dict[str, Any] = {"loss_fn": loss_fn, "holdout": holdout(), **options}
    with pytest.raises(SettingsError) as caught:
        Evolver(model, optimizer, **given)
    assert caught.value.place == place


def test_growth_is_tried_where_a_width_is_starved() -> None:
    """Two units for a function that needs more: the evolver widens them."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    evolver = Evolver(
        model, optimizer, loss_fn=loss_fn, holdout=holdout(), settings=Settings(price=0.001)
    )
    for _ in range(12):
        for batch in DATA[:64].split(8):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        evolver.end_epoch()
    kinds = [e["kind"] for e in evolver.journal.events if e["event"] == "proposal"]
    assert Widen.__name__ in kinds
    assert model[0].weight.shape[0] > 2


def test_a_moving_average_follows_every_change() -> None:
    """Given once, it stays a copy of the model through changes that are kept or taken back."""
    run = Run().epochs(1)
    assert run.evolver is not None
    average = torch.optim.swa_utils.AveragedModel(run.model)
    run.evolver.follow(average)
    for _ in range(7):
        run.epochs(1)
        average.update_parameters(run.model)
    assert any(event["event"] == "applied" for event in run.events)
    assert [t.shape for t in average.module.state_dict().values()] == [
        t.shape for t in run.model.state_dict().values()
    ]
    with pytest.raises(GuardError, match="needed a copy of"):
        run.evolver.follow(nn.Linear(2, 2))
