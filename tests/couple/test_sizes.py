"""Numbers in user code: which attribute repeats which width, and what must be one axis."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import Narrow, Widen, apply, map_axes
from neuroexapt.capture import capture
from neuroexapt.capture.attributes import Attribute, integers, read, write
from neuroexapt.capture.numbers import Number, attributes_tracked, matched
from neuroexapt.capture.trace import Combined, OfAttribute, OfSize


class Split(nn.Module):
    """Computes its sizes in the middle of a line, from whatever it was given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **numbers: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 24), nn.Linear(24, 3)
        self.line = forward
        for name, number in numbers.items():
            setattr(self, name, number)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.line(self, self.first(x)))


def heads(m: Any, y: Tensor) -> Tensor:
    return y.view(2, m.heads, y.shape[-1] // m.heads).sigmoid().flatten(1)


def head_size(m: Any, y: Tensor) -> Tensor:
    return y.reshape(-1, y.size(1) // m.size, m.size).tanh().view(len(y), -1)


def config(m: Any, y: Tensor) -> Tensor:
    return y.view(-1, m.config.heads, m.config.dim // m.config.heads).tanh().flatten(1)


def table(m: Any, y: Tensor) -> Tensor:
    return y.view(-1, m.sizes["heads"], m.sizes["each"]).tanh().flatten(1)


def parts(m: Any, y: Tensor) -> Tensor:
    a, b = y.split(m.parts, dim=-1)
    return torch.cat([a.relu(), b.tanh()], -1)


def shape(m: Any, y: Tensor) -> Tensor:
    return y.view(2, *m.shape).tanh().flatten(1)


def start(m: Any, y: Tensor) -> Tensor:
    return torch.cat([y[:, : m.keep].relu(), y[:, m.keep :]], 1)


def taken(m: Any, y: Tensor) -> Tensor:
    a, b = y.narrow(1, 0, m.keep), y.narrow(1, m.keep, y.shape[1] - m.keep)
    return torch.cat([a.relu(), b], 1)


def state(m: Any, y: Tensor) -> Tensor:
    return y + torch.zeros(y.size(0), m.hidden)


def product(m: Any, y: Tensor) -> Tensor:
    return y.view(2, m.size, m.heads).tanh().reshape(2, m.heads * m.size)


@dataclass(frozen=True)
class Row:
    """A line of user code, the numbers it reads, and what each must be bound to."""

    line: Callable[[Any, Tensor], Tensor]
    numbers: dict[str, Any]
    widths: tuple[int, ...]
    bound: dict[str, int]


ROWS = (
    Row(heads, {"heads": 4}, (4, 6), {"heads": 4}),
    Row(head_size, {"size": 6}, (4, 6), {"size": 6}),
    Row(
        config,
        {"config": SimpleNamespace(heads=4, dim=24)},
        (4, 6),
        {"config.heads": 4, "config.dim": 24},
    ),
    Row(
        table,
        {"sizes": {"heads": 4, "each": 6}},
        (4, 6),
        {"sizes.heads": 4, "sizes.each": 6},
    ),
    Row(parts, {"parts": [14, 10]}, (10, 14), {"parts.0": 14, "parts.1": 10}),
    Row(shape, {"shape": (4, 6)}, (4, 6), {"shape.0": 4, "shape.1": 6}),
    Row(start, {"keep": 14}, (10, 14), {"keep": 14}),
    Row(taken, {"keep": 14}, (10, 14), {"keep": 14}),
    Row(state, {"hidden": 24}, (24,), {"hidden": 24}),
    Row(product, {"heads": 4, "size": 6}, (4, 6), {"heads": 4, "size": 6}),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.line.__name__)
def test_numbers_in_a_line_are_bound_and_follow(row: Row) -> None:
    """Each number is found, and after an edit of any width it holds the new size."""
    model, x = Split(row.line, **row.numbers), torch.randn(2, 5)
    axes = map_axes(model, (x,))
    assert sorted(width.size for width in axes.widths.values()) == sorted(row.widths)
    own = {a.name for a in axes.attributes if a.module == ""}
    assert own >= set(row.bound)
    for name, value in row.bound.items():
        held = read(model, Attribute("", name))
        assert (held, type(held)) == (value, int)
    moved = set()
    for width in axes.widths.values():
        for edit in (Narrow(width.name, by=2), Widen(width.name, by=1)):
            changed = copy.deepcopy(model)
            apply(changed, edit, (x,))
            assert changed(x).shape == (2, 3)
            moved |= {n for n, v in row.bound.items() if read(changed, Attribute("", n)) != v}
    assert moved == set(row.bound)


def test_one_config_in_two_modules_is_one_number() -> None:
    """Whoever reads a shared config reads the same number, so their widths are one."""
    shared = SimpleNamespace(heads=4, dim=24)
    net = nn.Sequential(Split(config, config=shared), nn.Linear(3, 5), Split(config, config=shared))
    axes = map_axes(net, (torch.randn(2, 5),))
    (width,) = (w for w in axes.widths.values() if w.size == 4)
    assert {place.tensor for place in width.appearances} >= {"0.first.weight", "2.last.weight"}
    apply(net, Narrow(width.name, by=1), (torch.randn(2, 5),))
    assert (shared.heads, shared.dim) == (3, 18)


def test_sizes_of_two_widths_that_one_line_compares_become_one() -> None:
    """``split(self.n)`` and ``view(..., x.shape[-1])``: the stream and what it makes are one."""

    class Nano(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.dim = 3, 12
            self.embed, self.qkv = nn.Linear(5, 12), nn.Linear(12, 36)
            self.out = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            size, dim = x.size()
            q, k, v = self.qkv(x).split(self.dim, dim=1)
            q, k, v = (t.view(size, self.heads, dim // self.heads) for t in (q, k, v))
            return self.out((torch.softmax(q @ k.mT, -1) @ v).reshape(size, dim))

    model, x = Nano(), torch.randn(2, 5)
    axes = map_axes(model, (x,))
    assert sorted(width.size for width in axes.widths.values()) == [3, 4]
    assert str(axes.tensors["embed.weight"][0]) == str(axes.tensors["qkv.weight"][1])
    apply(model, Narrow("heads", by=1), (x,))
    assert (model.heads, model.dim, model.embed.out_features) == (2, 8, 8)


def test_a_number_without_origin_is_left_to_the_resized_run() -> None:
    """A literal in the line pins, with the line."""
    axes = map_axes(Split(lambda m, y: y.view(-1, 4, 6).tanh().flatten(1)), (torch.randn(2, 5),))
    assert not axes.widths
    assert any("test_sizes.py" in pin.reason for pin in axes.pinned.values())


def test_origins_of_a_call() -> None:
    """What the recorder hands to the rules: attribute, size, and arithmetic of both."""
    model = Split(heads, heads=4)
    trace = capture(model, (torch.randn(2, 5),), track=True)
    (view,) = (call for call in trace.calls if len(call.origins) == 2)
    assert isinstance(view.origins[1, 1], OfAttribute)
    assert view.origins[1, 1].at == Attribute("", "heads")
    quotient = view.origins[1, 2]
    assert isinstance(quotient, Combined)
    assert (quotient.sign, type(quotient.left)) == ("//", OfSize)
    assert type(model.heads) is int


def test_a_tracked_run_that_fails_is_run_untracked() -> None:
    """Code that looks at the very type of a number still runs, and is mapped."""

    def strict(m: Any, y: Tensor) -> Tensor:
        if type(m.heads) is not int:
            raise TypeError("heads must be an int")
        return y.view(2, m.heads, -1).tanh().flatten(1)

    axes = map_axes(Split(strict, heads=4), (torch.randn(2, 5),))
    assert sorted(width.size for width in axes.widths.values()) == [4, 6]


def test_arithmetic_keeps_origins() -> None:
    n = Number.of(6, OfAttribute(Attribute("m", "n"), 6))
    with attributes_tracked(nn.Identity()):
        for value in (n + 2, 2 + n, n - 2, 9 - n, n * 3, 3 * n, n // 2, 13 // n):
            assert isinstance(value, Number)
        total = 0
        for _ in range(100):
            total += n
        assert total == 600
        assert getattr(total, "depth", 0) <= 16  # a history that long is none of a size
    assert type(n + 1) is int  # outside of a run numbers forget
    assert [int(v) for v in (n + 2, 2 + n, n - 2, 9 - n, n * 3, n // 2, 13 // n)] == [
        *(8, 8, 4, 3, 18, 3, 2)
    ]
    assert type(n / 2) is float
    assert type(copy.deepcopy(n)) is int


@pytest.mark.parametrize(
    ("given", "args", "places"),
    [
        ((2, 4, -1), (None, [2, 4, 8]), {(1, 1)}),  # a list, position by position
        ((4, 1), (None, 4, 1), {(1,)}),  # all numbers of the call
        ((4,), (None, 1, 0, 4), {(3,)}),  # by value
        ((4, 5), (None, [7, 9]), set()),  # nothing that was given
    ],
)
def test_matching(given: tuple[int, ...], args: tuple[Any, ...], places: set[Any]) -> None:
    """The four is tracked; it must be found where it went, and nowhere else."""
    origin = OfAttribute(Attribute("", "n"), 4)
    numbers = tuple(Number.of(n, origin) if n == 4 else n for n in given)
    assert set(matched(numbers, args)) == places


def test_two_origins_of_one_value_are_not_guessed() -> None:
    a, b = (Number.of(4, OfAttribute(Attribute("", name), 4)) for name in "ab")
    assert matched((a, b), (None, 4)) == {}


def test_attributes_in_sequences_and_configs() -> None:
    """A number in a tuple is written into a tuple of the same kind."""
    model = Split(shape, shape=(4, 6), config=SimpleNamespace(n=[3, 5]))
    names = {integer.at.name for integer in integers(model) if integer.at.module == ""}
    assert {"shape.0", "shape.1", "config.n.0", "config.n.1"} <= names
    write(model, Attribute("", "shape.1"), 7)
    write(model, Attribute("", "config.n.0"), 8)
    assert model.shape == (4, 7)
    assert model.config.n == [8, 5]


def test_what_the_forward_keeps_of_sizes_grows_no_history() -> None:
    """A tracker that a module holds counts on after a map as if there had been none."""

    class Meter:
        tokens = 0

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.meter, self.body = Meter(), nn.Linear(5, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.meter.tokens += x.shape[0]
            return self.head(self.body(x) + x.new_zeros(self.meter.tokens, 8).sum(0))

    model, x = Counting(), torch.randn(2, 5)
    map_axes(model, (x,))
    for _ in range(30):
        model(x)
    assert type(model.meter.tokens) is int
    assert map_axes(model, (x,)).pinned
