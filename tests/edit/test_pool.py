"""InsertPool: sizes and weights follow; what it computes is what a user would write down."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt import InsertPool, apply, map_axes, transaction
from neuroexapt.errors import EditError
from neuroexapt.testing import changes, snapshot
from tests import zoo
from tests.laws import world

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def seeded(make: Any) -> nn.Module:
    """The same weights at every call, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: nn.Module = make()
    return model.double()


def noise(*shape: int) -> Tensor:
    """The same numbers at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def flat(rank: int, size: int) -> nn.Module:
    """A convolution whose maps a linear layer reads."""
    layers = CONVS[rank](2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * size**rank, 4)
    return nn.Sequential(*layers)


def out(model: nn.Module, *args: Any) -> Tensor:
    """The output in evaluation mode."""
    with torch.no_grad():
        return torch.as_tensor(model.eval()(*args))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("size", [4, 7])
def test_an_average_over_constant_windows_is_exact(rank: int, stride: int, size: int) -> None:
    """Maps that say one thing in each window are read as before, also in windows cut short."""
    model = seeded(lambda: flat(rank, size))
    where = torch.arange(size) // stride
    small = noise(3, 2, *[int(where[-1]) + 1] * rank)
    x = small
    for dim in range(2, 2 + rank):
        x = x.index_select(dim, where)
    before = out(model, x)
    done = apply(model, InsertPool("1", kind="avg", stride=stride), (x,))
    assert model[3].in_features == 3 * (int(where[-1]) + 1) ** rank  # type: ignore[index]
    assert done.max_difference < 1e-12
    torch.testing.assert_close(out(model, x), before, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out(model, noise(*x.shape)), out(seeded(lambda: flat(rank, size)), x))


@pytest.mark.parametrize("kind", ["max", "avg", "global"])
def test_a_pool_is_what_torch_computes_with_summed_weights(kind: str) -> None:
    """On any input: the pool of torch, then the weights summed over each window."""
    model, plain = seeded(lambda: flat(2, 5)), seeded(lambda: flat(2, 5))
    x = noise(3, 2, 5, 5)
    done = apply(model, InsertPool("0", kind=kind), (x,))
    wide = F.pad(plain[3].weight.view(4, 3, 5, 5), (0, 1, 0, 1))  # type: ignore[index,operator]
    weight = wide.view(4, 3, 3, 2, 3, 2).sum((3, 5))
    maps = plain[0](x)  # type: ignore[index,operator]
    if kind == "global":
        weight, small = weight.sum((2, 3)), maps.mean((2, 3))
    elif kind == "max":
        small = F.max_pool2d(maps, 2, ceil_mode=True)
    else:
        small = F.avg_pool2d(maps, 2, ceil_mode=True)
    expected = F.linear(small.relu().flatten(1), weight.flatten(1), plain[3].bias)  # type: ignore
    torch.testing.assert_close(out(model, x), expected.detach())
    shift = float((expected.detach() - out(plain, x)).abs().max())
    assert done.max_difference == pytest.approx(shift)


@pytest.mark.parametrize("name", ["resnet_basic", "small_cnn", "mobilenet"])
def test_an_average_before_a_global_average_is_exact(name: str) -> None:
    """Full windows in front of a global average pool change nothing."""
    model, x = zoo.build(name, dtype=torch.float64), zoo.example(name, dtype=torch.float64)
    last = {"resnet_basic": "layer2", "small_cnn": "features", "mobilenet": "block2"}[name]
    assert apply(model, InsertPool(last, kind="avg"), x).max_difference < 1e-12


class Deep(nn.Module):
    """Strides, a padded convolution, a pool, permuted maps, a batch of sizes read off the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 3, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.mean = nn.Linear(3 * 3 * 5, 2)
        self.spread = nn.Linear(3 * 3 * 5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.pool(self.second(self.first(x).relu()))
        rows = self.drop(maps.permute(0, 2, 3, 1).reshape(x.shape[0], -1))
        return self.mean(rows), self.spread(rows)


def test_everything_between_is_followed() -> None:
    """Two readers behind a stride, a pool and a permutation get the sums of their windows."""
    model, plain = seeded(Deep), seeded(Deep)
    x = noise(2, 2, 12, 20)
    apply(model, InsertPool("first", kind="avg"), (x,))
    for name in ("mean", "spread"):
        weight = plain.get_submodule(name).weight.view(2, 3, 5, 3)  # type: ignore[union-attr]
        # 3 x 5 positions were read, 1 x 2 are left (6 x 10, 3 x 5, 1 x 2): a window of 3 or 5 each.
        rows = torch.stack([weight[:, :, :3].sum((1, 2)), weight[:, :, 3:].sum((1, 2))], 1)
        torch.testing.assert_close(
            model.get_submodule(name).weight, nn.Parameter(rows.reshape(2, -1))
        )
        assert model.get_submodule(name).in_features == 6
    assert all(o.shape == (2, 2) for o in model(x))


def test_the_optimizer_follows_by_the_mean() -> None:
    """Moments of a summed weight are those of one entry, not of a sum."""
    model = seeded(lambda: flat(1, 4))
    optimizer = torch.optim.Adam(model.parameters())
    x = noise(3, 2, 4)
    model(x).square().sum().backward()
    optimizer.step()
    weight = model[3].weight  # type: ignore[index]
    old = {key: value.clone() for key, value in optimizer.state[weight].items()}  # type: ignore
    grad = weight.grad.clone()  # type: ignore[union-attr,operator]
    apply(model, InsertPool("0"), (x,), optimizer=optimizer)
    for key in ("exp_avg", "exp_avg_sq"):
        expected = old[key].view(4, 3, 2, 2).mean(3).view(4, 6)
        torch.testing.assert_close(optimizer.state[weight][key], expected)  # type: ignore[index]
    assert optimizer.state[weight]["step"] == old["step"]  # type: ignore[index]
    torch.testing.assert_close(weight.grad, grad.view(4, 3, 2, 2).mean(3).view(4, 6))
    assert model[3].weight is weight  # type: ignore[index]
    optimizer.step()


@pytest.mark.parametrize("name", ["conv1d_net", "conv3d_net", "vae"])
def test_the_laws(name: str) -> None:
    """Rollback bit for bit, training, copies, one graph."""
    at = {"conv1d_net": "net.1", "conv3d_net": "conv1"}
    edit = InsertPool(at.get(name, "encoder.1"))
    model, args = zoo.build(name), zoo.example(name)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    world.train(model, args, optimizer, 1)
    before = snapshot(model, optimizer)
    tx = transaction(model, optimizer)
    tx.apply(edit, args)
    tx.roll_back()
    assert not changes(before, snapshot(model, optimizer))
    apply(model, edit, args, optimizer=optimizer)
    world.train(model, args, optimizer, 3)
    expected = world.outputs(model, args)
    assert torch.equal(world.outputs(copy.deepcopy(model), args), expected)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(world.outputs(compiled, args), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", world.NAMES)
def test_every_module_of_the_zoo(name: str) -> None:
    """What is not refused before anything is written goes through."""
    model, axes, args = zoo.build(name), world.mapped(name), zoo.example(name)
    edits = [InsertPool(path, kind="global") for path, _ in model.named_modules()]
    made = [edit for edit in edits if not edit.check(axes)]
    for edit in made[:: max(1, len(made))]:
        tx = transaction(model)
        assert tx.apply(edit, args, axes=axes).max_difference >= 0
        tx.roll_back()


# --- refusals --------------------------------------------------------------------------------


class Written(nn.Module):
    """Flattens to a size written down, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.head, self.way = nn.Conv2d(2, 3, 1), nn.Linear(48, 2), way
        self.norm, self.flat = nn.BatchNorm1d(48), 48

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        if self.way == "number":
            return torch.as_tensor(self.head(maps.view(-1, 48)))
        if self.way == "attribute":
            return torch.as_tensor(self.head(maps.view(-1, self.flat)))
        if self.way == "beside":
            return torch.as_tensor(self.head(maps.view(x.size(0), 48)))
        if self.way == "norm":
            return torch.as_tensor(self.head(self.norm(maps.flatten(1))))
        if self.way == "spread":
            return torch.as_tensor(self.head((maps + x.mean(1, keepdim=True)).flatten(1)))
        return torch.as_tensor(self.head(maps[:, :, 3:].repeat(1, 1, 4, 1).flatten(1)))


@pytest.mark.parametrize(
    ("way", "seen"),
    [
        ("number", "holds a size as a number"),
        ("beside", "holds a size as a number"),
        ("norm", "a norm with parameters for each position"),
        ("spread", "a map of 1 positions would meet one of 4"),
        ("slice", "test_pool.py"),
    ],
)
def test_what_cannot_follow_is_named(way: str, seen: str) -> None:
    """The line and the reason; nothing is written."""
    model = Written(way).double()
    x = noise(3, 2, 4, 4)
    (problem,) = InsertPool("conv", kind="global").check(map_axes(model, (x,)))
    assert seen in problem.seen


def test_an_attribute_that_repeats_the_size_follows() -> None:
    """A number held by the module is set."""
    model = Written("attribute").double()
    apply(model, InsertPool("conv"), (noise(3, 2, 4, 4),))
    assert model.flat == model.head.in_features == 12


@pytest.mark.parametrize(
    ("name", "at", "seen"),
    [
        ("unet", "inc", "the model's output"),
        ("resnet_basic", "layer1.0.conv1", "would meet one of 16"),
        ("pixel_shuffle_net", "conv1", "the model's output"),
        ("gpt", "blocks.0", "with channels in dimension 2"),
        ("mixer", "blocks.0.token_mix.0", "where a layer makes 10 units"),
        ("resnet_basic", "layer1.0.relu", "called 2 times"),
        ("vae", "", "3 tensors"),
    ],
)
def test_refusals(name: str, at: str, seen: str) -> None:
    """Outputs of a fixed shape, partners, layers called twice, no maps."""
    (problem,) = InsertPool(at).check(world.mapped(name))
    assert seen in problem.seen


@pytest.mark.parametrize("settings", [{"kind": "min"}, {"stride": 1}, {"stride": 2.5}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    """A kind there is, and windows of two or more."""
    with pytest.raises(EditError, match="use kind='max', stride=2"):
        apply(seeded(lambda: flat(2, 4)), InsertPool("0", **settings), (noise(3, 2, 4, 4),))


def test_maps_that_get_too_small_are_refused_with_the_layer() -> None:
    """A kernel that no longer fits is named before anything is written."""
    layers = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 5), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers).double()
    (problem,) = InsertPool("0").check(map_axes(model, (noise(3, 2, 8, 8),)))
    assert "would fail with" in problem.seen
