"""Sizes that user code computes: each number given to an operator equals the size of an axis.

``x.view(B, T, self.heads, C // self.heads)`` says that one axis is as long as the attribute, and
that it times the next is as long as C. These equations are solved in the algebra: an attribute
met for the first time is bound to its axis; two axes that must be of one size become one.
Numbers without an origin (literals in a line) are left to the resized run (``probe.py``).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from neuroexapt.capture import Call, Trace
from neuroexapt.capture.attributes import Attribute
from neuroexapt.capture.trace import Combined, OfAttribute, OfSize, Origin
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis, Mismatch, find
from neuroexapt.couple.marks import Bind
from neuroexapt.couple.site import Draft

# A size as a sum of products of atoms; atoms that keep their size count as numbers.
Polynomial: TypeAlias = dict[tuple[Axis, ...], int]

# The argument that lists the sizes of the output.
_SHAPE_AT = {
    "aten.view": 1,
    "aten._unsafe_view": 1,
    "aten.reshape": 1,
    "aten.expand": 1,
    "aten.empty": 0,
    "aten.full": 0,
    "aten.ones": 0,
    "aten.rand": 0,
    "aten.randn": 0,
    "aten.zeros": 0,
    "aten.new_empty": 1,
    "aten.new_full": 1,
    "aten.new_ones": 1,
    "aten.new_zeros": 1,
}


@dataclass(frozen=True)
class Equation:
    """An axis is as long as a number that user code computed."""

    axis: Axis
    origin: Origin
    call: Call


def relate(traces: tuple[Trace, ...], draft: Draft) -> None:
    """Solve the equations of all traces; bindings go to ``draft.binds``.

    Equations that do not determine anything (an attribute never tied to an axis) are left.
    """
    found = [
        equation
        for trace in traces
        for call in trace.calls
        if call.origins
        for equation in _equations(call, draft)
    ]
    solver = _Solver(draft)
    # What an attribute stands for is clearest where it is used alone.
    found.sort(key=lambda equation: isinstance(equation.origin, Combined))
    for equation in found:
        solver.solve(equation)


def _equations(call: Call, draft: Draft) -> Iterator[Equation]:
    if any(ref not in draft.dims for ref in (*call.inputs, *call.outputs)):
        return
    at = _SHAPE_AT.get(call.op)
    if at is not None:
        yield from _shape_equations(call, draft, at)
    elif call.op in ("aten.split", "aten.split_with_sizes"):
        dim = int(call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0))
        for number, out in enumerate(call.outputs):
            place = (1,) if call.op == "aten.split" else (1, number)
            if place in call.origins and out.shape[dim] == _at(call, place):
                yield Equation(draft.dims[out][dim], call.origins[place], call)
    elif call.op == "aten.slice":
        yield from _slice_equations(call, draft)


def _shape_equations(call: Call, draft: Draft, at: int) -> Iterator[Equation]:
    out = draft.dims[call.outputs[0]]
    for place, origin in call.origins.items():
        if place[0] != at or len(place) != 2 or out[place[1]].size != _at(call, place):
            continue
        if call.op == "aten.expand" and _passes(call, place[1]):
            continue
        yield Equation(out[place[1]], origin, call)


def _passes(call: Call, dim: int) -> bool:
    """Whether a dimension of an expansion is the input's own."""
    before, after = call.inputs[0].shape, call.outputs[0].shape
    own = dim - (len(after) - len(before))
    return own >= 0 and before[own] == after[dim]


def _at(call: Call, place: tuple[int, ...]) -> int:
    value = call.args[place[0]]
    return int(value if len(place) == 1 else value[place[1]])


def _slice_equations(call: Call, draft: Draft) -> Iterator[Equation]:
    x, dim = call.inputs[0], int(call.args[1] if len(call.args) > 1 else 0)
    whole = draft.dims[x][dim]
    for place in ((2,), (3,)):
        if place in call.origins and 0 < _at(call, place) < whole.size:
            head = _prefix(whole, _at(call, place))
            if head is not None:
                yield Equation(head, call.origins[place], call)


def _prefix(axis: Axis, size: int) -> Axis | None:
    """The first positions of an axis as an axis; None where it has no boundary there."""
    total, pieces = 0, []
    for piece in algebra.segments(axis):
        if total == size:
            break
        total += piece.size
        pieces.append(piece)
    if total == size:
        return algebra.concat(pieces)
    _, *inner = algebra.factors(axis)
    step = algebra.product(inner)
    return step if inner and step.size == size else None


@dataclass
class _Solver:
    draft: Draft
    bound: dict[Attribute, Axis] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for bind in self.draft.binds:
            if not bind.is_tuple:
                self.bound.setdefault(Attribute(bind.module, bind.attribute), bind.axes[0])

    def solve(self, equation: Equation) -> None:
        axis, origin = equation.axis, equation.origin
        known = self.size_of(origin)
        if known is not None and known == size_of(axis):
            return
        try:
            target = self.axis_of(origin, axis)
            if target is not None:
                algebra.unify(axis, target)
        except Mismatch as mismatch:
            self._pin(equation, str(mismatch))

    def _pin(self, equation: Equation, why: str) -> None:
        reason = f"its size is computed ({equation.call.place}), and cannot follow: {why}"
        algebra.pin(equation.axis, reason)
        for axis in self._mentioned(equation.origin):
            algebra.pin(axis, reason)

    def _mentioned(self, origin: Origin) -> Iterator[Axis]:
        if isinstance(origin, Combined):
            yield from self._mentioned(origin.left)
            yield from self._mentioned(origin.right)
        elif isinstance(origin, OfAttribute):
            if origin.at in self.bound:
                yield self.bound[origin.at]
        elif isinstance(origin, OfSize) and origin.ref in self.draft.dims:
            yield self.draft.dims[origin.ref][origin.dim]

    def size_of(self, origin: Origin) -> Polynomial | None:
        """The number as a polynomial in atoms; None while an attribute in it is not bound."""
        if isinstance(origin, int):
            return {(): origin} if origin else {}
        if isinstance(origin, OfAttribute):
            return size_of(self.bound[origin.at]) if origin.at in self.bound else None
        if isinstance(origin, OfSize):
            dims = self.draft.dims.get(origin.ref)
            return size_of(dims[origin.dim]) if dims else None
        left, right = self.size_of(origin.left), self.size_of(origin.right)
        if left is None or right is None:
            return None
        if origin.sign == "*":
            return _times(left, right)
        if origin.sign == "//":
            return _divided(left, right)
        return _plus(left, right, 1 if origin.sign == "+" else -1)

    def axis_of(self, origin: Origin, against: Axis | None = None) -> Axis | None:
        """An axis as long as the number; None where it is none that an axis can follow.

        ``against`` is the axis that it will be unified with: it says in which order factors go.

        Raises:
            Mismatch: the axes of its parts do not fit together.
        """
        if isinstance(origin, int):
            return Axis(origin, pin="a number in the code") if origin > 0 else None
        if isinstance(origin, OfAttribute):
            if origin.at not in self.bound:
                self.bound[origin.at] = Axis(origin.value)
                bind = Bind(origin.at.module, origin.at.name, (self.bound[origin.at],))
                self.draft.binds.append(bind)
            return self.bound[origin.at]
        if isinstance(origin, OfSize):
            dims = self.draft.dims.get(origin.ref)
            return dims[origin.dim] if dims else None
        return self._combined(origin, against)

    def _combined(self, origin: Combined, against: Axis | None) -> Axis | None:
        left, right = self.axis_of(origin.left), self.axis_of(origin.right)
        if left is None or right is None:
            return None
        if origin.sign == "*":
            return algebra.product(_in_order(left, right, against))
        if origin.sign == "+":
            return algebra.concat([left, right])
        if origin.sign == "//":
            return self._quotient(left, right)
        head, *rest = algebra.cut(left, [right.size])
        algebra.unify(head, right)
        return algebra.concat(rest)

    @staticmethod
    def _quotient(whole: Axis, divisor: Axis) -> Axis | None:
        if whole.size % divisor.size:
            return None
        outer, inner = algebra.split(whole, divisor.size)
        algebra.unify(outer, divisor)
        return inner


def _in_order(left: Axis, right: Axis, against: Axis | None) -> list[Axis]:
    """Two factors in the order in which another axis has them: a product of numbers has none."""
    if against is not None and find(against).form == "product":
        parts = [find(part) for part in algebra.factors(against)]
        if parts[0] is not find(left) and (parts[0] is find(right) or _leads(right, parts)):
            return [right, left]
    return [left, right]


def _leads(axis: Axis, parts: list[Axis]) -> bool:
    """Whether the axis is as long as the leading factors, and the other one is not."""
    sizes = list(itertools.accumulate((part.size for part in parts), operator.mul))
    return axis.size in sizes and sizes[-1] // axis.size not in sizes


def size_of(axis: Axis) -> Polynomial:
    """The size of an axis as a polynomial in its free atoms.

    Example:
        >>> size_of(algebra.product([Axis(3, pin="why"), Axis(4)])).values()
        dict_values([3])
    """
    axis = find(axis)
    if axis.form == "atom":
        return {(): axis.size} if axis.pin else {(axis,): 1}
    parts = [size_of(part) for part in axis.parts]
    total = parts[0]
    for part in parts[1:]:
        total = _times(total, part) if axis.form == "product" else _plus(total, part, 1)
    return total


def _times(left: Polynomial, right: Polynomial) -> Polynomial:
    total: Polynomial = {}
    for a, m in left.items():
        for b, n in right.items():
            atoms = tuple(sorted((*a, *b), key=lambda atom: atom.serial))
            total[atoms] = total.get(atoms, 0) + m * n
    return {atoms: n for atoms, n in total.items() if n}


def _plus(left: Polynomial, right: Polynomial, sign: int) -> Polynomial:
    total = dict(left)
    for atoms, n in right.items():
        total[atoms] = total.get(atoms, 0) + sign * n
    return {atoms: n for atoms, n in total.items() if n}


def _divided(whole: Polynomial, divisor: Polynomial) -> Polynomial | None:
    """The quotient where the divisor is one product that divides every term."""
    if len(divisor) != 1:
        return None
    (atoms, n), total = next(iter(divisor.items())), {}
    for term, m in whole.items():
        rest = list(term)
        for atom in atoms:
            if atom not in rest:
                return None
            rest.remove(atom)
        if m % n:
            return None
        total[tuple(rest)] = m // n
    return total
