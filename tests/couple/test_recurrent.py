"""Recurrent networks and cells: which units are one, whichever kernel computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuroexapt import AxisMap, map_axes
from neuroexapt.capture import Call, TensorRef
from neuroexapt.couple import Expr, Leaf, Width, unit_of
from neuroexapt.couple.axis import Axis, find
from neuroexapt.couple.site import RULES, Draft, Label, Site
from tests.couple.dead_units import worst_difference
from tests.couple.recurrent import (
    BATCH,
    CASES,
    FEATURES,
    GRID,
    LOOPS,
    STEPS,
    Case,
    Packed,
    Tagger,
    built,
    ragged,
    steps,
)

# Without oneDNN's support torch says so once a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cache
def mapped(case: Case) -> AxisMap:
    """The map of a case, made once a process."""
    return map_axes(*built(case))


@by_case
def test_widths(case: Case) -> None:
    """Exactly the widths expected, no operator without a rule."""
    axes = mapped(case)
    assert sorted(width.size for width in axes.widths.values()) == sorted(case.widths)
    assert not axes.unknown


@by_case
def test_a_silent_unit_can_be_taken_out(case: Case) -> None:
    """Zero what reads a unit, take the unit out of every layer and direction: same outputs."""
    model, args = built(case)
    axes = mapped(case)
    for width in axes.widths.values():
        for unit in range(width.size):
            assert worst_difference(model, args, axes, width, unit) < 1e-9, width.name


def in_parts(model: nn.Module, args: tuple[Tensor, ...]) -> AxisMap:
    """The map of a run in which torch takes recurrent networks apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuroexapt.capture.whole._NETWORKS", frozenset())
        patch.setattr("neuroexapt.capture.whole._CELLS", frozenset())
        axes = map_axes(model, args)
    assert len(axes.traces[0].calls) > len(map_axes(model, args).traces[0].calls)
    assert not axes.unknown
    return axes


@pytest.mark.parametrize("case", [*GRID, *LOOPS], ids=lambda case: case.name)
def test_a_network_couples_what_its_parts_do(case: Case) -> None:
    """One rule for the whole, or those of every product, gate and step: the same map."""
    _same(mapped(case), in_parts(*built(case)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_another_precision_has_the_same_map(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    """Other kernels compute it then, and the expressions are the same."""
    model = Tagger(kind, num_layers=2, bidirectional=True)
    [x] = steps()
    exact = map_axes(model.double(), (x.double(),))
    _same(exact, map_axes(model.to(dtype), (x.to(dtype),)))
    _same(exact, in_parts(model, (x.to(dtype),)))


def test_a_long_sequence_is_one_call() -> None:
    """The run that is recorded has as many calls for a thousand steps as for two."""
    model = Tagger(nn.GRU, num_layers=2)
    long, short = (map_axes(model, (torch.randn(n, 2, FEATURES),)) for n in (1000, 2))
    assert len(long.traces[0].calls) == len(short.traces[0].calls) < 20
    assert long.modules["rnn"].outputs[0][0] != short.modules["rnn"].outputs[0][0]
    _same(long, short)


def _same(one: AxisMap, other: AxisMap) -> None:
    """The same widths at the same places, whatever they are called."""
    ones, others = ([_places(axes, name) for name in axes.widths] for axes in (one, other))
    assert sorted(ones, key=str) == sorted(others, key=str)


def _places(axes: AxisMap, name: str) -> dict[tuple[str, int], tuple[Any, ...]]:
    return {
        (place.tensor, place.dim): (
            place.role,
            place.fill,
            unit_of(axes.tensors[place.tensor][place.dim], name).tolist(),
        )
        for place in axes.widths[name].appearances
    }


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences_in_parts(kind: type[nn.RNNBase]) -> None:
    """Lengths and steps are data, features pass."""
    model, args = Packed(kind, steps=False, num_layers=2, bidirectional=True), ragged()
    _same(map_axes(model, args), in_parts(model, args))


# --- by brute force: move one entry and see what moves -------------------------------------------


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_a_row_moves_its_unit_alone(case: Case) -> None:
    """In one step, an entry of a gate (or projection) moves the unit that the map says."""
    rnn, axes, width = _network(case)
    prefix = "weight_hr" if rnn.proj_size else ("weight", "bias")
    touched = set[int]()
    for name, parameter in _last_layer(rnn):
        if not name.startswith(prefix):
            continue
        first = width.size if name.endswith("_reverse") else 0
        for row, unit in enumerate(unit_of(axes.tensors[f"rnn.{name}"][0], width.name)):
            moved = _moved(rnn, parameter, row)
            assert moved <= {first + unit}, (name, row)
            touched |= moved
    assert touched == set(range(width.size * (2 if rnn.bidirectional else 1)))


@pytest.mark.parametrize(
    "case", [c for c in GRID if not c.name.startswith("GRU")], ids=lambda case: case.name
)
def test_a_column_reads_its_unit_alone(case: Case) -> None:
    """A column set to zero in one step is the unit of the given state set to zero."""
    rnn, axes, width = _network(case)
    for name, parameter in _last_layer(rnn):
        if not name.startswith("weight_hh"):
            continue
        old = parameter.detach().clone()
        place = -1 if name.endswith("_reverse") or not rnn.bidirectional else -2
        for column, unit in enumerate(unit_of(axes.tensors[f"rnn.{name}"][1], width.name)):
            with torch.no_grad():
                parameter[:, column] = 0
                without_column = _one_step(rnn)
                parameter.copy_(old)
                without_unit = _one_step(rnn, silent=(place, int(unit)))
            torch.testing.assert_close(without_column, without_unit, rtol=0, atol=1e-12)
            assert not torch.equal(without_unit, _one_step(rnn))


def _network(case: Case) -> tuple[nn.RNNBase, AxisMap, Width]:
    """The network of a case, its map, and the width that it puts out."""
    rnn, axes = built(case)[0].get_submodule("rnn"), mapped(case)
    assert isinstance(rnn, nn.RNNBase)
    held = "proj_size" if rnn.proj_size else "hidden_size"
    [expr] = next(a.exprs for a in axes.attributes if (a.module, a.name) == ("rnn", held))
    assert isinstance(expr, Leaf)
    return rnn, axes, axes.widths[expr.name]


def _last_layer(rnn: nn.RNNBase) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in rnn.named_parameters() if f"_l{rnn.num_layers - 1}" in n]


def _one_step(rnn: nn.RNNBase, silent: tuple[int, int] | None = None) -> Tensor:
    """The output of one step from a random state, of which one unit may be silent."""
    generator = torch.Generator().manual_seed(1)
    x, first, cells = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((1, 1, 5), (len(rnn.all_weights), 1, rnn.proj_size or 6), (4, 1, 6))
    )
    if silent:
        first[silent[0], :, silent[1]] = 0
    with torch.no_grad():
        out, _ = rnn(x, (first, cells[: len(first)]) if isinstance(rnn, nn.LSTM) else first)
    return torch.as_tensor(out[0, 0])


def _moved(rnn: nn.RNNBase, parameter: Tensor, row: int) -> set[int]:
    """The outputs that move with a row, up or down (a ReLU may be shut on one side)."""
    before, old, moved = _one_step(rnn), parameter.detach().clone(), set[int]()
    with torch.no_grad():
        for change in (3.0, -3.0):
            parameter[row] += change
            far = (before - _one_step(rnn)).abs() > 1e-9
            moved |= set(far.nonzero()[:, 0].tolist())
            parameter.copy_(old)
    return moved


# --- kernels of other devices --------------------------------------------------------------------


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
