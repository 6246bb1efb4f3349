"""ExpandBottleneck: planted bottlenecks are found, and nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import ExpandBottleneck, apply, map_axes
from neuroexapt.edit import Squeeze
from neuroexapt.errors import EditError, UnknownPlaceError
from neuroexapt.testing import changes, snapshot
from neuroexapt.train import read_squeezes

Batch = tuple[Tensor, Tensor]


def data(rows: int, seed: int) -> Batch:
    """Twenty inputs that all matter, through sixteen hidden directions, to four outputs."""
    fixed = torch.Generator().manual_seed(99)
    x = torch.randn(rows, 20, generator=torch.Generator().manual_seed(seed))
    hidden = torch.tanh(x @ torch.randn(20, 16, generator=fixed) / 3)
    return x, hidden @ torch.randn(16, 4, generator=fixed)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error."""
    return (model(batch[0]) - batch[1]).square().mean()


class TwoPaths(nn.Module):
    """Two paths side by side, each with a narrow place, and their sum."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left = self._path(left)
        self.right = self._path(right)
        self.head = nn.Linear(24, 4)

    @staticmethod
    def _path(middle: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, middle), nn.Tanh(), nn.Linear(middle, 24)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.tanh(self.left(x) + self.right(x))))


def trained(model: nn.Module, steps: int = 150) -> nn.Module:
    """The model after some steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, data(128, step + 1)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def planted(left: int, right: int, seed: int) -> nn.Module:
    """A trained net of the two paths."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return trained(TwoPaths(left, right))


BATCHES = [data(256, 1000 + number) for number in range(6)]
ARGS = (BATCHES[0][0],)


def read(model: nn.Module) -> tuple[Squeeze, ...]:
    """Readings on batches that were not trained on."""
    return read_squeezes(model, loss, BATCHES, ARGS)


@pytest.mark.parametrize("seed", range(3))
def test_two_planted_bottlenecks_are_widened_and_nothing_else(seed: int) -> None:
    """Both narrow places grow to what enters them; the loss falls once trained on."""
    model: Any = planted(3, 4, seed)
    sizes = {name: width.size for name, width in map_axes(model, ARGS).widths.items()}
    done = apply(model, ExpandBottleneck(read(model)), ARGS)
    after = {name: width.size for name, width in map_axes(model, ARGS).widths.items()}
    assert {name for name in sizes if after[name] != sizes[name]} == {"left.2.out", "right.2.out"}
    assert 8 <= after["left.2.out"] <= 16
    assert 8 <= after["right.2.out"] <= 16
    assert done.max_difference < 1e-5
    assert "left.2.out from 3 to" in done.description


@pytest.mark.parametrize("seed", range(2))
def test_a_net_without_a_bottleneck_is_left_alone(seed: int) -> None:
    """The refusal names every width with its figures."""
    model = planted(24, 24, seed)
    readings = read(model)
    before = snapshot(model)
    with pytest.raises(EditError, match="no width is squeezed") as caught:
        apply(model, ExpandBottleneck(readings), ARGS)
    assert all(f"'{one.width}' uses {one.rank:.1f} of" in caught.value.seen for one in readings)
    assert {"left.0.out", "left.2.out", "right.2.out"} <= {one.width for one in readings}
    assert not changes(before, snapshot(model))


def test_of_two_in_a_row_only_the_first_is_seen() -> None:
    """What the first lets through is all that enters the second, as long as it is narrow."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        sizes = (20, 24, 3, 24, 4, 24)
        pairs = [(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(sizes)]
        layers = [layer for pair in pairs for layer in pair]
        model = trained(nn.Sequential(*layers, nn.Linear(24, 4)))
    done = apply(model, ExpandBottleneck(read(model)), ARGS)
    assert done.description.startswith("widen 2.out from 3 ")
    assert "6.out" not in done.description


def test_reading_changes_nothing() -> None:
    """Weights, gradients, random numbers and flags are as before."""
    model = TwoPaths(3, 4)
    before = snapshot(model)
    read(model)
    assert not changes(before, snapshot(model))


def test_readings_agree_with_their_definitions() -> None:
    """A layer of copies has the rank of its originals; what enters has the rank of the input."""
    model = nn.Sequential(nn.Linear(20, 6, bias=False), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[:, :3] = torch.eye(3).repeat(2, 1)  # three inputs, each twice
    (one,) = read_squeezes(model, loss, BATCHES, ARGS)
    assert one.width == "0.out"
    assert abs(one.rank - 3) < 0.05
    assert abs(one.entering - 20) < 0.5
    assert abs(one.lost - 0.85) < 0.01


def squeeze(width: str = "left.2.out", size: int = 3, **figures: float) -> Squeeze:
    """A reading that calls for widening."""
    return Squeeze(width, size, **{"rank": 2.9, "entering": 11.2, **figures})


NET = TwoPaths(3, 4)


@pytest.mark.parametrize(
    ("edit", "size"),
    [
        (ExpandBottleneck((squeeze(),)), 12),
        (ExpandBottleneck((squeeze(),), most=2.0), 6),
        (ExpandBottleneck((squeeze(entering=200.0),)), 12),
        (ExpandBottleneck((squeeze(entering=4.2),), lost=0.3), 5),
        (ExpandBottleneck((squeeze(gain=0.1, error=0.01),), significance=2.0), 12),
    ],
    ids=str,
)
def test_it_grows_to_what_enters(edit: ExpandBottleneck, size: int) -> None:
    """Rounded up, and at most so many times its size."""
    (step,) = edit.plan(map_axes(NET, ARGS), dict(NET.named_parameters())).steps
    assert (step.width, len(step.positions)) == ("left.2.out", size)
    assert edit.place == "left.2.out"


@pytest.mark.parametrize(
    ("edit", "kind", "words"),
    [
        (ExpandBottleneck(()), EditError, "readings="),
        (ExpandBottleneck((squeeze(),), saturation=1.5), EditError, "saturation=1.5"),
        (ExpandBottleneck((squeeze(),), most=1.0), EditError, "most=1.0"),
        (ExpandBottleneck((squeeze("left.2.uot"),)), UnknownPlaceError, "left.2.out"),
        (ExpandBottleneck((squeeze(size=4),)), EditError, "measure again"),
        (ExpandBottleneck((squeeze(rank=1.5),)), EditError, "uses 1.5 of 3 units"),
        (ExpandBottleneck((squeeze(entering=3.0),)), EditError, "3.0 enter, 3 units hold them"),
        (
            ExpandBottleneck((squeeze(gain=0.01, error=0.01),), significance=2.0),
            EditError,
            "1.0e-02 nats, error 1.0e-02",
        ),
        (ExpandBottleneck((squeeze(),), significance=2.0), EditError, "an unknown gain"),
    ],
    ids=str,
)
def test_what_is_not_squeezed_or_not_measured_is_refused(
    edit: ExpandBottleneck, kind: type[EditError], words: str
) -> None:
    """The figures say why."""
    with pytest.raises(kind, match=words):
        apply(NET, edit, ARGS)


def test_a_squeezed_width_that_cannot_grow_is_named() -> None:
    """Others grow all the same; alone it is a refusal."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(20, 4), nn.Linear(20, 4), nn.Linear(8, 4)
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.head(torch.cat([self.norm(self.one(x)), self.two(x)], 1)))

    model = Normed()
    groups = map_axes(model, ARGS).widths["one.out"].size  # channels of a group
    stuck, free = squeeze("one.out", groups, rank=1.9), squeeze("two.out", 4, rank=3.9)
    with pytest.raises(EditError, match="group_norm"):
        apply(model, ExpandBottleneck((stuck,)), ARGS)
    done = apply(model, ExpandBottleneck((stuck, free)), ARGS)
    assert "'one.out' is squeezed and stays: 'group_norm'" in done.description
    assert (model.one.out_features, model.two.out_features) == (4, 12)
