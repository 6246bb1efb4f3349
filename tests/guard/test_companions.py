"""What else stands around a model in training: compilation, gradient scaling, accumulation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from neuroexapt import InsertConv, InsertResidual, Narrow, Widen, apply
from neuroexapt.edit import Edit

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
EDITS: list[Edit] = [Widen("0", by=3), Narrow("0", by=2), InsertConv("2"), InsertResidual("3")]
each = pytest.mark.parametrize("edit", EDITS, ids=lambda edit: type(edit).__name__)


def net() -> nn.Sequential:
    """Two convolutions and a head."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 2),
        )


# --- torch.compile -------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Code of the user's: torch compiles its own containers only inside of such."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.body(x).relu()))


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def wrapped(model: nn.Module) -> nn.Module:
    """Compiled as a wrapper."""
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def in_place(model: nn.Module) -> nn.Module:
    """Compiled in place, so that names stay."""
    model.compile(backend="eager")
    return model


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("way", [wrapped, in_place])
def test_a_compiled_model_is_compiled_anew_for_every_edit(
    way: Callable[[nn.Module], nn.Module],
) -> None:
    """Twelve widths, twelve compilations and never the eager fallback; outputs equal eager."""
    model = TwoLayers()
    compiled, x = way(model), torch.randn(5, 4)
    for edits in range(12):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model.forward(x))
        assert counters["stats"]["unique_graphs"] == edits + 1
        apply(compiled, Widen("body", by=1), (x,))


@pytest.mark.usefixtures("_fresh_dynamo")
@each
def test_a_compiled_model_trains_on(edit: Edit) -> None:
    """The losses after an edit are those of the same model uncompiled."""
    losses = []
    for compiling in (False, True):
        model = net()
        run: Any = torch.compile(model, backend="aot_eager") if compiling else model
        made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        seen = []
        for step in range(6):
            if step == 3:
                apply(run, edit, (X,), optimizer=made)
            made.zero_grad()
            loss = run(X).square().mean()
            loss.backward()
            made.step()
            seen.append(loss.item())
            del loss
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- gradients that wait: scaling and accumulation -----------------------------------------------


def trained(edit: Edit, scale: float | None, place: str) -> nn.Module:
    """Six steps, an edit in the middle; with a scaler whose scale is a power of two."""
    model = net().double()
    made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for step in range(6):
        made.zero_grad()
        scaler.scale(model(X.double()).square().mean()).backward()
        if step == 3 and place == "before unscaling":
            apply(model, edit, (X.double(),), optimizer=made)
        scaler.unscale_(made)
        if step == 3 and place == "before the step":
            apply(model, edit, (X.double(),), optimizer=made)
        scaler.step(made)
        scaler.update()
        if step == 3 and place == "at the boundary":
            apply(model, edit, (X.double(),), optimizer=made)
    assert not scale or scaler.get_scale() == scale
    return model


@each
@pytest.mark.parametrize("place", ["at the boundary", "before unscaling", "before the step"])
def test_a_gradient_scaler_goes_on(edit: Edit, place: str) -> None:
    """No gradient is unscaled twice or not at all: the weights are those without a scaler."""
    plain, scaled = trained(edit, None, place), trained(edit, 2.0**12, place)
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def accumulated(edit: Edit, at: int) -> tuple[nn.Module, Tensor]:
    """Two halves of a batch in one step, an edit before the half ``at``."""
    model = net().double().eval()
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, half in enumerate(X.double().split(4)):
        if number == at:
            apply(model, edit, (X.double(),), optimizer=made)
        (model(half).square().sum() / 8).backward()
    weight = model.get_parameter("3.weight")
    assert weight.grad is not None
    return model, weight.grad[:6, :4].clone()


@pytest.mark.parametrize("edit", [Widen("0", by=3), InsertConv("2")], ids=repr)
def test_what_was_accumulated_is_kept(edit: Edit) -> None:
    """In the middle of a window the gradient of the first half is carried along, not lost."""
    before, between = (accumulated(edit, at)[1] for at in (0, 1))
    torch.testing.assert_close(between, before)
    half = accumulated(edit, 1)[0]
    assert not torch.allclose(half.get_parameter("3.weight").grad[:6, :4] / 2, before)  # type: ignore[index]


def test_gradients_of_the_units_that_stay_are_kept_when_others_go() -> None:
    """Narrowing in the middle of a window slices what was accumulated."""
    model = net()
    model(X).square().mean().backward()
    old = copy.deepcopy([p.grad for p in model.parameters()])
    apply(model, Narrow("0", to=4, scores={"0.out": [5, 0, 4, 3, 0, 2]}), (X,))
    kept = [0, 2, 3, 5]
    assert torch.equal(model.get_parameter("0.weight").grad, old[0][kept])  # type: ignore[arg-type, index]
    assert torch.equal(model.get_parameter("3.weight").grad, old[4][:, kept])  # type: ignore[arg-type, index]
