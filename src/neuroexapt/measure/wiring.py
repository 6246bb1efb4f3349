"""Which layer reads which, read off one traced run: what a drawing of the model needs.

A node is a layer (a module without children, or one of the rows of `layers`), or a place where the
outputs of several meet: a sum, a product, a concatenation, attention.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator

from torch import nn

from neuroexapt.capture.trace import Call, ModuleRun, TensorRef, Trace
from neuroexapt.measure.cost import is_whole, kind_of

INPUT, OUTPUT = "(input)", "(output)"
_PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "matmul"})
_WORDS = {"add": "+", "sub": "\N{MINUS SIGN}", "mul": "\N{MULTIPLICATION SIGN}", "cat": "concat"}

# Stand for a layer that is not there, or no more.
_NOTHING = frozenset({"Identity", "Passage"})

Node = dict[str, str | list[str]]


def wiring(model: nn.Module, trace: Trace) -> list[Node]:
    """The layers of a run in the order of their first call, each with what it reads.

    Views and other operators of user code between two layers are passed over. Sums and products in
    the code of one module that nothing else reads are one node. A layer with parameters that is
    called several times is one node, one without has a node for each call. What the run did not
    reach is not there.

    Args:
        model: the model the trace was made of.
        trace: a run of it as it is.

    Returns:
        Nodes ``{"name", "type", "from": [names]}``. The first is ``(input)``, the last
        ``(output)``. A layer has the name that `layers` gives it, with ``#2`` and so on for further
        calls, a meeting place the path of its
        module, ``:`` and its number there.

    Example:
        >>> import torch
        >>> from neuroexapt.capture import capture
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> for node in wiring(net, capture(net, (torch.zeros(1, 3),))):
        ...     print(node["name"], node["type"], node["from"])
        (input) input []
        0 Linear ['(input)']
        1 ReLU ['0']
        2 Linear ['1']
        (output) output ['2']
    """
    return _Wires(model, trace).nodes()


class _Wires:
    """Follows every tensor of a run back to the node that made it."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.trace = trace
        self.modules = dict(model.named_modules())
        self.owners = dict(self._owners())
        self.reads: dict[str, dict[str, None]] = {INPUT: {}}
        self.types = {INPUT: "input", OUTPUT: "output"}
        self.joins: dict[str, list[Call]] = {}
        self.starts: dict[str, list[int]] = {}
        for run in sorted(trace.runs, key=lambda run: run.start):
            self.starts.setdefault(run.path, []).append(run.start)
        # The node each tensor comes from; tensors made of nothing but parameters: their layer.
        self.source = dict.fromkeys(trace.inputs, INPUT)
        self.held = dict(self.owners)

    def nodes(self) -> list[Node]:
        """All nodes in order."""
        idle = self._idle()
        for number, call in enumerate(self.trace.calls):
            for run in idle.get(number, ()):
                self._pass(run)
            self._follow(number, call)
        for run in idle.get(len(self.trace.calls), ()):
            self._pass(run)
        self._fold()
        ends = [self.source[ref] for ref in self.trace.outputs if ref in self.source]
        self.reads[OUTPUT] = dict.fromkeys(ends)
        names = self._numbered()
        return [
            {"name": names[name], "type": self._type(name), "from": [names[one] for one in reads]}
            for name, reads in self.reads.items()
        ]

    def _numbered(self) -> dict[str, str]:
        """Final names: meeting places are counted within their module, so that most stay."""
        names, counts = {}, Counter[str]()
        for name in self.reads:
            names[name] = name
            if name in self.joins:
                path = name.rpartition(":")[0]
                names[name] = f"{path}:{counts[path]}"
                counts[path] += 1
        return names

    def _owners(self) -> Iterator[tuple[TensorRef, str]]:
        """The layer of each parameter."""
        for name, ref in self.trace.tensors.items():
            path, _, last = name.rpartition(".")
            module = self.modules.get(path)
            if module is not None and last in module._parameters:
                yield ref, path if is_whole(module) else name

    def _idle(self) -> dict[int, list[ModuleRun]]:
        """Runs that called no operator (dropout while evaluating), by the call they precede."""
        found: dict[int, list[ModuleRun]] = {}
        for run in self.trace.runs:
            module = self.modules.get(run.path)
            if module is None or next(module.children(), None) is not None:
                continue
            if run.start == run.stop and kind_of(module) not in _NOTHING:
                found.setdefault(run.start, []).append(run)
        return found

    def _pass(self, run: ModuleRun) -> None:
        made = {self.source[ref] for ref in run.inputs if ref in self.source}
        if made and run.outputs:
            layer = self._called(run.path, run.start)
            self._read(layer, made)
            self.source.update(dict.fromkeys(run.outputs, layer))

    def _called(self, path: str, number: int) -> str:
        """The node of a module that is running at a call."""
        times = bisect_right(self.starts.get(path, []), number)
        if times < 2 or next(self.modules[path].parameters(), None) is not None:
            return path
        name = f"{path}#{times}"
        self.types[name] = kind_of(self.modules[path])
        return name

    def _follow(self, number: int, call: Call) -> None:
        made = {self.source[ref]: None for ref in call.inputs if ref in self.source}
        layer = self._layer(number, call, bool(made))
        if layer is not None:
            self._read(layer, made)
        elif len(made) > 1:
            layer = f"{call.module}:{len(self.joins)}"
            self.joins[layer] = [call]
            self._read(layer, made)
        elif made:
            layer = next(iter(made))
        else:
            owner = next((self.held[ref] for ref in call.inputs if ref in self.held), None)
            if owner is not None:
                self.held.update(dict.fromkeys(call.outputs, owner))
            return
        self.source.update(dict.fromkeys(call.outputs, layer))

    def _layer(self, number: int, call: Call, active: bool) -> str | None:
        """The layer whose work a call is, if it is one's."""
        module = self.modules.get(call.module)
        if module is not None and next(module.children(), None) is None:
            return self._called(call.module, number) if active else None
        if active:
            return next((self.held[ref] for ref in call.inputs if ref in self.held), None)
        return None

    def _read(self, layer: str, made: dict[str, None] | set[str]) -> None:
        reads = self.reads.setdefault(layer, {})
        reads.update((name, None) for name in made if name != layer)

    def _fold(self) -> None:
        """Sums and products of one module that only each other read become one node."""
        readers: dict[str, set[str]] = {}
        for name, reads in self.reads.items():
            for other in reads:
                readers.setdefault(other, set()).add(name)
        ends = {self.source.get(ref) for ref in self.trace.outputs}
        for name in list(self.joins):
            for other in list(self.reads[name]):
                alone = other in self.joins and readers.get(other) == {name} and other not in ends
                if alone and other.rpartition(":")[0] == name.rpartition(":")[0]:
                    own = self.reads.pop(other)
                    self.reads[name] = {**own, **self.reads[name]}
                    self.reads[name].pop(other)
                    self.joins[name] = self.joins.pop(other) + self.joins[name]
                    for further in own:
                        readers[further] = (readers[further] - {other}) | {name}

    def _type(self, name: str) -> str:
        if name in self.types:
            return self.types[name]
        if name not in self.joins:
            module = self.modules.get(name)
            return "Parameter" if module is None else kind_of(module)
        ops = [call.op.removeprefix("aten.").rstrip("_") for call in self.joins[name]]
        if any("attention" in op for op in ops) or sum(op in _PRODUCTS for op in ops) > 1:
            return "attention"
        return _WORDS.get(ops[-1], ops[-1])
