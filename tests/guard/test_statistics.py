"""Batch norm statistics by hand, and that nothing but them changes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuroexapt import Narrow, apply, transaction
from neuroexapt.errors import GuardError
from neuroexapt.guard import Trial, reestimate
from neuroexapt.testing import changes, snapshot
from tests import zoo
from tests.laws.world import outputs


class Net(nn.Module):
    """Two norms, dropout, and what a forward may leave behind."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.head, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen = len(x)
        x = self.drop(torch.relu(self.norm(self.conv(x))))
        noise = torch.rand(()) * 0 + random.random() * 0 + float(np.random.rand()) * 0
        return torch.as_tensor(self.last(self.head(x.mean((2, 3)))) + noise)


def built() -> tuple[Net, list[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Net().double()
        for _ in range(3):
            model(torch.randn(5, 2, 6, 6).double())
        batches = [torch.randn(n, 2, 6, 6).double() + n for n in (4, 7, 2, 4)]
    return model, batches


def run(model: nn.Module, batch: Tensor) -> Tensor:
    return torch.as_tensor(model(batch))


def by_hand(model: Net, batches: list[Tensor]) -> dict[str, Tensor]:
    """Layer by layer: each batch normalised by itself, statistics over all values together."""
    with torch.no_grad():
        first = [model.conv(x) for x in batches]
        second = []
        for h in first:
            mean = h.mean((0, 2, 3), keepdim=True)
            var = h.var((0, 2, 3), unbiased=False, keepdim=True)
            shape = (1, 3, 1, 1)
            h = (h - mean) / (var + model.norm.eps).sqrt()
            h = h * model.norm.weight.view(shape) + model.norm.bias.view(shape)
            second.append(model.head(torch.relu(h).mean((2, 3))))  # dropout is off
    channels = torch.cat([h.movedim(1, -1).reshape(-1, 3) for h in first])
    units = torch.cat(second)
    return {
        "norm.running_mean": channels.mean(0),
        "norm.running_var": channels.var(0),
        "last.running_mean": units.mean(0),
        "last.running_var": units.var(0),
    }


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_statistics_are_those_of_all_values(training: bool) -> None:
    """Batches of unlike sizes count by their size; nothing else in the world moves."""
    model, batches = built()
    model.train(training)
    optimizer = torch.optim.Adam(model.parameters())
    run(model, batches[0]).sum().backward()
    optimizer.step()
    expected, before = by_hand(model, batches), snapshot(model, optimizer)
    assert reestimate(model, run, batches) == ("norm", "last")
    buffers = dict(model.named_buffers())
    for name, value in expected.items():
        torch.testing.assert_close(buffers[name], value, rtol=1e-12, atol=1e-12)
    assert set(changes(before, snapshot(model, optimizer))) == {f"{n}: value" for n in expected}


def test_evaluation_then_does_what_training_does() -> None:
    """With one batch the running statistics are the batch's own, but for the unbiased variance."""
    model, batches = built()
    model.drop.p = 0.0
    big = torch.cat(batches * 50)
    reestimate(model, run, [big])
    expected, found = outputs(model, (big,), True), outputs(model, (big,), False)
    assert float((expected - found).abs().max()) < 2e-3 * float(expected.abs().max())


def test_broken_statistics_are_mended() -> None:
    """A running mean that is not finite leaves no trace in the new one."""
    model, batches = built()
    model.norm.running_mean.fill_(float("nan"))  # type: ignore[union-attr]
    reestimate(model, run, batches)
    assert model.norm.running_mean.isfinite().all()  # type: ignore[union-attr]


def test_frozen_and_unreached_norms_stay() -> None:
    """A norm set to evaluation inside a model in training, one no batch reaches, one without."""
    model, batches = built()
    model.spare, model.bare = nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False)
    model.last.eval()
    frozen = model.last.running_mean.clone()  # type: ignore[union-attr]
    assert reestimate(model, run, batches) == ("norm",)
    assert torch.equal(model.last.running_mean, frozen)  # type: ignore[arg-type]
    assert torch.equal(model.spare.running_mean, torch.zeros(2))
    assert reestimate(nn.Linear(2, 2), run, [torch.ones(1, 2)]) == ()


class Interrupted(Exception):
    """What the user's loss may raise."""


def fails(model: nn.Module, batch: Tensor) -> Tensor:
    run(model, batch)
    if len(batch) == 2:
        raise Interrupted
    return torch.zeros(())


def test_an_error_half_way_leaves_everything() -> None:
    """Flags, momentum, hooks and buffers are as before."""
    model, batches = built()
    before = snapshot(model)
    with pytest.raises(Interrupted):
        reestimate(model, fails, batches)
    assert changes(before, snapshot(model)) == []


def test_a_buffer_that_cannot_be_written_is_refused() -> None:
    """A live graph holds it: nothing is written, not even the other norm's."""
    import weakref

    model, batches = built()
    held = weakref.ref(model.last.running_var)
    before = snapshot(model)
    with pytest.raises(GuardError, match="running_var"):
        reestimate(model, run, batches)
    assert changes(before, snapshot(model)) == []
    assert held() is model.last.running_var


def test_a_transaction_takes_it_back() -> None:
    """Together with the edit before it, bit for bit."""
    model, batches = built()
    before = snapshot(model)
    tx = transaction(model)
    tx.apply(Narrow("conv", by=1), (batches[0],))
    assert tx.reestimate(run, batches) == ("norm", "last")
    tx.roll_back()
    assert changes(before, snapshot(model)) == []


def test_a_trial_takes_it_back_after_training() -> None:
    """Edit, statistics, some steps, and back."""
    model, batches = built()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = snapshot(model, optimizer)
    trial = Trial(model, optimizer)
    with pytest.raises(GuardError, match="without an edit"):
        trial.reestimate(run, batches)
    trial.apply(Narrow("conv", by=1), (batches[0],))
    trial.reestimate(run, batches)
    for batch in batches:
        optimizer.zero_grad()
        run(model, batch).square().mean().backward()
        optimizer.step()
    trial.roll_back()
    after = snapshot(model, optimizer)
    random_states = {"torch random", "numpy random", "python random", "module '' seen"}
    grads = {name for name in after if name.endswith("gradient")}
    assert set(changes(before, after)) <= random_states | grads


@pytest.mark.parametrize("name", ["resnet_basic", "mobilenet", "densenet", "conv3d_net"])
def test_after_narrowing_statistics_fit_again(name: str) -> None:
    """On real nets: evaluation comes much nearer to training, and training goes on."""
    model, args = zoo.build(name), zoo.example(name, batch=16)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    reestimate(model, call, [args])
    apply(model, Narrow("*", by=0.4), args)
    stale = gap(model, args)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(reestimate(model, call, [args])) == len(norms)
    assert gap(model, args) < 0.3 * stale
    zoo.loss(model, args).backward()


def call(model: nn.Module, args: tuple[Any, ...]) -> object:
    return model(*args)


def gap(model: nn.Module, args: tuple[Any, ...]) -> float:
    """How far evaluation is from training on one batch."""
    return float((outputs(model, args, True) - outputs(model, args, False)).abs().mean())
