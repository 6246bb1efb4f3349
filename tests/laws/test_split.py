"""Splitting units: exact wherever only weights read them, and the copies part in training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import AxisMap, Widen, apply, map_axes
from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import resize_expr, unit_of
from neuroexapt.edit import share
from neuroexapt.edit.initial import mean_shares, split_positions
from neuroexapt.guard import transaction
from neuroexapt.testing import Row, check_cell
from tests import zoo
from tests.laws.test_optimizer_oracle import OPTIMIZERS, axes_of, batch, build, run
from tests.laws.world import NAMES, calm, difference, mapped, outputs


@pytest.mark.parametrize("name", NAMES)
def test_split_is_exact_or_refused_for_a_reason_on_the_map(name: str) -> None:
    """Every width grows, mostly to more than twice its size, to 1e-10; or its mixer is named."""
    args, axes, model = (
        zoo.example(name, dtype=torch.float64),
        mapped(name),
        calm(name, torch.float64),
    )
    before = {training: outputs(model, args, training) for training in (False, True)}
    for width in axes.widths.values():
        problems = Widen(width.name, by=1.2, init="split").check(axes)
        assert bool(problems) == bool(width.mixers), width.name
        assert all(f"'{width.mixers[0].kind}' mixes" in problems[0].seen for _ in problems[:1])
    edit = Widen("*", by=0.3 if name == "reference_cnn" else 1.2, init="split")  # that one is big
    patch = edit.plan(axes, named_tensors(model))
    assert len(patch.steps) == sum(not width.mixers for width in axes.widths.values())
    with transaction(model) as tx:
        tx.stage(patch)
    for training, expected in before.items():
        assert difference(expected, outputs(model, args, training)) <= 1e-10


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "lstm", "llama"])
def test_every_law_holds_for_split_units(name: str) -> None:
    """Undo, training, copies, optimizer, compilation: as for every edit."""

    def choice(axes: AxisMap, _model: nn.Module) -> list[Widen]:
        return [Widen(width, by=2, init="split") for width in axes.widths]

    entry = zoo.entry(name)
    cell = check_cell(choice, Row(name, entry.make, entry.args(4)), maps=partial(mapped, name))
    assert cell.kept, cell.reason


@pytest.mark.parametrize("name", ["small_cnn", "lstm"])
def test_a_moving_average_keeps_its_function_too(name: str) -> None:
    """A copy with other weights gets the same shares."""
    args, model = zoo.example(name, dtype=torch.float64), calm(name, torch.float64)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.9)
    before = outputs(average, args)
    apply(model, Widen("*", by=0.4, init="split"), args, copies=[average])
    assert difference(before, outputs(average, args)) <= 1e-10


def test_shares_differ_and_add_up() -> None:
    """By hand for two and three copies; every copy has a share of its own."""
    assert mean_shares((0, 1, 1)) == pytest.approx((1.0, 0.65, 0.35))
    assert mean_shares((0, 0, 0)) == pytest.approx((1.3 / 3, 1 / 3, 0.7 / 3))


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_copies_are_equal_and_their_readers_add_up(kind: str) -> None:
    """Makers are bit-equal copies; the columns of the copies of a unit add up to its old ones."""
    model, axes = build(kind), axes_of(kind)
    old = copy.deepcopy(model)
    for name, width in axes.widths.items():
        apply(model, Widen(name, by=width.size, init="split"), batch(kind, 0)[:1])
        after = map_axes(model, batch(kind, 0)[:1])
        for place in width.appearances:
            if place.tensor not in axes.parameters:
                continue
            before = old.get_parameter(place.tensor).detach()
            now = model.get_parameter(place.tensor).detach()
            units = torch.from_numpy(unit_of(after.tensors[place.tensor][place.dim], name))
            first, second = (
                now.index_select(place.dim, torch.nonzero(half).flatten())
                for half in (units < width.size, units >= width.size)
            )
            if place.role == "consumer":
                per_unit = first.shape[place.dim] // width.size
                order = torch.tensor(_origins(width.size))
                where = (order[:, None] * per_unit + torch.arange(per_unit)).flatten()
                total = first.index_add(place.dim, where, second)
                torch.testing.assert_close(total, before)
                assert not torch.allclose(first, before / 2)
            else:
                twin = before.index_select(place.dim, torch.tensor(_origins(width.size)))
                assert torch.equal(first, before)
                assert torch.equal(second, twin)
        old = copy.deepcopy(model)


def _origins(size: int) -> list[int]:
    return list(split_positions(size, 2 * size)[size:])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad"])
@pytest.mark.parametrize("outputs_", [1, 3])
def test_copies_part_in_training(optimizer: str, outputs_: int) -> None:
    """Under any optimizer, with one output too."""
    assert _apart(optimizer, outputs_) > 0.005


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adagrad"])
def test_shares_of_their_own_part_copies_sooner(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These optimizers are blind to the length of a gradient, the one thing that else differs."""
    apart = _apart(optimizer, 3)
    monkeypatch.setattr(share, "JITTER", 0.0)
    assert apart > 5 * _apart(optimizer, 3)


def _apart(optimizer: str, outputs_: int) -> float:
    """How far the copies of a unit have moved from it after 30 steps, relative to its length."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs_)).double()
    made = OPTIMIZERS[optimizer](model.parameters())
    x, y = torch.randn(32, 6).double(), torch.randn(32, outputs_).double()
    for step in range(40):
        if step == 10:
            apply(model, Widen("0", by=5, init="split"), (x,), optimizer=made)
        made.zero_grad()
        (model(x) - y).square().mean().backward()
        made.step()
    rows = model.get_parameter("0.weight").detach()
    return float(((rows[5:] - rows[_origins(5)]).norm(dim=1) / rows[5:].norm(dim=1)).min())


# --- the optimizer, against one that has trained the wider model all along -----------------------

TINY = 1e-30  # an epsilon that leaves updates independent of the gradient's length
EXACT: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": OPTIMIZERS["sgd"],
    "adam_amsgrad": OPTIMIZERS["adam_amsgrad"],
    "adamw": OPTIMIZERS["adamw"],
    "nadam": OPTIMIZERS["nadam"],
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01, eps=TINY),
    "adagrad": OPTIMIZERS["adagrad"],
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5, eps=TINY),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=TINY, centered=True, momentum=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


# Biases before a batch norm: their gradients are rounding errors, which some optimizers blow up.
ROUNDING = {("conv", "0.bias"), ("conv", "3.bias")}


def shadow(
    made: torch.optim.Optimizer, values: nn.Module, grads: dict[str, Tensor], held: nn.Module
) -> None:
    """One step of an optimizer at weights that others chose, for its state alone."""
    with torch.no_grad():
        for name, parameter in held.named_parameters():
            parameter.copy_(values.get_parameter(name))
            parameter.grad = grads[name].clone()
    made.step()


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("optimizer", EXACT)
def test_moments_are_those_of_a_model_split_all_along(
    optimizer: str, net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one share for all readers of a copy, entry by entry; with unlike ones in the mean."""
    monkeypatch.setattr(share, "JITTER", 0.0)
    model, x = build(net), batch(net, 0)[:1]
    edit = Widen("0", by=6, init="split")
    made = EXACT[optimizer](model.parameters())
    wide = copy.deepcopy(model)
    apply(wide, edit, x)
    held = copy.deepcopy(wide)
    all_along = EXACT[optimizer](held.parameters())
    for step in range(4):
        twin = copy.deepcopy(model)
        apply(twin, edit, x)
        twin.zero_grad()
        inputs, target = batch(net, step)
        (twin(inputs) - target).square().mean().backward()
        grads = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        shadow(all_along, twin, grads, held)
        run(net, model, made, range(step, step + 1))
    apply(model, edit, x, optimizer=made)
    for name, parameter in held.named_parameters():
        if (net, name) in ROUNDING:
            continue
        state = made.state[model.get_parameter(name)]
        assert state.keys() == all_along.state[parameter].keys()
        for key, value in all_along.state[parameter].items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(
                    state[key], value, rtol=1e-5, atol=1e-12, msg=f"{name} {key}"
                )


SCALED = {
    ("llama", "embed_tokens.out"): "norm",
    ("llama", "layers.0.self_attn.q_proj.head_size"): "q_proj",
    ("gpt", "blocks.0.attn.qkv.head_size"): "qkv",
}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("cell", SCALED, ids=".".join)
def test_scaled_parameters_have_the_moments_of_a_wide_model(
    cell: tuple[str, str], optimizer: str
) -> None:
    """Beside scaled weights gradients are smaller or larger: old entries, all parameters."""
    name, width = cell
    args = zoo.example(name)
    model = calm(name, torch.float64)
    edit, axes = Widen(width, by=2), mapped(name)
    wide = copy.deepcopy(model)
    made = OPTIMIZERS[optimizer](model.parameters())
    with transaction(wide) as tx:
        tx.stage(edit.plan(axes, named_tensors(wide)))
    held = copy.deepcopy(wide)
    all_along = OPTIMIZERS[optimizer](held.parameters())
    for _ in range(3):
        twin = copy.deepcopy(model)
        with transaction(twin) as tx:
            tx.stage(edit.plan(axes, named_tensors(twin)))
        zoo.loss(twin, args).backward()
        grads = {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in twin.named_parameters()
        }
        shadow(all_along, twin, grads, held)
        made.zero_grad()
        zoo.loss(model, args).backward()
        made.step()
    with transaction(model, made) as tx:
        tx.stage(edit.plan(axes, named_tensors(model)))
    seen = 0
    for key_name, parameter in held.named_parameters():
        state = made.state.get(model.get_parameter(key_name), {})
        old = _old_entries(name, key_name, width, parameter)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                expected = all_along.state[parameter][key][old]
                torch.testing.assert_close(
                    value[old], expected, rtol=1e-6, atol=1e-12, msg=f"{key_name} {key}"
                )
                seen += SCALED[cell] in key_name
    assert seen


def _old_entries(name: str, tensor: str, width: str, parameter: Tensor) -> Tensor:
    """Where the entries are that were there before: not on the new units in any dimension."""
    old = torch.ones(parameter.shape, dtype=torch.bool)
    size = mapped(name).widths[width].size
    for dim, expr in enumerate(mapped(name).tensors[tensor]):
        unit = unit_of(resize_expr(expr, width, size + 2), width)
        old &= torch.from_numpy(unit < size).view(-1, *[1] * (parameter.dim() - dim - 1))
    return old
