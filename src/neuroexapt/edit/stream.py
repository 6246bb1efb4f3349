"""What happens to a module's output: is it the branch of a residual connection?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from neuroexapt.capture import Call, ModuleRun, TensorRef, Trace
from neuroexapt.couple import AxisMap, Leaf

_ADDS = {"aten.add", "aten.add_"}
# Zero stays zero: a branch that is dropped before is dropped behind as well.
_SCALES = {"aten.mul", "aten.mul_", "aten.div", "aten.div_", "aten._to_copy", "aten.clone"}
_MOVES = {
    f"aten.{name}" for name in ("transpose", "permute", "view", "_unsafe_view", "reshape", "alias")
}
# A shortcut may change the number of channels and positions, and do no more than that.
_LINEAR = {
    *_SCALES,
    *(f"aten.{name}" for name in ("convolution", "mm", "addmm", "bmm", "linear", "t", "pad")),
    *(f"aten.{name}" for name in ("native_batch_norm", "cudnn_batch_norm", "batch_norm")),
    *(
        f"aten.{name}"
        for name in ("_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
    ),
    *(f"aten.{name}" for name in ("avg_pool1d", "avg_pool2d", "avg_pool3d", "constant_pad_nd")),
    *(f"aten.{name}" for name in ("view", "_unsafe_view", "reshape", "transpose", "permute")),
    *(f"aten.{name}" for name in ("slice", "cat", "expand", "unsqueeze", "squeeze", "alias")),
}
_MAPS = ("convolution", "pool", "batch_norm", "upsample", "group_norm", "instance_norm")
# Behind these channels come last, or each position by itself.
_FEATURES = (
    *(f"aten.{name}" for name in ("transpose", "permute", "native_layer_norm", "bmm", "_scaled")),
    "aten.addmm",
    "aten.mm",
    "aten.linear",
    "aten.embedding",
    "aten.lstm",
    "aten.gru",
)


@dataclass(frozen=True)
class Flow:
    """One run, as a graph of tensors that depend on the model's input."""

    trace: Trace

    @cached_property
    def makers(self) -> dict[TensorRef, list[int]]:
        """The calls that made each tensor or changed it in place."""
        found: dict[TensorRef, list[int]] = {}
        for number, call in enumerate(self.trace.calls):
            for ref in call.outputs:
                found.setdefault(ref, []).append(number)
        return found

    @cached_property
    def readers(self) -> dict[TensorRef, list[int]]:
        """The calls that read each tensor."""
        found: dict[TensorRef, list[int]] = {}
        for number, call in enumerate(self.trace.calls):
            for ref in dict.fromkeys(call.inputs):
                found.setdefault(ref, []).append(number)
        return found

    @cached_property
    def active(self) -> set[TensorRef]:
        """The tensors that depend on the model's input."""
        found = set(self.trace.inputs)
        for call in self.trace.calls:
            if found & set(call.inputs):
                found.update(call.outputs)
        return found

    def readers_from(self, ref: TensorRef, start: int) -> list[int]:
        """The calls from a moment on that read a tensor, as long as it holds this value."""
        found = []
        for number in self.readers.get(ref, []):
            if number >= start:
                found.append(number)
                if ref in self.trace.calls[number].outputs:
                    break  # changed in place: who reads on reads something else
        return found

    def sources(self, ref: TensorRef, before: int, *, linear: bool = False) -> set[TensorRef]:
        """The floating tensors a tensor was made from, itself included.

        With ``linear`` only those it is a linear function of, operator by operator.
        """
        found, edge = {(ref, before)}, [(ref, before)]
        while edge:
            tensor, limit = edge.pop()
            number = max((n for n in self.makers.get(tensor, []) if n < limit), default=None)
            if number is None or (linear and self.trace.calls[number].op not in _LINEAR):
                continue
            inputs = {(r, number) for r in self.trace.calls[number].inputs if r in self.active}
            edge += inputs - found
            found |= inputs
        return {tensor for tensor, _ in found if tensor.dtype.is_floating_point}


def joins_stream(flow: Flow, path: str) -> str:
    """Why a module's output is not the branch of a residual connection; empty if it is.

    It is, if at every run it goes nowhere but into a sum whose other side is the stream: a tensor
    that the branch was computed from, or a linear shortcut of one.
    """
    for run in flow.trace.runs:
        problem = _branch_problem(flow, run) if run.path == path else ""
        if problem:
            return problem
    return ""


def _branch_problem(flow: Flow, run: ModuleRun) -> str:
    """Follow the output through scales to the sum."""
    if run.gives not in ("tensor", "tuple"):
        return f"an output of type {run.gives}"
    start = ref = run.outputs[0]
    moment = run.stop
    while True:
        if ref in flow.trace.outputs:
            return "an output of the model"
        readers = flow.readers_from(ref, moment)
        if len(readers) != 1:
            return f"an output that {len(readers)} operators read"
        call = flow.trace.calls[readers[0]]
        if call.op in _ADDS:
            return _sum_problem(flow, start, ref, call, readers[0])
        others = [r for r in call.inputs if r != ref and r in flow.active]
        scales = call.op in _SCALES and not others and call.outputs[0].shape == ref.shape
        if not scales and call.op not in _MOVES:
            return f"an output that {call.op} reads ({call.place})"
        if call.outputs[0] == ref:
            return f"an output that {call.op} changes in place ({call.place})"
        ref, moment = call.outputs[0], readers[0]


def _sum_problem(flow: Flow, start: TensorRef, ref: TensorRef, call: Call, number: int) -> str:
    other = next((r for r in call.inputs if r != ref), None)
    if other is None or other not in flow.active or other.shape != ref.shape:
        return f"a sum with something else than the stream ({call.place})"
    made_from = flow.sources(start, number) - {start}
    if other in made_from:
        return ""
    shortcut = flow.sources(other, number, linear=True) & made_from
    if shortcut and not flow.sources(start, number, linear=True) & shortcut:
        return ""
    return f"a sum whose other side is no stream that this is a branch of ({call.place})"


def branches_near(flow: Flow, path: str) -> Iterator[str]:
    """Paths of residual branches inside a module, else beside it."""
    parent = path.rpartition(".")[0]
    paths = dict.fromkeys(run.path for run in flow.trace.runs)
    inside = [p for p in paths if p.startswith(f"{path}.") or not path]
    beside = [p for p in paths if p.startswith(f"{parent}.") or not parent]
    for group in (inside, beside):
        found = [p for p in group if p and not joins_stream(flow, p)]
        if found:
            yield from found
            return


def sample_dim(axes: AxisMap, path: str) -> int | None:
    """The dimension of a module's output that counts the samples of the batch."""
    inputs = axes.modules[""].inputs if "" in axes.modules else ()
    batch = inputs[0][0] if inputs and inputs[0] else None
    if isinstance(batch, Leaf) and axes.modules[path].outputs:
        for dim, expr in enumerate(axes.modules[path].outputs[0]):
            if expr == batch:
                return dim
    return None


def is_map(axes: AxisMap, path: str) -> bool:
    """Whether a module's output is a map of channels over space, not rows of features.

    What made it decides: a convolution, a pool or a norm over channels, or a linear layer.
    """
    trace = axes.traces[0]
    flow = Flow(trace)
    run = next(run for run in trace.runs if run.path == path)
    ref, limit = next(iter(run.outputs), None), run.stop
    while ref is not None:
        number = max((n for n in flow.makers.get(ref, []) if n < limit), default=None)
        if number is None:
            return True
        call, limit = trace.calls[number], number
        if any(word in call.op for word in _MAPS):
            return True
        if call.op.startswith(_FEATURES):
            return False
        ref = next((r for r in call.inputs if r in flow.active), None)
    return True
