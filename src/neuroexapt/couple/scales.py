"""Factors that user code computes from sizes: ``scores / math.sqrt(self.head_dim)``.

A dot product divided by the root of its width keeps its logits when Widen and Narrow scale the
queries. Any other number that follows a width changes what the model computes as soon as the
width changes; it is noted as a mixer of that width. No operator shows where such a number comes
from, but the run with every width at another size does: each width grows by a ratio of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import isclose

from neuroexapt.capture import Call
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis, find
from neuroexapt.couple.probe import Prober, predicted
from neuroexapt.couple.site import Mix

_FACTORS = {"aten.mul", "aten.div", "aten.mul_", "aten.div_"}
_POWERS = (-0.5, 0.5, -1.0, 1.0, -0.25, 0.25)


@dataclass(frozen=True)
class Moving:
    """A factor of a call that was another one in the run with other sizes."""

    call: Call
    ratio: float


def note_scales(prober: Prober) -> None:
    """Find the dot products that follow their width, and the widths that other factors follow."""
    moving = list(_moving(prober))
    modules = {factor.call.module for factor in moving}
    mixes = prober.draft.mixes
    for number, mix in enumerate(mixes):
        if mix.kind == "dot" and mix.data["scale"] == "free" and mix.module in modules:
            mixes[number] = replace(mix, data={**mix.data, "scale": "inverse_sqrt"})
    for factor in moving:
        for atom in dict.fromkeys(_followed(prober, factor)):
            mixes.append(Mix(atom, "number", factor.call.module, factor.call.place, {}))


def _moving(prober: Prober) -> Iterator[Moving]:
    for call, new in zip(prober.traces[0].calls, prober.resized, strict=False):
        old, now = _factor(call), _factor(new)
        if old and now and old != now and call.op in _FACTORS and now / old > 0:
            yield Moving(call, now / old)


def _factor(call: Call) -> float | None:
    """The Python number a product or quotient was made with."""
    other = call.args[1] if len(call.args) > 1 else None
    return float(other) if isinstance(other, (int, float)) else None


def _followed(prober: Prober, factor: Moving) -> Iterator[Axis]:
    """Atoms of the axes near the call whose growth explains the factor's, but for its own dots."""
    dots = {
        atom
        for mix in prober.draft.mixes
        if mix.kind == "dot" and mix.module == factor.call.module
        for atom in algebra.atoms(mix.axis)
        if mix.data["scale"] == "inverse_sqrt"
    }
    for axis in _near(prober, factor.call):
        ratio = predicted(axis, prober.sizes) / axis.size
        if ratio != 1 and any(isclose(factor.ratio, ratio**p, rel_tol=1e-9) for p in _POWERS):
            yield from (a for a in algebra.atoms(axis) if not a.pin and a not in dots)


def _near(prober: Prober, call: Call) -> Iterable[Axis]:
    """What the call works on, and what the numbers of its module and those around it stand for."""
    found: dict[Axis, None] = {}
    for ref in call.inputs:
        found.update((find(axis), None) for axis in prober.draft.dims.get(ref, ()))
    for bind in prober.draft.binds:
        if not bind.is_tuple and f"{call.module}.".startswith(
            f"{bind.module}." if bind.module else ""
        ):
            found[find(bind.axes[0])] = None
    return found
