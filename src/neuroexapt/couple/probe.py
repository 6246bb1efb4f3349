"""The last word on a map: run the model with every free width resized, and compare.

Rules see operators, not the Python numbers that user code writes into them. So the model is
run once more with all free widths grown, each by its own amount, and every operator's output
must have exactly the size its axes predict. Where it has not, a module attribute that repeats
the width is looked for (``self.heads``); if setting it makes the run go through, it is bound
to the width, else the width is pinned with the line that holds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from torch import nn

from neuroexapt.capture import Call, RunFailure, Trace, capture
from neuroexapt.capture.attributes import Attribute
from neuroexapt.capture.trace import same_computation
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis, find
from neuroexapt.couple.marks import Bind
from neuroexapt.couple.site import Draft
from neuroexapt.couple.solve import call_axes

_MOST_RUNS = 150
_STEPS = (1, 3, 2, 5, 4, 7, 6)  # neighbours grow by unlike amounts, so that a mix-up shows


@dataclass(frozen=True)
class Conflict:
    """The first operator of a resized run that did not do what its axes predict."""

    trace: int
    call: int
    axes: tuple[Axis, ...]
    detail: str

    @property
    def position(self) -> tuple[int, int]:
        return self.trace, self.call


@dataclass
class Prober:
    """Finds and resolves conflicts until the resized run goes through."""

    model: nn.Module
    example: tuple[tuple[Any, ...], Mapping[str, Any]]
    traces: tuple[Trace, ...]
    draft: Draft
    end: tuple[int, int] = (1 << 30, 0)
    # The last run of the first trace with other sizes: what it called, and the sizes.
    resized: tuple[Call, ...] = ()
    runs: int = 0
    sizes: Mapping[Axis, int] = field(default_factory=dict)

    @cached_property
    def unlike(self) -> tuple[Trace, ...]:
        """The runs that differ: where both modes are one computation, one of them tells of both."""
        return self.traces[:1] if same_computation(self.traces) else self.traces

    def settle(self) -> None:
        """Bind attributes and pin widths until a run with all free widths resized agrees."""
        while self.free_atoms():
            conflict = self.first_conflict()
            if conflict is None:
                return
            if self.runs > _MOST_RUNS:  # a forward that runs otherwise each time, say
                for atom in self.free_atoms():
                    algebra.pin(atom, f"not settled in {_MOST_RUNS} runs: {conflict.detail[:80]}")
                return
            self._resolve(conflict)

    def free_atoms(self) -> list[Axis]:
        """The atoms that may change and live in a parameter, in order of appearance."""
        found: dict[Axis, None] = {}
        for dims in self.draft.parameters.values():
            for axis in dims:
                found.update((atom, None) for atom in algebra.atoms(axis) if not atom.pin)
        return list(found)

    def first_conflict(
        self,
        held: Iterable[Axis] = (),
        binds: Sequence[Bind] = (),
        alike: Mapping[Axis, Axis] | None = None,
    ) -> Conflict | None:
        """Resize every free atom but those held, run, and return the first disagreement.

        ``alike`` names atoms that grow as much as another one.
        """
        self.runs += 1
        kept = set(held)
        atoms = [atom for atom in self.free_atoms() if atom not in kept]
        sizes = self._grown(atoms)
        sizes.update((atom, sizes.get(other, other.size)) for atom, other in (alike or {}).items())
        shapes = self._shapes(sizes)
        values = attribute_values([*self.draft.binds, *binds], sizes)
        for number, trace in enumerate(self.unlike):
            conflict = self._compare(number, trace, shapes, values, sizes)
            if conflict is not None:
                return conflict
        return None

    def _grown(self, atoms: Sequence[Axis]) -> dict[Axis, int]:
        multiples = self.draft.multiple_of()
        return {
            atom: atom.size + _STEPS[i % len(_STEPS)] * multiples.get(atom, 1)
            for i, atom in enumerate(atoms)
        }

    def _shapes(self, sizes: Mapping[Axis, int]) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(predicted(axis, sizes) for axis in dims)
            for name, dims in self.draft.parameters.items()
        }

    def _compare(
        self,
        number: int,
        trace: Trace,
        shapes: Mapping[str, tuple[int, ...]],
        values: Mapping[Attribute, Any],
        sizes: Mapping[Axis, int],
    ) -> Conflict | None:
        args, kwargs = self.example
        try:
            other = capture(
                self.model, args, kwargs, shapes=shapes, attributes=values, training=trace.training
            )
            calls, failure = other.calls, ""
        except RunFailure as stopped:
            calls, failure = stopped.calls, str(stopped)
        if number == 0:
            self.resized, self.sizes = tuple(calls), sizes
        free = set(self.free_atoms())
        for index, (call, new) in enumerate(zip(trace.calls, calls, strict=False)):
            if call.op != new.op or len(call.outputs) != len(new.outputs):
                return self._blame(number, index, f"{new.op} took the place of {call.op}")
            wrong = self._wrong_axes(call, new, sizes, free)
            if wrong:
                return Conflict(number, index, tuple(wrong), "another size came out")
        if len(calls) != len(trace.calls) or failure:
            last = min(len(calls), len(trace.calls) - 1)
            return self._blame(number, last, failure or "another number of operators ran")
        return None

    def _wrong_axes(
        self, call: Call, new: Call, sizes: Mapping[Axis, int], free: set[Axis]
    ) -> list[Axis]:
        wrong = []
        for ref, got in zip(call.outputs, new.outputs, strict=True):
            dims = self.draft.dims[ref]
            if len(got.shape) != len(dims):
                return list(dims)
            for axis, size in zip(dims, got.shape, strict=True):
                # A size that user code computes and no parameter or contract has may be any.
                if size != predicted(axis, sizes) and all(
                    atom.pin or atom in free for atom in algebra.atoms(axis)
                ):
                    wrong.append(axis)
        return wrong

    def _blame(self, number: int, index: int, detail: str) -> Conflict:
        call = self.traces[number].calls[index]
        return Conflict(number, index, tuple(call_axes(call, self.draft)), detail)

    def _resolve(self, conflict: Conflict) -> None:
        call = self.traces[conflict.trace].calls[conflict.call]
        free = self.free_atoms()
        is_free = set(free)
        seen = dict.fromkeys(a for axis in conflict.axes for a in algebra.atoms(axis))
        suspects = [atom for atom in seen if atom in is_free]
        if self._bind(call, conflict, suspects) or self._join(call, conflict, suspects):
            return
        culprits = self._culprits(conflict, suspects)
        if not culprits:
            # An assertion may speak of a tensor that the operator beside it does not touch.
            culprits = self._culprits(conflict, free)
            if self._bind(call, replace(conflict, axes=self._around(culprits)), culprits):
                return
        for culprit in culprits or free:
            self._pin_alike(call, culprit, conflict.detail, is_free)

    def _bind(self, call: Call, conflict: Conflict, suspects: Sequence[Axis]) -> bool:
        """Bind the first attribute that helps; the other suspects may need one of their own."""
        for bind in self._candidate_binds(call, conflict):
            others = [a for a in suspects if a not in set(algebra.atoms(bind.axes[0]))]
            if self._helps(conflict, held=others, binds=[bind]):
                self._bind_alike(call, bind, set(self.free_atoms()))
                return True
        return False

    def _around(self, culprits: Iterable[Axis]) -> tuple[Axis, ...]:
        """The axes of parameters that are made of these atoms."""
        made = set(culprits)
        axes = (find(axis) for dims in self.draft.parameters.values() for axis in dims)
        return tuple(dict.fromkeys(a for a in axes if not made.isdisjoint(algebra.atoms(a))))

    def _culprits(self, conflict: Conflict, atoms: list[Axis]) -> list[Axis]:
        """A minimal part of these atoms that removes the conflict if held (delta debugging)."""
        if not atoms or not self._helps(conflict, held=atoms):
            return []
        chunk = (len(atoms) + 1) // 2
        while chunk:
            start = 0
            while start < len(atoms):
                rest = atoms[:start] + atoms[start + chunk :]
                if rest and self._helps(conflict, held=rest):
                    atoms = rest
                else:
                    start += chunk
            chunk //= 2
        return atoms

    def _helps(
        self,
        conflict: Conflict,
        held: Sequence[Axis] = (),
        binds: Sequence[Bind] = (),
        alike: Mapping[Axis, Axis] | None = None,
    ) -> bool:
        after = self.first_conflict(held, binds, alike)
        return (after.position if after else self.end) > conflict.position

    def _candidate_binds(self, call: Call, conflict: Conflict) -> Iterator[Bind]:
        """Attributes, from the calling module outwards, whose number equals a size in conflict."""
        known = {(bind.module, bind.attribute) for bind in self.draft.binds}
        axes = _sizes_in(conflict.axes, set(self.free_atoms()))
        for path in _outwards(call.module):
            for name, value in _integers(self.model.get_submodule(path)):
                if (path, name) not in known:
                    for axis in axes:
                        if axis.size == value:
                            yield Bind(path, name, (axis,))

    def _join(self, call: Call, conflict: Conflict, suspects: list[Axis]) -> bool:
        """One number for two widths (``head_dim`` of keys and of values): make them one."""
        around = set(_outwards(call.module))
        for bind in self.draft.binds:
            bound = find(bind.axes[0])
            if bind.module not in around or bind.is_tuple or bound.form != "atom" or bound.pin:
                continue
            for atom in suspects:
                if atom.size != bound.size or atom is bound:
                    continue
                others = [a for a in suspects if a not in (atom, bound)]
                if self._helps(conflict, held=others, alike={atom: bound}):
                    self._join_alike(call, bind, atom, set(self.free_atoms()))
                    return True
        return False

    def _join_alike(self, call: Call, bind: Bind, atom: Axis, free: set[Axis]) -> None:
        """Join here, and in every module that runs the same line with the same number."""
        place = self._place_in(call, atom, free)
        bound = {(b.module, b.attribute): b.axes[0] for b in self.draft.binds if not b.is_tuple}
        pairs = [(atom, find(bind.axes[0]))]
        for other in self._same_line(call):
            axis = self._at(other, place, free)
            partner = bound.get((_owner(call, bind, other), bind.attribute))
            if axis in free and partner is not None and find(partner) in free:
                pairs.append((axis, find(partner)))
        for a, b in pairs:
            if a.size == b.size:
                algebra.unify(a, b)

    def _bind_alike(self, call: Call, bind: Bind, free: set[Axis]) -> None:
        """Bind here, and in every module that runs the same line with the same number."""
        self.draft.binds.append(bind)
        kind = type(self.model.get_submodule(bind.module))
        place = self._place_in(call, bind.axes[0], free)
        bound = {(known.module, known.attribute) for known in self.draft.binds}
        for other in self._same_line(call):
            path = _owner(call, bind, other)
            if (path, bind.attribute) in bound:
                continue
            axis = self._at(other, place, free)
            module = self.model.get_submodule(path)
            if axis is None or type(module) is not kind:
                continue
            if getattr(module, bind.attribute) == axis.size:
                self.draft.binds.append(Bind(path, bind.attribute, (axis,)))
                bound.add((path, bind.attribute))

    def _pin_alike(self, call: Call, suspect: Axis, detail: str, free: set[Axis]) -> None:
        """Pin here, and in every other run of the same line."""
        place = self._place_in(call, suspect, free)
        algebra.pin(suspect, _reason(call, detail))
        for other in self._same_line(call):
            axis = self._at(other, place, free)
            if axis is not None:
                algebra.pin(axis, _reason(other, detail))

    def _same_line(self, call: Call) -> Iterator[Call]:
        line = call.op, call.source, _pattern(call.module)
        if call.source is not None:
            for trace in self.traces:
                for other in trace.calls:
                    # All operators inside a torch.nn layer share the line that calls the layer.
                    if (other.op, other.source, _pattern(other.module)) == line:
                        yield other

    def _place_in(self, call: Call, axis: Axis, free: set[Axis]) -> tuple[int, int] | None:
        for number, candidate in enumerate(call_axes(call, self.draft)):
            for depth, part in enumerate(_sizes_in([candidate], free)):
                if find(part) is find(axis):
                    return number, depth
        return None

    def _at(self, call: Call, place: tuple[int, int] | None, free: set[Axis]) -> Axis | None:
        axes = call_axes(call, self.draft)
        if place is None or place[0] >= len(axes):
            return None
        parts = _sizes_in([axes[place[0]]], free)
        return parts[place[1]] if place[1] < len(parts) else None


def _pattern(path: str) -> str:
    """A module path without its numbers: alike for the same part of each repeated block."""
    return re.sub(r"\d+", "#", path)


def _owner(call: Call, bind: Bind, other: Call) -> str:
    """The module that is to another call what the bind's module is to this one."""
    if not bind.module:
        return ""
    depth = call.module.count(".") - bind.module.count(".")
    return ".".join(other.module.split(".")[: -depth or None])


def predicted(axis: Axis, sizes: Mapping[Axis, int]) -> int:
    """The size of an axis when some atoms have other sizes."""
    axis = find(axis)
    if axis.form == "atom":
        return sizes.get(axis, axis.size)
    parts = [predicted(part, sizes) for part in axis.parts]
    return prod(parts) if axis.form == "product" else sum(parts)


def attribute_values(binds: Iterable[Bind], sizes: Mapping[Axis, int]) -> dict[Attribute, Any]:
    """What each bound attribute must hold when some atoms have other sizes."""
    values: dict[Attribute, Any] = {}
    for bind in binds:
        now = tuple(predicted(axis, sizes) for axis in bind.axes)
        if now != tuple(axis.size for axis in bind.axes):
            values[Attribute(bind.module, bind.attribute)] = now if bind.is_tuple else now[0]
    return values


def _sizes_in(axes: Iterable[Axis], free: set[Axis]) -> list[Axis]:
    """The axes and their atoms that contain something free, without repetition."""
    found: dict[Axis, None] = {}
    for axis in axes:
        for part in (find(axis), *algebra.atoms(axis)):
            if any(atom in free for atom in algebra.atoms(part)):
                found[part] = None
    return list(found)


def _outwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, value in vars(module).items():
        if type(value) is int and value > 1 and not name.startswith("_"):
            yield name, value


def _reason(call: Call, detail: str) -> str:
    short = detail.splitlines()[0][:160]
    return f"the forward holds its size as a number ({call.place}): {short}"
