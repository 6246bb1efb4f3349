"""RemoveLayer(into=...): a neighbour computes what the removed layer computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt import RemoveLayer, apply, map_axes, transaction
from neuroexapt.errors import EditError, MeasureError
from neuroexapt.measure import affine_fit
from neuroexapt.testing import changes, snapshot


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """The same weights at every call, in double precision; norms that have seen data."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make().double()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.running_mean, module.weight, module.bias):
                    if tensor is not None:
                        nn.init.normal_(tensor)
                nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    """The same numbers at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def out(model: nn.Module, *args: Any) -> Tensor:
    """The output in evaluation mode."""
    with torch.no_grad():
        return torch.as_tensor(model.eval()(*args))


Row = tuple[Callable[[], nn.Module], str, str, tuple[int, ...]]
EXACT: dict[str, Row] = {
    "linear into the next": (
        lambda: nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3)),
        "0",
        "1",
        (5, 4),
    ),
    "linear into the one before": (
        lambda: nn.Sequential(nn.Linear(4, 9, bias=False), nn.Linear(9, 3)),
        "1",
        "0",
        (5, 7, 4),
    ),
    "no bias anywhere": (
        lambda: nn.Sequential(nn.Linear(4, 9, bias=False), nn.Linear(9, 3, bias=False)),
        "0",
        "1",
        (5, 7, 4),
    ),
    "pointwise into a kernel": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 3)),
        "0",
        "1",
        (5, 4, 6, 6),
    ),
    "pointwise without shift into a padded kernel": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 1, bias=False), nn.Conv1d(6, 3, 3, padding=1)),
        "0",
        "1",
        (5, 4, 6),
    ),
    "pointwise into a strided kernel before": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 3, 1)),
        "1",
        "0",
        (5, 4, 6, 6),
    ),
    "pointwise into a transposed one before": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2), nn.Conv2d(6, 3, 1)),
        "1",
        "0",
        (5, 4, 6, 6),
    ),
}
NORMS: dict[str, Row] = {
    "behind a convolution": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        "1",
        "0",
        (5, 4, 6, 6),
    ),
    "behind a linear layer, without scale": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False)),
        "1",
        "0",
        (5, 4),
    ),
    "behind a convolution in groups": (
        lambda: nn.Sequential(nn.Conv3d(4, 6, 2, groups=2), nn.BatchNorm3d(6, eps=0.1)),
        "1",
        "0",
        (5, 4, 3, 3, 3),
    ),
    "behind a transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6)),
        "1",
        "0",
        (5, 4, 3),
    ),
    "in front of a convolution in groups": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False)),
        "0",
        "1",
        (5, 4, 6, 6),
    ),
    "in front of a linear layer": (
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)),
        "0",
        "1",
        (5, 4),
    ),
}


@pytest.mark.parametrize("case", [*EXACT, *NORMS])
def test_a_linear_neighbour_absorbs_it_without_a_trace(case: str) -> None:
    """Same outputs, fewer parameters, attributes in step; undone bit for bit."""
    make, at, into, shape = {**EXACT, **NORMS}[case]
    model, x = seeded(make), noise(*shape)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    expected, before = out(model, x), snapshot(model, optimizer)
    tx = transaction(model, optimizer)
    tx.apply(RemoveLayer(at, into=into), (x,))
    tx.roll_back()
    assert not changes(before, snapshot(model, optimizer))
    weight = model.get_submodule(into).weight
    done = apply(model, RemoveLayer(at, into=into), (x,), optimizer=optimizer)
    torch.testing.assert_close(out(model, x), expected, rtol=1e-11, atol=1e-11)
    assert (done.max_difference < 1e-10) is (case in EXACT)  # a norm differs while it trains
    assert model.get_submodule(into).weight is weight
    assert not list(model.get_submodule(at).parameters())
    held = optimizer.param_groups[0]["params"]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert "in_features=9" not in repr(model)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(x).square().sum().backward()
        optimizer.step()


def test_a_copy_absorbs_from_its_own_weights() -> None:
    """A moving average keeps the function it has, not the one of the model."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    average = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*average.parameters(), *average.buffers()]:
            tensor.mul_(0.9) if tensor.is_floating_point() else tensor
    x = noise(5, 4, 6, 6)
    expected = out(average, x)
    assert not torch.allclose(expected, out(model, x))
    apply(model, RemoveLayer("1", into="0"), (x,), copies=[average])
    torch.testing.assert_close(out(average, x), expected, rtol=1e-11, atol=1e-11)


def test_a_given_matrix_is_composed_with_what_the_layer_reads() -> None:
    """W (A x + b) + c is one layer with W A and W b + c; the activation between stays."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    x, matrix, offset = noise(5, 4), noise(6, 4, seed=2), noise(6, seed=3)
    weight, bias = (p.detach().clone() for p in model[2].parameters())  # type: ignore[index,union-attr,operator]
    edit = RemoveLayer("0", into="2", matrix=matrix, offset=offset)
    done = apply(model, edit, (x,))
    expected = F.linear(x.relu(), weight @ matrix, weight @ offset + bias)
    torch.testing.assert_close(out(model, x), expected)
    assert done.max_difference > 0.1
    assert (model[2].in_features, model[2].weight.shape) == (4, (3, 4))  # type: ignore[index]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Any number: the fit does not use it."""
    return torch.as_tensor(model(x)).square().mean()


def fitted(model: nn.Module, x: Tensor, at: str, into: str) -> RemoveLayer:
    """The edit with the map fitted on one batch."""
    fit = affine_fit(model, loss, [x], at, into)
    return RemoveLayer(at, into=into, matrix=fit.matrix, offset=fit.offset)


@pytest.mark.parametrize("act", [nn.ReLU, nn.Identity])
def test_an_activation_that_is_always_on_is_absorbed_exactly(act: type[nn.Module]) -> None:
    """Positive inputs and weights: layer and ReLU are affine on the data."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 3)))
    with torch.no_grad():
        for parameter in model[0].parameters():  # type: ignore[index]
            parameter.abs_()
    x = noise(40, 4).abs()
    fit = affine_fit(model, loss, [x[:20], x[20:]], "0", "2")
    torch.testing.assert_close(fit.matrix, model[0].weight.detach())  # type: ignore[index,union-attr]
    torch.testing.assert_close(fit.offset, model[0].bias.detach())  # type: ignore[index,union-attr]
    assert fit.explained == pytest.approx(1.0)
    before = out(model, x)
    done = apply(model, fitted(model, x, "0", "2"), (x,))
    torch.testing.assert_close(out(model, x), before)
    assert done.max_difference < 1e-10


def test_the_fit_is_the_one_of_least_squares() -> None:
    """Against torch.linalg.lstsq with a column of ones, on what the reader reads in both cases."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    x = noise(60, 4)
    fit = affine_fit(model, loss, list(x.split(16)), "0", "2")
    now = torch.cat([x.tanh(), torch.ones(60, 1, dtype=x.dtype)], 1)
    target = model[0](x).tanh().detach()  # type: ignore[index,operator]
    solution = torch.linalg.lstsq(now, target).solution
    torch.testing.assert_close(torch.cat([fit.matrix.T, fit.offset[None]]), solution)
    left = (target - now @ solution).square().sum() / (target - target.mean(0)).square().sum()
    assert fit.explained == pytest.approx(1 - float(left))
    assert fit.samples == 60


def test_absorbing_is_nearer_than_passing() -> None:
    """A block of convolutions: what a 3x3 convolution reads is fitted by position."""
    body = nn.Conv2d(4, 4, 1), nn.Sigmoid()
    model = seeded(lambda: nn.Sequential(nn.Sequential(*body), nn.Conv2d(4, 3, 3, padding=1)))
    x = noise(6, 4, 8, 8)
    plain = apply(model, RemoveLayer("0.1"), (x,)).max_difference  # to see that it differs at all
    assert plain > 0.1
    model = seeded(lambda: nn.Sequential(nn.Sequential(*body), nn.Conv2d(4, 3, 3, padding=1)))
    with transaction(model) as tx:
        passed = tx.apply(RemoveLayer("0"), (x,)).max_difference
        tx.roll_back()
    done = apply(model, fitted(model, x, "0", "1"), (x,))
    assert done.max_difference < 0.7 * passed


# --- refusals --------------------------------------------------------------------------------


class Shared(nn.Module):
    """Reads the first layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y) + y


def seq(*layers: nn.Module) -> nn.Module:
    """A Sequential."""
    return nn.Sequential(*layers)


MAPS, ROWS = (5, 4, 6, 6), (5, 4)
REFUSED: dict[str, tuple[nn.Module, str, str, tuple[int, ...], str]] = {
    "border": (
        seq(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 3, padding=1)),
        "0",
        "1",
        MAPS,
        "reads zeros beyond the border",
    ),
    "read twice": (Shared(), "one", "two", ROWS, "does not read, or not alone"),
    "kernel": (
        seq(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 1)),
        "0",
        "1",
        MAPS,
        "over several positions",
    ),
    "something between": (
        seq(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)),
        "0",
        "2",
        ROWS,
        "does not read, or not alone",
    ),
    "no statistics": (
        seq(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        "1",
        "0",
        ROWS,
        "without running statistics",
    ),
    "no linear layer": (seq(nn.Linear(4, 4), nn.LayerNorm(4)), "0", "1", ROWS, "native_layer_norm"),
    "groups": (
        seq(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=2)),
        "0",
        "1",
        MAPS,
        "a convolution in groups",
    ),
    "unknown": (seq(nn.Linear(4, 4), nn.Linear(4, 4)), "0", "7", ROWS, "no module path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_why(case: str) -> None:
    """Nothing that would change the function passes for exact."""
    model, at, into, shape, seen = REFUSED[case]
    axes = map_axes(model, (noise(*shape).float(),))
    (problem,) = RemoveLayer(at, into=into).check(axes)
    assert seen in problem.seen


def test_what_was_fitted_must_fit() -> None:
    """A matrix of another size; one without a layer to absorb it; layers that do not run behind."""
    model, x = seq(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double(), noise(5, 4)
    with pytest.raises(EditError, match="matrix of shape"):
        apply(model, RemoveLayer("0", into="2", matrix=torch.ones(3, 3)), (x,))
    with pytest.raises(EditError, match="as `into`"):
        apply(model, RemoveLayer("0", matrix=torch.ones(4, 4)), (x,))
    with pytest.raises(MeasureError, match="paths of modules"):
        affine_fit(model, loss, [x], "0", "9")
    with pytest.raises(MeasureError, match="a few batches"):
        affine_fit(model, loss, [], "0", "2")
