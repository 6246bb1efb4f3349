"""Bad input is refused by name: place, value seen, value needed, next step; nothing is written."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import InsertConv, InsertResidual, Narrow, NeuroExaptError, Widen, apply
from neuroexapt.edit import Edit
from neuroexapt.errors import (
    CaptureError,
    EditError,
    GuardError,
    PinnedError,
    UnknownPlaceError,
    VerifyError,
)
from neuroexapt.guard import Trial, transaction
from neuroexapt.guard.verify import _check_fake, behaviour
from neuroexapt.testing import changes, snapshot

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NAN, INF = float("nan"), float("inf")


class Net(nn.Module):
    """Convolution, norm, flatten by a literal, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(5 * 4 * 4, 12)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.last(x)).view(-1, 80)
        return torch.as_tensor(self.fc2(torch.relu(self.fc1(x))))


class Case(NamedTuple):
    """An edit, what is raised, and words of the message."""

    edit: Edit
    error: type[NeuroExaptError]
    words: tuple[str, ...]


CASES = {
    "typo": Case(Widen("fc11", by=1), UnknownPlaceError, ("fc11", "'fc1'")),
    "typo of a conv": Case(InsertConv("cnv"), UnknownPlaceError, ("cnv", "'conv'")),
    "typo of a span": Case(InsertResidual("nrm"), UnknownPlaceError, ("nrm", "'norm'")),
    "glob without match": Case(Narrow("blocks.*", by=1), UnknownPlaceError, ("blocks.*",)),
    "empty place": Case(Widen("x" * 99, by=1), UnknownPlaceError, ("map_axes",)),
    "pinned by a literal": Case(Widen("last", by=1), PinnedError, ("test_refusals.py:", "view")),
    "pinned output": Case(Narrow("fc2", by=1), PinnedError, ("fc2.out", "output")),
    "pinned input": Case(Widen("conv.in", by=1), PinnedError, ("conv.in", "input")),
    "to=0": Case(Narrow("fc1", to=0), EditError, ("to=0", "at least 1", "12")),
    "negative to": Case(Narrow("fc1", to=-3), EditError, ("to=-3", "at least 1")),
    "narrow to the same": Case(Narrow("fc1", to=12), EditError, ("to=12", "fewer than", "12")),
    "narrow to more": Case(Narrow("fc1", to=13), EditError, ("to=13", "fewer than")),
    "widen to the same": Case(Widen("fc1", to=12), EditError, ("to=12", "more than")),
    "widen to less": Case(Widen("fc1", to=3), EditError, ("to=3", "Narrow")),
    "narrow by all": Case(Narrow("fc1", by=12), EditError, ("by=12", "at least 1")),
    "narrow by a whole": Case(Narrow("fc1", by=1.0), EditError, ("by=1.0", "at least 1")),
    "both": Case(Widen("fc1", by=1, to=13), EditError, ("to=13, by=1", "exactly one")),
    "neither": Case(Widen("fc1"), EditError, ("to=None, by=None", "exactly one")),
    "narrow both": Case(Narrow("fc1", by=1, to=1), EditError, ("exactly one",)),
    "narrow neither": Case(Narrow("fc1"), EditError, ("exactly one",)),
    "even kernel": Case(InsertConv("norm", kernel=4), EditError, ("kernel=4", "odd")),
    "kernel 0": Case(InsertConv("norm", kernel=0), EditError, ("kernel=0", "odd")),
    "negative kernel": Case(InsertConv("norm", kernel=-3), EditError, ("kernel=-3", "odd")),
    "float kernel": Case(InsertConv("norm", kernel=3.0), EditError, ("kernel=3.0",)),  # type: ignore[arg-type]
    "conv behind a linear": Case(InsertConv("fc1"), EditError, ("fc1", "spatial")),
    "span over a flatten": Case(InsertResidual(""), EditError, ("whole model", "flatten")),
    "a width as span": Case(InsertResidual("conv.out"), EditError, ("module path",)),
}
for value in (0, -1, -0.5, 0.0, NAN, INF, -INF, True, False, "2", [2]):
    for kind in (Widen, Narrow):
        CASES[f"{kind.__name__} by {value!r}"] = Case(
            kind("fc1", by=value),  # type: ignore[arg-type]
            EditError,
            (f"by={value!r}", "positive"),
        )
for value in (True, 2.5, NAN, "8"):
    for kind in (Widen, Narrow):
        CASES[f"{kind.__name__} to {value!r}"] = Case(
            kind("fc1", to=value),  # type: ignore[arg-type]
            EditError,
            (f"to={value!r}", "whole number"),
        )
for label, scores in {
    "too few scores": [1.0] * 11,
    "too many scores": [1.0] * 13,
    "no scores": [],
    "nan scores": [NAN] * 12,
    "infinite scores": [1.0] * 11 + [INF],
}.items():
    CASES[label] = Case(
        Narrow("fc1", by=1, scores={"fc1.out": scores}),
        EditError,
        ("fc1.out", "12 finite scores"),
    )
CASES["scores of a module"] = Case(
    Narrow("fc1", by=1, scores={"fc1": [1.0] * 12}), EditError, ("'features.0.out'", "map_axes")
)


def check(error: NeuroExaptError, words: tuple[str, ...]) -> None:
    """The message has all four parts and the words expected of it."""
    text = str(error)
    for part in (error.place, error.seen, error.needed, error.next_step, *words):
        assert part, text
        assert part in text, text


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with gradients and optimizer state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).square().mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_bad_edit_is_refused(case: Case) -> None:
    """The error is of the class that says what to do, and the model is bit-equal."""
    model, optimizer = net()
    before = snapshot(model, optimizer)
    with pytest.raises(case.error) as caught:
        apply(model, case.edit, (X,), optimizer=optimizer)
    check(caught.value, case.words)
    assert not changes(before, snapshot(model, optimizer))


GOOD = Widen("fc1", by=2)
INPUTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "channels": ((torch.zeros(4, 5, 8, 8),), {}, "(4, 5, 8, 8)"),
    "rank": ((torch.zeros(4),), {}, "(4,)"),
    "dtype": ((torch.zeros(4, 3, 8, 8, dtype=torch.long),), {}, "conv"),
    "missing": ((), {}, "x"),
    "one too many": ((X, X), {}, "positional"),
    "unknown keyword": ((X,), {"y": X}, "y"),
    "a bare tensor": (X, {}, "args=(x,)"),
    "a dict": ({"x": X}, {}, "args=(x,)"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_wrong_example_input_is_refused(name: str) -> None:
    """The forward's own words are quoted, with the shapes that went in."""
    args, kwargs, word = INPUTS[name]
    model, optimizer = net()
    before = snapshot(model, optimizer)
    with pytest.raises(CaptureError) as caught:
        apply(model, GOOD, args, kwargs, optimizer=optimizer)
    check(caught.value, (word,))
    assert not changes(before, snapshot(model, optimizer))


class Failing(Net):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise ValueError("the user's own")


def test_a_failing_forward_is_named() -> None:
    """The user's exception is quoted and chained."""
    model = Failing()
    before = snapshot(model)
    with pytest.raises(CaptureError) as caught:
        apply(model, GOOD, (X,))
    check(caught.value, ("ValueError: the user's own",))
    assert isinstance(caught.value.__cause__, ValueError)
    assert not changes(before, snapshot(model))


OTHER = nn.Linear(2, 2)
WRONG_OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "of another model": lambda model: torch.optim.SGD(OTHER.parameters(), lr=0.1),
    "a list": lambda model: list(model.parameters()),
    "the model": lambda model: model,
    "a class": lambda model: torch.optim.SGD,
    "one flat history": lambda model: torch.optim.LBFGS(model.parameters()),
}


@pytest.mark.parametrize("name", WRONG_OPTIMIZERS)
def test_a_wrong_optimizer_is_refused(name: str) -> None:
    """Nothing is mapped or written with an optimizer that could not follow."""
    model, _ = net()
    before = snapshot(model)
    with pytest.raises(GuardError) as caught:
        apply(model, GOOD, (X,), optimizer=WRONG_OPTIMIZERS[name](model))
    check(caught.value, ("optimizer",))
    assert not changes(before, snapshot(model))


def test_a_live_graph_is_refused_and_still_works() -> None:
    """With a loss waiting for its backward nothing is written, and that backward runs."""
    model, optimizer = net()
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    loss = model.eval()(X).square().mean()
    model.train()
    with pytest.raises(GuardError) as caught:
        apply(model, GOOD, (X,), optimizer=optimizer)
    check(caught.value, ("fc1.weight", "del loss"))
    assert not changes(before, snapshot(model, optimizer))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_refusal_does_not_spoil_the_graph_that_caused_it() -> None:
    """An embedding, which its graph does not keep, is looked at before what reads it."""
    model, tokens = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), torch.arange(5)[None]
    loss = model(tokens).square().mean()
    with pytest.raises(GuardError) as caught:
        apply(model, Widen("0", by=2), (tokens,))
    check(caught.value, ("0.weight", "variable loss"))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_spent_loss_may_live_on() -> None:
    """After its backward a loss that is still held neither forbids an edit nor breaks the next."""
    model, optimizer = net()
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        apply(model, GOOD, (X,), optimizer=optimizer)
    assert loss.isfinite()
    assert model.get_parameter("fc1.weight").shape == (18, 80)


def test_a_weak_reference_is_refused() -> None:
    """An object that watches a parameter would lose it: the parameter is named."""
    model, optimizer = net()
    held = weakref.ref(model.get_parameter("fc1.bias"))
    before = snapshot(model, optimizer)
    with pytest.raises(GuardError) as caught:
        apply(model, GOOD, (X,), optimizer=optimizer)
    check(caught.value, ("fc1.bias", "weak reference"))
    assert not changes(before, snapshot(model, optimizer))
    assert held() is not None


class Sharded(nn.parallel.DataParallel):
    pass


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "the model": nn.DataParallel,
    "a subclass": Sharded,
    "inside": lambda model: nn.Sequential(nn.DataParallel(model)),
}


@pytest.mark.parametrize("where", WRAPPED)
def test_a_wrapper_that_holds_copies_is_refused(where: str) -> None:
    """Around the model, as a subclass, or deep inside."""
    model, _ = net()
    before = snapshot(model)
    for start in (transaction, Trial):
        with pytest.raises(GuardError) as caught:
            start(WRAPPED[where](model), None)
        check(caught.value, ("model.module",))
    assert not changes(before, snapshot(model))


@pytest.mark.parametrize("edit", [InsertConv("norm"), InsertResidual("norm")], ids=repr)
def test_a_forward_of_the_instance_is_refused(edit: Edit) -> None:
    """A class cannot add a branch to a forward that the instance replaced."""
    model, optimizer = net()
    norm = model.get_submodule("norm")
    norm.forward = norm.forward  # type: ignore[method-assign]
    before = snapshot(model, optimizer)
    with pytest.raises(GuardError) as caught:
        apply(model, edit, (X,), optimizer=optimizer)
    check(caught.value, ("norm", "instance"))
    assert not changes(before, snapshot(model, optimizer))


class Fragile(nn.Module):
    """Works until its inner width changes: sizes or values go wrong afterwards."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.as_tensor(self.fc2(torch.relu(self.fc1(x))))
        changed = len(list(self.fc1.parameters())[1]) != 4 and not torch.compiler.is_compiling()
        if not changed or type(x) is not Tensor:
            return y
        if self.kind == "raises":
            raise ArithmeticError("changed")
        return {"nan": y * NAN, "value": y + 1, "shape": y[:1], "gradient": y + _spike(y)}[
            self.kind
        ]


def _spike(y: Tensor) -> Tensor:
    return (y - y.detach()).abs().sqrt()  # value 0, gradient not finite


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("nan", "relative difference of inf"),
        ("value", "relative difference"),
        ("shape", "shapes"),
        ("raises", "ArithmeticError: changed"),
        ("gradient", "not finite"),
    ],
)
def test_a_broken_promise_is_found_and_taken_back(kind: str, word: str) -> None:
    """Whatever an edit breaks is told, and the model is bit-equal."""
    model, args = Fragile(kind), (torch.ones(4, 3),)
    before = snapshot(model)
    with pytest.raises(VerifyError) as caught:
        apply(model, Widen("fc1", by=2), args)
    check(caught.value, (word,))
    assert not changes(before, snapshot(model))


def test_fake_tensors_go_first_on_an_accelerator() -> None:
    """The check that runs there before the real batch finds wrong shapes and failing forwards."""
    model, args = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.ones(4, 3),)
    before = behaviour(model, args, {}, (False, True))
    _check_fake(model, args, {}, before)
    for broken, word in (
        (nn.Linear(3, 5), "shapes"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), "RuntimeError"),
    ):
        with pytest.raises(VerifyError, match=word):
            _check_fake(broken, args, {}, before)


class Counts(nn.Module):
    """Counts its calls on real data."""

    def __init__(self, seen: list[bool]) -> None:
        super().__init__()
        self.put_down = seen.append  # a bound method: what a look leaves in a list is taken back

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            self.put_down(self.training)
        return x


@pytest.mark.parametrize(
    ("between", "runs"),
    [
        (nn.Identity(), [True, True]),
        (nn.Dropout(0.0), [True, True]),
        (nn.Dropout(0.5), [False, True, False, True]),
        (nn.BatchNorm1d(4), [False, True, False, True]),
    ],
)
def test_the_model_runs_no_more_often_than_it_must(between: nn.Module, runs: list[bool]) -> None:
    """Once before and once after where both modes are one computation, else once in each."""
    seen: list[bool] = []
    model = nn.Sequential(nn.Linear(3, 4), between, nn.ReLU(), nn.Linear(4, 2), Counts(seen))
    apply(model, Widen("0", by=2), (torch.randn(5, 3),))
    assert seen == runs
