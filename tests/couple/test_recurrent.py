"""Recurrent networks and cells: which units are one, whichever kernel computes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import AxisMap, map_axes
from neuroexapt.couple import Leaf, Width, unit_of
from tests.couple.dead_units import worst_difference
from tests.couple.recurrent import (
    CASES,
    FEATURES,
    GRID,
    LOOPS,
    Case,
    Packed,
    Tagger,
    built,
    in_parts,
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


class Asking(nn.Module):
    """Asks where its weight lies, as a recurrent module does on an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(FEATURES, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.head.weight.data_ptr() == x.data_ptr() != 0
        return self.head(self.rnn(x)[0]) + shared


def test_where_fake_weights_lie_may_be_asked() -> None:
    """Without a warning, and without falling back to real copies."""
    axes = map_axes(Asking(), steps())
    assert not axes.notes
    assert list(axes.widths) == ["rnn.hidden_size"]


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
