"""One step of dynamic sparse training, and the schedules of pruning and regrowth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import PruneWeights, apply
from neuroexapt.edit import RegrowWeights, drop_fraction, sparsity_at
from neuroexapt.errors import EditError
from neuroexapt.measure import dense_gradients

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def net(optimizer: Any = torch.optim.Adam) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """A pruned net that has trained for a few steps."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    steps = optimizer(model.parameters(), lr=0.01)
    apply(model, PruneWeights("*", share=0.6, scope="layer"), (X,), optimizer=steps)
    for _ in range(5):
        train(model, steps)
    return model, steps


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_fn(model, (X, Y)).backward()
    optimizer.step()


def test_the_smallest_go_and_the_steepest_come() -> None:
    """Against sorting by hand, as the authors do it: what is dropped may come back."""
    model, optimizer = net()
    parameters = dict(model.named_parameters())
    old = {f"{i}.weight": model[i].nx_mask_weight.clone() for i in (0, 2)}
    before = {name: parameters[name].detach().clone() for name in old}
    gradients = dense_gradients(model, loss_fn, [(X, Y)])
    done = apply(model, RegrowWeights(gradients, share=0.5), (X,), optimizer=optimizer)
    for name, mask in old.items():
        kept = int(mask.sum())
        count = int(kept / 2 + 0.5)
        sizes = before[name].abs()[mask].sort().values
        stay = mask & (before[name].abs() >= sizes[count])
        slopes = gradients[name].abs().masked_fill(stay, -1)
        grow = ~stay & (slopes >= slopes.flatten().sort(descending=True).values[count - 1])
        new = model[int(name[0])].nx_mask_weight
        assert torch.equal(new, stay | grow)
        assert int(new.sum()) == kept
        assert (parameters[name][new & ~mask] == 0).all()
        assert torch.equal(parameters[name][new & mask], before[name][new & mask])
    assert "65 of 108 weights are zero" in done.description


def test_a_weight_that_grows_has_no_momentum_and_steps_like_its_siblings() -> None:
    """Its second moment is the mean of the kept ones: with zero its first steps are too long."""
    model, optimizer = net()
    weight = dict(model.named_parameters())["0.weight"]
    old = model[0].nx_mask_weight.clone()
    squares = optimizer.state[weight]["exp_avg_sq"].clone()
    assert (squares[~old] == 0).all()
    gradients = dense_gradients(model, loss_fn, [(X, Y)])
    apply(model, RegrowWeights(gradients, share=0.5), (X,), optimizer=optimizer)
    new = model[0].nx_mask_weight
    born = new & ~old
    state = optimizer.state[weight]
    assert born.any()
    assert (state["exp_avg"][born] == 0).all()
    assert (state["exp_avg_sq"][~new] == 0).all()
    # The mean over those that were there and stay.
    torch.testing.assert_close(
        state["exp_avg_sq"][born], squares[new & old].mean().expand(int(born.sum()))
    )
    before = weight.detach().clone()
    train(model, optimizer)
    moved = (weight - before).abs()
    assert weight.grad is not None
    steep = weight.grad[born] != 0  # some fed only what was dropped at the same time
    assert steep.any()
    assert ((moved[born] > 0) == steep).all()
    assert moved[born].max() < 0.02
    assert (weight[~new] == 0).all()


def test_gradients_of_masked_weights_are_those_of_the_same_dense_model() -> None:
    """The loss is that of the masked model, the way back goes to every weight."""
    model, _ = net()
    dense = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    state = {name: value for name, value in model.state_dict().items() if "nx_mask" not in name}
    dense.load_state_dict(state)
    loss_fn(dense, (X, Y)).backward()
    with torch.no_grad():  # as an optimizer that is not elementwise would leave it
        stored = dict(model.named_parameters())["0.weight"]
        stored[~model[0].nx_mask_weight] = 5.0
    found = dense_gradients(model, loss_fn, [(X, Y)])
    for name, parameter in dense.named_parameters():
        if "weight" in name:
            torch.testing.assert_close(found[name], parameter.grad)
    assert model[0].weight.grad_fn is not None
    assert (stored[~model[0].nx_mask_weight] == 5.0).all()


def test_sparse_training_with_regrowth_beats_a_fixed_mask() -> None:
    """A task that needs exactly the weights that a bad mask has shut out."""
    torch.manual_seed(0)
    truth = torch.zeros(1, 20)
    truth[0, :5] = torch.randn(5)
    x = torch.randn(256, 20)
    y = x @ truth.T
    losses = {}
    for regrow in (False, True):
        model = nn.Linear(20, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scores = {"weight": (truth == 0).float()}
        apply(model, PruneWeights("", share=0.75, scores=scores), (x,), optimizer=optimizer)
        for step in range(150):
            if regrow and step % 10 == 0 and (share := drop_fraction(step, steps=100, first=0.6)):
                edit = RegrowWeights(dense_gradients(model, loss_fn, [(x, y)]), share=share)
                apply(model, edit, (x,), optimizer=optimizer)
            optimizer.zero_grad()
            loss = loss_fn(model, (x, y))
            loss.backward()
            optimizer.step()
            losses[regrow] = loss.item()
            del loss
        assert int((model.weight != 0).sum()) <= 5
    assert losses[True] < 1e-3 < losses[False]


def test_the_schedule_of_pruning_is_cubic() -> None:
    for step in range(0, 60):
        expected = 0.2 + 0.7 * (1 - (1 - min(1, max(0, (step - 10) / 40))) ** 3)
        assert sparsity_at(step, final=0.9, initial=0.2, start=10, steps=40) == pytest.approx(
            expected
        )
    shares = [sparsity_at(step, final=0.9, steps=40) for step in range(50)]
    assert shares == sorted(shares)


def test_the_schedule_of_regrowth_is_a_cosine_that_ends() -> None:
    for step in range(100):
        expected = 0.15 * (1 + math.cos(math.pi * step / 100))
        assert drop_fraction(step, steps=100) == pytest.approx(expected)
    assert drop_fraction(100, steps=100) == drop_fraction(10**6, steps=100) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sparsity_at(1, final=1.5, steps=10), "final=1.5"),
        (lambda: sparsity_at(1, final=0.5, steps=0), "steps=0"),
        (lambda: drop_fraction(1, steps=10, first=-1), "first=-1"),
    ],
)
def test_a_schedule_out_of_range_is_refused(call: Any, words: str) -> None:
    with pytest.raises(EditError, match=words):
        call()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (RegrowWeights({}, share=0.3), "no gradients"),
        (RegrowWeights({"0.weight": torch.ones(12, 6)}, share=0.3), "no gradients"),
        (RegrowWeights({"0.weight": torch.ones(6)}, at="0"), r"gradients of shape \(12, 6\)"),
        (RegrowWeights({"0.weight": torch.full((12, 6), math.nan)}, at="0"), "finite: False"),
        (RegrowWeights({}, share=0), "above 0"),
        (RegrowWeights({}, at="*.bias"), "have been pruned"),
    ],
    ids=repr,
)
def test_what_cannot_be_regrown_is_refused(edit: RegrowWeights, words: str) -> None:
    model, _ = net()
    with pytest.raises(EditError, match=words):
        apply(model, edit, (X,))
