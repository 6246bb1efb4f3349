"""The arithmetic of a resize, and the choices that Widen and Narrow make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import Narrow, Widen, apply, map_axes
from neuroexapt.couple import Expr, Leaf, Product, Sum, unit_sums
from neuroexapt.edit import DimEdit, Scaling, WidthStep, resized
from neuroexapt.edit.base import units_of
from neuroexapt.edit.importance import unit_norms
from neuroexapt.edit.narrow import best

C = Leaf("c", 3)
EXPRS: dict[str, tuple[Expr, int]] = {
    "plain": (C, 3),
    "outer": (Product((C, Leaf("hw", 2))), 6),
    "inner": (Product((Leaf("heads", 2), C)), 6),
    "middle": (Product((Leaf("qkv", 2), C, Leaf("d", 2))), 12),
    "segment": (Sum((Leaf("a", 2), C, Leaf("b", 1))), 6),
    "twice": (Sum((C, C)), 6),
}
POSITIONS = {
    "keep": (0, 1, 2),
    "remove": (0, 2),
    "reorder": (2, 0, 1),
    "split": (0, 1, 1, 2),
    "grow": (0, 1, 2, -1, -1),
    "replace": (0, -1, 2),
}


def slow(tensor: Tensor, expr: Expr, positions: tuple[int, ...], new: float | str) -> list[Any]:
    """The oracle: walk the expression and copy, fill or average entry by entry (rows of dim 0)."""

    def rows(part: Expr) -> list[tuple[bool, list[int]]]:
        if isinstance(part, Leaf):
            if part.name != "c":
                return [(False, [p]) for p in range(part.size)]
            return [(p < 0, [p] if p >= 0 else [0, 1, 2]) for p in positions]
        if isinstance(part, Sum):
            found, offset = [], 0
            for piece in part.parts:
                found += [(fresh, [offset + p for p in old]) for fresh, old in rows(piece)]
                offset += size(piece)
            return found
        found = [(False, [0])]
        for piece in part.parts:
            found = [
                (a or b, [p * size(piece) + q for p in old for q in inner])
                for a, old in found
                for b, inner in rows(piece)
            ]
        return found

    def size(part: Expr) -> int:
        if isinstance(part, Leaf):
            return part.size
        sizes = [size(piece) for piece in part.parts]
        return sum(sizes) if isinstance(part, Sum) else int(torch.tensor(sizes).prod())

    result = []
    for fresh, old in rows(expr):
        if not fresh:
            result.append(tensor[old[0]].tolist())
        elif new == "mean":
            result.append(tensor[old].double().mean(0).tolist())
        else:
            result.append(torch.full_like(tensor[0], float(new)).tolist())
    return result


@pytest.mark.parametrize("move", POSITIONS)
@pytest.mark.parametrize("kind", EXPRS)
@pytest.mark.parametrize("fill", ["zero", "one", "mean"])
def test_resized_agrees_with_a_slow_oracle(kind: str, move: str, fill: str) -> None:
    """Along the first dimension and along the last, for every shape of expression."""
    expr, size = EXPRS[kind]
    tensor = torch.randn(size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    new: float | str = {"zero": 0.0, "one": 1.0}.get(fill, fill)
    expected = torch.tensor(slow(tensor, expr, POSITIONS[move], new), dtype=torch.float64)
    for dim in (0, 1):
        given = tensor if dim == 0 else tensor.T.contiguous()
        step = WidthStep("c", POSITIONS[move], (DimEdit("w", dim, expr, fill),))
        result = resized(given, [step], "w", generator=torch.Generator())
        torch.testing.assert_close(result if dim == 0 else result.T, expected)
        assert result.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()


def test_random_entries_have_the_deviation_of_the_tensor() -> None:
    """Drawn from the generator given, beside untouched old entries; a constant tensor gets He's."""
    step = WidthStep("c", (0, 1, 2, *[-1] * 500), (DimEdit("w", 0, C, "random"),))
    for tensor, deviation in (
        (torch.randn(3, 50) * 0.3, None),
        (torch.zeros(3, 50), (2 / 50) ** 0.5),
    ):
        result = resized(tensor, [step], "w", generator=torch.Generator().manual_seed(1))
        again = resized(tensor, [step], "w", generator=torch.Generator().manual_seed(1))
        assert torch.equal(result, again)
        assert torch.equal(result[:3], tensor)
        wanted = float(tensor.std()) if deviation is None else deviation
        assert float(result[3:].std()) == pytest.approx(wanted, rel=0.05)


def test_where_a_new_row_meets_a_new_column_silence_wins() -> None:
    """A tensor that makes and reads one width stays silent on its new columns."""
    dims = (DimEdit("w", 1, C, "zero"), DimEdit("w", 0, C, "random"))
    step = WidthStep("c", (0, 1, 2, -1), dims)
    result = resized(torch.randn(3, 3), [step], "w", generator=torch.Generator())
    assert not result[:, 3].any()
    assert result[3, :3].all()


def test_scalings_touch_old_entries_alone_and_never_the_state() -> None:
    """All of a tensor or some of its rows; with a fill of its own (optimizer state) none."""
    dims = (DimEdit("w", 0, C, "one"),)
    for scaling, factors in (
        (Scaling("w", 2.0), [2.0, 2, 2]),
        (Scaling("w", 2.0, 0, (1,)), [1.0, 2, 1]),
        (Scaling("other", 2.0), [1.0, 1, 1]),
    ):
        step = WidthStep("c", (0, 1, 2, -1), dims, (scaling,))
        given = torch.tensor([1.0, 1, 1])
        assert resized(given, [step], "w", generator=torch.Generator()).tolist() == [*factors, 1]
        state = resized(given, [step], "w", generator=torch.Generator(), fill="zero")
        assert state.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("fill", ["zero", "one", "mean", "random"])
def test_dtypes_stay(dtype: torch.dtype, fill: str) -> None:
    """Also of integer buffers."""
    step = WidthStep("c", (0, 1, 2, -1), (DimEdit("w", 0, C, fill),))
    given = torch.arange(6).reshape(3, 2).to(dtype)
    result = resized(given, [step], "w", generator=torch.Generator())
    assert result.dtype == dtype
    assert torch.equal(result[:3], given)


def test_unit_sums_agree_with_a_loop() -> None:
    """Along every dimension, with positions that belong to no unit left out."""
    expr, size = EXPRS["segment"]
    values = torch.rand(4, size, 2)
    sums = unit_sums(values, expr, "c", 1, 3)
    expected = [float(values[:, 2 + unit].sum()) for unit in range(3)]
    assert sums.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("amount", "size", "units"),
    [(1, 9, 1), (9, 9, 9), (0.5, 9, 4), (0.01, 9, 1), (2.0, 9, 18), (0.1, 30, 3), (0.7, 10, 7)],
)
def test_amounts(amount: float, size: int, units: int) -> None:
    """Counts are counts; fractions round down, to one at least, without a float's own error."""
    assert units_of("x", amount, size) == units


# --- what Narrow keeps ---------------------------------------------------------------------------


def test_narrow_keeps_the_best_in_order() -> None:
    """Ties go to the first, and so do scores given as a tensor or an array."""
    assert best([1, 5, 5, 0, 5], 3) == (1, 2, 4)
    assert best([0.0] * 4, 2) == (0, 1)
    for scores in (
        [1.0, 3, 0, 2],
        torch.tensor([1.0, 3, 0, 2]),
        torch.tensor([1, 3, 0, 2]).numpy(),
    ):
        net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        rows = net[0].weight.detach().clone()
        apply(net, Narrow("0", to=2, scores={"0.out": scores}), (torch.ones(3, 2),))
        assert torch.equal(net[0].weight, rows[[1, 3]])


def test_group_norm_weighs_makers_and_readers_alike() -> None:
    """By hand: each tensor's squared share over its mean, summed, rooted; biases do not count."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, 0], [0, 0], [0, 3]]))
        net[2].weight.copy_(torch.tensor([[0.0, 1, 1], [0, 1, 1]]))
        net[0].bias.fill_(100.0)
    axes = map_axes(net, (torch.ones(3, 2),))
    tensors = dict(net.named_parameters())
    expected = [1.5**0.5, 1.5**0.5, 3**0.5]
    assert unit_norms(axes, axes.one("0"), tensors) == pytest.approx(expected)


# --- what Widen draws ----------------------------------------------------------------------------


def test_units_added_at_different_times_differ() -> None:
    """Growing twice by the same amount draws other units: twins would learn the same for ever."""
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    for _ in range(3):
        apply(net, Widen("0", by=2), (torch.randn(3, 5),))
    rows = torch.nn.functional.normalize(net[0].weight.detach())
    alike = (rows @ rows.T).fill_diagonal_(0)
    assert float(alike.max()) < 0.999


def test_the_same_edit_draws_the_same_units_everywhere() -> None:
    """Two processes that start from one model end with one model, whatever their random state."""
    nets = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(7)
            net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
            torch.default_generator.manual_seed(seed)
            apply(net, Widen("0", by=2), (torch.ones(3, 5),))
        nets.append(net)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)
