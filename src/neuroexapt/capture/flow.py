"""Who makes and who reads each tensor of a run: questions that edits of whole layers ask."""

from __future__ import annotations

from collections.abc import Iterable

from neuroexapt.capture.trace import ModuleRun, TensorRef, Trace

# Their output holds the positions of their first input, in another order or shape.
VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "permute",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
        "expand",
        "slice",
        "select",
        "detach",
        "alias",
    )
)
# What is zero stays zero.
_KEEP_ZERO = VIEWS | {
    f"aten.{name}"
    for name in (
        "mul",
        "mul_",
        "div",
        "div_",
        "neg",
        "clone",
        "contiguous",
        "_to_copy",
        "native_dropout",
        "relu",
        "relu_",
        "gelu",
        "tanh",
        "pow",
        "mean",
        "native_layer_norm",
        "_fused_rms_norm",
    )
}
_CONTRACTIONS = frozenset(
    f"aten.{name}"
    for name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "embedding")
)
_PRODUCTS = ("aten.mul", "aten.mul_")
_ADDS = ("aten.add", "aten.add_")


class Flow:
    """Makers and readers of the tensors of one run.

    Example:
        >>> import torch
        >>> from neuroexapt.capture import capture
        >>> trace = capture(torch.nn.Linear(3, 2), (torch.zeros(4, 3),))
        >>> flow = Flow(trace)
        >>> [trace.calls[at].op for at in flow.readers(trace.inputs[0])]
        ['aten.addmm']
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._readers: dict[TensorRef, list[int]] = {}
        self._makers: dict[TensorRef, list[int]] = {}
        for number, call in enumerate(trace.calls):
            for ref in dict.fromkeys(call.inputs):
                self._readers.setdefault(ref, []).append(number)
            for ref in call.outputs:
                self._makers.setdefault(ref, []).append(number)
        self._held = set(trace.tensors.values())

    def readers(self, ref: TensorRef, start: int = 0) -> list[int]:
        """Positions of the calls that read a tensor, from ``start`` on."""
        return [number for number in self._readers.get(ref, ()) if number >= start]

    def is_used(self, ref: TensorRef, start: int) -> bool:
        """Whether anything reads a tensor from ``start`` on, or the model returns it."""
        return ref in self.trace.outputs or bool(self.readers(ref, start))

    def origins(self, ref: TensorRef, stop: int) -> set[TensorRef]:
        """A tensor and all that it was computed from before the call at ``stop``."""
        found, stack = {ref}, [ref]
        while stack:
            for number in self._makers.get(stack.pop(), ()):
                if number < stop:
                    new = [r for r in self.trace.calls[number].inputs if r not in found]
                    found.update(new)
                    stack.extend(new)
        return found

    def rewrites(self, refs: Iterable[TensorRef], start: int) -> bool:
        """Whether a call from ``start`` on writes into one of these tensors, or into a view."""
        same = set(refs)
        for call in self.trace.calls[start:]:
            if not same.intersection(call.inputs):
                continue
            if same.intersection(call.outputs) and call.op not in VIEWS:
                return True
            if call.op in VIEWS and call.inputs[0] in same:
                same.update(call.outputs)
        return False

    def stream(self, run: ModuleRun, entry: TensorRef, out: TensorRef) -> TensorRef | None:
        """The tensor that all of a module's output is added to, if its input stems from that.

        This is what a residual branch does: ``x + module(norm(x))``. Between the module and
        the sum may stand what keeps zeros zero. None where anything else reads the output.
        """
        known = self.origins(entry, run.start)
        zeros, constants, sums = {out}, set[TensorRef](), set[TensorRef]()
        found: TensorRef | None = None
        for call in self.trace.calls[run.stop :]:
            branch = zeros | constants | sums
            if not branch.intersection(call.inputs):
                continue
            outside = set(call.inputs) - branch - self._held
            if call.op in _ADDS and len(outside) == 1 and not constants.intersection(call.inputs):
                # In place, it is the sum from here on.
                zeros.difference_update(call.outputs)
                sums.difference_update(call.outputs)
                if outside <= known:
                    found = found or outside.pop()
                else:  # another branch, which runs beside this one
                    sums.update(call.outputs)
            elif outside or sums.intersection(call.inputs):
                if call.op not in _PRODUCTS or not zeros.intersection(call.inputs):
                    return None
                zeros.update(call.outputs)
            elif call.op in _KEEP_ZERO and zeros.intersection(call.inputs):
                zeros.update(call.outputs)
            else:
                constants.update(call.outputs)
        ends = zeros | constants | sums
        return None if ends.intersection(self.trace.outputs) else found

    def distance(self, source: TensorRef, target: TensorRef, span: range) -> int | None:
        """The fewest layers with a weight matrix on a way from one tensor to another.

        Only the calls of ``span`` count; None where no way leads there.
        """
        away = {source: 0}
        for number in span:
            call = self.trace.calls[number]
            before = [away[ref] for ref in call.inputs if ref in away]
            if before:
                steps = min(before) + (call.op in _CONTRACTIONS)
                for ref in call.outputs:
                    away[ref] = min(steps, away.get(ref, steps))
        return away.get(target)
