"""Where a model reads its widths: which operator multiplies which weight with what.

A *reader* is a weight whose operator sums products over a dimension: a linear layer, a
convolution, a recurrent kernel. What leaves with a removed unit is a sum over that dimension, so
its mean can be given back where the reader's result is shifted anyway: at its bias, or at the
running mean of a batch norm right behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from neuroexapt.capture import Call, TensorRef, Trace
from neuroexapt.capture.masks import is_mask
from neuroexapt.couple.axismap import AxisMap
from neuroexapt.couple.index import Product, leaves, size_of

# Which dimension of a weight each dimension of a view of it is; None where it is none of them.
Layout: TypeAlias = tuple[int | None, ...]
Known: TypeAlias = "Callable[[Any], tuple[str, Layout] | None]"

_SAME = frozenset(
    {"detach", "alias", "_to_copy", "clone", "contiguous", "lift_fresh", "view_as", "to"}
)
_RESHAPED = frozenset({"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze"})
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
_KERNELS = frozenset(
    {"lstm", "gru", "rnn_tanh", "rnn_relu"}
    | {"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
)


@dataclass(frozen=True)
class Reading:
    """One operator call that reads a weight.

    Attributes:
        tensor: the weight's name.
        dim: the weight's dimension that is summed over.
        out: its dimension that stays.
        blocks: number of equal parts of its first dimension that read inputs of their own (groups
            of a convolution, experts of a batched product).
        x: what it is multiplied with.
        rows_last: whether ``x`` has its summed dimension second to last (weight times x).
        bias: what is added in the same call, or None.
        convolution: whether it is one; ``x`` is then (N, channels, ...).
    """

    tensor: str
    dim: int
    out: int
    blocks: int
    x: Any
    rows_last: bool = False
    bias: Any = None
    convolution: bool = False


@dataclass(frozen=True)
class Reader:
    """A weight that reads, and where a constant can be added to its result.

    Attributes:
        tensor: the weight's name; of tied names the first.
        dim: the weight's dimension that is summed over.
        out: its dimension that stays.
        blocks: see :class:`Reading`.
        bias: name of the bias that is added to its result, or "".
        mean: name of the running mean that is subtracted right behind it, or "".
        inner: how many neighbouring inputs belong together as places of one thing (a flattened
            map has as many as it has places in space).
        why_not: why its inputs cannot be measured one by one, or "".
    """

    tensor: str
    dim: int = 1
    out: int = 0
    blocks: int = 1
    bias: str = ""
    mean: str = ""
    inner: int = 1
    why_not: str = ""

    @property
    def shifted(self) -> bool:
        """Whether a constant can be added to its result."""
        return bool(self.bias or self.mean)


def passed_on(op: str, args: Sequence[Any], layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout of a view (or copy) of a weight of this layout; None if it is another tensor.

    Args:
        op: operator name without its namespace.
        args: its arguments; the first one has the layout.
        layout: of the first argument.
        shape: of the result.

    Example:
        >>> import torch
        >>> passed_on("t", (torch.zeros(2, 3),), (0, 1), (3, 2))
        (1, 0)
    """
    old = tuple(args[0].shape)
    if op == "t":
        return layout[::-1]
    if op == "transpose":
        moved = list(layout)
        a, b = int(args[1]), int(args[2])
        moved[a], moved[b] = moved[b], moved[a]
        return tuple(moved)
    if op == "permute":
        return tuple(layout[int(dim)] for dim in args[1])
    if op in _SAME:
        return layout
    if op == "expand":
        kept = [d if size == new else None for d, size, new in _from_right(layout, old, shape)]
        return (*[None] * (len(shape) - len(old)), *kept)
    if op in _RESHAPED and [s for s in old if s != 1] == [s for s in shape if s != 1]:
        dims = iter(d for d, size in zip(layout, old, strict=True) if size != 1)
        return tuple(next(dims) if size != 1 else None for size in shape)
    return None


def _from_right(
    layout: Layout, old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[int | None, int, int]]:
    return zip(layout, old, list(new)[len(new) - len(old) :], strict=True)


def reading(op: str, args: Sequence[Any], known: Known) -> Reading | None:
    """What a call reads, if it multiplies a whole weight with something that is none.

    Args:
        op: operator name without its namespace.
        args: its arguments; anything with a ``shape`` in place of tensors.
        known: name and layout of an argument that is a weight or a view of one.
    """
    if op == "convolution" and len(args) >= 9:
        return _convolution(args, known)
    if op == "linear":
        return _with_bias(_product(args[0], args[1], known, flipped=True), args[2:3])
    if op in _PRODUCTS:
        first = _PRODUCTS[op]
        found = _product(args[first], args[first + 1], known)
        return _with_bias(found, args[:first])
    return None


def _with_bias(found: Reading | None, bias: Sequence[Any]) -> Reading | None:
    return replace(found, bias=bias[0]) if found is not None and bias else found


def _product(left: Any, right: Any, known: Known, *, flipped: bool = False) -> Reading | None:
    """Reads ``left @ right``; ``flipped`` for a right operand of shape (out, in)."""
    held, other = known(right), left
    rows_last = held is None
    if held is None:
        held, other = known(left), right
    if held is None or known(other) is not None:
        return None
    name, layout = held
    summed, stays = (-1, -2) if rows_last or flipped else (-2, -1)
    dim, out, batch = layout[summed], layout[stays], layout[:-2]
    if dim is None or out is None or any(d not in (None, 0) for d in batch):
        return None
    weight = left if rows_last else right
    blocks = int(weight.shape[batch.index(0)]) if 0 in batch else 1
    return Reading(name, dim, out, blocks, other, rows_last)


def _convolution(args: Sequence[Any], known: Known) -> Reading | None:
    x, weight, bias, transposed, groups = args[0], args[1], args[2], bool(args[6]), int(args[8])
    held = known(weight)
    if held is None or known(x) is not None or held[1] != tuple(range(len(weight.shape))):
        return None
    dim, out = (0, 1) if transposed else (1, 0)
    return Reading(held[0], dim, out, groups, x, bias=bias, convolution=True)


def find_readers(axes: AxisMap) -> Mapping[str, Reader]:
    """Every weight that reads a width, by name.

    A weight read in several ways, or whose results are shifted by several biases, has no single
    place for what it loses; ``why_not`` says so, as for one that is read in a form that is
    computed from it (a weight norm) or by an operator that sums in another way.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> find_readers(map_axes(net, (torch.zeros(1, 4),)))["2.weight"].bias
        '2.bias'
    """
    found: dict[str, set[Reader]] = {}
    for trace in axes.traces:
        for reader in _Search(trace, axes).readers():
            found.setdefault(reader.tensor, set()).add(reader)
    first = first_names(axes)
    wanted = {
        first[place.tensor]: place.dim
        for width in axes.widths.values()
        for place in width.appearances
        if "consumer" in place.roles
    }
    readers = {name: _one(name, dim, found.get(name, set())) for name, dim in wanted.items()}
    return {name: replace(r, inner=_inner(axes, r)) for name, r in readers.items()}


def _inner(axes: AxisMap, reader: Reader) -> int:
    """The part of a flattened axis behind its last width."""
    expr = axes.tensors[reader.tensor][reader.dim]
    count = 1
    for part in reversed(expr.parts if isinstance(expr, Product) else ()):
        if any(leaf.name in axes.widths for leaf in leaves(part)):
            return count
        count *= size_of(part, {})
    return 1


def first_names(axes: AxisMap) -> dict[str, str]:
    """Every tensor's name to the first of the names it is tied under."""
    first: dict[int, str] = {}
    names = {}
    for name, ref in axes.traces[0].tensors.items():
        names[name] = first.setdefault(ref.id, name)
    return {name: names.get(name, name) for name in axes.tensors}


def _one(name: str, dim: int, found: set[Reader]) -> Reader:
    if len(found) == 1:
        return next(iter(found))
    why = "read in several ways" if found else "read in a form computed from it"
    return Reader(name, dim, why_not=why)


class _Search:
    """Follows the weights of one run to the calls that read them."""

    def __init__(self, trace: Trace, axes: AxisMap) -> None:
        self.trace = trace
        self.names: dict[int, str] = {}
        for name, ref in trace.tensors.items():
            if name in axes.tensors:
                self.names.setdefault(ref.id, name)
        self.masks = {ref.id for name, ref in trace.tensors.items() if is_mask(name)}
        self.layouts: dict[int, tuple[str, Layout]] = {
            ref.id: (self.names[ref.id], tuple(range(len(ref.shape))))
            for ref in trace.tensors.values()
            if ref.id in self.names
        }
        self.uses: dict[int, list[Call]] = {}
        for call in trace.calls:
            for ref in call.inputs:
                self.uses.setdefault(ref.id, []).append(call)

    def readers(self) -> Iterator[Reader]:
        for call in self.trace.calls:
            op = call.op.removeprefix("aten.")
            if op in _KERNELS:
                yield from self._recurrent(call)
                continue
            found = reading(op, call.args, self._known)
            if found is not None:
                bias, mean = self._shift(call, found)
                yield Reader(found.tensor, found.dim, found.out, found.blocks, bias, mean)
            self._follow(op, call)

    def _known(self, value: Any) -> tuple[str, Layout] | None:
        if not isinstance(value, TensorRef):
            return None
        held = self.layouts.get(value.id)
        return held if held is not None and len(held[1]) > 1 else None

    def _follow(self, op: str, call: Call) -> None:
        first = call.args[0] if call.args else None
        held = self.layouts.get(first.id) if isinstance(first, TensorRef) else None
        if held is not None and len(call.outputs) == 1:
            layout = passed_on(op, call.args, held[1], call.outputs[0].shape)
            if op == "mul" and isinstance(call.args[1], TensorRef):
                layout = held[1] if call.args[1].id in self.masks else None
            if layout is not None:
                self.layouts.setdefault(call.outputs[0].id, (held[0], layout))

    def _recurrent(self, call: Call) -> Iterator[Reader]:
        """A kernel adds to each product the bias that is named like its weight."""
        for ref in call.inputs:
            name = self.names.get(ref.id, "")
            owner, _, leaf = name.rpartition(".")
            if leaf.startswith("weight_") and len(ref.shape) == 2:
                bias = f"{owner}.{leaf.replace('weight_', 'bias_', 1)}".lstrip(".")
                yield Reader(name, bias=bias if bias in self.names.values() else "")

    def _shift(self, call: Call, found: Reading) -> tuple[str, str]:
        """The bias added to a result, and the running mean taken off it."""
        if isinstance(found.bias, TensorRef):
            return self._bias(found.bias, call.outputs[0], found), ""
        return self._behind(call.outputs[0], found)

    def _bias(self, bias: TensorRef, out: TensorRef, found: Reading) -> str:
        """The name of what is added, if it is a parameter with one entry a result."""
        results = [out.shape[1]] if found.convolution else [found.blocks, out.shape[-1]]
        same = [s for s in bias.shape if s != 1] == [s for s in results if s != 1]
        return self.layouts.get(bias.id, ("", ()))[0] if same else ""

    def _behind(self, ref: TensorRef, found: Reading) -> tuple[str, str]:
        size = ref.shape[1] if found.convolution else ref.shape[-1]
        for _ in range(4):  # a view or two stand between a product and what is added to it
            uses = self.uses.get(ref.id, [])
            if len(uses) != 1:
                return "", ""
            call = uses[0]
            op = call.op.removeprefix("aten.")
            if "batch_norm" in op and call.args[0] == ref and ref.shape[1] == size:
                running = call.args[3]
                held = isinstance(running, TensorRef) and ref.shape[1] == running.shape[0]
                return "", self.names.get(running.id, "") if held else ""
            if op in ("add", "add_") and not found.convolution:
                others = [other for other in call.inputs if other != ref]
                plain = len(others) == 1 and not call.kwargs
                return self._bias(others[0], ref, found) if plain else "", ""
            views = op in _RESHAPED | _SAME and len(call.outputs) == 1
            if not views or found.convolution or call.outputs[0].shape[-1:] != (size,):
                return "", ""
            ref = call.outputs[0]
        return "", ""
