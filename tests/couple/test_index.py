"""The source index against numpy: reshape, take, concatenate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuroexapt.couple import (
    Expr,
    Leaf,
    Positions,
    Product,
    Sum,
    leaves,
    size_of,
    source_index,
    unit_of,
)

NAMES = ("a", "b", "c", "d")
sizes_by_name = st.fixed_dictionaries({name: st.integers(1, 3) for name in NAMES})


def expressions(sizes: dict[str, int]) -> st.SearchStrategy[Expr]:
    """Expressions over the four atoms; an atom may appear several times."""
    return st.recursive(
        st.sampled_from(NAMES).map(lambda name: Leaf(name, sizes[name])),
        lambda parts: st.one_of(
            st.lists(parts, min_size=1, max_size=3).map(lambda p: Product(tuple(p))),
            st.lists(parts, min_size=1, max_size=3).map(lambda p: Sum(tuple(p))),
        ),
        max_leaves=5,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Expr, dict[str, Positions]]:
    """An expression, and new positions (kept, repeated, reordered, -1) for some of its atoms."""
    sizes = draw(sizes_by_name)
    expr = draw(expressions(sizes))
    changed = draw(st.sets(st.sampled_from(NAMES)))
    return expr, {
        name: np.array(draw(st.lists(st.integers(-1, sizes[name] - 1), max_size=4)), dtype=np.int64)
        for name in sorted(changed)
    }


def taken(grid: np.ndarray, expr: Expr, positions: dict[str, Positions]) -> np.ndarray:
    """Numpy's own answer: take along each dimension of the grid that the expression unfolds to.

    New positions take from a row of -1 that is put at the end of the dimension.
    """
    if isinstance(expr, Leaf):
        if expr.name not in positions:
            return grid
        lined = np.concatenate([grid, np.full((1, *grid.shape[1:]), -1)])
        return lined[positions[expr.name]]
    if isinstance(expr, Sum):
        edges = np.cumsum([size_of(part, {}) for part in expr.parts])[:-1]
        pieces = zip(np.split(grid, edges), expr.parts, strict=True)
        return np.concatenate([taken(piece, part, positions) for piece, part in pieces])
    sizes = [size_of(part, {}) for part in expr.parts]
    grid = grid.reshape(*sizes, *grid.shape[1:])
    for place, part in enumerate(expr.parts):
        grid = np.moveaxis(taken(np.moveaxis(grid, place, 0), part, positions), 0, place)
    return grid.reshape(-1, *grid.shape[len(sizes) :])


def bare(expr: Expr) -> int:
    """The size of an expression by its leaves alone."""
    if isinstance(expr, Leaf):
        return expr.size
    sizes = [bare(part) for part in expr.parts]
    return int(np.prod(sizes)) if isinstance(expr, Product) else sum(sizes)


@given(cases())
def test_source_index_is_numpys_take(case: tuple[Expr, dict[str, Positions]]) -> None:
    """Reshape to the factors, take along each, concatenate segments: the same old positions."""
    expr, positions = case
    expected = taken(np.arange(bare(expr)), expr, positions)
    index = source_index(expr, positions)
    assert index.dtype == np.int64
    assert index.tolist() == expected.tolist()


@given(cases())
def test_size_of_is_the_length_of_the_source_index(
    case: tuple[Expr, dict[str, Positions]],
) -> None:
    """The predicted size and the index never disagree; unchanged, it is the old size."""
    expr, positions = case
    sizes = {name: len(new) for name, new in positions.items()}
    assert size_of(expr, sizes) == len(source_index(expr, positions))
    assert size_of(expr, {}) == bare(expr)
    assert source_index(expr, {}).tolist() == list(range(bare(expr)))


@given(cases())
def test_a_position_is_new_exactly_if_one_of_its_units_is(
    case: tuple[Expr, dict[str, Positions]],
) -> None:
    """-1 marks every position that lies on a new unit, and no other."""
    expr, positions = case
    flags = {name: np.where(new < 0, 1, 0) for name, new in positions.items()}
    assert (source_index(expr, positions) < 0).tolist() == _any_new(expr, flags).tolist()


def _any_new(expr: Expr, flags: dict[str, np.ndarray]) -> np.ndarray:
    if isinstance(expr, Leaf):
        return flags.get(expr.name, np.zeros(expr.size)) > 0
    parts = [_any_new(part, flags) for part in expr.parts]
    if isinstance(expr, Sum):
        return np.concatenate(parts)
    result = parts[0]
    for part in parts[1:]:
        result = (result[:, None] | part[None, :]).reshape(-1)
    return result


@given(cases())
def test_unit_of_says_which_positions_a_unit_takes_along(
    case: tuple[Expr, dict[str, Positions]],
) -> None:
    """Position p is on unit u exactly if p is gone when u alone is gone."""
    expr, _ = case
    for leaf in leaves(expr):
        if _twice_in_a_product(expr, leaf.name):
            continue
        units = unit_of(expr, leaf.name)
        for unit in range(leaf.size):
            kept = np.array([u for u in range(leaf.size) if u != unit], dtype=np.int64)
            gone = set(range(bare(expr))) - set(source_index(expr, {leaf.name: kept}).tolist())
            assert gone == set(np.flatnonzero(units == unit).tolist())


def _twice_in_a_product(expr: Expr, name: str) -> bool:
    """An atom times itself (a Gram matrix laid flat): its positions lie on two units at once."""
    if isinstance(expr, Leaf):
        return False
    holders = [any(leaf.name == name for leaf in leaves(part)) for part in expr.parts]
    if isinstance(expr, Product) and sum(holders) > 1:
        return True
    return any(_twice_in_a_product(part, name) for part in expr.parts)


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (Leaf("conv.out", 4), "conv.out"),
        (Product((Leaf("h", 2), Leaf("d", 3))), "h * d"),
        (Product((Sum((Leaf("a", 1), Leaf("b", 2))), Leaf("hw", 4))), "(a + b) * hw"),
        (Sum((Leaf("a", 1), Product((Leaf("b", 2), Leaf("c", 2))))), "a + b * c"),
    ],
)
def test_expressions_read_as_arithmetic(expr: Expr, text: str) -> None:
    """A sum inside a product stands in brackets."""
    assert str(expr) == text
