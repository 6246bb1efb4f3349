"""Inserted convolutions: every option keeps the function, and is what it says."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import InsertConv, Widen, apply, map_axes
from neuroexapt.edit import Edit
from neuroexapt.errors import EditError

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def seeded(make: Any) -> Any:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().double()


def net(activation: nn.Module | None = None, channels: int = 6) -> nn.Sequential:
    """A convolution, a norm, an activation, a convolution."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            activation or nn.ReLU(),
            nn.Conv2d(channels, 4, 3),
        )
    )


def both(model: nn.Module, *args: Tensor) -> list[Tensor]:
    """Outputs in evaluation and training mode, of a copy: batch norm counts in training."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        return [twin.train(training)(*args) for training in (False, True)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"groups": 3},
    "depthwise": {"depthwise": True, "kernel": 5},
    "bias": {"bias": True},
    "identity": {"mode": "identity"},
    "identity, grouped": {"mode": "identity", "groups": 2, "bias": True},
    "identity, depthwise": {"mode": "identity", "depthwise": True},
}


@pytest.mark.parametrize("after", ["", "0", "1", "2", "3"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_exact_everywhere(option: str, after: str) -> None:
    """Both modes, behind a convolution, a norm, an activation, the whole; then it trains."""
    model = net(channels=6)
    before = both(model, X)
    options = OPTIONS[option]
    if options.get("groups") == 3 and after in ("", "3"):
        assert "groups" in InsertConv(after, **options).check(map_axes(model, (X,)))[0].seen
        return
    done = apply(model, InsertConv(after, **options), (X,))
    assert done.max_difference <= 1e-12
    for old, new in zip(before, both(model, X), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    inner = [p for n, p in model.named_parameters() if "nx_" in n]
    assert inner
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in inner)


def test_an_identity_is_a_convolution_and_the_activation_once_more() -> None:
    """The kernel is one at its centre and zero elsewhere; ReLU6 follows as its two bounds."""
    model = net(nn.ReLU6())
    apply(model, InsertConv("2", mode="identity", kernel=5), (X,))
    convolution, activation = model[2].nx_then
    expected = torch.zeros(6, 6, 5, 5).double()
    expected[range(6), range(6), 2, 2] = 1
    assert torch.equal(convolution.weight, expected)
    assert (activation.min_val, activation.max_val) == (0.0, 6.0)
    apply(model, InsertConv("1", mode="identity"), (X,))
    assert len(model[1].nx_then) == 1  # behind a norm there is no activation to repeat
    apply(model, InsertConv("2", mode="identity"), (X,))
    assert [type(part).__name__ for part in model[2].nx_then2] == ["Conv2d", "Hardtanh"]


@pytest.mark.parametrize(
    "activation", [nn.GELU(), nn.Sigmoid(), nn.LeakyReLU(), nn.Tanh(), nn.Hardswish()], ids=repr
)
def test_an_identity_is_refused_behind_other_activations(activation: nn.Module) -> None:
    """A curved activation twice is not the same as once."""
    problems = InsertConv("2", mode="identity").check(map_axes(net(activation), (X,)))
    assert [p.next_step for p in problems] == ["use mode='residual'"]


def test_a_depthwise_branch_follows_its_stream() -> None:
    """A wider stream has a wider depthwise convolution, with as many groups."""
    model = net()
    apply(model, InsertConv("2", depthwise=True), (X,))
    torch.nn.init.constant_(model[2].nx_after[3].scale, 0.3)
    before = both(model, X)
    apply(model, Widen("0", by=2), (X,))
    branch = model[2].nx_after[0]
    assert branch.groups == branch.in_channels == branch.weight.shape[0] == 8
    for old, new in zip(before, both(model, X), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "even kernel": ({"kernel": 4}, "kernel=4"),
    "no kernel": ({"kernel": 0}, "kernel=0"),
    "mode": ({"mode": "parallel"}, "mode='parallel'"),
    "groups": ({"groups": 0}, "groups=0"),
    "uneven groups": ({"groups": 4}, "4 groups of 6 channels"),
    "both": ({"groups": 2, "depthwise": True}, "groups=2 and depthwise=True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_told_beforehand(case: str) -> None:
    """By ``check``, and raised by ``plan``."""
    options, seen = WRONG[case]
    axes = map_axes(net(), (X,))
    assert [problem.seen for problem in InsertConv("2", **options).check(axes)] == [seen]
    with pytest.raises(EditError, match=seen.split("=")[0]):
        InsertConv("2", **options).plan(axes, {})


def test_all_problems_are_listed() -> None:
    """A wrong option and a wrong place at once."""
    model = nn.Sequential(nn.Linear(3, 4))
    problems = InsertConv("0", kernel=2).check(map_axes(model, (torch.randn(2, 3),)))
    assert len(problems) == 2


# --- modules with unusual outputs ----------------------------------------------------------------


class Pair(NamedTuple):
    """A map and its mean."""

    features: Tensor
    mean: Tensor


class Body(nn.Module):
    """Puts out a tuple, a named tuple, a dictionary, or numbers of places."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.conv(x))
        if self.form == "dict":
            return {"features": y}
        if self.form == "index":
            return y.argmax(1)
        return (Pair if self.form == "named" else lambda *items: items)(y, y.mean((2, 3)))


class Unpacks(nn.Module):
    """Uses a body's first output, by name where it has names."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.body, self.head = Body(form), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if isinstance(out, dict):
            return self.head(out["features"])
        if isinstance(out, Tensor):
            return self.head(torch.nn.functional.one_hot(out, 6).movedim(-1, 1).to(x))
        features = out.features if isinstance(out, Pair) else out[0]
        return self.head(features) * out[1].mean()


@pytest.mark.parametrize("form", ["tuple", "named"])
def test_the_first_of_several_outputs(form: str) -> None:
    """The branch works on it; the others and the names stay."""
    model = seeded(lambda: Unpacks(form))
    before = both(model, X)
    apply(model, InsertConv("body"), (X,))
    assert all(torch.equal(a, b) for a, b in zip(before, both(model, X), strict=True))
    out = model.body(X)
    assert type(out) is (Pair if form == "named" else tuple)
    torch.nn.init.ones_(model.body.nx_after[3].scale)
    assert not torch.equal(both(model, X)[0], before[0])


@pytest.mark.parametrize(("form", "seen"), [("dict", "type dict"), ("index", "torch.int64")])
def test_other_outputs_are_refused_beforehand(form: str, seen: str) -> None:
    """There is no tensor of activations to add to."""
    (problem,) = InsertConv("body").check(map_axes(seeded(lambda: Unpacks(form)), (X,)))
    assert seen in problem.seen


def test_a_module_called_on_unlike_channels_is_refused_beforehand() -> None:
    """One branch cannot fit both calls."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.relu(self.second(self.relu(self.first(x)))))

    (problem,) = InsertConv("relu").check(map_axes(seeded(Twice), (X,)))
    assert "(4, 4, 6, 6) and (4, 5, 4, 4)" in problem.seen


def test_parts_that_a_fused_kernel_skips_are_refused_beforehand() -> None:
    """In evaluation mode torch would not call what stands behind them."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    axes = map_axes(model, (torch.randn(2, 5, 8),))
    (problem,) = InsertConv("0.linear1").check(axes)
    assert problem.next_step == "insert behind '0' as a whole"


def test_a_branch_has_the_dtype_of_what_it_works_on() -> None:
    """Where a part of the model is kept in another precision, a branch in it is too."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.low.bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            low = torch.relu(self.low(x.bfloat16()))
            return torch.as_tensor(self.high(low.float()))

    model = Mixed()
    edits: list[Edit] = [InsertConv("low"), InsertConv("high")]
    for edit in edits:
        apply(model, edit, (X.float(),))
    kinds = {n.split(".")[0]: p.dtype for n, p in model.named_parameters() if "nx_" in n}
    assert kinds == {"low": torch.bfloat16, "high": torch.float32}


def test_a_gate_keeps_the_dtype_under_autocast() -> None:
    """In a region of lower precision the stream does not become wider."""
    model = net().float()
    apply(model, InsertConv("2"), (X.float(),))
    seen = []
    model[2].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(X.float())
    assert seen == [torch.bfloat16]
