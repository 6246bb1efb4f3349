"""Numbers that user code computes from sizes: ``scores / math.sqrt(self.head_dim)``.

A dot product divided by the root of its width keeps its logits when Widen and Narrow scale the
queries. Any other number that follows a width changes what the model computes as soon as the
width changes; it is noted as a mixer of that width. No operator shows where such a number comes
from, but the run with every width at another size does: each width grows by a ratio of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isclose, prod

from neuroexapt.capture import Call
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis, find
from neuroexapt.couple.marks import Mix
from neuroexapt.couple.probe import Prober, predicted

_POWERS = (-0.5, 0.5, -1.0, 1.0, -0.25, 0.25)


@dataclass(frozen=True)
class Moving:
    """A number of a call that was another one in the run with other sizes.

    ``factor`` is by how much a product grew with it; None where the number is no factor.
    """

    call: Call
    ratio: float
    factor: float | None


def note_scales(prober: Prober) -> None:
    """Find the dot products that follow their width, and the widths that other numbers follow."""
    moving = list(_moving(prober))
    mixes = prober.draft.mixes
    for number, mix in enumerate(mixes):
        own = [m for m in moving if m.call.module == mix.module]
        if mix.kind == "dot" and mix.data["scale"] == "free" and _by_root(prober, mix, own):
            mixes[number] = replace(mix, data={**mix.data, "scale": "inverse_sqrt"})
    for moved in moving:
        for atom in dict.fromkeys(_followed(prober, moved)):
            mixes.append(Mix(atom, "number", moved.call.module, moved.call.place, {}))


def _by_root(prober: Prober, mix: Mix, moving: list[Moving]) -> bool:
    """Whether the factors of a module make one root of the width for each of its dots."""
    factors = [m.factor for m in moving if m.factor is not None and m.factor > 0]
    dots = [
        m
        for m in prober.draft.mixes
        if (m.kind, m.module) == ("dot", mix.module)
        and not all(atom.pin for atom in algebra.atoms(m.axis))  # as over the tokens
    ]
    ratio = predicted(mix.axis, prober.sizes) / mix.axis.size
    if not factors or ratio == 1:
        return False
    # All runs of the model have told of their dots, the factors are those of one run.
    runs = len(prober.traces)
    together = prod(factors) ** (runs / max(1, len(dots)))
    # One factor a dot, and some for products of constants, which are not counted as dots.
    alike = len(set(factors)) == 1 and len(factors) * runs >= len(dots)
    each = [together, factors[0]] if alike else [together]
    return any(isclose(one, ratio**-0.5, rel_tol=1e-6) for one in each)


def _moving(prober: Prober) -> Iterator[Moving]:
    for call, new in zip(prober.traces[0].calls, prober.resized, strict=False):
        if call.inputs and all(ref in call.constants for ref in call.inputs):
            continue  # still on its way to what it will scale
        for old, now in zip(_numbers(call), _numbers(new), strict=False):
            if old != now and old and now:
                ratio = now / old
                yield Moving(call, ratio, _factor(call, ratio))


def _factor(call: Call, ratio: float) -> float | None:
    op = call.op.rstrip("_")
    if op == "aten.div":
        return 1 / ratio
    scaled = op == "aten.mul" or "scaled_dot_product" in op or op == "aten.baddbmm"
    return ratio if scaled else None


def _numbers(call: Call) -> list[float]:
    """The numbers a call computes with: sizes and places are whole, and no operands."""
    given = [*call.args, *call.kwargs.values()]
    whole = [v for v in call.args[1:] if type(v) is int] if call.pointwise else []
    floats = [v for v in given if type(v) is float]
    constants = [call.constants[v] for v in call.inputs if v in call.constants]
    return [*map(float, whole), *floats, *constants]


def _followed(prober: Prober, number: Moving) -> Iterator[Axis]:
    """Atoms near the call whose growth explains the number's, but for a dot's own root.

    Where none explains it, any of them may be behind it.
    """
    dots = [
        mix.axis
        for mix in prober.draft.mixes
        if mix.kind == "dot"
        and mix.module == number.call.module
        and mix.data["scale"] == "inverse_sqrt"
    ]
    if number.factor and any(_explains(prober, axis, number.ratio) for axis in dots):
        return
    near = _near(prober, number.call)
    explained = [axis for axis in near if _explains(prober, axis, number.ratio)]
    for axis in explained or near:
        yield from (atom for atom in algebra.atoms(axis) if not atom.pin)


def _explains(prober: Prober, axis: Axis, ratio: float) -> bool:
    grown = predicted(axis, prober.sizes) / axis.size
    return grown != 1 and ratio > 0 and any(isclose(ratio, grown**p, rel_tol=1e-6) for p in _POWERS)


def _near(prober: Prober, call: Call) -> list[Axis]:
    """What the call works on, and what the numbers of its module and those around it stand for."""
    found: dict[Axis, None] = {}
    for ref in call.inputs:
        found.update((find(axis), None) for axis in prober.draft.dims.get(ref, ()))
    for bind in prober.draft.binds:
        around = f"{bind.module}." if bind.module else ""
        if not bind.is_tuple and f"{call.module}.".startswith(around):
            found[find(bind.axes[0])] = None
    return list(found)
