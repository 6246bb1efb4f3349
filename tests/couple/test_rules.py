"""One row per family of operators: what becomes a width, and whether the right units go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt import map_axes
from neuroexapt.capture import Call, TensorRef
from neuroexapt.couple import AxisMap
from neuroexapt.couple.axis import Axis, find
from neuroexapt.couple.site import RULES, Dims, Draft, Label, Site
from tests.couple.dead_units import MIXING, TOLERANCE, worst_difference


class Between(nn.Module):
    """A function between two layers, so that the width of the first flows through it."""

    def __init__(self, first: nn.Module, op: Callable[..., Tensor], last: nn.Module) -> None:
        super().__init__()
        self.first, self.op, self.last = first, op, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(self.first(x)))


class Weighted(nn.Module):
    """A function of the input and of bare parameters of given shapes."""

    def __init__(self, op: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.op = op
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, *self.weights)


class Heads(nn.Module):
    """Attention by hand: one fused projection, heads as an attribute."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = 3, attend
        self.qkv, self.out = nn.Linear(5, 3 * 3 * 4), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5, -1) @ v


@dataclass(frozen=True)
class Row:
    """A tiny model around an operator.

    ``widths``: the sizes of all widths that must be found; ``pinned``: a text that the reason
    of some pin must have.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    widths: tuple[int, ...]
    pinned: str = "contract with its caller"


def vector(op: Callable[..., Tensor], width: int = 6, after: int | None = None) -> Any:
    """(4, 5) -> width -> the operator -> 3 outputs."""
    return lambda: Between(nn.Linear(5, width), op, nn.Linear(after or width, 3))


def image(op: Callable[..., Tensor], width: int = 6, after: int | None = None) -> Any:
    """(2, 3, 8, 8) -> width channels -> the operator -> 3 channels."""
    return lambda: Between(nn.Conv2d(3, width, 1), op, nn.Conv2d(after or width, 3, 1))


def conv(*layers: nn.Module) -> Any:
    return lambda: nn.Sequential(*layers)


V, T, I = (4, 5), (4, 7, 5), (2, 3, 8, 8)
FLAT = torch.tensor([2, 0, 1, 5])

ROWS = (
    Row("mm", lambda: Weighted(lambda x, a, b: x @ a @ b, (5, 6), (6, 3)), V, (6,)),
    Row("addmm", vector(F.relu), V, (6,)),
    Row("linear on tokens", vector(F.gelu), T, (6,)),
    Row("bmm attention", lambda: Heads(by_hand), T, (3, 4), "equal parts"),
    Row("fused attention", lambda: Heads(F.scaled_dot_product_attention), T, (3, 4), "equal parts"),
    Row("mv", lambda: Weighted(lambda x, a, b: (x @ a) @ b, (5, 6), (6,)), V, (6,)),
    Row(
        "dot",
        lambda: Weighted(lambda x, a, b: x * torch.dot(a, b), (6,), (6,)),
        V,
        (),
        "no layer produces it",
    ),
    Row("conv", conv(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 2, 1)), I, (4, 6)),
    Row("conv groups", conv(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, groups=2)), I, (3,)),
    Row("depthwise", conv(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)), I, (6,)),
    Row("depth multiplier", conv(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 2, 1)), I, (2, 6)),
    Row("grouped conv inside", conv(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1)), I, (2, 3, 4)),
    Row("transposed conv", conv(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 2), nn.Conv2d(4, 2, 1)), I, (4, 6)),
    Row(
        "transposed conv groups",
        conv(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 2, groups=2), nn.Conv2d(8, 2, 1)),
        I,
        (2, 3, 4),
    ),
    Row("embedding", lambda: Weighted(lambda x, e, w: F.embedding(x.long().abs() % 9, e) @ w, (9, 6), (6, 2)), V, (6,), "rows taken by number"),
    Row("batch norm", conv(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)), I, (6,)),
    Row("layer norm", vector(nn.LayerNorm(6)), V, (6,)),
    Row("rms norm", vector(nn.RMSNorm(6)), V, (6,)),
    Row("group norm", image(nn.GroupNorm(2, 6)), I, (2, 3)),
    Row("group norm, a number", image(lambda x: F.group_norm(x, 2)), I, (3,), "a number of groups"),
    Row("instance norm", image(nn.InstanceNorm2d(6, affine=True)), I, (6,)),
    Row("pointwise with itself", vector(lambda x: x * torch.sigmoid(x) + x), V, (6,)),
    Row("prelu", image(nn.PReLU(6)), I, (6,)),
    Row("residual", lambda: nn.Sequential(nn.Linear(5, 6), Between(nn.Identity(), lambda x: x + 1, nn.Linear(6, 6)), nn.Linear(6, 3)), V, (6, 6)),
    Row("softmax", vector(lambda x: x.softmax(-1)), V, (6,)),
    Row("mean", image(lambda x: x.mean((2, 3), keepdim=True)), I, (6,)),
    Row("max with indices", image(lambda x: x.flatten(2).max(2)[0][..., None, None]), I, (6,)),
    Row("sum over the width", vector(lambda x: x - x.sum(-1, keepdim=True)), V, (6,)),
    Row("cumsum", vector(lambda x: x.cumsum(-1)), V, (), "an order that matters"),
    Row("glu", vector(lambda x: F.glu(x, -1), 12, 6), V, (6,), "two halves"),
    Row("flatten", lambda: Between(nn.Conv2d(3, 6, 1), lambda x: x.flatten(1), nn.Linear(6 * 64, 3)), I, (6,)),
    Row("unflatten", lambda: Between(nn.Linear(5, 12), lambda x: x.view(4, 3, -1).transpose(1, 2).flatten(1), nn.Linear(12, 2)), V, (4,), "view(4, 3, -1)"),
    Row("squeeze", vector(lambda x: x[:, None].unsqueeze(-1).squeeze()), V, (6,)),
    Row("permute", lambda: Between(nn.Conv2d(3, 6, 1), lambda x: x.permute(0, 2, 3, 1), nn.Linear(6, 3)), I, (6,)),
    Row("expand", vector(lambda x: (x[:, None].expand(4, 7, x.shape[-1]) * 2).sum(1)), V, (6,)),
    Row("repeat", vector(lambda x: x.repeat(1, 2), 6, 12), V, (6,)),
    Row("cat", vector(lambda x: torch.cat([x, x.relu()], -1), 6, 12), V, (6,)),
    Row("cat of two", lambda: Weighted(lambda x, a, b, c: torch.cat([x @ a, (x @ b).relu()], 1) @ c, (5, 4), (5, 6), (10, 2)), V, (4, 6)),
    Row("stack", vector(lambda x: torch.stack([x, -x], 1).flatten(1), 6, 12), V, (6,)),
    Row("select", vector(lambda x: x * x[:, :1] + x.select(1, 2)[:, None]), V, (), "by number"),
    Row("unbind", vector(lambda x: torch.stack(x.unbind(1)[::-1], 1)), V, (), "by number"),
    Row("slices", vector(lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)), V, (3,)),
    Row("every second", vector(lambda x: x[:, ::2], 6, 3), V, (), "every n-th position"),
    Row("split in parts", vector(lambda x: torch.cat(x.split([2, 4], 1)[::-1], 1)), V, (), "split([2, 4], 1)"),
    Row("chunk", vector(lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], 12, 6), V, (6,), "equal parts"),
    Row("pad", vector(lambda x: F.pad(x, (1, 2)), 6, 9), V, (6,), "an amount of padding"),
    Row("pixel shuffle", image(nn.PixelShuffle(2), 12, 3), I, (3,), "an upscale factor"),
    Row("pixel unshuffle", image(nn.PixelUnshuffle(2), 6, 24), I, (6,), "a downscale factor"),
    Row("channel shuffle", image(nn.ChannelShuffle(2), 6), I, (2, 3)),
    Row("channel shuffle, a number", image(lambda x: F.channel_shuffle(x, 2)), I, (3,), "a number of groups"),
    Row("max pool", image(nn.MaxPool2d(2)), I, (6,), "kernel size"),
    Row("adaptive pool", image(nn.AdaptiveAvgPool2d(3)), I, (6,)),
    Row("upsample", image(nn.Upsample(scale_factor=2)), I, (6,)),
    Row("unfold", lambda: Between(nn.Conv2d(3, 6, 1), lambda x: F.unfold(x, 2).transpose(1, 2), nn.Linear(24, 2)), I, (6,), "a kernel size"),
    Row("fold", lambda: Between(nn.Linear(5, 24), lambda x: F.fold(x.transpose(1, 2), (3, 4), 2), nn.Conv2d(6, 2, 1)), (2, 6, 5), (6,), "a kernel size"),
    Row("roll", vector(lambda x: x.roll(1, -1)), V, (), "change places"),
    Row("flip", image(lambda x: x.flip(-1)), I, (6,)),
    Row("triangle", vector(lambda x: x[:, None].expand(4, x.shape[1], x.shape[1]).tril().sum(1)), V, (), "a triangle"),
    Row("index", vector(lambda x: x[:, FLAT], 6, 4), V, (), "index tensor"),
    Row("index of the batch", vector(lambda x: x[FLAT % 4]), V, (6,)),
    Row("index_select", vector(lambda x: x.index_select(1, FLAT), 6, 4), V, (), "index tensor"),
    Row("gather", vector(lambda x: x.gather(1, FLAT.expand(4, 4)), 6, 4), V, (), "index tensor"),
    Row("index_put", vector(lambda x: x.clone().index_put_((FLAT % 4,), x[:4] * 2)), V, (), "written by an index"),
    Row("create", vector(lambda x: x + torch.ones(x.shape[-1])), V, (6,)),
    Row("constant table", vector(lambda x: x + torch.arange(6.0)), V, (), ""),
)  # fmt: skip


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
    """Exactly the expected widths are found, what is held has its reason, no operator is unknown."""
    _, _, axes = mapped(row)
    assert sorted(width.size for width in axes.widths.values()) == sorted(row.widths)
    assert any(row.pinned in pin.reason for pin in axes.pinned.values())
    assert not axes.unknown


@by_row
def test_a_silent_unit_can_be_taken_out(row: Row) -> None:
    """Zero what reads a unit, take the unit out everywhere: the outputs are the same."""
    model, args, axes = mapped(row)
    for width in axes.widths.values():
        if any(m.kind in MIXING or m.scale == "inverse_sqrt" for m in width.mixers):
            continue
        for unit in range(width.size):
            assert worst_difference(model, args, axes, width, unit) < TOLERANCE, width.name


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


DIRECT = {"linear", "rms_norm"}


def test_every_rule_has_a_row() -> None:
    """A rule that no row of the table reaches fails here, by its name."""
    seen = {
        RULES[call.op].__name__
        for row in ROWS
        for trace in mapped(row)[2].traces
        for call in trace.calls
        if call.op in RULES
    }
    assert {function.__name__ for function in RULES.values()} - seen - DIRECT == set()


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
