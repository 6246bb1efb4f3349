"""Which weight reads what, and where a constant can be added to its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuroexapt import map_axes
from neuroexapt.couple import Reader, find_readers, passed_on


class Plain(nn.Module):
    """A hidden layer that is read by ``read``, which the cases replace."""

    def __init__(self, read: Callable[[Plain, Tensor], Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.up, self.read = nn.Linear(4, 6), read
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, torch.relu(self.up(x)))


def w(*shape: int) -> Tensor:
    return torch.randn(shape)


def conv(*behind: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), *behind)


VECTORS, IMAGES, WORDS = (8, 4), (4, 2, 8, 8), (3, 5, 4)


class Attention(nn.Module):
    """torch's own attention, whose projections read through slices and views."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix = nn.Linear(4, 6), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return torch.as_tensor(self.mix(x, x, x, need_weights=False)[0]) @ torch.ones(6, 2)


# model, input, the weight, and what is said of it
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, Reader]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), VECTORS, "1.weight",
        Reader("1.weight", bias="1.bias"),
    ),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2, bias=False)), VECTORS, "1.weight",
        Reader("1.weight"),
    ),
    "batch norm behind a linear layer": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2, bias=False), nn.BatchNorm1d(2)),
        VECTORS, "1.weight", Reader("1.weight", mean="2.running_mean"),
    ),
    "bias before batch norm": (
        lambda: conv(nn.Conv2d(6, 3, 3), nn.BatchNorm2d(3)), IMAGES, "2.weight",
        Reader("2.weight", bias="2.bias"),
    ),
    "batch norm behind a convolution": (
        lambda: conv(nn.Conv2d(6, 3, 3, bias=False), nn.BatchNorm2d(3)), IMAGES, "2.weight",
        Reader("2.weight", mean="3.running_mean"),
    ),
    "batch norm that is not right behind": (
        lambda: conv(nn.Conv2d(6, 3, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(3)), IMAGES,
        "2.weight", Reader("2.weight"),
    ),
    "batch norm without statistics": (
        lambda: conv(nn.Conv2d(6, 3, 3, bias=False), nn.BatchNorm2d(3, track_running_stats=False)),
        IMAGES, "2.weight", Reader("2.weight"),
    ),
    "groups": (
        lambda: conv(nn.Conv2d(6, 4, 3, groups=2)), IMAGES, "2.weight",
        Reader("2.weight", blocks=2, bias="2.bias"),
    ),
    "transposed": (
        lambda: conv(nn.ConvTranspose2d(6, 3, 2)), IMAGES, "2.weight",
        Reader("2.weight", dim=0, out=1, bias="2.bias"),
    ),
    "flattened": (
        lambda: conv(nn.Flatten(), nn.Linear(6 * 36, 3)), IMAGES, "3.weight",
        Reader("3.weight", bias="3.bias", inner=36),
    ),
    "in, out": (
        lambda: Plain(lambda m, x: x @ m.down, down=w(6, 2)), VECTORS, "down",
        Reader("down", dim=0, out=1),
    ),
    "a bias of its own, behind": (
        lambda: Plain(lambda m, x: x @ m.down + m.b, down=w(6, 2), b=w(2)), WORDS, "down",
        Reader("down", dim=0, out=1, bias="b"),
    ),
    "a number for each word is no bias": (
        lambda: Plain(lambda m, x: x @ m.down + m.b, down=w(6, 2), b=w(5, 2)), WORDS, "down",
        Reader("down", dim=0, out=1),
    ),
    "a result that is used twice before the sum": (
        lambda: Plain(lambda m, x: (y := x @ m.down) + m.b + y, down=w(6, 2), b=w(2)), VECTORS,
        "down", Reader("down", dim=0, out=1),
    ),
    "scaled before the sum": (
        lambda: Plain(lambda m, x: torch.add(m.b, x @ m.down, alpha=2), down=w(6, 2), b=w(2)),
        VECTORS, "down", Reader("down", dim=0, out=1),
    ),
    "weight on the left": (
        lambda: Plain(lambda m, x: (m.down @ x.T).T, down=w(2, 6)), VECTORS, "down",
        Reader("down"),
    ),
    "einsum": (
        lambda: Plain(lambda m, x: torch.einsum("ni,oi->no", x, m.down), down=w(2, 6)), VECTORS,
        "down", Reader("down"),
    ),
    "experts": (
        lambda: Plain(lambda m, x: torch.bmm(x.expand(3, -1, -1), m.down), down=w(3, 6, 2)),
        VECTORS, "down", Reader("down", dim=1, out=2, blocks=3),
    ),
    "read twice alike": (
        lambda: Plain(lambda m, x: F.linear(x, m.down, m.b) + F.linear(x, m.down, m.b),
                      down=w(2, 6), b=w(2)),
        VECTORS, "down", Reader("down", bias="b"),
    ),
    "two biases": (
        lambda: Plain(lambda m, x: F.linear(x, m.down, m.b) + F.linear(x, m.down, m.c),
                      down=w(2, 6), b=w(2), c=w(2)),
        VECTORS, "down", Reader("down", why_not="read in several ways"),
    ),
    "a scaled weight": (
        lambda: Plain(lambda m, x: F.linear(x, m.down * 2), down=w(2, 6)), VECTORS, "down",
        Reader("down", why_not="read in a form computed from it"),
    ),
    "recurrent": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.GRU(6, 3)), WORDS, "1.weight_ih_l0",
        Reader("1.weight_ih_l0", bias="1.bias_ih_l0"),
    ),
    "recurrent without bias": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LSTM(6, 3, bias=False)), WORDS, "1.weight_ih_l0",
        Reader("1.weight_ih_l0"),
    ),
    "attention": (
        Attention, WORDS, "mix.out_proj.weight",
        Reader("mix.out_proj.weight", bias="mix.out_proj.bias"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_a_reader(case: str) -> None:
    """Dimension, blocks, and the place for a constant."""
    make, shape, weight, expected = CASES[case]
    axes = map_axes(make(), (torch.randn(shape),))
    assert find_readers(axes)[weight] == expected


VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[Any, ...], tuple[int | None, ...]]] = {
    "t": (Tensor.t, (), (1, 0)),
    "transpose": (lambda t: t.transpose(0, 1), (0, 1), (1, 0)),
    "permute": (lambda t: t.permute(1, 0), ([1, 0],), (1, 0)),
    "expand": (lambda t: t.expand(3, 2, 5), ([3, 2, 5],), (None, 0, 1)),
    "unsqueeze": (lambda t: t.unsqueeze(1), (1,), (0, None, 1)),
    "view": (lambda t: t.view(1, 2, 1, 5), ([1, 2, 1, 5],), (None, 0, None, 1)),
    "clone": (Tensor.clone, (), (0, 1)),
}


@pytest.mark.parametrize("op", VIEWS)
def test_a_view_is_followed(op: str) -> None:
    """Each dimension of the view is the one of the weight along which its entries change."""
    change, args, expected = VIEWS[op]
    weight = torch.arange(10.0).view(2, 5)
    view = change(weight)
    assert passed_on(op, (weight, *args), (0, 1), view.shape) == expected
    for dim, size in enumerate(view.shape):
        if size > 1 and expected[dim] is not None:
            step = view.select(dim, 1) - view.select(dim, 0)
            assert (step == weight.stride(expected[dim])).all()


def test_what_mixes_dimensions_is_not_followed() -> None:
    """A flattened weight, or an operator that is no view."""
    weight = torch.zeros(2, 5)
    assert passed_on("view", (weight, [10]), (0, 1), (10,)) is None
    assert passed_on("relu", (weight,), (0, 1), (2, 5)) is None
