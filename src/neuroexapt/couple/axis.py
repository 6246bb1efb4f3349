"""The axis algebra: what a tensor dimension is made of, and when two dimensions are the same.

An axis is an *atom* (n positions that live and die one by one), a *product* of axes
(row-major, what ``view`` and ``flatten`` make) or a *sum* of axes (segments in order, what
``cat`` makes and ``split`` reveals). :func:`unify` says that two axes are one; it refines
both sides until their atoms agree, or raises :class:`Mismatch`.

Pure Python: nothing here knows of tensors or models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from math import prod


class Mismatch(Exception):
    """Two axes cannot be refined to common atoms; the message says which sizes collide."""


class Axis:
    """A node of the union-find: follow :func:`find` before looking at ``form`` or ``parts``.

    Attributes:
        size: number of positions.
        form: ``"atom"``, ``"product"`` or ``"sum"``.
        parts: the factors or segments; empty for an atom.
        pin: why this axis must keep its size, or None. Held by atoms only.
    """

    __slots__ = ("_link", "form", "parts", "pin", "serial", "size")
    _serials = itertools.count()

    def __init__(
        self, size: int, form: str = "atom", parts: tuple[Axis, ...] = (), pin: str | None = None
    ) -> None:
        self.size = size
        self.form = form
        self.parts = parts
        self.pin = pin
        self.serial = next(Axis._serials)
        self._link: Axis | None = None

    def __repr__(self) -> str:
        axis = find(self)
        if axis.form == "atom":
            return f"{'!' if axis.pin else ''}{axis.size}"
        return "(" + {"product": "*", "sum": "+"}[axis.form].join(map(repr, axis.parts)) + ")"


def find(axis: Axis) -> Axis:
    """The node that now stands for this axis (with path compression)."""
    root = axis
    while root._link is not None:
        root = root._link
    while axis._link is not None:
        axis._link, axis = root, axis._link
    return root


def atoms(axis: Axis) -> Iterator[Axis]:
    """The atoms of an axis in order, repeated as often as they occur."""
    rest = [axis]  # a stack rather than a recursion: cat after cat nests deep
    while rest:
        axis = find(rest.pop())
        if axis.form == "atom":
            yield axis
        rest.extend(reversed(axis.parts))


def share(a: Axis, b: Axis) -> bool:
    """Whether two axes have an atom in common."""
    if find(a) is find(b):
        return True
    own = set(atoms(a))
    return any(atom in own for atom in atoms(b))


def pin(axis: Axis, reason: str) -> None:
    """Freeze every atom of the axis; the first reason given is kept."""
    for atom in list(atoms(axis)):
        atom.pin = atom.pin or reason


def product(parts: Iterable[Axis]) -> Axis:
    """The row-major product; factors of size 1 carry no positions and are left out.

    Example:
        >>> product([Axis(3), Axis(1), Axis(4)])
        (3*4)
    """
    parts = list(parts)
    kept = [part for part in parts if part.size != 1]
    for part in parts:
        if part.size == 1:
            # It leaves the expression, so nothing could follow if it grew.
            pin(part, "a single position beside other factors")
    if len(kept) == 1:
        return kept[0]
    if not kept:
        return Axis(1, pin="a dimension of size 1")
    return Axis(prod(part.size for part in kept), "product", tuple(kept))


def concat(parts: Sequence[Axis]) -> Axis:
    """The sum of segments in order; a single segment is itself, a sum gives its own segments.

    Example:
        >>> concat([Axis(3), Axis(4)])
        (3+4)
    """
    kept = [find(part) for part in parts if part.size]
    if len(kept) == 1:
        return kept[0]
    # Flat, since cat after cat would nest as deep as the model.
    flat = [piece for part in kept for piece in (part.parts if part.form == "sum" else (part,))]
    return Axis(sum(piece.size for piece in flat), "sum", tuple(flat))


def factors(axis: Axis) -> list[Axis]:
    """The flat list of factors; an axis that is no product is its own only factor."""
    axis = find(axis)
    if axis.form != "product":
        return [axis]
    return [factor for part in axis.parts for factor in factors(part)]


def segments(axis: Axis) -> list[Axis]:
    """The flat list of segments; a product whose outer factor is a sum is distributed."""
    axis = find(axis)
    if axis.form == "sum":
        return [segment for part in axis.parts for segment in segments(part)]
    if axis.form == "product":
        outer, *inner = factors(axis)
        pieces = segments(outer)
        if len(pieces) > 1:
            return [product([piece, *inner]) for piece in pieces]
    return [axis]


def split(axis: Axis, outer: int) -> tuple[Axis, Axis]:
    """Refine an axis of size n into a product (outer, n/outer) and return both factors.

    A factor of size 1 is made beside the axis, not inside it, and must keep its size.

    Raises:
        Mismatch: n is not a multiple of ``outer``, or a segment boundary forbids it.
    """
    axis = find(axis)
    if axis.size % outer:
        raise Mismatch(f"{axis.size} is not a multiple of {outer}")
    inner = axis.size // outer
    if outer == 1 or inner == 1:
        single = Axis(1, pin="a single position beside other factors")
        return (single, axis) if outer == 1 else (axis, single)
    if axis.form == "product":
        return _split_product(axis, outer)
    if axis.form == "atom":
        pair = Axis(outer, pin=axis.pin), Axis(inner, pin=axis.pin)
    else:
        pair = _split_sum(axis, inner)
    axis.form, axis.parts, axis.pin = "product", pair, None
    return pair


def _split_product(axis: Axis, outer: int) -> tuple[Axis, Axis]:
    head: list[Axis] = []
    rest = factors(axis)
    missing = outer
    while missing > 1:
        first = rest[0]
        if missing % first.size == 0:
            head.append(rest.pop(0))
        elif first.size % missing == 0:
            left, right = split(first, missing)
            head.append(left)
            rest[0] = right
            break
        else:
            raise Mismatch(f"factors {first.size} and {missing} share no common refinement")
        missing //= first.size
    return product(head), product(rest)


def _split_sum(axis: Axis, inner: int) -> tuple[Axis, Axis]:
    """(a*i + b*i) is (a+b)*i: each segment gives its outer part, the inner ones are one."""
    pairs = []
    for segment in segments(axis):
        if segment.size % inner:
            raise Mismatch(f"segment of {segment.size} is not a multiple of {inner}")
        pairs.append(split(segment, segment.size // inner))
    for _, other in pairs[1:]:
        unify(pairs[0][1], other)
    return concat([pair[0] for pair in pairs]), pairs[0][1]


def cut(axis: Axis, boundaries: Iterable[int]) -> list[Axis]:
    """Refine the axis so that it has a segment boundary at each position; return its segments.

    Raises:
        Mismatch: a boundary falls inside an inner factor.
    """
    inside = sorted({b for b in boundaries if 0 < b < axis.size})
    _cut(find(axis), inside)
    return segments(axis)


def _cut(axis: Axis, inside: list[int]) -> None:
    if not inside:
        return
    if axis.form == "product":
        outer, *inner = factors(axis)
        step = prod(factor.size for factor in inner)
        if any(boundary % step for boundary in inside):
            raise Mismatch(f"a boundary in {inside} is not a multiple of the inner size {step}")
        _cut(find(outer), [boundary // step for boundary in inside])
    elif axis.form == "sum":
        start = 0
        for part in axis.parts:
            _cut(find(part), [b - start for b in inside if start < b < start + part.size])
            start += part.size
    else:
        edges = [0, *inside, axis.size]
        axis.parts = tuple(Axis(b - a, pin=axis.pin) for a, b in itertools.pairwise(edges))
        axis.form, axis.pin = "sum", None


def boundaries(axis: Axis) -> list[int]:
    """Positions at which the axis has a segment boundary."""
    return list(itertools.accumulate(segment.size for segment in segments(axis)))[:-1]


def unify(a: Axis, b: Axis) -> None:
    """Make two axes one. Pins of either side hold for both.

    The result does not depend on the order in which a consistent set of axes is unified (with
    segments of size 1 some orders may raise where others find it; none finds another).

    Raises:
        Mismatch: sizes differ or no common refinement exists; what was refined stays refined.

    Example:
        >>> heads, size, whole = Axis(4), Axis(8), Axis(32)
        >>> unify(product([heads, size]), whole); whole
        (4*8)
    """
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise Mismatch(f"sizes {a.size} and {b.size}")
    if a.form == "atom":
        _bind(a, b)
    elif b.form == "atom":
        _bind(b, a)
    elif a.form == b.form == "product":
        _unify_products(a, b)
        _link(a, b)
    else:
        _unify_segments(a, b)
        _link(a, b) if a.form == "sum" else _link(b, a)


def _bind(atom: Axis, other: Axis) -> None:
    if any(part is atom for part in atoms(other)):
        raise Mismatch(f"an axis of {atom.size} would contain itself")
    atom._link = other
    if atom.pin:
        pin(other, atom.pin)


def _link(a: Axis, b: Axis) -> None:
    a, b = find(a), find(b)
    if a is not b and all(node is not a for node in _nodes(b)):
        a._link = b


def _nodes(axis: Axis) -> Iterator[Axis]:
    rest = [axis]
    while rest:
        axis = find(rest.pop())
        yield axis
        rest.extend(axis.parts)


def _unify_products(a: Axis, b: Axis) -> None:
    left, right = factors(a), factors(b)
    while left and right:
        x, y = find(left[0]), find(right[0])
        if x.form == "product" or y.form == "product":
            # An earlier step of this loop refined it: go on with its factors.
            left[:1], right[:1] = factors(x), factors(y)
        elif x.size == y.size:
            unify(left.pop(0), right.pop(0))
        elif x.size > y.size:
            head, left[0] = split(x, y.size)
            unify(head, right.pop(0))
        else:
            head, right[0] = split(y, x.size)
            unify(left.pop(0), head)


def _unify_segments(a: Axis, b: Axis) -> None:
    """Cut both at the union of their boundaries until these agree, then unify in pairs."""
    while boundaries(a) != boundaries(b):
        edges = sorted({*boundaries(a), *boundaries(b)})
        cut(a, edges)
        cut(b, edges)
    left, right = segments(a), segments(b)
    if len(left) == 1:
        raise Mismatch(f"a sum and a product of {a.size} without a common boundary")
    for x, y in zip(left, right, strict=True):
        unify(x, y)
