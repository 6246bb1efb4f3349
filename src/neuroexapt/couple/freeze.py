"""Turn a settled draft into the frozen AxisMap: name the atoms, list their appearances."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from neuroexapt.capture import TensorRef, Trace
from neuroexapt.capture.masks import is_mask
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis, find
from neuroexapt.couple.axismap import (
    Appearance,
    Attribute,
    AxisMap,
    Mixer,
    ModuleAxes,
    Pinned,
    Side,
    Width,
)
from neuroexapt.couple.index import Expr, Leaf, Product, Sum
from neuroexapt.couple.marks import KEPT, LOST, POSTED, Bind, Dims, Join, Label, Mark, Mix
from neuroexapt.couple.site import Draft

# Attributes that repeat a whole channel count say nothing that ".out" does not.
_PLAIN = {"in_channels", "out_channels", "in_features", "out_features", "num_features"} | {
    "embedding_dim",
    "input_size",
    "normalized_shape",
    "num_channels",
}
_RANK = {"producer": 0, "elementwise": 1, "consumer": 2}


@dataclass
class _Names:
    """Atom to name; names are unique, and given in order of the parameters."""

    of: dict[Axis, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def give(self, atom: Axis, wish: str) -> None:
        name, number = wish, 1
        while name in self.taken:
            number += 1
            name = f"{wish}.{number}"
        self.of[atom] = name
        self.taken.add(name)

    def expr(self, axis: Axis) -> Expr:
        axis = find(axis)
        if axis.form == "atom":
            return Leaf(self.of.get(axis, f"axis{axis.serial}"), axis.size)
        parts = tuple(self.expr(part) for part in axis.parts)
        return Product(parts) if axis.form == "product" else Sum(parts)


def freeze(
    draft: Draft, traces: tuple[Trace, ...], parameters: tuple[str, ...], notes: tuple[str, ...]
) -> AxisMap:
    """Name every atom of every parameter and write the map down."""
    _pin_unused(draft, traces, parameters)
    appearances = _appearances(draft)
    _pin_idle(appearances)
    _pin_squares(draft)
    names = _name(draft, appearances)
    mixers = _mixers(draft, names)
    multiples, leasts = draft.multiple_of(), draft.least_of()
    widths, pinned = {}, {}
    for atom, name in names.of.items():
        where = tuple(appearances[atom])
        if atom.pin:
            pinned[name] = Pinned(name, atom.size, atom.pin, where)
        else:
            mixed = tuple(mixers.get(atom, ()))
            widths[name] = Width(
                name, atom.size, where, mixed, multiples.get(atom, 1), leasts.get(atom, 1)
            )
    return AxisMap(
        widths=widths,
        pinned=pinned,
        unknown={op: tuple(paths) for op, paths in draft.unknown.items()},
        tensors={n: tuple(map(names.expr, dims)) for n, dims in draft.parameters.items()},
        attributes=tuple(
            Attribute(b.module, b.attribute, tuple(map(names.expr, b.axes)), b.is_tuple)
            for b in _distinct(draft.binds)
        ),
        modules=_modules(draft, traces, names),
        traces=traces,
        parameters=parameters,
        notes=notes,
        offsets=_offsets(traces),
    )


def _offsets(traces: Iterable[Trace]) -> dict[str, float]:
    """Numbers that the forward adds to a parameter before it uses it."""
    found: dict[str, float] = {}
    for trace in traces:
        names: dict[TensorRef, list[str]] = {}
        for name, ref in trace.tensors.items():
            names.setdefault(ref, []).append(name)
        for call in trace.calls:
            if call.op == "aten._to_copy" and call.inputs[0] in names:
                names[call.outputs[0]] = names[call.inputs[0]]
            elif call.op == "aten.add" and isinstance(call.args[1], (int, float)):
                found.update((name, float(call.args[1])) for name in names.get(call.inputs[0], ()))
    return found


def _distinct(binds: Iterable[Bind]) -> list[Bind]:
    """One bind per attribute: both runs of a model report the same ones."""
    return list({(bind.module, bind.attribute): bind for bind in reversed(list(binds))}.values())


def _pin_unused(draft: Draft, traces: Iterable[Trace], parameters: Sequence[str]) -> None:
    used = {ref for trace in traces for call in trace.calls for ref in call.inputs}
    for name, dims in draft.parameters.items():
        if any(trace.tensors[name] in used for trace in traces):
            continue
        for axis in dims:
            algebra.pin(axis, f"'{name}' is not used in this forward")
        if name in parameters and not _is_shift(draft, name):  # a buffer reads nothing either
            _pin_readers_choice(draft, name, dims[min(1, len(dims) - 1) :][:1])


def _is_shift(draft: Draft, name: str) -> bool:
    """The bias of a layer whose weight says what it reads."""
    owner, _, leaf = name.rpartition(".")
    weight = draft.parameters.get(f"{owner}.weight".lstrip("."), ())
    return leaf == "bias" and len(weight) > 1


def _pin_readers_choice(draft: Draft, name: str, reads: Dims) -> None:
    """A branch not taken cannot be followed: what it may read by its size stays as it is."""
    sizes = {axis.size for axis in reads}
    for dims in draft.parameters.values():
        for axis in dims:
            if find(axis).form == "atom" and axis.size in sizes:
                algebra.pin(axis, f"'{name}', in a branch that this forward skips, may read it")


def _pin_idle(appearances: Mapping[Axis, list[Appearance]]) -> None:
    """A remainder that a slice leaves, say: no layer makes these positions or reads them."""
    for atom, places in appearances.items():
        if all(place.roles == {"elementwise"} for place in places):
            algebra.pin(atom, "no layer produces it or reads it")


def _pin_squares(draft: Draft) -> None:
    """An atom that is two factors of one dimension (a Gram matrix, flattened) has no single
    unit at a position."""
    for dims in draft.parameters.values():
        for axis in dims:
            parts = [find(part) for part in algebra.factors(axis)]
            for part in parts:
                if parts.count(part) > 1:
                    algebra.pin(part, "twice a factor of one dimension")


def _appearances(draft: Draft) -> dict[Axis, list[Appearance]]:
    """For each atom of a parameter its places, each with the roles it was seen in."""
    told: dict[tuple[str, int, Axis], list[Mark]] = {}
    for mark in draft.marks:
        for atom in set(algebra.atoms(mark.axis)):
            told.setdefault((mark.label.name, mark.label.dim, atom), []).append(mark)
    found: dict[Axis, list[Appearance]] = {}
    first: dict[int, str] = {}  # tied names share their dims; marks are told of the first name
    for name, dims in draft.parameters.items():
        known = first.setdefault(id(dims), name) if dims else name
        for dim, axis in enumerate(dims):
            for atom in dict.fromkeys(algebra.atoms(axis)):
                marks = told.get((known, dim, atom), [])
                roles = frozenset(mark.role for mark in marks) or frozenset(["elementwise"])
                fill = marks[0].fill if marks else "one" if is_mask(name) else "mean"
                reads = frozenset((label.name, label.dim) for m in marks for label in m.reads)
                read = [m.entry.taken for m in marks if m.role == "consumer"]
                place = Appearance(name, dim, roles, fill, reads, bool(read) and all(read))
                found.setdefault(atom, []).append(place)
    return found


def _name(draft: Draft, appearances: Mapping[Axis, list[Appearance]]) -> _Names:
    names = _Names()
    bound = {
        find(bind.axes[0]): f"{bind.module}.{bind.attribute}".lstrip(".")
        for bind in reversed(draft.binds)  # the first to bind an atom names it
        if bind.attribute not in _PLAIN
        and len(bind.axes) == 1
        and find(bind.axes[0]).form == "atom"
    }
    dots = {atom for mix in draft.mixes if mix.kind == "dot" for atom in algebra.atoms(mix.axis)}
    for atom, places in appearances.items():
        first = min(places, key=lambda place: (is_mask(place.tensor), _RANK[place.role]))
        owner = first.tensor.rpartition(".")[0]
        whole = find(draft.parameters[first.tensor][first.dim]) is atom
        if first.role != "producer":
            wish = f"{owner}.in" if first.role == "consumer" else f"{first.tensor}.dim{first.dim}"
        elif whole:
            wish = f"{owner}.out"
        elif atom in bound:
            wish = bound[atom]
        elif atom.pin:  # a number of gates or of equal parts: ".out" is for what is free
            wish = f"{first.tensor}.dim{first.dim}"
        else:
            wish = f"{owner}.head_size" if atom in dots else f"{owner}.out"
        names.give(atom, wish.lstrip("."))
    return names


def _mixers(draft: Draft, names: _Names) -> dict[Axis, list[Mixer]]:
    found: dict[Axis, dict[Mixer, None]] = {}
    for mix in draft.mixes:
        mixer = _mixer(draft, mix, names)
        for atom in dict.fromkeys(algebra.atoms(mix.axis)):
            found.setdefault(atom, {})[mixer] = None
    return {atom: list(mixers) for atom, mixers in found.items()}


def _mixer(draft: Draft, mix: Mix, names: _Names) -> Mixer:
    data = mix.data
    mixer = Mixer(
        mix.kind,
        mix.module,
        mix.place,
        over=tuple(names.of[a] for a in dict.fromkeys(algebra.atoms(mix.axis)) if a in names.of),
        makers=frozenset((label.name, label.dim) for label in mix.makers),
        centred=_centred(draft, mix),
        silent=mix.entry.zero,
    )
    if mix.kind == "dot":
        sides = tuple(_sides(draft, data[name]) for name in ("left", "right"))
        return replace(mixer, sides=(sides[0], sides[1]), scale=data["scale"])
    return replace(
        mixer,
        weight=data.get("weight") or frozenset(),
        bias=data.get("bias") or frozenset(),
        eps=float(data.get("eps", 0.0)),
        eps_attribute=data.get("eps_attribute", ""),
    )


def _centred(draft: Draft, mix: Mix) -> str:
    """A maker can set the mean of the whole axis only if it makes the whole axis."""
    wanted = set(algebra.atoms(mix.axis))
    whole = find(mix.axis).form != "sum" and all(
        wanted <= set(algebra.atoms(draft.parameters[label.name][label.dim]))
        for label in mix.makers
    )
    return {KEPT: "yes", POSTED: "evenly", LOST: "no"}[mix.entry.mean] if whole else "no"


def _sides(draft: Draft, labels: Iterable[Label]) -> tuple[Side, ...]:
    made, multiplied = set[tuple[str, int]](), set[tuple[str, int]]()
    for mark in draft.marks:
        if mark.role == "producer":
            made.add((mark.label.name, mark.label.dim))
        elif mark.role == "elementwise" and mark.fill == "mean":
            multiplied.add((mark.label.name, mark.label.dim))
    factors = multiplied - made
    places = dict[tuple[str, int], set[int]]()
    for label in labels:
        places.setdefault((label.name, label.dim), set()).update(_positions(draft, label))
    return tuple(
        Side(name, dim, tuple(sorted(found)), factor=(name, dim) in factors)
        for (name, dim), found in sorted(places.items())
        if found
    )


def _positions(draft: Draft, label: Label) -> list[int]:
    """Positions of the parameter dimension that remain after all steps."""
    whole = draft.parameters[label.name][label.dim]
    kept = list(range(whole.size))
    frame: Axis | None = whole
    places = dict(zip(kept, kept, strict=True))
    for step in label.steps:
        if isinstance(step, Join):
            # Where not every position of the segment is one of ours, where we are is not known.
            frame = step.axis if len(kept) == step.size else None
            places = {position: step.start + number for number, position in enumerate(kept)}
        elif frame is not None:
            on = _positions_on(frame, find(step.axis), step.start, step.stop)
            kept = [position for position in kept if places[position] in on]
    return kept


def _positions_on(whole: Axis, axis: Axis, start: int, stop: int) -> set[int]:
    """Positions of ``whole`` that lie on start..stop of a part; all if the part is not in it."""
    whole = find(whole)
    if whole is axis:
        return set(range(start, stop))
    if whole.form == "product":
        step = whole.size
        for factor in algebra.factors(whole):
            step //= factor.size
            if find(factor) is axis:
                return {p for p in range(whole.size) if start <= p // step % axis.size < stop}
    return set(range(whole.size))


def _modules(draft: Draft, traces: Iterable[Trace], names: _Names) -> dict[str, ModuleAxes]:
    found: dict[str, ModuleAxes] = {}

    def exprs(refs: Iterable[TensorRef]) -> tuple[tuple[Expr, ...], ...]:
        return tuple(tuple(map(names.expr, draft.dims[r])) for r in refs if r in draft.dims)

    for trace in traces:
        for run in trace.runs:
            if run.path not in found:
                found[run.path] = ModuleAxes(exprs(run.inputs), exprs(run.outputs))
    return found
