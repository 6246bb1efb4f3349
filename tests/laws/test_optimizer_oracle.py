"""The optimizer goes along: against a big model whose units are held dead, and entry by entry."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

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
from neuroexapt.couple import unit_of
from neuroexapt.edit import Edit
from neuroexapt.errors import GuardError
from neuroexapt.testing import changes, snapshot

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "sgd_decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05, t0=3),
}


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
    )


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 5, 3, stride=2, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 4, 3),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "mlp": (_mlp, (16, 6), {"0.out": (1, 5, 11), "2.out": (0, 9)}),
    "conv": (_conv, (8, 6, 4, 4), {"0.out": (0, 3), "3.out": (2,)}),
}


def build(net: str, seed: int = 0) -> nn.Module:
    """A net in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return NETS[net][0]().double()


def batch(net: str, step: int) -> tuple[Tensor, Tensor]:
    """Another input and target at each step."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = NETS[net][1]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randn(shape[0], 3, generator=generator, dtype=torch.float64)


@cache
def axes_of(net: str) -> AxisMap:
    """The map of a net."""
    return map_axes(build(net), batch(net, 0)[:1])


def alive(net: str) -> dict[str, Tensor]:
    """For each parameter, ones where it belongs to units that live and zeros elsewhere."""
    axes = axes_of(net)
    masks = {name: torch.ones_like(p) for name, p in build(net).named_parameters()}
    for width, dead in NETS[net][2].items():
        for place in axes.widths[width].appearances:
            if place.tensor in masks:
                unit = unit_of(axes.tensors[place.tensor][place.dim], width)
                where = torch.tensor([p for p, u in enumerate(unit) if u in dead])
                masks[place.tensor].index_fill_(place.dim, where, 0)
    return {name: mask.detach() for name, mask in masks.items()}


def run(
    net: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    masks: Mapping[str, Tensor] | None = None,
) -> list[float]:
    """Train; with masks the dead entries and their gradients are held at zero."""
    losses = []
    for step in steps:
        x, target = batch(net, step)
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        for name, mask in (masks or {}).items():
            grad = model.get_parameter(name).grad
            assert grad is not None
            grad.mul_(mask)
        optimizer.step()
        hold(model, masks or {})
        losses.append(loss.item())
    return losses


def hold(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put dead entries back to zero."""
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_narrowing_dead_units_goes_on_like_the_masked_big_model(optimizer: str, net: str) -> None:
    """Twenty more steps give the same losses to a relative 1e-9."""
    model, dead = build(net), NETS[net][2]
    big = OPTIMIZERS[optimizer](model.parameters())
    run(net, model, big, range(5))
    hold(model, alive(net))
    small, carried = copy.deepcopy((model, big))
    for width, gone in dead.items():
        size = axes_of(net).widths[width].size
        scores = {width: [float(unit not in gone) for unit in range(size)]}
        edit = Narrow(width, to=size - len(gone), scores=scores)
        apply(small, edit, batch(net, 0)[:1], optimizer=carried)
    expected = run(net, model, big, range(5, 25), alive(net))
    assert run(net, small, carried, range(5, 25)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("net", NETS)
def test_without_its_state_it_would_not(net: str) -> None:
    """The oracle can fail: a fresh optimizer on the narrowed model gives other losses."""
    model, masks = build(net), alive(net)
    big = OPTIMIZERS["adam"](model.parameters())
    run(net, model, big, range(5))
    hold(model, masks)
    twin = copy.deepcopy(model)
    expected = run(net, model, big, range(5, 25), masks)
    fresh = run(net, twin, OPTIMIZERS["adam"](twin.parameters()), range(5, 25), masks)
    assert fresh != pytest.approx(expected, rel=1e-3)


# --- widening, entry by entry --------------------------------------------------------------------

MEAN = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta", "grad_avg"}
MEAN |= {"step_size"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_widening_keeps_old_state_and_starts_new_state_gently(optimizer: str) -> None:
    """Old entries and ``step`` stay; new first moments are 0, second ones their siblings' mean."""
    model = build("mlp")
    made = OPTIMIZERS[optimizer](model.parameters())
    run("mlp", model, made, range(3))
    old = {p: copy.deepcopy(state) for p, state in made.state.items()}
    apply(model, Widen("2", by=4), batch("mlp", 0)[:1], optimizer=made)
    for name, dim in (("2.weight", 0), ("2.bias", 0), ("4.weight", 1)):
        parameter = model.get_parameter(name)
        for key, value in made.state[parameter].items():
            before = old[parameter][key]
            if not isinstance(value, Tensor) or not value.dim():
                assert value == before, (name, key)
                continue
            assert torch.equal(value.narrow(dim, 0, 10), before), (name, key)
            mean = before.mean(dim, keepdim=True) * (key in MEAN)
            new = value.narrow(dim, 10, 4)
            torch.testing.assert_close(new, mean.expand_as(new), msg=f"{name} {key}")
    assert list(made.state) == list(old)
    assert made.state[model.get_parameter("0.weight")].keys() == old[model[0].weight].keys()  # type: ignore[index]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_new_units_do_not_leap(optimizer: str) -> None:
    """No entry moves much further in the first step after widening than the old ones do."""
    model = build("mlp")
    made = OPTIMIZERS[optimizer](model.parameters())
    run("mlp", model, made, range(20))
    apply(model, Widen("2", by=4), batch("mlp", 0)[:1], optimizer=made)
    weight = model.get_parameter("4.weight")
    before = weight.detach().clone()
    run("mlp", model, made, range(20, 21))
    moves = (weight.detach() - before).abs()
    assert moves[:, 10:].any()
    assert moves[:, 10:].max() <= 4 * moves[:, :10].max()


class Odd(torch.optim.SGD):
    """Keeps a vector of its own for every parameter."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("odd", torch.zeros(7))
        return super().step(closure)


def test_state_of_another_shape_is_reset_with_a_warning() -> None:
    """What cannot follow starts anew, is named, and training goes on."""
    model = build("mlp")
    made = Odd(model.parameters(), lr=0.1)
    run("mlp", model, made, range(3))
    with pytest.warns(UserWarning, match="odd") as caught:
        apply(model, Widen("2", by=4), batch("mlp", 0)[:1], optimizer=made)
    told = " ".join(str(warning.message) for warning in caught)
    assert "'2.weight'" in told
    assert "'4.weight'" in told
    run("mlp", model, made, range(3, 6))


def test_factored_moments_follow_along_the_dimensions_they_have() -> None:
    """Adafactor's means over rows and columns: old ones stay, new ones are their mean."""
    model = build("mlp")
    made = torch.optim.Adafactor(model.parameters())
    run("mlp", model, made, range(3))
    old = {n: copy.deepcopy(made.state[p]) for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(model, Widen("2", by=4), batch("mlp", 0)[:1], optimizer=made)
    makers, readers = (made.state[model.get_parameter(n)] for n in ("2.weight", "4.weight"))
    assert torch.equal(makers["row_var"][:10], old["2.weight"]["row_var"])
    mean = old["2.weight"]["row_var"].mean()
    torch.testing.assert_close(makers["row_var"][10:], mean.expand(4, 1))
    assert torch.equal(makers["col_var"], old["2.weight"]["col_var"])
    assert readers["col_var"].shape == (1, 14)
    assert torch.equal(readers["row_var"], old["4.weight"]["row_var"])
    losses = run("mlp", model, made, range(3, 9))
    assert all(loss < 10 for loss in losses)


# --- several optimizers, and kinds of parameters -------------------------------------------------


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Matrices to one, the rest to the other, as Muon's users do."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01)]


@pytest.mark.parametrize(
    "edit", [Widen("2", by=4), Narrow("0", by=2), InsertResidual("2")], ids=repr
)
def test_two_optimizers_go_along_together(edit: Edit) -> None:
    """Each keeps its own parameters, state of their shape, and trains on; rolled back, both do."""
    model, args = build("mlp"), batch("mlp", 0)[:1]
    made = muon_and_adamw(model)
    for step in range(3):
        both_step("mlp", model, made, step)
    before = snapshot(model, made[0]), snapshot(model, made[1])
    tx = transaction(model, made)
    tx.apply(edit, args)
    held = [id(p) for o in made for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for one, dims in zip(made, ({2}, {1}), strict=True):
        assert {p.dim() for g in one.param_groups for p in g["params"]} == dims
        for parameter, state in one.state.items():
            shapes = {v.shape for v in state.values() if isinstance(v, Tensor) and v.dim()}
            assert shapes <= {parameter.shape}
    tx.roll_back()
    assert not changes(before[0], snapshot(model, made[0]))
    assert not changes(before[1], snapshot(model, made[1]))
    apply(model, edit, args, optimizer=made)
    for step in range(3, 6):
        both_step("mlp", model, made, step)


def both_step(net: str, model: nn.Module, made: list[torch.optim.Optimizer], step: int) -> None:
    """One step of every optimizer."""
    x, target = batch(net, step)
    for optimizer in made:
        optimizer.zero_grad()
    (model(x) - target).square().mean().backward()
    for optimizer in made:
        optimizer.step()


def test_narrowing_with_two_optimizers_is_each_for_its_own() -> None:
    """Against a masked big model, where both are element by element."""
    model, dead = build("mlp"), NETS["mlp"][2]
    parts = list(model.parameters())
    big = [torch.optim.Adam(parts[:3], lr=0.01), torch.optim.SGD(parts[3:], lr=0.05, momentum=0.9)]
    for step in range(5):
        both_step("mlp", model, big, step)
    hold(model, alive("mlp"))
    small, carried = copy.deepcopy((model, big))
    for width, gone in dead.items():
        size = axes_of("mlp").widths[width].size
        scores = {width: [float(unit not in gone) for unit in range(size)]}
        edit = Narrow(width, to=size - len(gone), scores=scores)
        apply(small, edit, batch("mlp", 0)[:1], optimizer=carried)
    for step in range(5, 25):
        both_step("mlp", small, carried, step)
        x, target = batch("mlp", step)
        for optimizer in big:
            optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        for name, mask in alive("mlp").items():
            model.get_parameter(name).grad.mul_(mask)  # type: ignore[union-attr]
        for optimizer in big:
            optimizer.step()
        hold(model, alive("mlp"))
    x = batch("mlp", 99)[0]
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-12)


def test_new_vectors_join_the_group_without_decay() -> None:
    """Groups by kind: gate and bias of an inserted branch are not decayed, its matrix is."""
    model = build("mlp")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    made = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    apply(model, InsertResidual("2"), batch("mlp", 0)[:1], optimizer=made)
    decayed, free = (group["params"] for group in made.param_groups)
    assert [p.dim() for p in decayed] == [2] * 4
    assert [p.dim() for p in free] == [1] * 5
    assert {id(p) for p in [*decayed, *free]} == {id(p) for p in model.parameters()}


def test_what_an_optimizer_cannot_train_is_refused() -> None:
    """Muon alone and a gate; two for one parameter; those with a history of their own."""
    model, args = build("mlp"), batch("mlp", 0)[:1]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    with pytest.raises(GuardError, match="Muon trains those alone"):
        apply(model, InsertResidual("2"), args, optimizer=torch.optim.Muon(matrices))
    twice = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam(matrices)]
    with pytest.raises(GuardError, match="3 parameters that two of them train"):
        apply(model, Widen("2", by=1), args, optimizer=twice)
    for made in (torch.optim.LBFGS(model.parameters()), torch.optim.SparseAdam(matrices)):
        with pytest.raises(GuardError, match="not LBFGS, not SparseAdam"):
            apply(model, Widen("2", by=1), args, optimizer=made)


# --- groups and schedules ------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("edit", "neighbour"),
    [
        (InsertConv("2"), "1.bias"),
        (InsertResidual("3"), "3.bias"),
        (InsertResidual("0"), "0.bias"),
        (InsertConv(""), None),
    ],
    ids=repr,
)
def test_new_parameters_join_the_group_of_their_neighbour(
    edit: Edit, neighbour: str | None, named: bool
) -> None:
    """They stand right behind it, with its learning rate; names go along where there are names."""
    model = build("conv")
    if neighbour is None:
        model, edit = nn.Sequential(*list(model)[:6]), InsertConv("")  # type: ignore[call-overload]
        neighbour = "4.bias"
    old = dict(model.named_parameters())
    items = [(n, p) if named else p for n, p in old.items()]
    made = torch.optim.SGD([{"params": items[:5]}, {"params": items[5:], "lr": 0.3}], lr=0.1)
    apply(model, edit, batch("conv", 0)[:1], optimizer=made)
    new = {n: p for n, p in model.named_parameters() if n not in old}
    order = list(old)
    at = order.index(neighbour) + 1
    order[at:at] = list(new)
    split = 5 + (len(new) if at <= 5 else 0)
    for group, names in zip(made.param_groups, (order[:split], order[split:]), strict=True):
        everything = {**old, **new}
        assert [id(p) for p in group["params"]] == [id(everything[n]) for n in names]
        assert group.get("param_names") == (names if named else None)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "constant": lambda o: lr_scheduler.ConstantLR(o, total_iters=5),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.LambdaLR(o, lambda step: 0.9**step)],
        milestones=[3],
    ),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=6),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("edit", [Widen("0", by=2), Narrow("3", by=1), InsertConv("2")], ids=repr)
def test_schedules_go_on(scheduler: str, edit: Edit) -> None:
    """The learning rates after an edit are those of a model without one."""
    rates = []
    for edited in (False, True):
        model = build("conv")
        groups = list(model.parameters())
        made = torch.optim.SGD([{"params": groups[:4]}, {"params": groups[4:]}], 0.1, momentum=0.9)
        schedule = SCHEDULERS[scheduler](made)
        seen = []
        for step in range(8):
            if edited and step == 4:
                apply(model, edit, batch("conv", 0)[:1], optimizer=made)
            run("conv", model, made, range(step, step + 1))
            schedule.step()
            seen.append([(group["lr"], group["momentum"]) for group in made.param_groups])
        rates.append(seen)
    assert rates[0] == rates[1]
    assert len({str(step) for step in rates[0]}) > 1


@pytest.mark.parametrize("edit", [Widen("0", by=2), Narrow("3", by=1), InsertConv("2")], ids=repr)
def test_a_plateau_is_still_noticed(edit: Edit) -> None:
    """ReduceLROnPlateau counts on through an edit, for every group."""
    model = build("conv")
    groups = list(model.parameters())
    made = torch.optim.SGD([{"params": groups[:4]}, {"params": groups[4:]}], 0.1)
    schedule = lr_scheduler.ReduceLROnPlateau(made, patience=3, min_lr=[0.001, 0.002])
    for step in range(6):
        if step == 2:
            apply(model, edit, batch("conv", 0)[:1], optimizer=made)
        run("conv", model, made, range(step, step + 1))
        schedule.step(1.0)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0.01, 0.01])
