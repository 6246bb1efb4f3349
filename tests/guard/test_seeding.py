"""New units do not leap: what an optimizer starts from for them, and what they do in 20 steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuroexapt.guard.optimizer
from neuroexapt import AxisMap, Widen, apply, map_axes, transaction
from neuroexapt.errors import GuardError
from neuroexapt.guard import Trial
from neuroexapt.measure import Probe
from neuroexapt.testing import changes, snapshot
from tests.laws.test_optimizer_oracle import NETS, OPTIMIZERS, build

Make = Callable[[Any], torch.optim.Optimizer]
AFTER = 20  # steps that are looked at
MOST = 3.0  # how far new rows may go, in their siblings' steps

MAKERS: dict[str, Make] = OPTIMIZERS | {
    "rmsprop_plain": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
SITES = {"mlp": "2.out", "conv": "0.out"}


@cache
def teacher(net: str) -> tuple[Tensor, Tensor]:
    """What is to be learnt: a fixed net of 16 units."""
    generator = torch.Generator().manual_seed(5)
    inputs = int(torch.tensor(NETS[net][1][1:]).prod())
    into = torch.randn(inputs, 16, generator=generator, dtype=torch.float64) / inputs**0.5
    return into, torch.randn(16, 3, generator=generator, dtype=torch.float64) / 2


def batch(net: str, step: int) -> tuple[Tensor, Tensor]:
    """Another one at each step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(32, *NETS[net][1][1:], generator=generator, dtype=torch.float64)
    into, out = teacher(net)
    return x, (x.flatten(1) @ into).tanh() @ out


def loss_fn(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    return (model(pair[0]) - pair[1]).square().mean()


def train(
    net: str, model: nn.Module, made: torch.optim.Optimizer, steps: range, of: int = 1000
) -> None:
    """Some steps; with ``of`` the batches come round again."""
    for step in steps:
        made.zero_grad()
        loss_fn(model, batch(net, step % of)).backward()
        made.step()


@cache
def axes_of(net: str) -> AxisMap:
    """The map of a net."""
    return map_axes(build(net), batch(net, 0)[:1])


def updates(
    net: str, model: nn.Module, made: torch.optim.Optimizer, step: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The next step: of incoming rows and of what reads them, new entries and their siblings."""
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(net, model, made, range(step, step + 1))
    width = axes_of(net).widths[SITES[net]]
    sides: dict[str, tuple[list[Tensor], list[Tensor]]] = {"rows": ([], []), "readers": ([], [])}
    for place in width.appearances:
        if place.tensor in old:
            moved = (model.get_parameter(place.tensor).detach() - old[place.tensor]).abs()
            before = axes_of(net).tensors[place.tensor][place.dim].size
            new, siblings = sides["readers" if "consumer" in place.roles else "rows"]
            parts = moved.movedim(place.dim, 0).split([before, moved.shape[place.dim] - before])
            siblings.append(parts[0].flatten())
            new.append(parts[1].flatten())
    return {side: (torch.cat(new), torch.cat(old_)) for side, (new, old_) in sides.items()}


def widened(net: str, make: Make, **how: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A net that has learnt for 20 steps, four units wider."""
    model = build(net)
    made = make(list(model.parameters()))
    train(net, model, made, range(20))
    init = how.pop("init", "zero_out")
    edit = Widen(SITES[net], by=4, init=init)
    apply(model, edit, batch(net, 0)[:1], optimizer=made, **how)
    return model, made


def largest(net: str, model: nn.Module, made: torch.optim.Optimizer) -> float:
    """The largest ratio of root mean squares, new to siblings, in any step and on any side."""
    ratios = [
        float((new.square().mean() / siblings.square().mean()).sqrt())
        for step in range(20, 20 + AFTER)
        for new, siblings in updates(net, model, made, step).values()
    ]
    assert all(ratio > 0 for ratio in ratios[-2:])  # they do learn
    return max(ratios)


# Rprop steps by signs alone, a fifth longer each time one stays: a law of its own, below.
ELEMENTWISE = [name for name in MAKERS if name != "rprop"]


CELLS = [("mlp", name) for name in ELEMENTWISE]
CELLS += [("conv", name) for name in ("sgd", "adam", "adamax", "rmsprop", "adafactor")]


@pytest.mark.parametrize(("net", "optimizer"), CELLS)
def test_new_units_keep_to_their_siblings_steps(net: str, optimizer: str) -> None:
    """Up to three times as far, in each of 20 steps: random units, copies, and measured moments."""
    probe = Probe(loss_fn, [batch(net, step) for step in range(8)])
    ways: list[dict[str, Any]] = [{}, {"init": "split"}, {"second_moments": probe}]
    for how in ways:
        assert largest(net, *widened(net, MAKERS[optimizer], **how)) <= MOST, how


@pytest.mark.parametrize("optimizer", ["nadam", "adagrad", "rmsprop_plain"])
def test_moments_of_zero_would_leap(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law can be broken."""
    monkeypatch.setattr(neuroexapt.guard.optimizer, "SECOND_MOMENTS", frozenset())
    assert largest("mlp", *widened("mlp", MAKERS[optimizer])) > 1.2 * MOST


def test_muon_moves_the_whole_matrix() -> None:
    """It makes the singular values of a step equal: new rows go as far as the others."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.01)

    with pytest.warns(UserWarning, match="not in the optimizer"):
        model, made = widened("mlp", make)
    assert largest("mlp", model, made) <= MOST


def test_rprop_starts_at_its_siblings_and_grows_by_a_fifth() -> None:
    """Its step knows no gradient's length, only signs; so the bound is its own rule."""
    model, made = widened("mlp", OPTIMIZERS["rprop"])
    sizes = [made.state[p]["step_size"].max().item() for p in model.parameters()]
    for step in range(AFTER):
        for new, _ in updates("mlp", model, made, 20 + step).values():
            assert new.max() <= max(sizes) * 1.2**step * (1 + 1e-9)


# --- measured moments ----------------------------------------------------------------------------


def standing(name: str) -> Make:
    """An optimizer that sees gradients and moves nothing."""
    kinds: dict[str, Make] = {
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.0),
        "adam": lambda p: torch.optim.Adam(p, lr=0.0),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.0, alpha=0.999),
    }
    return kinds[name]


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "rmsprop"])
@pytest.mark.parametrize("net", SITES)
def test_measured_moments_are_those_of_an_optimizer_that_was_there(
    optimizer: str, net: str
) -> None:
    """Unit by unit, against one that has seen the wider model all along (nothing moves)."""
    batches = [batch(net, step) for step in range(4)]
    model = build(net).eval()
    made = standing(optimizer)(list(model.parameters()))
    train(net, model, made, range(40), of=4)
    edit, args = Widen(SITES[net], by=4), batch(net, 0)[:1]
    apply(model, edit, args, optimizer=made, second_moments=Probe(loss_fn, batches))
    oracle = standing(optimizer)(list(model.parameters()))
    train(net, model, oracle, range(40), of=4)
    reader = "4.weight" if net == "mlp" else "3.weight"
    key = "sum" if optimizer == "adagrad" else "exp_avg_sq" if optimizer == "adam" else "square_avg"
    mine, theirs = (
        o.state[model.get_parameter(reader)][key][:, -4:].transpose(0, 1).flatten(1).mean(1)
        for o in (made, oracle)
    )
    old = made.state[model.get_parameter(reader)][key][:, :-4].mean()
    theirs = theirs.clamp(min=old / 9)  # the least there is, for a unit that is hardly active
    # Running means weigh the last batch of a round most; a sum weighs all alike.
    exact = 1e-9 if optimizer == "adagrad" else 0.02
    torch.testing.assert_close(mine, theirs, rtol=exact, atol=0)


def test_units_that_no_gradient_reaches_keep_their_siblings_moments() -> None:
    """Behind readers of zero there is nothing to measure yet."""
    probe = Probe(loss_fn, [batch("mlp", step) for step in range(4)])
    moments = [
        made.state[model.get_parameter("2.weight")]["exp_avg_sq"]
        for model, made in (
            widened("mlp", OPTIMIZERS["adam"], second_moments=policy)
            for policy in ("siblings", probe)
        )
    ]
    assert torch.equal(*moments)


def test_a_trial_takes_measured_moments_back() -> None:
    """To the bit, after training; and a block does at once."""
    model = build("mlp")
    made = OPTIMIZERS["adam"](model.parameters())
    train("mlp", model, made, range(5))
    made.zero_grad()
    before, args = snapshot(model, made), batch("mlp", 0)[:1]
    probe = Probe(loss_fn, [batch("mlp", step) for step in range(4)])
    trial = Trial(model, made, second_moments=probe)
    trial.apply(Widen("2", by=4), args)
    train("mlp", model, made, range(5, 8))
    trial.roll_back()
    assert not changes(before, snapshot(model, made))
    tx = transaction(model, made, second_moments=probe)
    tx.apply(Widen("2", by=4), args)
    tx.roll_back()
    assert not changes(before, snapshot(model, made))


def broken(model: nn.Module) -> dict[str, Tensor]:
    """Not a number for everything."""
    return {name: torch.full_like(p, float("nan")) for name, p in model.named_parameters()}


def failing(model: nn.Module) -> dict[str, Tensor]:
    """A loss that fails."""
    raise ZeroDivisionError


BAD: dict[str, tuple[Any, type[Exception]]] = {
    "nan": (broken, GuardError),
    "nothing": (lambda model: {}, GuardError),
    "an error": (failing, ZeroDivisionError),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_measured_takes_the_edit_back(case: str) -> None:
    """The edit was made by then."""
    model = build("mlp")
    made = OPTIMIZERS["adam"](model.parameters())
    train("mlp", model, made, range(3))
    before = snapshot(model, made)
    measure, error = BAD[case]
    with pytest.raises(error):
        apply(
            model,
            Widen("2", by=4),
            batch("mlp", 0)[:1],
            optimizer=made,
            second_moments=measure,
        )
    assert not changes(before, snapshot(model, made))


def test_a_policy_of_another_name_is_refused() -> None:
    """By the names there are."""
    with pytest.raises(GuardError, match="'siblings'"):
        transaction(build("mlp"), None, second_moments="zero")  # type: ignore[arg-type]
