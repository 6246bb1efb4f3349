"""Moving averages and other copies follow every edit by name, on their own weights."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from neuroexapt import (
    AddRegularization,
    InsertConv,
    InsertResidual,
    Narrow,
    Widen,
    apply,
    transaction,
)
from neuroexapt.edit import Edit
from neuroexapt.errors import GuardError
from neuroexapt.guard import Trial, writing
from neuroexapt.testing import changes, snapshot

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
EXACT: list[Edit] = [Widen("0", by=3), Widen("3", by=2), InsertConv("2"), InsertResidual("3")]
each = pytest.mark.parametrize("edit", [*EXACT, Narrow("0", by=2)], ids=repr)


def net() -> nn.Sequential:
    """Two convolutions of one shape, so that a pairing by position could go wrong unnoticed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 2),
        )


class Run:
    """Training with an exponential moving average beside it."""

    def __init__(self) -> None:
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True
        )

    def step(self, count: int = 3) -> Run:
        """Train and average."""
        for _ in range(count):
            self.optimizer.zero_grad()
            self.model(X).square().mean().backward()
            self.optimizer.step()
            self.average.update_parameters(self.model)
        self.optimizer.zero_grad()
        return self

    def apply(self, edit: Edit) -> None:
        """Edit the model, its optimizer and the average."""
        apply(self.model, edit, (X,), optimizer=self.optimizer, copies=[self.average])


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, without copying them."""
    return model.state_dict(keep_vars=True)


def out(model: nn.Module) -> Tensor:
    """Outputs in evaluation mode."""
    with torch.no_grad():
        return torch.as_tensor(copy.deepcopy(model).eval()(X))


@pytest.mark.parametrize("edit", EXACT, ids=repr)
def test_the_average_computes_what_it_computed(edit: Edit) -> None:
    """Exact for the copy's own function too, which is not the model's."""
    run = Run().step()
    before = out(run.average)
    assert not torch.allclose(before, out(run.model))
    run.apply(edit)
    torch.testing.assert_close(out(run.average), before, rtol=1e-5, atol=1e-6)


@each
def test_it_stays_a_copy_and_averages_by_name(edit: Edit) -> None:
    """The same names and shapes; the next update is that of each name, also of a new layer."""
    run = Run().step()
    run.apply(edit)
    inner = run.average.module
    assert {n: t.shape for n, t in named(inner).items()} == {
        n: t.shape for n, t in named(run.model).items()
    }
    assert not {id(t) for t in named(inner).values()} & {id(t) for t in named(run.model).values()}
    old = copy.deepcopy(inner.state_dict())
    run.step(1)
    for name, new in run.model.state_dict().items():
        if new.is_floating_point():
            torch.testing.assert_close(named(inner)[name], 0.8 * old[name] + 0.2 * new)


def test_narrowing_takes_the_same_units() -> None:
    """Kept slices are those of the model's choice, with the average's values."""
    run = Run().step()
    weight, mean = (run.average.module.get_parameter("0.weight").detach().clone() for _ in "ab")
    kept = run.model.get_parameter("0.weight").detach().clone()
    run.apply(Narrow("0", to=4))
    now = run.model.get_parameter("0.weight").detach()
    chosen = [next(i for i, row in enumerate(kept) if torch.equal(row, one)) for one in now]
    assert torch.equal(run.average.module.get_parameter("0.weight"), weight[chosen])
    assert torch.equal(mean, weight)


@each
@pytest.mark.parametrize("fault", ["in the copy", "afterwards"])
def test_what_fails_leaves_model_and_copy_as_they_were(
    edit: Edit, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault while the copy is written, or in the block behind it."""
    run = Run().step()
    before = snapshot(run.model, run.optimizer), snapshot(run.average)
    tx = transaction(run.model, run.optimizer, copies=[run.average])
    if fault == "in the copy":
        real, calls = writing.write, iter(range(9))

        def failing(*args: Any) -> None:
            real(*args)
            if next(calls):
                raise KeyboardInterrupt

        monkeypatch.setattr(sys.modules["neuroexapt.guard.transaction"], "write", failing)
        with pytest.raises(KeyboardInterrupt):
            tx.apply(edit, (X,))
    else:
        tx.apply(edit, (X,))
        tx.roll_back()
    assert not changes(before[0], snapshot(run.model, run.optimizer))
    assert not changes(before[1], snapshot(run.average))


def test_a_trial_takes_the_average_back_with_its_count() -> None:
    """After steps and updates in between."""
    run = Run().step()
    before = copy.deepcopy(run.average.state_dict())
    trial = Trial(run.model, run.optimizer, copies=[run.average])
    trial.apply(Widen("0", by=3), (X,))
    run.step()
    trial.roll_back()
    after = run.average.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    run.step()


def test_decay_is_for_what_an_optimizer_trains() -> None:
    """The average follows the weights, and is not decayed beside them."""
    run = Run().step()
    before = copy.deepcopy(run.average.state_dict())
    run.apply(AddRegularization("3", "weight_decay", 0.1))
    after = run.average.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    run.step()


def test_what_is_no_copy_is_refused() -> None:
    """Another shape, a missing layer, the model itself."""
    model = net()
    wider = net()
    apply(wider, Widen("0", by=1), (X,))
    with pytest.raises(GuardError, match=r"'0.weight' of shape \(7, 3, 3, 3\)"):
        transaction(model, copies=[AveragedModel(wider)])
    with pytest.raises(GuardError, match=r"'8.weight' of shape none"):
        transaction(model, copies=[net()[:8]])
    with pytest.raises(GuardError, match=r"'0.weight' is the model's own"):
        transaction(model, copies=[model])
