"""The frozen result of axis inference: widths, what they tie together, and what is pinned."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from neuroexapt.capture import Trace
from neuroexapt.capture.stacks import Stack
from neuroexapt.couple.index import Expr, leaves
from neuroexapt.errors import EditError, PinnedError, UnknownPlaceError


@dataclass(frozen=True)
class Appearance:
    """One place of a width: a dimension of a parameter or buffer.

    Attributes:
        tensor: name of the parameter or buffer.
        dim: the dimension.
        roles: ``"producer"`` (its slices make the units), ``"consumer"`` (its slices read them),
            ``"elementwise"`` (norm scales, biases, running statistics, gates); a tied embedding
            produces and consumes.
        fill: what a new entry of an elementwise tensor holds: ``"zero"``, ``"one"``, ``"mean"``.
        reads: for a consumer, the parameter dimensions (name, dim) that made what it reads.
        behind_norm: for a consumer, whether all that it reads comes out of a layer norm, which
            takes the mean off new entries that were made as the mean of their siblings.
    """

    tensor: str
    dim: int
    roles: frozenset[str]
    fill: str
    reads: frozenset[tuple[str, int]] = frozenset()
    behind_norm: bool = False

    @property
    def role(self) -> str:
        """The strongest role: what reads a unit must stay silent whatever else it does."""
        return next(r for r in ("consumer", "elementwise", "producer") if r in self.roles)


@dataclass(frozen=True)
class Side:
    """Part of a parameter dimension: the positions start..stop of an atom inside it.

    ``factor`` says that the parameter multiplies the operand (a norm's scale, a rotary table)
    instead of making it.
    """

    tensor: str
    dim: int
    positions: tuple[int, ...]
    factor: bool = False


@dataclass(frozen=True)
class Mixer:
    """An operator that mixes over a width, so that its size matters to other units.

    Attributes:
        kind: ``"layer_norm"``, ``"mean_square"`` (RMS norm), ``"dot"``, ``"softmax"``, ...
        module: path of the module that made the call.
        place: source line, or the module path.
        weight: names of the norm's scale parameters.
        bias: names of the norm's shift parameters.
        eps: the norm's epsilon, held by the module's attribute ``eps_attribute``.
        sides: for a dot product, the parameter positions behind its left and right operand.
        scale: ``"inverse_sqrt"`` if the product is divided by the square root of the width.
        over: names of all atoms of the axis it mixes over, this width among them.
        makers: the parameter dimensions that axis stems from, by tensor name and dimension.
        centred: whether new entries made as the mean of all siblings along the axis are still
            their mean here; ``"evenly"`` if that holds where an earlier norm's scale is the same
            for all units (``"yes"``, ``"evenly"``, ``"no"``).
        silent: whether new entries made zero are still zero here.
    """

    kind: str
    module: str
    place: str
    weight: frozenset[str] = frozenset()
    bias: frozenset[str] = frozenset()
    eps: float = 0.0
    eps_attribute: str = ""
    sides: tuple[tuple[Side, ...], tuple[Side, ...]] = ((), ())
    scale: str = "free"
    over: tuple[str, ...] = ()
    makers: frozenset[tuple[str, int]] = frozenset()
    centred: str = "yes"
    silent: bool = True


@dataclass(frozen=True)
class Width:
    """A resizable atom: ``size`` units that live and die one by one.

    Attributes:
        name: ``"features.0.out"``; also accepted as a place by every edit.
        size: number of units.
        appearances: every parameter and buffer dimension that has it.
        mixers: operators that mix over it.
        multiple: its size must be a multiple of this (a kernel's demand on memory).
        least: the fewest units it may have (as many as `topk` chooses from them).
    """

    name: str
    size: int
    appearances: tuple[Appearance, ...]
    mixers: tuple[Mixer, ...] = ()
    multiple: int = 1
    least: int = 1


@dataclass(frozen=True)
class Pinned:
    """An atom that must keep its size, and why."""

    name: str
    size: int
    reason: str
    appearances: tuple[Appearance, ...]


@dataclass(frozen=True)
class Attribute:
    """A Python attribute that repeats sizes: an int for one expression, else a tuple."""

    module: str
    name: str
    exprs: tuple[Expr, ...]
    is_tuple: bool


@dataclass(frozen=True)
class ModuleAxes:
    """The axes of the tensors that enter and leave a module (its first call)."""

    inputs: tuple[tuple[Expr, ...], ...]
    outputs: tuple[tuple[Expr, ...], ...]


@dataclass(frozen=True)
class AxisMap:
    """Which dimensions of a model must change together.

    Attributes:
        widths: the resizable widths by name.
        pinned: the dimensions that cannot change, by name, each with its reason.
        unknown: operators without a rule, with the module paths that called them; what they
            touch is pinned.
        tensors: the expression of every parameter and buffer dimension.
        attributes: the Python numbers that repeat a width.
        modules: the axes at each module's door.
        traces: the runs the map was made from.
        parameters: names of the parameters among ``tensors``, in the model's order.
        notes: what a reader should know (a run that did not go through, say).
        offsets: numbers that the forward adds to a parameter before use (a norm's ``1 + weight``).
        fused: modules that torch may run in evaluation mode without calling their parts.
        stacks: layers that are counted by a number in them, such as ``layer_idx``.
        kinds: for each module path the name of its class or nearest base in ``torch.nn`` or this
            library (``"Dropout"``; ``"Module"`` for a class of the user's own).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> axes = map_axes(net, (torch.zeros(1, 4),))
        >>> [(w.name, w.size) for w in axes.widths.values()], sorted(axes.pinned)
        ([('0.out', 8)], ['0.in', '2.out'])
    """

    widths: Mapping[str, Width]
    pinned: Mapping[str, Pinned]
    unknown: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, tuple[Expr, ...]]
    attributes: tuple[Attribute, ...]
    modules: Mapping[str, ModuleAxes]
    traces: tuple[Trace, ...]
    parameters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    offsets: Mapping[str, float] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)

    def find(self, at: str) -> tuple[Width, ...]:
        """The widths a place means: a width's name, a module path, or a glob over both.

        Raises:
            UnknownPlaceError: nothing has this name; near names are suggested.
            PinnedError: what it names cannot change; the reason and source line are given.
        """
        if not isinstance(at, str):
            raise UnknownPlaceError(
                repr(at),
                seen=f"a {type(at).__name__}",
                needed="a module path, a width's name, or a glob, as text",
                next_step="see `map_axes(...).widths` for the names",
            )
        if at in self.widths:
            return (self.widths[at],)
        if at in self.pinned:
            raise self._pinned(at, [self.pinned[at]])
        if at in self.modules:
            return self._of_module(at)
        if not any(sign in at for sign in "*?["):
            raise self._unknown_place(at)
        found = self._matching(at)
        if not found:
            raise self._unknown_place(at)
        return found

    def one(self, at: str) -> Width:
        """The single width a place means.

        Raises:
            EditError: the place has several widths; their names are listed.
        """
        found = self.find(at)
        if len(found) > 1:
            names = ", ".join(f"'{w.name}' ({w.size})" for w in found)
            raise EditError(
                at, seen=f"{len(found)} widths", needed="one width", next_step=f"name one: {names}"
            )
        return found[0]

    def _of_module(self, path: str) -> tuple[Width, ...]:
        names = [
            leaf.name for dims in self.modules[path].outputs for e in dims for leaf in leaves(e)
        ]
        found = [self.widths[name] for name in dict.fromkeys(names) if name in self.widths]
        if not found:
            ops = [op for op, paths in self.unknown.items() if path in paths]
            raise self._pinned(path, self._pins_of(path, names), ops)
        return tuple(found)

    def _pins_of(self, path: str, names: Sequence[str]) -> list[Pinned]:
        """The pins a reader means by a module: those of its own tensors, else of its output."""
        own = [pin for pin in self.pinned.values() if pin.name == f"{path}.out"]
        return own or [self.pinned[name] for name in dict.fromkeys(names) if name in self.pinned]

    def _matching(self, pattern: str) -> tuple[Width, ...]:
        found = {name: None for name in self.widths if fnmatch.fnmatchcase(name, pattern)}
        for path in self.modules:
            if path and fnmatch.fnmatchcase(path, pattern):
                for dims in self.modules[path].outputs:
                    found.update(
                        (leaf.name, None)
                        for expr in dims
                        for leaf in leaves(expr)
                        if leaf.name in self.widths
                    )
        return tuple(self.widths[name] for name in self.widths if name in found)

    def _pinned(self, at: str, pins: Sequence[Pinned], unknown: Sequence[str] = ()) -> PinnedError:
        reasons = "; ".join(f"'{p.name}' ({p.size}): {p.reason}" for p in pins[:3])
        without = [f"operator {op}, which has no rule," for op in unknown[:1]]
        other = f"{(*without, 'no parameter')[0]} has this dimension"
        return PinnedError(
            at,
            seen=f"pinned: {reasons or other}",
            needed="a width that can change",
            next_step="choose one of `map_axes(...).widths`, or rewrite the line named",
        )

    def _unknown_place(self, at: str) -> UnknownPlaceError:
        known = [*self.widths, *(path for path in self.modules if path)]
        near = difflib.get_close_matches(at, known, n=3, cutoff=0.4)
        hint = ", ".join(f"'{name}'" for name in near) or "see `map_axes(...).widths`"
        return UnknownPlaceError(
            at,
            seen="no module path or width of this name",
            needed="a module path, a width's name, or a glob that matches one",
            next_step=f"near names: {hint}",
        )
