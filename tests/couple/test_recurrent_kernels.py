"""Recurrent kernels that this device takes apart or does not have, beside what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuroexapt import AxisMap
from neuroexapt.capture import Call, TensorRef
from neuroexapt.couple import Expr, Leaf
from neuroexapt.couple.axis import Axis, find
from neuroexapt.couple.marks import Label
from neuroexapt.couple.site import RULES, Draft, Site
from tests.couple.recurrent import BATCH, FEATURES, STEPS, Tagger, in_parts, steps

# Without oneDNN's support torch says so once a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


@dataclass(frozen=True)
class Kernel:
    """An operator that this device takes apart or does not have, on the weights of a module."""

    op: str
    make: Callable[[], nn.RNNBase]
    arguments: Callable[[nn.RNNBase, Tensor, list[Tensor], list[Tensor]], tuple[Any, ...]]
    more: tuple[tuple[int, ...], ...] | None = None  # further outputs, where torch cannot tell

    @property
    def name(self) -> str:
        """The operator and the kind of network."""
        return f"{self.op} {self.make().mode}"


def _given(rnn: nn.RNNBase, states: list[Tensor]) -> Any:
    return states if isinstance(rnn, nn.LSTM) else states[0]


def _numbers(rnn: nn.RNNBase) -> tuple[Any, ...]:
    return rnn.bias, rnn.num_layers, 0.0, False, rnn.bidirectional


def _sequence(rnn: nn.RNNBase, x: Tensor, states: list[Tensor], weights: list[Tensor]) -> Any:
    return x, _given(rnn, states), weights, *_numbers(rnn), rnn.batch_first


def _packed(rnn: nn.RNNBase, x: Tensor, states: list[Tensor], weights: list[Tensor]) -> Any:
    sizes = torch.tensor([BATCH] * STEPS)
    return x.flatten(0, 1), sizes, _given(rnn, states), weights, *_numbers(rnn)


def _vendor(rnn: nn.RNNBase, x: Tensor, states: list[Tensor], weights: list[Tensor]) -> Any:
    stride = len(rnn.all_weights[0])
    mode = ("RNN_RELU", "RNN_TANH", "LSTM", "GRU").index(rnn.mode)
    cells = states[1] if isinstance(rnn, nn.LSTM) else None
    rest = rnn.batch_first, 0.0, False, rnn.bidirectional, [], None
    return x, weights, stride, states[0], cells, mode, rnn.hidden_size, rnn.num_layers, *rest


def _cudnn(rnn: nn.RNNBase, x: Tensor, states: list[Tensor], weights: list[Tensor]) -> Any:
    args = list(_vendor(rnn, x, states, weights))
    args.insert(3, None)  # the flat buffer
    args.insert(8, rnn.proj_size)
    return tuple(args)


_DEEP: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
KERNELS = (
    Kernel("lstm.input", lambda: nn.LSTM(5, 6, **_DEEP), _sequence),
    Kernel("lstm.input", lambda: nn.LSTM(5, 6, proj_size=4, **_DEEP), _sequence),
    Kernel("lstm.data", lambda: nn.LSTM(5, 6, **_DEEP), _packed),
    Kernel("gru.data", lambda: nn.GRU(5, 6, bias=False), _packed),
    Kernel("gru.input", lambda: nn.GRU(5, 6, bias=False, batch_first=True, **_DEEP), _sequence),
    Kernel("rnn_tanh.input", lambda: nn.RNN(5, 6, **_DEEP), _sequence),
    Kernel("rnn_relu.input", lambda: nn.RNN(5, 6, nonlinearity="relu"), _sequence),
    Kernel("_lstm_mps.default", lambda: nn.LSTM(5, 6, **_DEEP), _sequence, ((7,), (7,), (7,))),
    Kernel("_cudnn_rnn.default", lambda: nn.LSTM(5, 6, **_DEEP), _cudnn),
    Kernel("_cudnn_rnn.default", lambda: nn.LSTM(5, 6, proj_size=4, bias=False), _cudnn),
    Kernel("_cudnn_rnn.default", lambda: nn.GRU(5, 6, bias=False, **_DEEP), _cudnn),
    Kernel("miopen_rnn.default", lambda: nn.RNN(5, 6, **_DEEP), _vendor),
    Kernel("miopen_rnn.default", lambda: nn.LSTM(5, 6, **_DEEP), _vendor),
)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_couples_what_its_parts_do(kernel: Kernel) -> None:
    """The rule of the whole gives each weight the units that the rules of the parts do."""
    rnn = kernel.make().to("meta")
    ways = len(rnn.all_weights)
    states = [torch.empty(ways, BATCH, n, device="meta") for n in (rnn.proj_size or 6, 6)]
    x = torch.empty(STEPS, BATCH, 5, device="meta")
    if rnn.batch_first:
        x = x.transpose(0, 1)
    args = kernel.arguments(rnn, x, states, list(rnn.parameters()))
    if kernel.more is None:
        op, overload = kernel.op.split(".")
        made = getattr(getattr(torch.ops.aten, op), overload)(*args)
        results = [result for result in made if result is not None]
    else:
        ways_out = (rnn.proj_size or 6) * (2 if rnn.bidirectional else 1)
        more = [torch.empty(shape, device="meta") for shape in kernel.more]
        results = [torch.empty(STEPS, BATCH, ways_out, device="meta"), *states, *more]
    state = states[1] if isinstance(rnn, nn.LSTM) else states[0]
    _check(kernel.op, dict(rnn.named_parameters()), args, results, state, _map_of_parts(rnn))


def _map_of_parts(rnn: nn.RNNBase) -> AxisMap:
    options = {name: getattr(rnn, name) for name in ("num_layers", "bidirectional", "bias")}
    options |= {"proj_size": rnn.proj_size} if rnn.proj_size else {}
    options |= {"nonlinearity": "relu"} if rnn.mode == "RNN_RELU" else {}
    model = Tagger(type(rnn), last=False, batch_first=rnn.batch_first, **options)
    return in_parts(model.double(), tuple(t.double() for t in steps()))


def _check(
    op: str,
    named: dict[str, Tensor],
    args: tuple[Any, ...],
    results: list[Tensor],
    state: Tensor,
    axes: AxisMap,
) -> None:
    """Apply the rule to a call, and compare the axes of every weight with those of a map."""
    refs: dict[int, TensorRef] = {}

    def ref(tensor: Tensor) -> TensorRef:
        made = TensorRef(-1 - len(refs), tuple(tensor.shape), tensor.dtype)
        return refs.setdefault(id(tensor), made)

    name, _, overload = op.partition(".")
    outputs = tuple(map(ref, results))
    sealed = pytree.tree_map_only(Tensor, ref, args)
    call = Call(f"aten.{name}", overload, sealed, {}, outputs, "rnn", None, pointwise=False)
    site = Site(call, Draft(), {})
    for weight, tensor in named.items():
        site.draft.weights.add(ref(tensor))
        labels = [frozenset([Label(f"rnn.{weight}", dim)]) for dim in range(tensor.dim())]
        site.draft.labels[ref(tensor)] = tuple(labels)
    site.draft.dims.update({r: tuple(map(Axis, r.shape)) for r in call.inputs})
    made = RULES[call.op](site)
    assert [tuple(a.size for a in dims) for dims in made] == [r.shape for r in outputs]
    hidden = find(site.dims(ref(state))[-1])
    known = {_hidden(axes): hidden}
    out = axes.modules["rnn"].outputs[0][-1]
    _compare(axes, out, made[0][-1], known)
    for weight, tensor in named.items():
        pairs = zip(axes.tensors[f"rnn.{weight}"], site.dims(ref(tensor)), strict=True)
        for expr, axis in pairs:
            _compare(axes, expr, axis, known)
    marks = {(m.label.name, m.label.dim, m.role) for m in site.draft.marks}
    assert marks == {
        (place.tensor, place.dim, place.role)
        for width in axes.widths.values()
        for place in width.appearances
        if place.tensor.startswith("rnn.")
    }


def _hidden(axes: AxisMap) -> str:
    [expr] = next(a.exprs for a in axes.attributes if (a.module, a.name) == ("rnn", "hidden_size"))
    return str(expr)


def _compare(axes: AxisMap, expr: Expr, axis: Axis, known: dict[str, Axis]) -> None:
    """Expression and axis have the same form over the same atoms; both pinned, or neither."""
    axis = find(axis)
    if isinstance(expr, Leaf):
        assert (axis.form, axis.size) == ("atom", expr.size)
        if expr.name in axes.widths:
            assert known.setdefault(expr.name, axis) is axis
            assert axis.pin is None
        else:
            assert axis.pin
        return
    assert axis.form == type(expr).__name__.lower()
    for part, piece in zip(expr.parts, axis.parts, strict=True):
        _compare(axes, part, piece, known)


class Once(nn.Module):
    """A cell that makes one step."""

    def __init__(self, kind: type[nn.RNNCellBase], bias: bool) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(FEATURES, 5), kind(5, 6, bias=bias)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = self.rnn(self.embed(x))
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_couples_what_its_parts_do(kind: type[nn.RNNCellBase], bias: bool) -> None:
    """One step as one operator: gates by rows, the state by columns."""
    cell = kind(5, 6, bias=bias, device="meta")
    x, state = torch.empty(BATCH, 5, device="meta"), torch.empty(BATCH, 6, device="meta")
    lstm = kind is nn.LSTMCell
    op = {nn.LSTMCell: "lstm_cell", nn.GRUCell: "gru_cell"}.get(kind, "rnn_tanh_cell")
    args = (x, [state, torch.empty_like(state)] if lstm else state, *cell.parameters())
    results = getattr(torch.ops.aten, op)(*args)
    axes = in_parts(Once(kind, bias), (steps()[0][0],))
    named = dict(cell.named_parameters())
    _check(f"{op}.default", named, args, list(results) if lstm else [results], state, axes)


@pytest.mark.parametrize(("op", "gates"), [("lstm", 4), ("gru", 3)])
def test_a_fused_cell_couples_gates_and_state(op: str, gates: int) -> None:
    """What the gates are made of are row blocks of the state's units; biases go along."""
    wide, narrow = (BATCH, gates * 6), (BATCH, 6)
    kept = ((BATCH, gates * 6),) if op == "lstm" else ((BATCH, 5 * 6),)
    shapes = (wide, wide, narrow, wide[1:], wide[1:], *([narrow] * (1 + (op == "lstm"))), *kept)
    refs = [TensorRef(-1 - n, shape, torch.float32) for n, shape in enumerate(shapes)]
    name = f"aten._thnn_fused_{op}_cell"
    call = Call(name, "", tuple(refs[:5]), {}, tuple(refs[5:]), "rnn", None, pointwise=False)
    site = Site(call, Draft(), {})
    for ref, bias in zip(refs[3:5], ("bias_ih", "bias_hh"), strict=True):
        site.draft.weights.add(ref)
        site.draft.labels[ref] = (frozenset([Label(bias, 0)]),)
    site.draft.dims.update({ref: tuple(map(Axis, ref.shape)) for ref in refs[:5]})
    made = RULES[name](site)
    assert [tuple(a.size for a in dims) for dims in made] == [ref.shape for ref in refs[5:]]
    units = find(site.axis(refs[2], 1))
    assert find(made[0][1]) is units
    for ref in (refs[0], refs[1], refs[3], refs[4]):
        blocks, inner = find(site.dims(ref)[-1]).parts
        assert (blocks.size, find(inner)) == (gates, units)
        assert blocks.pin
        assert units.pin is None
    assert {(m.label.name, m.role, m.fill) for m in site.draft.marks} == {
        ("bias_ih", "elementwise", "zero"),
        ("bias_hh", "elementwise", "zero"),
    }
    assert site.labels(refs[5])[1] == {Label("bias_ih", 0), Label("bias_hh", 0)}


def test_steps_of_packed_sequences_are_pinned_and_features_pass() -> None:
    """(steps, f) -> (batch, time, f); what the lengths say stays."""
    data, sizes, x, lengths = (
        TensorRef(-1 - n, shape, torch.float32)
        for n, shape in enumerate([(9, 6), (4,), (BATCH, 4, 6), (BATCH,)])
    )
    args = (data, sizes, True, 0.0, 4)
    op = "aten._pad_packed_sequence"
    site = Site(Call(op, "", args, {}, (x, lengths), "", None, pointwise=False), Draft(), {})
    site.draft.dims.update({ref: tuple(map(Axis, ref.shape)) for ref in (data, sizes)})
    unpacked, counted = RULES[op](site)
    assert find(unpacked[2]) is find(site.axis(data, 1))
    assert unpacked[2].pin is None
    fixed = (*unpacked[:2], *counted, site.axis(data, 0), site.axis(sizes, 0))
    assert all(find(axis).pin for axis in fixed)
