"""The axis algebra against positions counted one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuroexapt.couple.axis import (
    Axis,
    Mismatch,
    atoms,
    boundaries,
    concat,
    cut,
    factors,
    find,
    pin,
    product,
    segments,
    split,
    unify,
)

# A truth is what a dimension really is: ("atom", which), ("*", parts) or ("+", parts).
# A view is how one tensor shows it: ("new", size, pin), ("shared", which), ("*" or "+", parts).
Truth = tuple[Any, ...]
View = tuple[Any, ...]
MAX_SIZE = 48


def truth_size(truth: Truth, sizes: Sequence[int]) -> int:
    if truth[0] == "atom":
        return sizes[truth[1]]
    parts = [truth_size(part, sizes) for part in truth[1]]
    return prod(parts) if truth[0] == "*" else sum(parts)


def some_truth(random: Random, depth: int) -> Truth:
    form = random.choice(["atom", "*", "+"]) if depth else "atom"
    if form == "atom":
        return "atom", random.randrange(3)
    return form, [some_truth(random, depth - 1) for _ in range(random.randint(2, 3))]


def some_view(random: Random, truth: Truth, sizes: Sequence[int]) -> View:
    """The truth with neighbours taken together, parts not looked into, some atoms pinned."""
    if random.random() < (0.6 if truth[0] == "atom" else 0.25):
        return "new", truth_size(truth, sizes), "by test" if random.random() < 0.1 else None
    if truth[0] == "atom":
        return "shared", truth[1]
    form, parts = truth
    groups, rest = [], list(parts)
    while rest:
        taken = [rest.pop(0) for _ in range(min(len(rest), random.choice([1, 1, 2])))]
        groups.append(taken[0] if len(taken) == 1 else (form, taken))
    if len(groups) == 1:
        return "new", truth_size(truth, sizes), None
    return form, [some_view(random, group, sizes) for group in groups]


def some_world(random: Random, sizes: Sequence[int]) -> list[list[View]]:
    """One or two truths, each seen in several ways; atoms may be shared between all."""
    rows: list[list[View]] = []
    while len(rows) < 2:
        truth = some_truth(random, random.choice([1, 2, 3]))
        if truth_size(truth, sizes) <= MAX_SIZE:
            rows.append([some_view(random, truth, sizes) for _ in range(random.randint(2, 4))])
    return rows


def made(view: View, shared: Sequence[Axis]) -> Axis:
    if view[0] == "new":
        return Axis(view[1], pin=view[2])
    if view[0] == "shared":
        return shared[view[1]]
    parts = [made(part, shared) for part in view[1]]
    return product(parts) if view[0] == "*" else concat(parts)


def unified(world: list[list[View]], sizes: Sequence[int], order: Random) -> list[list[Axis]]:
    """Build the views of each row and make them one, along a random tree in random order."""
    shared = [Axis(size) for size in sizes]
    rows = [[made(view, shared) for view in row] for row in world]
    pairs = []
    for row in rows:
        shuffled = order.sample(row, len(row))
        for number in range(1, len(shuffled)):
            pairs.append(order.sample([shuffled[number], order.choice(shuffled[:number])], 2))
    order.shuffle(pairs)
    for a, b in pairs:
        unify(a, b)
    return rows


def coordinates(axis: Axis) -> list[tuple[tuple[Axis, int], ...]]:
    """For each position its place on every atom that it lies on."""
    axis = find(axis)
    if axis.form == "atom":
        return [((axis, position),) for position in range(axis.size)]
    parts = [coordinates(part) for part in axis.parts]
    if axis.form == "sum":
        return [place for part in parts for place in part]
    return [sum(places, ()) for places in itertools.product(*parts)]


def canonical(rows: list[list[Axis]]) -> object:
    """What all axes are, position by position, with atoms numbered as they come."""
    numbers: dict[Axis, int] = {}
    lines = [
        tuple(
            tuple((numbers.setdefault(atom, len(numbers)), at) for atom, at in place)
            for place in coordinates(axis)
        )
        for row in rows
        for axis in row
    ]
    return lines, [(atom.size, bool(atom.pin)) for atom in numbers]


def kept_positions(axis: Axis, atom: Axis, kept: Sequence[int]) -> list[int]:
    """Old positions in order (-1: new) when an atom keeps some of its own; by enumeration."""
    axis = find(axis)
    if axis.form == "atom":
        return list(kept) if axis is atom else list(range(axis.size))
    parts = [(kept_positions(part, atom, kept), part.size) for part in axis.parts]
    if axis.form == "sum":
        starts = itertools.accumulate((size for _, size in parts), initial=0)
        pairs = zip(parts, starts, strict=False)
        return [p if p < 0 else p + start for (part, _), start in pairs for p in part]
    result = [0]
    for part, size in parts:
        result = [
            -1 if outer < 0 or inner < 0 else outer * size + inner
            for outer in result
            for inner in part
        ]
    return result


randoms = st.randoms(use_true_random=False)
sizes_from_2 = st.lists(st.sampled_from([2, 3, 4, 6]), min_size=3, max_size=3)
sizes_from_1 = st.lists(st.sampled_from([1, 2, 3]), min_size=3, max_size=3)


@given(randoms, sizes_from_2)
def test_the_order_of_unifying_does_not_matter(random: Random, sizes: list[int]) -> None:
    """Six random orders over six random spanning trees give the same atoms, sizes and pins."""
    world = some_world(random, sizes)
    results = [canonical(unified(world, sizes, Random(seed))) for seed in range(6)]
    assert all(result == results[0] for result in results)


@given(randoms, sizes_from_1)
def test_single_positions_never_make_orders_disagree(random: Random, sizes: list[int]) -> None:
    """With parts of size 1 an order may fail (its axes are then pinned), but none is wrong."""
    world = some_world(random, sizes)
    results = []
    for seed in range(6):
        try:
            results.append(canonical(unified(world, sizes, Random(seed))))
        except Mismatch:
            continue
    assert all(result == results[0] for result in results)


@given(randoms, st.one_of(sizes_from_1, sizes_from_2))
def test_unified_axes_follow_every_free_atom_alike(random: Random, sizes: list[int]) -> None:
    """Whatever is unified, split and cut: dropping a unit moves the same positions in all views."""
    rows = [[made(v, [Axis(s) for s in sizes]) for v in row] for row in some_world(random, sizes)]
    try:
        for row in rows:
            for _ in range(5):
                _refine_somehow(random, row)
            for other in row[1:]:
                unify(row[0], other)
    except Mismatch:
        return
    for row in rows:
        for atom in {atom for axis in row for atom in atoms(axis) if not atom.pin}:
            kept = [*range(1, atom.size), -1, -1]
            moved = [kept_positions(axis, atom, kept) for axis in row]
            assert all(positions == moved[0] for positions in moved)


def _refine_somehow(random: Random, row: list[Axis]) -> None:
    axis = random.choice(row)
    form = random.choice(["split", "cut", "unify"])
    if form == "split":
        outer = random.choice([d for d in range(1, axis.size + 1) if axis.size % d == 0])
        left, right = split(axis, outer)
        assert (left.size, right.size) == (outer, axis.size // outer)
    elif form == "cut":
        cut(axis, [random.randrange(axis.size + 1) for _ in range(2)])
    else:
        unify(axis, random.choice(row))


@given(st.permutations(range(4)))
def test_a_pin_holds_for_all_whatever_comes_first(order: list[int]) -> None:
    """The reason given to one view reaches every view, and no atom that is not in it."""
    rows, columns, other = Axis(4), Axis(3), Axis(5)
    whole, pinned = Axis(12), Axis(12)
    steps = [
        lambda: unify(product([rows, columns]), whole),
        lambda: unify(whole, pinned),
        lambda: pin(pinned, "held by test"),
        lambda: unify(concat([other, whole]), Axis(17)),
    ]
    for number in order:
        steps[number]()
    assert [find(axis).pin for axis in (rows, columns, other)] == ["held by test"] * 2 + [None]


def test_the_first_reason_is_kept() -> None:
    """A second pin does not overwrite the reason that a reader saw first."""
    axis = Axis(3)
    pin(axis, "first")
    pin(axis, "second")
    assert find(axis).pin == "first"


def test_an_axis_cannot_contain_itself() -> None:
    """n = n * 1 + ... has no finite answer: the occurs check refuses."""
    part = Axis(4)
    whole = Axis(8, "sum", (part, part))
    part.size = 8  # a tensor that were both the part and the whole
    with pytest.raises(Mismatch, match="contain itself"):
        unify(part, whole)


MISMATCHES = {
    "unlike sizes": (lambda: (Axis(4), Axis(6)), "sizes [46] and [46]"),
    "factors without a common refinement": (
        lambda: (product([Axis(4), Axis(3)]), product([Axis(6), Axis(2)])),
        "is not a multiple",
    ),
    "a boundary inside an inner factor": (
        lambda: (product([Axis(2), Axis(3)]), concat([Axis(2), Axis(4)])),
        "not a multiple of the inner size 3",
    ),
    "unlike boundaries in equal parts": (
        lambda: (product([Axis(3), Axis(4)]), concat([Axis(6), Axis(6)])),
        "not a multiple of the inner size 4",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_mismatch_says_which_sizes_collide(name: str, swapped: bool) -> None:
    """What has no common refinement is refused from either side, with its sizes."""
    make, message = MISMATCHES[name]
    pair = make()
    with pytest.raises(Mismatch, match=message):
        unify(*reversed(pair) if swapped else pair)


def test_split_refines_in_place() -> None:
    """Splitting an atom makes it a product that every holder of the atom sees; pins stay."""
    axis = Axis(12, pin="why")
    holder = concat([axis, Axis(2)])
    outer, inner = split(axis, 3)
    assert (outer.size, inner.size, outer.pin, inner.pin) == (3, 4, "why", "why")
    assert repr(holder) == "((!3*!4)+2)"


def test_split_goes_through_factors_and_segments() -> None:
    """A product is split where its factors allow; the inner part of segments becomes one."""
    four, six = Axis(4), Axis(6)
    outer, inner = split(product([four, six]), 8)
    assert [f.size for f in factors(outer)] == [4, 2]
    assert [f.size for f in factors(inner)] == [3]
    a, b = Axis(8), Axis(12)
    outer, inner = split(concat([a, b]), 5)
    assert repr(outer) == "(2+3)"
    assert find(factors(a)[1]) is find(factors(b)[1]) is find(inner)


def test_split_refuses_what_does_not_divide() -> None:
    """12 has no 5 equal parts, and 4*3 none of 6."""
    with pytest.raises(Mismatch, match="12 is not a multiple of 5"):
        split(Axis(12), 5)
    with pytest.raises(Mismatch, match="share no common refinement"):
        split(product([Axis(4), Axis(3)]), 6)


def test_split_into_single_positions_stays_outside() -> None:
    """A factor of size 1 would let the axis contain itself: it is made beside it, pinned."""
    axis = Axis(3)
    outer, inner = split(axis, 3)
    assert outer is axis
    assert inner.pin
    assert find(axis).form == "atom"


def test_cut_keeps_segments_and_finds_positions() -> None:
    """Boundaries add up over calls; a cut inside a product goes to its outer factor."""
    axis = Axis(10)
    assert [s.size for s in cut(axis, [4])] == [4, 6]
    assert [s.size for s in cut(axis, [0, 7, 10])] == [4, 3, 3]
    assert boundaries(axis) == [4, 7]
    channels, pixels = Axis(6), Axis(4)
    pieces = cut(product([channels, pixels]), [8])
    assert [p.size for p in pieces] == [8, 16]
    assert repr(channels) == "(2+4)"


def test_the_rotate_half_of_rotary_embeddings() -> None:
    """x = [x1 x2]; cat(-x2, x1) * sin + x * cos makes both halves one width."""
    head = Axis(8)
    first, second = cut(head, [4])
    unify(head, concat([second, first]))
    assert find(first) is find(second)
    assert [find(s) for s in segments(head)] == [find(first)] * 2
    assert not find(first).pin


def test_a_fused_qkv_falls_into_equal_parts() -> None:
    """(3*h*d) chunked in three and viewed as heads: one heads axis, one head size, a fixed 3."""
    fused, heads, size = Axis(3 * 4 * 8), Axis(4), Axis(8)
    three, part = split(fused, 3)
    pin(three, "a number of equal parts")
    unify(part, product([heads, size]))
    assert repr(fused) == "(!3*(4*8))"
    assert [find(f) for f in factors(fused)][1:] == [find(heads), find(size)]


def test_three_projections_side_by_side_are_the_same_as_one() -> None:
    """cat(q, k, v) seen as (3, h*d) says that all three have the same positions."""
    parts = [Axis(6) for _ in range(3)]
    unify(concat(parts), product([Axis(3), Axis(6)]))
    assert len({find(part) for part in parts}) == 1


def test_deep_nests_need_no_recursion() -> None:
    """cat after cat, 2,000 deep, as a long dense net makes them."""
    axis = Axis(1)
    for _ in range(2000):
        axis = concat([axis, Axis(1)])
    assert len(list(atoms(axis))) == 2001
    assert len(segments(axis)) == 2001
    pin(axis, "all")
    unify(axis, Axis(2001))
