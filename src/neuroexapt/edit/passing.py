"""Which parameters of a block make it hand on its input unchanged, once they are zero.

A residual block is its input plus branches. The run is followed backwards from its output: what is
added to the input must become zero, and does so when the last linear map of each branch is zero.
Where that cannot be shown, there is no answer (a gate around the block is then the way).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from neuroexapt.capture import Call, TensorRef, Trace
from neuroexapt.capture.trace import ModuleRun
from neuroexapt.couple import AxisMap
from neuroexapt.edit.graft import AFTER, HOLD, NEXT, THEN, is_branch

Names = frozenset[str]
_NONE: Names = frozenset()


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names.split())


_SAME_CONTENT = _aten(
    "view _unsafe_view reshape clone detach alias unsqueeze squeeze contiguous flatten "
    "lift_fresh _reshape_alias _to_copy"
)
# Zero in, zero out; the first argument is what counts.
_ZERO_STAYS = _SAME_CONTENT | _aten(
    "permute transpose t expand slice select relu relu_ silu silu_ gelu tanh tanh_ neg leaky_relu "
    "leaky_relu_ elu mish sum native_dropout dropout mean hardswish hardswish_ constant_pad_nd "
    "roll avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d pixel_shuffle"
)
_WEIGHT_VIEWS = _aten(
    "t transpose permute view unsqueeze expand _to_copy clone squeeze _unsafe_view detach reshape"
)
_VIEWS = (_WEIGHT_VIEWS | {"aten.select", "aten.slice", "aten.alias"}) - {"aten.clone"}
_CUTS = ("aten.relu", "aten.relu_", "aten.hardtanh", "aten.hardtanh_")
_ADDS = ("aten.add", "aten.add_", "aten.sub", "aten.sub_")
_PRODUCTS = ("aten.mm", "aten.bmm", "aten.linear", "aten.addmm", "aten.baddbmm", "aten.convolution")
_NORMS = ("aten.native_layer_norm", "aten._fused_rms_norm", "aten.native_group_norm")
_BATCH_NORMS = ("aten.native_batch_norm", "aten.cudnn_batch_norm", "aten._native_batch_norm_legit")


def silenced(axes: AxisMap, path: str) -> Names | None:
    """Names inside a block of the parameters that make it the identity when they are zero.

    The identity on what the block itself puts out, that is: a block that ends in a ReLU never
    puts out anything below zero. What was inserted behind the block is not part of it.

    Returns:
        None if no such parameters were found, or the block is called more than once.
    """
    found: Names = _NONE
    for trace in axes.traces:
        runs = [run for run in trace.runs if run.path == path]
        if len(runs) > 1:
            return None
        for run in runs:
            output = _own_output(trace, run, path)
            names = None if output is None else _Walk(axes, trace, run, path).passes(output)
            if names is None:
                return None
            found |= names
    return found or None


def _own_output(trace: Trace, run: ModuleRun, path: str) -> TensorRef | None:
    """What the user's part of a module puts out, before anything that was inserted."""
    inserted = [
        (name, other)
        for other in trace.runs
        for parent, _, name in [other.path.rpartition(".")]
        if parent == path and is_branch(name) and not name.startswith(HOLD)
    ]
    if not inserted:
        return run.outputs[0]
    name, first = min(inserted, key=lambda pair: pair[1].start)
    return first.inputs[0] if name.startswith((AFTER, THEN, NEXT)) and first.inputs else None


@dataclass
class _Walk:
    """The calls of one run of a block, followed backwards."""

    axes: AxisMap
    trace: Trace
    run: ModuleRun
    path: str
    calls: Sequence[Call] = field(init=False)
    names: dict[TensorRef, str] = field(init=False)
    cut: Call | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.calls = self.trace.calls[self.run.start : self.run.stop]
        prefix = f"{self.path}."
        trained = {self.trace.tensors[name] for name in self.axes.parameters}
        self.names = {
            ref: name.removeprefix(prefix)
            for name, ref in reversed(list(self.trace.tensors.items()))
            if name.startswith(prefix) and ref in trained
        }

    def passes(self, output: TensorRef) -> Names | None:
        """The parameters by which the output is the input."""
        if self._writes_through_views():
            return None
        # A cut at the end changes nothing of an input that has just been through the same cut.
        last = self._maker(self.run.outputs[0], len(self.calls))
        self.cut = last[1] if last and last[1].op in _CUTS else None
        return self._same(output, len(self.calls))

    def _writes_through_views(self) -> bool:
        """Whether a tensor changes in place that shares its memory with another one here."""
        seen: set[TensorRef] = set()
        for call in self.calls:
            if call.op.endswith("_") and call.inputs and call.inputs[0] in seen:
                return True
            if call.op in _VIEWS:
                seen.update((call.inputs[0], call.outputs[0]))
        return False

    def _maker(self, ref: TensorRef, before: int) -> tuple[int, Call] | None:
        """The last call that made a tensor, or changed it in place, before another one."""
        for index in range(before - 1, -1, -1):
            if ref in self.calls[index].outputs:
                return index, self.calls[index]
        return None

    def _same(self, ref: TensorRef, before: int) -> Names | None:
        made = self._maker(ref, before)
        if made is None:
            return _NONE if ref == self.run.inputs[0] else None
        index, call = made
        if call.op in _SAME_CONTENT:
            return self._same(call.inputs[0], index)
        if self.cut and call.op.rstrip("_") == self.cut.op.rstrip("_"):
            same_limits = call.args[1:] == self.cut.args[1:]
            return self._same(call.inputs[0], index) if same_limits else None
        if call.op in _ADDS and len(call.inputs) == 2:
            left, right = call.inputs
            orders = [(left, right)] if "sub" in call.op else [(left, right), (right, left)]
            for kept, added in orders:
                if kept.shape == call.outputs[0].shape:
                    found = _joined([self._same(kept, index), self._zero(added, index)])
                    if found is not None:
                        return found
        return None

    def _zero(self, ref: TensorRef, before: int) -> Names | None:
        """The parameters by which a tensor is zero."""
        made = self._maker(ref, before)
        if made is None:
            return frozenset([self.names[ref]]) if ref in self.names else None
        index, call = made
        if ref != call.outputs[0]:
            return None
        if call.op in _ZERO_STAYS:
            return self._zero(call.inputs[0], index)
        if call.op in _PRODUCTS:
            return self._zero_product(call, index)
        if call.op in _BATCH_NORMS or call.op in _NORMS:
            return self._zero_norm(call, index)
        if call.op.startswith("aten._scaled_dot_product"):
            return self._zero(call.inputs[2], index)
        if (call.op in _ADDS and len(call.inputs) == 2) or call.op == "aten.cat":
            return _joined(self._zero(part, index) for part in call.inputs)
        if call.op in ("aten.mul", "aten.mul_"):
            return self._zero_factor(call, index)
        if call.op in ("aten.div", "aten.div_") and len(call.inputs) == 1:
            return self._zero(call.inputs[0], index)
        return None

    def _zero_product(self, call: Call, index: int) -> Names | None:
        """A weight is made zero, and its bias; a product of two activations by either."""
        tensors = list(call.inputs)
        shifts = []
        if call.op in ("aten.addmm", "aten.baddbmm"):
            shifts = [tensors.pop(0)]
        elif len(tensors) == 3:
            shifts = [tensors.pop()]
        weights = [name for name in map(self._weight, tensors) if name]
        if weights:
            zero: Names | None = frozenset(weights[:1])
        else:
            options = (self._zero(part, index) for part in tensors)
            zero = next((names for names in options if names is not None), None)
        return _joined([zero, *(self._zero(shift, index) for shift in shifts)])

    def _zero_norm(self, call: Call, index: int) -> Names | None:
        """Scale and shift are made zero; zero before a norm would give huge gradients."""
        scales = [self.names.get(ref) for ref in _scales(call)]
        return frozenset(name for name in scales if name) if scales and all(scales) else None

    def _zero_factor(self, call: Call, index: int) -> Names | None:
        """One factor is enough, and best a layer's output; not one that is being normalised."""
        makers = [self._maker(part, index) for part in call.inputs]
        normalised = any(made and made[1].op == "aten.rsqrt" for made in makers)
        parts = sorted(call.inputs, key=lambda part: part in self.names)
        for part in () if normalised else parts:
            found = self._zero(part, index)
            if found is not None:
                return found
        return None

    def _weight(self, ref: TensorRef) -> str | None:
        """The parameter of which a tensor is a view."""
        before = len(self.calls)
        while ref not in self.names:
            made = self._maker(ref, before)
            if made is None or made[1].op not in _WEIGHT_VIEWS:
                return None
            before, ref = made[0], made[1].inputs[0]
        return self.names[ref]


def _scales(call: Call) -> Iterator[TensorRef]:
    """Scale and shift of a norm, by what its operator takes."""
    first = {"aten.native_layer_norm": 2, "aten._fused_rms_norm": 2}.get(call.op, 1)
    last = first + 1 if call.op == "aten._fused_rms_norm" else first + 2
    yield from (item for item in call.args[first:last] if isinstance(item, TensorRef))


def _joined(parts: Iterable[Names | None]) -> Names | None:
    """All names together; none if one part has none."""
    found: Names = _NONE
    for names in parts:
        if names is None:
            return None
        found |= names
    return found
