"""An oracle for one operator rule: do to the real operator what the rule says cannot matter.

A rule claims which dimensions are the same axis. Two claims are tried on the operator itself,
run by itself with the values it was called with:

* *The order of positions is free.* Permute the positions of an axis in every input; the outputs
  must be the old ones, permuted wherever the rule says they have this axis. A wrong order of
  factors or segments, and an operand that should have been coupled but was not, fail here.
* *A position is its own.* Where the rule names no mixing over an axis: zero one position in the
  weights that read it, change it in all other inputs; no other position of the outputs may
  change. An axis that is summed over in silence fails here.

Pinned axes claim nothing and are left alone. A third claim needs no numbers: where a dimension of
the result has an axis of an operand, it *stems from* what that operand stems from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from neuroexapt.capture import Call, TensorRef
from neuroexapt.couple import Expr, Leaf, Product, Sum, source_index, unit_of
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis, find
from neuroexapt.couple.marks import Dims, Label
from neuroexapt.couple.site import RULES, Draft, Rule, Site
from neuroexapt.couple.solve import couple

_UNITS = 4  # positions of an axis that are tried one by one


@dataclass(frozen=True)
class RealCall:
    """An operator call with its values; ``weights`` are the tensors made of weights alone."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weights: tuple[Tensor, ...] = ()

    @property
    def op(self) -> str:
        return str(self.func._schema.name.replace("::", "."))

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, each once."""
        leaves_ = pytree.tree_leaves((self.args, self.kwargs))
        return list({id(leaf): leaf for leaf in leaves_ if isinstance(leaf, Tensor)}.values())

    def run(self, values: Sequence[Tensor]) -> tuple[list[Tensor], list[int | None]]:
        """The outputs with other values in place of ``tensors``; which of them are inputs."""
        # Cloned with their strides: an in-place operator must not write on the values given.
        given = {id(old): new.clone() for old, new in zip(self.tensors, values, strict=True)}
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda tensor: given[id(tensor)], (self.args, self.kwargs)
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            result = self.func(*args, **kwargs)
        order = [id(tensor) for tensor in given.values()]
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        return outputs, [order.index(id(o)) if id(o) in order else None for o in outputs]


class Recorder(TorchDispatchMode):
    """Keeps every operator call together with the values of its inputs."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.calls: list[RealCall] = []
        self._alive = list(weights)
        self._weights = set(map(id, self._alive))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            return kept.setdefault(id(tensor), tensor.detach().clone())

        sealed = pytree.tree_map_only(Tensor, keep, (args, kwargs or {}))
        made_of_weights = all(i in self._weights for i in kept)
        weights = tuple(tensor for i, tensor in kept.items() if i in self._weights)
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self._alive += outputs
        if made_of_weights and kept:
            self._weights |= set(map(id, outputs))
        if outputs:
            self.calls.append(RealCall(func, *sealed, weights))
        return result


def real_calls(model: nn.Module, args: tuple[Any, ...]) -> list[RealCall]:
    """Every operator call of the model, in evaluation and in training mode."""
    calls: list[RealCall] = []
    for training in (False, True):
        weights = [*model.parameters(), *model.buffers()]
        with torch.no_grad(), Recorder(weights) as recorder:
            model.train(training)(*args)
        calls += recorder.calls
    return calls


class _AnyField(dict[str, Any]):
    """Attributes of a module that repeats every number, so that groups may be free."""

    class _Equal:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    def get(self, key: str, default: Any = None) -> Any:
        return self._Equal()


@dataclass
class Claim:
    """What a rule says of one call, on axes of which nothing else is known."""

    inputs: list[Dims]
    outputs: list[Dims]
    draft: Draft
    given: list[TensorRef]
    made: tuple[TensorRef, ...]

    def atoms(self) -> list[Axis]:
        """The axes that claim to be free."""
        dims = [axis for tensor in (*self.inputs, *self.outputs) for axis in tensor]
        found = dict.fromkeys(atom for axis in dims for atom in algebra.atoms(axis))
        entering = {a for tensor in self.inputs for axis in tensor for a in algebra.atoms(axis)}
        # An axis that the data size and that only comes out has an order of its own.
        own = self.mixed() - entering
        return [atom for atom in found if not atom.pin and atom.size > 1 and atom not in own]

    def mixed(self) -> set[Axis]:
        return {atom for mix in self.draft.mixes for atom in algebra.atoms(mix.axis)}

    def numbering(self, atom: Axis) -> set[int]:
        """The outputs whose values name positions of the axis: who reads them pins it."""
        return {
            number
            for number, ref in enumerate(self.made)
            for axis in self.draft.numbering.get(ref, ())
            if atom in set(algebra.atoms(axis))
        }

    def readers(self, atom: Axis) -> set[tuple[str, int]]:
        """Names and dimensions of the weights that read the axis."""
        return {
            (mark.label.name, mark.label.dim)
            for mark in self.draft.marks
            if mark.role == "consumer" and atom in set(algebra.atoms(mark.axis))
        }


def claim(call: RealCall, rule: Rule | None = None) -> Claim:
    """Apply the operator's rule to the call alone, on axes of which nothing else is known."""
    outputs, same = call.run(call.tensors)
    refs = [
        TensorRef(-1 - n, tuple(t.shape), t.dtype, t.stride() if t.layout is torch.strided else ())
        for n, t in enumerate(call.tensors)
    ]
    by_id = {id(tensor): ref for tensor, ref in zip(call.tensors, refs, strict=True)}
    made = tuple(
        refs[place]
        if place is not None and refs[place].shape == tuple(out.shape)
        else TensorRef(-1001 - n, tuple(out.shape), out.dtype)
        for n, (out, place) in enumerate(zip(outputs, same, strict=True))
    )
    draft = Draft(weights={by_id[id(tensor)] for tensor in call.weights})
    for ref in refs:
        draft.dims[ref] = tuple(map(Axis, ref.shape))
        draft.labels[ref] = tuple(frozenset([Label(str(ref.id), d)]) for d in range(len(ref.shape)))
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: by_id[id(t)], (call.args, call.kwargs))
    is_pointwise = torch.Tag.pointwise in call.func.tags
    recorded = Call(
        call.op, call.func._overloadname, args, kwargs, made, "m", None, pointwise=is_pointwise
    )
    with mock.patch.dict(RULES, {call.op: rule} if rule else {}):
        couple(Site(recorded, draft, _AnyField()))
    assert not draft.unknown, f"the rule of {call.op} does not understand this call"
    return Claim([draft.dims[r] for r in refs], [draft.dims[r] for r in made], draft, refs, made)


def complaints(call: RealCall, rule: Rule | None = None) -> Iterator[str]:
    """What the operator does that its rule says it does not."""
    said = claim(call, rule)
    if "empty" in call.op:
        return  # no values yet
    yield from _origin_lost(call, said)
    mixed = said.mixed()
    for atom in said.atoms():
        if not _is_twice_in_one(said, atom):
            yield from _order_matters(call, said, atom)
            if atom not in mixed:
                yield from _others_change(call, said, atom)


# A norm's scale and shift, a mask on scores, and what is only looked at for its shape.
_NO_ORIGIN = (
    "attention",
    "norm",
    "_like",
    "zero",
    "fill",
    "full",
    "new_",
    "quantize",
    "max_unpool",
    "detach_",
)


def _origin_lost(call: RealCall, said: Claim) -> Iterator[str]:
    if any(word in call.op for word in _NO_ORIGIN):
        return
    for number, (ref, dims) in enumerate(zip(said.made, said.outputs, strict=True)):
        for axis, labels in zip(dims, said.draft.labels[ref], strict=True):
            atoms = {atom for atom in algebra.atoms(axis) if not atom.pin and atom.size > 1}
            for given, own in zip(said.given, said.inputs, strict=True):
                here = [d for d, a in enumerate(own) if not atoms.isdisjoint(algebra.atoms(a))]
                told = {label.dim for label in labels if label.name == str(given.id)}
                numbers = given.dtype.is_floating_point and ref.dtype.is_floating_point
                if numbers and here and told.isdisjoint(here):
                    yield f"{call.op}: output {number} does not stem from input {given.id}"


def frozen(axis: Axis) -> Expr:
    """The expression of an axis, atoms named by their serial numbers."""
    axis = find(axis)
    if axis.form == "atom":
        return Leaf(str(axis.serial), axis.size)
    parts = tuple(map(frozen, axis.parts))
    return Product(parts) if axis.form == "product" else Sum(parts)


def _is_twice_in_one(said: Claim, atom: Axis) -> bool:
    """A factor taken twice (a Gram matrix laid flat) has no single unit at a position."""
    dims = [axis for tensor in (*said.inputs, *said.outputs) for axis in tensor]
    return any([find(f) for f in algebra.factors(axis)].count(atom) > 1 for axis in dims)


def _order_matters(call: RealCall, said: Claim, atom: Axis) -> Iterator[str]:
    if torch.Tag.nondeterministic_seeded in call.func.tags:
        return  # each position draws its own number
    before, _ = call.run(call.tensors)
    moved = [_permuted(t, d, atom) for t, d in zip(call.tensors, said.inputs, strict=True)]
    after, _ = call.run(moved)
    for number, (old, new, dims) in enumerate(zip(before, after, said.outputs, strict=True)):
        if number in said.numbering(atom):
            continue
        if not _alike(_permuted(old, dims, atom), new):
            yield f"{call.op}: the order of an axis of {atom.size} matters to output {number}"


def _permuted(tensor: Tensor, dims: Dims, atom: Axis) -> Tensor:
    """The tensor with the positions of one axis in another order, memory laid out as before."""
    order = np.roll(np.random.default_rng(0).permutation(atom.size), 1)
    if (order == np.arange(atom.size)).all():
        order = order[::-1].copy()
    result = tensor
    for place, axis in enumerate(dims):
        index = source_index(frozen(axis), {str(atom.serial): order})
        result = result.index_select(place, torch.from_numpy(index))
    return tensor.clone().copy_(result)


def _others_change(call: RealCall, said: Claim, atom: Axis) -> Iterator[str]:
    weights = [any(t is w for w in call.weights) for t in call.tensors]
    readers = said.readers(atom)
    for unit in range(min(atom.size, _UNITS)):
        quiet, other = [], []
        for number, (tensor, dims) in enumerate(zip(call.tensors, said.inputs, strict=True)):
            reads = weights[number] and any(
                (str(said.given[number].id), place) in readers and atom in set(algebra.atoms(axis))
                for place, axis in enumerate(dims)
            )
            on = _on_unit(dims, atom, unit, tensor)
            if reads:
                quiet.append(torch.where(on, torch.zeros_like(tensor), tensor))
                other.append(quiet[-1])
            else:
                quiet.append(tensor)
                other.append(torch.where(on, _other_values(tensor, dims, atom), tensor))
        before, _ = call.run(quiet)
        after, _ = call.run(other)
        for number, (old, new, dims) in enumerate(zip(before, after, said.outputs, strict=True)):
            on = _on_unit(dims, atom, unit, old)
            if not _alike(old.masked_fill(on, 0), new.masked_fill(on, 0)):
                yield f"{call.op}: position {unit} of {atom.size} reaches others of output {number}"
                return


def _other_values(tensor: Tensor, dims: Dims, atom: Axis) -> Tensor:
    """For each position the values of the next one: other values that the operator can take."""
    result = tensor
    for place, axis in enumerate(dims):
        index = source_index(frozen(axis), {str(atom.serial): np.roll(np.arange(atom.size), -1)})
        result = result.index_select(place, torch.from_numpy(index))
    return result


def _on_unit(dims: Dims, atom: Axis, unit: int, tensor: Tensor) -> Tensor:
    """Where the tensor's entries lie on one position of the axis."""
    on = torch.zeros(tensor.shape, dtype=torch.bool)
    for place, axis in enumerate(dims):
        if atom in set(algebra.atoms(axis)):
            units = torch.from_numpy(unit_of(frozen(axis), str(atom.serial)) == unit)
            on |= units.reshape([-1 if d == place else 1 for d in range(tensor.dim())])
    return on


def _alike(a: Tensor, b: Tensor) -> bool:
    single = a.dtype in (torch.float32, torch.complex64)
    rtol, atol = (1e-4, 1e-5) if single else (1e-7, 1e-9)
    return a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
