"""What an operator rule sees and says: the call, its axes, and the words to couple them.

A rule is a function ``rule(site) -> axes of each output``. It is registered for its
operators with :func:`rule` and lives in the ``rules_*.py`` file of its family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm, prod
from typing import Any, TypeVar

import torch

from neuroexapt.capture import Call, TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis, share
from neuroexapt.couple.marks import Bind, Dims, Entry, Label, Labels, Mark, Mix, joined

Rule = Callable[["Site"], Sequence[Sequence[Axis]]]
Said = TypeVar("Said", bound=Rule)

RULES: dict[str, Rule] = {}

_MOST_LABELS = 32


def rule(*ops: str) -> Callable[[Said], Said]:
    """Register a function as the rule of these operators, any overload of them.

    An operator is named as torch names it, ``"mylib::double"``, or with a dot.

    Example:
        >>> @rule("mylib.double")
        ... def double(site):
        ...     return [site.dims(site.call.args[0])]
        >>> RULES.pop("mylib.double") is double
        True
    """

    def register(function: Said) -> Said:
        for op in ops:
            RULES[op.replace("::", ".")] = function
        return function

    return register


@dataclass
class Draft:
    """All that the rules have said so far; frozen into an AxisMap at the end.

    Attributes:
        numbering: axes whose positions the values of a tensor name (what ``argmax`` gives).
        counts: how often each position of an axis was named, or running sums of that.
        repeated: dimensions along which a tensor repeats one value (what ``expand`` makes).
        entries: what new entries have become, for each dimension of a tensor.
        chance: tensors of random values (the masks of dropout).
        multiples: axes whose size must stay a multiple of a number.
        leasts: axes that must keep at least a number of positions.
        views: tensors that are another tensor's memory, seen in another way.
        taken: tensors whose rows were taken out of a parameter by numbers that the data give.
    """

    parameters: dict[str, Dims] = field(default_factory=dict)
    dims: dict[TensorRef, Dims] = field(default_factory=dict)
    labels: dict[TensorRef, Labels] = field(default_factory=dict)
    weights: set[TensorRef] = field(default_factory=set)
    squares: dict[TensorRef, TensorRef] = field(default_factory=dict)
    numbering: dict[TensorRef, Dims] = field(default_factory=dict)
    counts: dict[TensorRef, Axis] = field(default_factory=dict)
    repeated: dict[TensorRef, frozenset[int]] = field(default_factory=dict)
    views: dict[TensorRef, TensorRef] = field(default_factory=dict)
    taken: set[TensorRef] = field(default_factory=set)
    entries: dict[TensorRef, tuple[Entry, ...]] = field(default_factory=dict)
    chance: set[TensorRef] = field(default_factory=set)
    multiples: list[tuple[Axis, int]] = field(default_factory=list)
    leasts: list[tuple[Axis, int]] = field(default_factory=list)

    def multiple_of(self) -> dict[Axis, int]:
        """What the size of an atom must be a multiple of, where an operator demands it."""
        found: dict[Axis, int] = {}
        for axis, multiple in self.multiples:
            *_, last = algebra.atoms(axis)
            found[last] = lcm(found.get(last, 1), multiple)
        return found

    def least_of(self) -> dict[Axis, int]:
        """The fewest units an atom may have; of a product only the last factor may shrink."""
        found: dict[Axis, int] = {}
        for axis, least in self.leasts:
            *others, last = algebra.atoms(axis)
            needed = {atom: atom.size for atom in others}
            needed[last] = -(-least // prod(needed.values()))
            for atom, size in needed.items():
                found[atom] = max(found.get(atom, 1), size)
        return found

    marks: dict[Mark, None] = field(default_factory=dict)
    mixes: list[Mix] = field(default_factory=list)
    binds: list[Bind] = field(default_factory=list)
    unknown: dict[str, dict[str, None]] = field(default_factory=dict)


class Site:
    """One call under a rule.

    Args:
        call: the recorded operator call.
        draft: where the couplings are collected.
        fields: attributes of the module that made the call, by name (for bindings).
    """

    def __init__(self, call: Call, draft: Draft, fields: Mapping[str, Any]) -> None:
        self.call = call
        self.draft = draft
        self.fields = fields

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword, else the default of the operator's schema."""
        if position < len(self.call.args):
            return self.call.args[position]
        return self.call.kwargs.get(name, default)

    def dims(self, ref: TensorRef) -> Dims:
        """The axes of a tensor; one that no call made is a constant of the model: pinned."""
        if ref not in self.draft.dims:
            self.draft.dims[ref] = tuple(self.fixed(n, "a constant tensor") for n in ref.shape)
        return self.draft.dims[ref]

    def axis(self, ref: TensorRef, dim: int) -> Axis:
        """The axis of one dimension, counted from the end when negative."""
        return self.dims(ref)[dim]

    def free(self, size: int) -> Axis:
        """A new axis that may turn out to be any."""
        return Axis(size)

    def fixed(self, size: int, why: str) -> Axis:
        """A new axis that must keep its size."""
        return Axis(size, pin=f"{why} ({self.call.place})")

    def pin(self, axis: Axis, why: str) -> None:
        """Freeze an axis, with the reason and the source line."""
        algebra.pin(axis, f"{why} ({self.call.place})")

    def same(self, a: Axis, b: Axis) -> Axis:
        """Unify; axes that cannot be refined to common atoms are both pinned."""
        try:
            algebra.unify(a, b)
        except algebra.Mismatch as mismatch:
            self.pin(a, f"cannot be matched: {mismatch}")
            self.pin(b, f"cannot be matched: {mismatch}")
        return a

    def chosen(self, size: int) -> Axis:
        """A new axis whose size the data give (a number of hits): what it meets says the rest."""
        axis = Axis(size)
        self.mix(axis, "choice")
        return axis

    def numbers(self, ref: TensorRef, axes: Iterable[Axis]) -> None:
        """Say that the values of an output are positions on these axes: who reads it pins them."""
        self.draft.numbering[ref] = tuple(axes)

    def is_weight(self, ref: TensorRef) -> bool:
        """Whether the tensor is made of parameters and buffers alone."""
        return ref in self.draft.weights

    def is_parameter(self, ref: TensorRef) -> bool:
        """Whether the tensor is made of named parameters or buffers, not of constants alone.

        Rows taken out of a parameter count: an expert's matrix is one, whichever the data choose.
        """
        return (self.is_weight(ref) or ref in self.draft.taken) and any(self.labels(ref))

    def silences(self, ref: TensorRef, dim: int) -> bool:
        """Whether zeros in a parameter make zeros of this tensor along a dimension."""
        return self.is_parameter(ref) and any(not label.muted for label in self.labels(ref)[dim])

    def labels(self, ref: TensorRef) -> Labels:
        """Per dimension, the parameter dimensions it stems from."""
        return self.draft.labels.get(ref) or (frozenset(),) * len(ref.shape)

    def set_labels(self, ref: TensorRef, labels: Iterable[frozenset[Label]]) -> None:
        """State the origin of an output's dimensions where it does not simply go by axis."""
        self.draft.labels[ref] = tuple(
            # Parts of parts of one weight multiply along a deep stream: then it is all of it.
            origin if len(origin) <= _MOST_LABELS else frozenset(_whole(label) for label in origin)
            for origin in labels
        )

    def stems_from(self, ref: TensorRef, sources: Iterable[TensorRef]) -> None:
        """Add what each dimension has of the sources' axes to where it stems from."""
        labels = list(self.labels(ref))
        for source in sources:
            for axis, origin in zip(self.dims(source), self.labels(source), strict=True):
                atoms = set(algebra.atoms(axis)) if origin else set[Axis]()
                for place, own in enumerate(self.dims(ref)):
                    if not atoms.isdisjoint(algebra.atoms(own)):
                        labels[place] |= origin
        self.set_labels(ref, labels)

    def role(
        self, ref: TensorRef, dim: int, role: str, fill: str = "mean", part: Axis | None = None
    ) -> None:
        """Say what the parameters behind a dimension, or behind a part of it, do in this call."""
        axis = part or self.axis(ref, dim)
        reads = self._makers(axis) if role == "consumer" else frozenset[Label]()
        entry = self.entry(axis) if role == "consumer" else Entry()
        for label in self.labels(ref)[dim]:
            if label.muted and role == "consumer":  # nothing is silenced by zeros in it
                self.draft.marks[Mark(label, axis, "elementwise", "mean", reads, entry)] = None
            else:
                self.draft.marks[Mark(label, axis, role, fill, reads, entry)] = None

    def setting(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema, else the schema's default."""
        namespace, _, operator = self.call.op.partition(".")
        overloads = getattr(getattr(torch.ops, namespace), operator)
        schema = getattr(overloads, self.call.overload or "default")._schema
        for place, argument in enumerate(schema.arguments):
            if argument.name == name:
                given = argument.default_value if argument.has_default_value() else default
                return self.arg(place, name, given)
        return default

    def mix(self, axis: Axis, kind: str, **data: Any) -> None:
        """Say that this call mixes over the axis."""
        mix = Mix(axis, kind, self.call.module, self.call.place, data, self._makers(axis))
        self.draft.mixes.append(mix)

    def entry(self, axis: Axis) -> Entry:
        """What new entries of an axis have become in what this call reads."""
        data = [ref for ref in self.call.inputs if not self.is_weight(ref)]
        return joined(self.entry_of(ref, axis) for ref in data)

    def entry_of(self, ref: TensorRef, axis: Axis) -> Entry:
        """What new entries have become along the dimensions of a tensor that share an atom."""
        states = self.draft.entries.get(ref)
        if states is None:
            return Entry()
        pairs = zip(self.dims(ref), states, strict=True)
        return joined(state for own, state in pairs if share(own, axis))

    def _makers(self, axis: Axis) -> frozenset[Label]:
        """The parameter dimensions from which this axis of the call's activations stems."""
        return place_of(
            labels
            for ref in self.call.inputs
            if not self.is_weight(ref)
            for own, labels in zip(self.dims(ref), self.labels(ref), strict=True)
            if algebra.find(own) is algebra.find(axis)
        )

    def epsilon(self, value: float | None) -> dict[str, Any]:
        """The calling module's attribute that holds a norm's epsilon, and its value."""
        for name, held in self.fields.items():
            if "eps" in name and (held is None or isinstance(held, float)):
                default = torch.finfo(self.call.inputs[0].dtype).eps
                known = next((v for v in (value, held, default) if v is not None), default)
                return {"eps": known, "eps_attribute": name}
        return {}

    def bind(self, attribute: str, axes: Sequence[Axis], *, is_tuple: bool = False) -> bool:
        """Say that an attribute of the calling module, if it has one, repeats these sizes."""
        sizes = tuple(axis.size for axis in axes)
        found = bool(self.fields.get(attribute) == (sizes if is_tuple else sizes[0]))
        if found:
            self.draft.binds.append(Bind(self.call.module, attribute, tuple(axes), is_tuple))
        return found

    def aligned(self, axis: Axis, multiple: int) -> None:
        """Say that the size of an axis must stay a multiple of a number.

        A demand on a product is laid on its last factor; one that it does not meet pins.
        """
        *_, last = algebra.atoms(axis)
        if last.size % multiple:
            self.pin(axis, f"a kernel demands a multiple of {multiple}")
        elif multiple > 1:
            self.draft.multiples.append((axis, multiple))

    def at_least(self, axis: Axis, number: int) -> None:
        """Say that an axis must keep so many positions: as many are chosen from it."""
        self.draft.leasts.append((axis, number))

    def groups(self, attribute: str, axis: Axis) -> None:
        """A number of groups given to the operator: the module's attribute, else fixed.

        A run with other sizes would not show it: 4 groups of 3 are also 2 groups of 6.
        """
        if not self.bind(attribute, [axis]):
            self.pin(axis, "a number of groups")

    def produce(self, ref: TensorRef) -> None:
        """Mark every dimension of a weight as producing."""
        self.contract(ref, [])

    def contract(self, ref: TensorRef, contracted: Sequence[int]) -> None:
        """Mark a contraction's weight operand: contracted dims consume, the others produce."""
        inner = {dim % len(ref.shape) for dim in contracted}
        for dim in range(len(ref.shape)):
            self.role(ref, dim, "consumer" if dim in inner else "producer", "zero")


def place_of(names: Iterable[frozenset[Label]]) -> frozenset[Label]:
    """The union of several label sets."""
    return frozenset().union(*names)


def _whole(label: Label) -> Label:
    return replace(label, steps=())
