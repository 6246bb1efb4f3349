"""Scores of single weights against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import PruneWeights, apply, map_axes
from neuroexapt.errors import MeasureError
from neuroexapt.measure import dense_gradients, weight_scores


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).squeeze(1) - batch[1]).square().mean()


def data(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rows, 4, **kind), torch.randn(rows, **kind)


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def test_taylor_is_the_slope_of_the_loss_towards_zero() -> None:
    """A small step of one weight towards zero, by difference quotient."""
    model, (x, y) = net(), data(64)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    scores = weight_scores(model, loss_fn, batches, kind="taylor")["0.weight"]
    with torch.no_grad():
        before = loss_fn(model, (x, y))
        for row, column in ((0, 0), (2, 3), (4, 1)):
            old = float(model[0].weight[row, column])
            model[0].weight[row, column] = old * (1 - 1e-6)
            slope = float((loss_fn(model, (x, y)) - before) / 1e-6)
            model[0].weight[row, column] = old
            assert float(scores[row, column]) == pytest.approx(abs(slope), rel=1e-3)


def test_fisher_is_half_the_squared_weight_times_the_mean_squared_gradient_of_a_sample() -> None:
    """Sample by sample, against the scatter of micro-batches of 8."""
    model, (x, y) = net(), data(16_000)
    weight = model[0].weight
    squares = torch.zeros_like(weight)
    for i in range(2000):
        (grad,) = torch.autograd.grad(loss_fn(model, (x[i : i + 1], y[i : i + 1])), [weight])
        squares += grad.square() / 2000
    expected = squares * weight.detach().square() / 2
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 16_000, 8)]
    found = weight_scores(model, loss_fn, batches, only=["0.weight"])["0.weight"]
    # Both are estimates, from 2,000 samples and 2,000 batches.
    assert float(((found - expected).abs() / expected).mean()) < 0.15


def test_scores_leave_the_model_alone_and_fit_its_weights() -> None:
    model = net().float()
    x, y = (t.float() for t in data(32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = weight_scores(model, loss_fn, [(x[:16], y[:16]), (x[16:], y[16:])])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert {name: (s.shape, s.dtype) for name, s in scores.items()} == {
        name: (p.shape, p.dtype) for name, p in model.named_parameters()
    }
    apply(model, PruneWeights("*", share=0.5, scores=scores), (x,))


def test_weights_are_pruned_by_what_they_cost() -> None:
    """A large weight on a dead input goes first by Taylor and Fisher, last by magnitude."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[9.0, 1.0, 1.0]]))
    x = torch.randn(32, 3) * torch.tensor([0.0, 1.0, 1.0])
    batches = [(x[:16], torch.zeros(16)), (x[16:], torch.zeros(16))]
    for kind in ("taylor", "fisher"):
        scores = weight_scores(model, loss_fn, batches, kind=kind)
        plan = PruneWeights("", share=1 / 3, scores=scores)
        patch = plan.plan(map_axes(model, (x,)), dict(model.named_parameters()))
        mask = patch.maskings[0].mask
        assert mask is not None
        assert mask.tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, b: weight_scores(m, loss_fn, b, kind="l1"), "kind='l1'"),
        (lambda m, b: weight_scores(m, loss_fn, b[:1]), "at least 2"),
        (lambda m, b: weight_scores(m, loss_fn, [], kind="taylor"), "at least 1"),
        (lambda m, b: dense_gradients(m, loss_fn, b), "no trainable weight with a mask"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Any, words: str) -> None:
    batches = [data(8, seed) for seed in range(3)]
    with pytest.raises(MeasureError, match=words):
        call(net(), batches)
