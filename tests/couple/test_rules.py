"""Every rule: what becomes a width, and whether the right units go together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt import map_axes
from neuroexapt.capture import Call, TensorRef
from neuroexapt.couple import AxisMap, Sum
from neuroexapt.couple.axis import Axis, find
from neuroexapt.couple.marks import Dims, Label
from neuroexapt.couple.site import RULES, Draft, Site
from tests.couple.dead_units import TOLERANCE, worst_difference
from tests.couple.direct_calls import direct_calls
from tests.couple.operators import ROWS, Row


def mapped(row: Row) -> tuple[nn.Module, tuple[Tensor, ...], AxisMap]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, args = row.make().double(), (torch.randn(row.shape, dtype=torch.float64),)
        for name, tensor in model.named_buffers():
            if name.endswith(("mean", "var")):
                tensor.uniform_(0.5, 2.0)
    return model, args, map_axes(model, args)


by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@by_row
def test_widths_and_pins(row: Row) -> None:
    """Exactly the expected widths are found, what is held has its reason, nothing is unknown."""
    _, _, axes = mapped(row)
    assert sorted(width.size for width in axes.widths.values()) == sorted(row.widths)
    assert any(row.pinned in pin.reason.partition(" (")[0] for pin in axes.pinned.values())
    assert not axes.unknown


@by_row
def test_a_silent_unit_can_be_taken_out(row: Row) -> None:
    """Zero what reads a unit, take the unit out everywhere: the outputs are the same."""
    model, args, axes = mapped(row)
    for width in axes.widths.values():
        if any(m.kind != "dot" or m.scale == "inverse_sqrt" for m in width.mixers):
            continue  # a silent unit still counts in what the others become
        if width.multiple > 1:
            continue  # one unit less is a size that the kernel does not take
        for unit in range(width.size):
            assert worst_difference(model, args, axes, width, unit) < TOLERANCE, width.name


def test_the_oracle_sees_a_wrong_coupling() -> None:
    """A map with two segments in the wrong order fails, so the test above can fail."""
    model, args, axes = mapped(next(row for row in ROWS if row.name == "cat of two"))
    total, out = axes.tensors["weights.2"]
    assert isinstance(total, Sum)
    swapped = {**axes.tensors, "weights.2": (Sum(total.parts[::-1]), out)}
    wrong = replace(axes, tensors=swapped)
    for width in axes.widths.values():
        assert worst_difference(model, args, axes, width, 0) < TOLERANCE
        assert worst_difference(model, args, wrong, width, 0) > 100 * TOLERANCE


def fused(op: str, *shapes: tuple[int, ...], **fields: object) -> tuple[Site, list[Dims]]:
    """Apply the rule of an operator that this device takes apart before it is seen."""
    refs = [TensorRef(-1 - number, shape, torch.float32) for number, shape in enumerate(shapes)]
    x, out, weight, *bias = refs
    draft = Draft()
    draft.dims.update({ref: tuple(map(Axis, ref.shape)) for ref in (x, weight, *bias)})
    for ref, name in zip((weight, *bias), ("weight", "bias"), strict=False):
        draft.labels[ref] = tuple(frozenset([Label(name, d)]) for d in range(len(ref.shape)))
        draft.weights.add(ref)
    middle = () if op == "aten.linear" else ((weight.shape),)
    args = (x, *middle, weight, *bias)
    site = Site(Call(op, "", args, {}, (out,), "m", None, pointwise=False), draft, fields)
    return site, [tuple(dims) for dims in RULES[op](site)]


def test_the_rule_of_an_undivided_linear() -> None:
    """(..., k) with (n, k): k is one axis, rows produce, columns consume, the bias goes along."""
    site, [out] = fused("aten.linear", (4, 7, 5), (4, 7, 6), (6, 5), (6,))
    x, weight, bias = (site.dims(ref) for ref in site.call.inputs)
    assert find(x[-1]) is find(weight[1])
    assert find(out[-1]) is find(weight[0]) is find(bias[0])
    assert {(m.label.name, m.label.dim, m.role) for m in site.draft.marks} == {
        ("weight", 0, "producer"),
        ("weight", 1, "consumer"),
        ("bias", 0, "elementwise"),
    }


def test_the_rule_of_a_fused_rms_norm() -> None:
    """The scale goes with the last dimension, over which the mean square is taken."""
    site, [out] = fused("aten._fused_rms_norm", (4, 6), (4, 6), (6,), eps=None)
    x, weight = (site.dims(ref) for ref in site.call.inputs)
    assert find(x[-1]) is find(weight[0]) is find(out[-1])
    [mix] = site.draft.mixes
    assert (mix.kind, mix.data["weight"], mix.data["eps_attribute"]) == (
        "mean_square",
        {"weight"},
        "eps",
    )


def test_every_rule_has_a_row() -> None:
    """A rule that neither a row nor a direct call reaches fails here, by its name."""
    in_rows = {call.op for row in ROWS for trace in mapped(row)[2].traces for call in trace.calls}
    reached = in_rows | {call.op for call in direct_calls()}
    # Recurrent kernels have a table of their own.
    names = {f.__name__ for f in RULES.values() if not f.__module__.endswith("rules_recurrent")}
    assert names - {RULES[op].__name__ for op in reached if op in RULES} == set()


def test_groups_of_a_transposed_convolution_are_read_inside() -> None:
    """Its first dimension is (groups, inputs of a group): the second factor is read."""
    axes = mapped(next(row for row in ROWS if row.name == "transposed conv groups"))[2]
    roles = {
        width.size: place.roles
        for width in axes.widths.values()
        for place in width.appearances
        if (place.tensor, place.dim) == ("1.weight", 0)
    }
    assert roles == {2: {"producer"}, 3: {"consumer"}}


class JoinedBias(nn.Module):
    """Attention whose query, key and value are one weight with three biases, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = 2, nn.Linear(12, 3)
        self.weight = nn.Parameter(torch.randn(36, 5))
        self.q, self.k, self.v = (nn.Parameter(torch.randn(12)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = F.linear(x, self.weight, torch.cat((self.q, self.k, self.v)))
        qkv = qkv.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


def test_a_part_of_a_concatenation_stems_from_its_own_segment() -> None:
    """The left operand of the scores is made by the query's rows and bias, by no other's."""
    axes = map_axes(JoinedBias(), (torch.randn(2, 7, 5),))
    [mixer] = [m for width in axes.widths.values() for m in width.mixers if m.sides[0]]
    told = [{(s.tensor, s.dim): s.positions for s in side} for side in mixer.sides]
    first, second = tuple(range(12)), tuple(range(12, 24))
    assert told[0] == {("q", 0): first, ("weight", 0): first}
    assert told[1] == {("k", 0): first, ("weight", 0): second}
