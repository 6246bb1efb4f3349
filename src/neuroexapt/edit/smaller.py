"""What becomes of a run when one of its tensors has smaller maps: sizes, and weights that follow.

The calls behind that tensor are made once more, on tensors without data. A spatial position that
is gone counts with the one whose window it lies in, through flattening too, so that a layer that
reads positions can be given the sums of its weights over each window.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from neuroexapt.capture import Call, TensorRef, Trace
from neuroexapt.errors import EditError

_RESHAPES = frozenset({"aten.view", "aten._unsafe_view", "aten.reshape", "aten._reshape_alias"})
# Their new spatial positions lie in windows over the old ones.
_SPATIAL = ("convolution", "pool", "upsample", "pad", "slice", "pixel")


@dataclass(frozen=True)
class Dim:
    """A dimension with fewer positions than before.

    Attributes:
        old: its size before.
        new: its size now.
        windows: for each old position the new one it counts with; None where that is not known.
        parts: the dimensions that were flattened into it.
    """

    old: int
    new: int
    windows: tuple[int, ...] | None
    parts: tuple[Dim, ...] = ()

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """For each new position the old ones that count with it."""
        found: list[list[int]] = [[] for _ in range(self.new)]
        for old, new in enumerate(self.windows or ()):
            found[new].append(old)
        return tuple(map(tuple, found))


def windowed(old: int, new: int, stride: int | None = None) -> Dim:
    """A spatial dimension that windows of ``stride`` positions have made smaller.

    Without a stride it is the smallest that gives the new size, or else even shares.

    Example:
        >>> windowed(4, 2, stride=3).windows, windowed(5, 3).windows
        ((0, 0, 0, 1), (0, 0, 1, 1, 2))
    """
    stride = stride or next((s for s in range(1, old + 1) if -(-old // s) == new), 0)
    where = [p // stride if stride else p * new // old for p in range(old)]
    return Dim(old, new, tuple(where))


def whole(size: int) -> Dim:
    """A dimension that stays."""
    return Dim(size, size, tuple(range(size)))


def flattened(parts: Sequence[Dim]) -> Dim:
    """Several dimensions as one, in row-major order."""
    if len(parts) == 1:
        return parts[0]
    windows: tuple[int, ...] | None = (0,)
    for part in parts:
        if windows is None or part.windows is None:
            windows = None
        else:
            windows = tuple(a * part.new + b for a in windows for b in part.windows)
    return Dim(prod(p.old for p in parts), prod(p.new for p in parts), windows, tuple(parts))


@dataclass
class Smaller:
    """The run behind a tensor that has got other sizes.

    Attributes:
        place: how messages call the edit's place.
        trace: the run as it was.
        dims: each tensor with other sizes, with its dimensions.
        folds: weights that follow: their ref and dimension, with what became of that.
        flattenings: the calls that flattened a dimension on the way to a weight.
    """

    place: str
    trace: Trace
    dims: dict[TensorRef, tuple[Dim, ...]]
    folds: dict[tuple[TensorRef, int], Dim] = field(default_factory=dict)
    flattenings: list[Call] = field(default_factory=list)

    def follow(self, start: int) -> None:
        """Go through all calls from ``start`` on.

        Raises:
            EditError: a call, a weight or the model's caller needs the sizes as they were.
        """
        for call in self.trace.calls[start:]:
            if any(ref in self.dims for ref in call.inputs):
                self._follow(call)
        for ref in self.trace.outputs:
            if ref in self.dims:
                sizes = tuple(dim.new for dim in self.dims[ref])
                raise self.refusal(
                    f"the model's output, which would have shape {sizes} instead of {ref.shape}",
                    "an output of the shape it has now",
                )

    def refusal(self, seen: str, needed: str) -> EditError:
        """An error about the place of the edit."""
        return EditError(
            self.place,
            seen=seen,
            needed=needed,
            next_step="choose a place from which all ways lead through a flatten or a global pool",
        )

    def _follow(self, call: Call) -> None:
        if call.op in _RESHAPES:
            self._note(call.outputs[0], self._reshaped(call))
            return
        self._check_partners(call)
        weight = self._weight_read(call)
        made = self._run(call, weight)
        for ref, shape in zip(call.outputs, made, strict=True):
            self._note(ref, tuple(self._dim(call, ref, at, n) for at, n in enumerate(shape)))

    def _note(self, ref: TensorRef, dims: tuple[Dim, ...]) -> None:
        if all(dim.old == dim.new for dim in dims):
            self.dims.pop(ref, None)
        else:
            self.dims[ref] = dims

    def _of(self, ref: TensorRef) -> tuple[Dim, ...]:
        return self.dims.get(ref) or tuple(map(whole, ref.shape))

    def _dim(self, call: Call, ref: TensorRef, at: int, new: int) -> Dim:
        """What is known of one dimension of an output."""
        old = ref.shape[at]
        if old == new:
            return whole(old)
        known = [d for r in call.inputs for d in self._of(r) if (d.old, d.new) == (old, new)]
        if known:
            return known[0]
        if any(word in call.op for word in _SPATIAL) and at >= 2:
            return windowed(old, new)
        return Dim(old, new, None)

    def _check_partners(self, call: Call) -> None:
        """What is computed position by position needs partners of the same size.

        Torch would spread a single position over the partner's without a word.
        """
        if not call.pointwise:
            return
        for one, other in itertools.permutations(dict.fromkeys(call.inputs), 2):
            for a, b in zip(reversed(self._of(one)), reversed(self._of(other)), strict=False):
                if a.old == b.old > 1 and a.new != b.new:
                    raise self.refusal(
                        f"{call.place}, where a map of {a.new} positions would meet one of {b.new}",
                        "partners of one size",
                    )

    def _weight_read(self, call: Call) -> TensorRef | None:
        """The weight whose columns the smaller dimension is read by, noted to be folded."""
        held = set(self.trace.tensors.values())
        self._check_norm(call, held)
        if call.op not in ("aten.addmm", "aten.mm", "aten.linear"):
            return None
        left, right = call.inputs[-2:] if call.op != "aten.linear" else call.inputs[:2]
        if left not in self.dims or self.dims[left][-1].old == self.dims[left][-1].new:
            return None
        maker = next((c for c in self.trace.calls if right in c.outputs), None)
        source = maker.inputs[0] if maker is not None and maker.op == "aten.t" else right
        dim = self.dims[left][-1]
        if source not in held or len(source.shape) != 2 or dim.windows is None:
            raise self.refusal(
                f"{call.place}, which reads positions by a product with {right.shape}",
                "a linear layer with a weight of its own, or positions that windows tell",
            )
        column = 1 if source.shape[1] == dim.old and source is not right else None
        if column is None:
            column = 1 if call.op == "aten.linear" else 0
        known = self.folds.setdefault((source, column), dim)
        if known.windows != dim.windows:
            raise self.refusal(
                f"{call.place}, a weight that reads two kinds of positions",
                "weights that read one",
            )
        return right

    def _check_norm(self, call: Call, held: set[TensorRef]) -> None:
        """Norms have parameters for positions where they normalise what was flattened."""
        if "norm" not in call.op or not held.intersection(call.inputs):
            return
        dims = self._of(call.inputs[0])
        own = {dims[1]} if "batch_norm" in call.op and len(dims) > 1 else set(dims[2:][-1:])
        if "layer_norm" in call.op or "rms_norm" in call.op:
            own = set(dims[-len(call.args[1]) :])
        elif "group_norm" in call.op or "instance_norm" in call.op:
            own = {dims[1]}
        if any(dim.old != dim.new for dim in own):
            raise self.refusal(
                f"{call.place}, a norm with parameters for each position",
                "norms over channels",
            )

    def _run(self, call: Call, weight: TensorRef | None) -> list[tuple[int, ...]]:
        """The shapes a call gives now."""
        namespace, name = call.op.split(".", 1)
        packet = getattr(getattr(torch.ops, namespace, None), name, None)
        if namespace != "aten" or packet is None:
            raise self.refusal(f"operator {call.op}", "operators of torch itself")
        function = getattr(packet, call.overload or "default")
        args, kwargs = pytree.tree_map(
            lambda value: self._stand_in(value, call, weight),
            (self._resized_numbers(call), dict(call.kwargs)),
            is_leaf=lambda value: isinstance(value, TensorRef),
        )
        try:
            with torch.no_grad():
                made = function(*args, **kwargs)
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise self.refusal(
                f"{call.place}, which would fail with '{reason}'", "maps large enough, of one size"
            ) from error
        return [tuple(t.shape) for t in pytree.tree_leaves(made) if isinstance(t, Tensor)]

    def _stand_in(self, value: Any, call: Call, weight: TensorRef | None) -> Any:
        if not isinstance(value, TensorRef):
            return value
        shape = [dim.new for dim in self._of(value)]
        if value == weight:
            rows = next(self.dims[r][-1] for r in call.inputs if r in self.dims)
            shape = [rows.new if n == rows.old else n for n in shape]
        return torch.empty(shape, dtype=value.dtype, device="meta")

    def _resized_numbers(self, call: Call) -> list[Any]:
        """The positional arguments, with sizes that repeat those of the tensors before."""
        args = list(call.args)
        dims = self._of(call.inputs[0])
        if call.op == "aten.expand":
            ahead = len(args[1]) - len(dims)
            args[1] = [
                -1 if at >= ahead and dims[at - ahead].old == n else n
                for at, n in enumerate(args[1])
            ]
        if call.op == "aten.native_group_norm":
            args[5] = prod(dim.new for dim in dims[2:])
        return args

    def _reshaped(self, call: Call) -> tuple[Dim, ...]:
        """The dimensions behind a change of shape: each made of whole ones before."""
        left, right = list(self._of(call.inputs[0])), list(call.outputs[0].shape)
        found: list[Dim] = []
        while left or right:
            ins = [left.pop(0)] if left else []
            outs = [right.pop(0)] if right else []
            while prod(d.old for d in ins) != prod(outs):
                if prod(d.old for d in ins) < prod(outs):
                    ins.append(left.pop(0))
                else:
                    outs.append(right.pop(0))
            found += self._regrouped(call, ins, outs)
        return tuple(found)

    def _regrouped(self, call: Call, ins: list[Dim], outs: list[int]) -> list[Dim]:
        if all(dim.old == dim.new for dim in ins):
            return [whole(size) for size in outs]
        if len(outs) == 1:
            if len(ins) > 1:
                self.flattenings.append(call)
            return [flattened(ins)]
        for parts in (ins, list(ins[0].parts)):
            if [part.old for part in parts] == outs:
                return parts
        if len([n for n in outs if n > 1]) == 1 == len([d for d in ins if d.old > 1]):
            dim = next(d for d in ins if d.old > 1)
            return [dim if n > 1 else whole(1) for n in outs]
        raise self.refusal(
            f"{call.place}, which cuts a dimension of positions into {outs}",
            "positions that stay together",
        )
