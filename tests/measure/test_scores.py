"""Scores of units against brute force: finite differences, single samples, generic solvers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests import zoo
from tests.laws.world import NAMES, calm, mapped, outputs
from torch import Tensor, nn

from neuroexapt import AxisMap, Narrow, apply, map_axes
from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import unit_of
from neuroexapt.edit import unit_norms
from neuroexapt.errors import MeasureError
from neuroexapt.measure import gate_slopes, removal_loss, unit_redundancy, unit_scores
from neuroexapt.measure.scores import KINDS


def loss(model: nn.Module, args: Sequence[Any]) -> Tensor:
    return zoo.loss(model, tuple(args))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tagger(nn.Module):
    """An LSTM, whose hidden units are read by itself and by a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Experts(nn.Module):
    """A gate, and two experts in one batched product: each sample goes through both."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.up, self.down = nn.Parameter(draw(2, 4, 6)), nn.Parameter(draw(2, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("ni,eih->enh", x, self.up))
        each = torch.einsum("enh,eho->eno", hidden, self.down)
        return torch.einsum("ne,eno->no", self.gate(x).softmax(-1), each)


def gate(model: nn.Module, axes: AxisMap, name: str, unit: int, value: float) -> None:
    """Scale what a unit gives to its readers, or all of its weights where nothing reads it.

    In a dot product what makes its left operand is scaled too.
    """
    width, named = axes.widths[name], named_tensors(model)
    done = set()
    read = [place for place in width.appearances if "consumer" in place.roles]
    places = [(place.tensor, place.dim, None) for place in read or width.appearances]
    for mixer in width.mixers:
        if mixer.kind == "dot":
            places += [(s.tensor, s.dim, s.positions) for s in mixer.sides[0]]  # type: ignore[misc]
    for tensor, dim, positions in places:
        if (id(named[tensor]), dim, positions) in done:
            continue
        done.add((id(named[tensor]), dim, positions))
        at = np.flatnonzero(unit_of(axes.tensors[tensor][dim], name) == unit)
        at = at if positions is None else np.intersect1d(at, positions)
        shape = [1] * named[tensor].dim()
        shape[dim] = -1
        factors = torch.ones(named[tensor].shape[dim], dtype=torch.float64)
        factors[torch.from_numpy(at)] = value
        named[tensor].data *= factors.view(shape)


def slope(model: nn.Module, axes: AxisMap, args: tuple[Any, ...], name: str, unit: int) -> float:
    """The derivative of the loss by a unit's gate, by central differences."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    step, values = 1e-5, []
    for value in (1 + step, 1 - step):
        gate(model, axes, name, unit, value)
        with torch.no_grad():
            values.append(float(loss(model.eval(), args)))
        model.load_state_dict(state)
    return (values[0] - values[1]) / (2 * step)


FINITE = [
    ("mlp", "net.0.out"), ("reference_cnn", "features.8.out"), ("mobilenet", "block2.conv.0.out"),
    ("llama", "layers.0.self_attn.num_kv_heads"), ("llama", "layers.0.mlp.gate_proj.out"),
    ("llama", "embed_tokens.out"), ("gpt", "blocks.0.attn.heads"),
    ("gpt", "blocks.0.attn.qkv.head_size"), ("gpt_nano", "transformer.h.0.mlp.c_fc.out"),
    ("densenet", "block1.0.conv.out"), ("unet", "up1.out"), ("groupnorm_cnn", "conv2.out"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "at"), FINITE)
def test_taylor_is_the_change_of_the_loss_as_the_gate_closes(name: str, at: str) -> None:
    """To first order, found by moving the gate of some units a little."""
    model, args = calm(name, torch.float64).eval(), zoo.example(name, dtype=torch.float64)
    axes = mapped(name)
    slopes = gate_slopes(model, loss, [args], axes, [at])[at][0]
    for unit in (0, axes.widths[at].size - 1):
        assert float(slopes[unit]) == pytest.approx(slope(model, axes, args, at, unit), rel=1e-5)
    taylor = unit_scores(model, loss, [args], axes, "taylor", [at])[at]
    assert taylor == pytest.approx(slopes.abs().tolist())


@pytest.mark.parametrize("make", [Tagger, Experts])
def test_taylor_of_kernels_and_experts(make: type[nn.Module]) -> None:
    """Recurrent and batched products have gates as well."""
    model = make().double()
    args = (draw(4, 3, 3) if make is Tagger else draw(6, 4),)
    axes = map_axes(model, args)
    assert axes.widths
    for name, row in gate_slopes(model, loss, [args], axes).items():
        for unit in range(axes.widths[name].size):
            by_hand = slope(model, axes, args, name, unit)
            assert float(row[0][unit]) == pytest.approx(by_hand, rel=1e-5, abs=1e-9)


def net() -> tuple[nn.Sequential, Tensor, AxisMap]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = draw(24, 4)
    return model, x, map_axes(model, (x,))


def test_fisher_is_the_mean_square_over_samples() -> None:
    """With batches of one sample exactly; from micro-batches without bias, over all splits."""
    model, x, axes = net()

    def squared(model: nn.Module, batch: Tensor) -> Tensor:
        return torch.as_tensor(model(batch).square().sum(1).mean())

    hidden = model[1](model[0](x)).detach()
    out = model(x).detach()
    by_hand = ((2 * out @ model[2].weight.detach()) * hidden).square().mean(0)
    single = unit_scores(model, squared, x.split(1), axes, "fisher")["0.out"]
    assert single == pytest.approx(by_hand.tolist())
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(300):
        parts = x[torch.randint(24, (24,), generator=generator)].split(4)
        found.append(unit_scores(model, squared, parts, axes, "fisher")["0.out"])
    mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
    assert (np.abs(mean - by_hand.numpy()) < 4 * error).all()


def test_removal_is_the_second_order_rise() -> None:
    """The same numbers as the evolver's own."""
    model, x, axes = net()
    batches = [(part,) for part in x.split(4)]
    slopes = gate_slopes(model, loss, batches, axes)["0.out"]
    found = unit_scores(model, loss, batches, axes, "removal")["0.out"]
    assert found == pytest.approx(removal_loss(slopes, 4)[0].tolist())


# --- from the readers' inputs --------------------------------------------------------------------


def test_redundancy_is_what_the_others_do_not_explain() -> None:
    """The R^2 of a unit from the others, here by the signal of the same name."""
    model, x, axes = net()
    x = draw(500, 4)
    hidden = model[1](model[0](x)).detach()
    found = unit_scores(model, loss, [(x,)], axes, "redundancy")["0.out"]
    assert found == pytest.approx((1 - unit_redundancy(hidden)).tolist(), abs=1e-9)


def test_reconstruction_is_the_error_that_a_fit_leaves() -> None:
    """Closed form against a generic least-squares solver on the unit's contribution."""
    model, x, axes = net()
    hidden = model[1](model[0](x)).detach()
    centred = hidden - hidden.mean(0)
    held = 1e-3 * centred.square().mean(0).mean()
    weight, errors = model[2].weight.detach(), []
    for unit in range(6):
        rest = [u for u in range(6) if u != unit]
        rows = torch.cat([centred[:, rest], (held * 24).sqrt() * torch.eye(5).double()])
        goal = torch.cat([centred[:, [unit]], torch.zeros(5, 1).double()])
        slope = torch.linalg.lstsq(rows, goal).solution
        # The ridge holds the unit's own weight as well.
        error = ((rows @ slope - goal).square().sum() / 24 + held) * weight[:, unit].square().sum()
        errors.append(float(error))
    found = unit_scores(model, loss, [(x,)], axes, "reconstruction")["0.out"]
    expected = np.array(errors) / np.mean(errors)
    assert found == pytest.approx(expected.tolist(), rel=1e-6)


SEES = [
    ("taylor", "dead"), ("fisher", "dead"), ("removal", "dead"), ("reconstruction", "dead"),
    ("redundancy", "copy"), ("reconstruction", "copy"), ("redundancy", "constant"),
    ("reconstruction", "constant"), ("l2", "dead"), ("l1", "dead"),
]  # fmt: skip


def plant(model: nn.Sequential, what: str) -> set[int]:
    """Make a unit worthless; the units of which one should go first."""
    first, last = model[0], model[2]
    with torch.no_grad():
        if what == "dead":
            first.weight[2], first.bias[2], last.weight[:, 2] = 0, 0, 0
            return {2}
        if what == "constant":
            first.weight[2], first.bias[2] = 0, 1
            return {2}
        first.weight[4], first.bias[4] = first.weight[2], first.bias[2]
    return {2, 4}


@pytest.mark.parametrize(("kind", "what"), SEES)
def test_a_worthless_unit_goes_first(kind: str, what: str) -> None:
    """Each score sees the dead, copied or constant units that it should see."""
    model, x, _ = net()
    ends = plant(model, what)
    axes = map_axes(model, (x,))
    if kind in KINDS:
        found: Any = unit_scores(model, loss, [(p,) for p in x.split(8)], axes, kind)["0.out"]
        edit = Narrow("0", by=1, scores={"0.out": found})
    else:
        found = unit_norms(axes, axes.widths["0.out"], named_tensors(model), kind)
        edit = Narrow("0", by=1, score=kind)
    assert int(np.argmin(found)) in ends
    kept = model[0].weight.detach().clone()
    apply(model, edit, (x,))
    gone = [u for u in range(6) if not (model[0].weight == kept[u]).all(1).any()]
    assert gone == [] if what == "copy" else set(gone) == ends


@pytest.mark.parametrize("name", NAMES)
def test_every_width_has_a_score_of_each_kind(name: str) -> None:
    """Finite, not negative, one a unit, and of use to Narrow; the model is as it was."""
    model, axes = calm(name), mapped(name)
    batches = [zoo.example(name, batch=4)] * 3
    before = outputs(model, batches[0])
    for kind in ("taylor", "fisher", "reconstruction"):
        found = unit_scores(model, loss, batches, axes, kind)
        assert {n: len(row) for n, row in found.items()} == {
            n: w.size for n, w in axes.widths.items()
        }
        assert all(value >= -1e-12 for row in found.values() for value in row)
        assert not Narrow("*", by=1, scores=found).check(axes)
    assert torch.equal(before, outputs(model, batches[0]))


def test_frozen_weights_count() -> None:
    """A backbone without gradients can be judged; it stays frozen."""
    model, x, axes = net()
    expected = unit_scores(model, loss, [(x,)], axes, "taylor")["0.out"]
    model.requires_grad_(False)
    assert unit_scores(model, loss, [(x,)], axes, "taylor")["0.out"] == expected
    assert not any(p.requires_grad for p in model.parameters())


def test_random_is_drawn_from_the_seed_and_the_name() -> None:
    """Another order for each seed and each width; the same for the same."""
    model, _, axes = net()
    width, tensors = axes.widths["0.out"], named_tensors(model)
    orders = {tuple(unit_norms(axes, width, tensors, "random", seed)) for seed in range(20)}
    assert len(orders) > 10
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders)
    again = unit_norms(axes, width, tensors, "random", 3)
    assert again == unit_norms(axes, width, tensors, "random", 3)


@pytest.mark.parametrize(
    ("kind", "widths", "count"),
    [
        ("entropy", None, 4),
        ("taylor", ["1.out"], 4),
        ("taylor", None, 0),
        ("fisher", None, 2),
        ("redundancy", None, 1),
    ],
)
def test_what_cannot_be_scored_is_refused(kind: str, widths: list[str] | None, count: int) -> None:
    """An unknown kind or width, too few batches, fewer rows than units."""
    model, x, axes = net()
    with pytest.raises(MeasureError):
        unit_scores(
            model, loss, [(p,) for p in x[: 2 * count].split(2) if len(p)], axes, kind, widths
        )
