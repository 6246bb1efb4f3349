"""Every width of every zoo model can be widened exactly and narrowed, or is refused by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from neuroexapt import AxisMap, Narrow, Widen
from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import Width, resize_expr, unit_of
from neuroexapt.edit import Edit
from neuroexapt.errors import EditError, NeuroExaptError
from neuroexapt.guard import transaction
from tests import zoo
from tests.laws.world import NAMES, calm, difference, mapped, outputs, train

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

# Where Widen says no, and the word in its message that says why. Everything else must work.
REFUSED: dict[tuple[str, str], tuple[type[NeuroExaptError], str]] = {
    ("groupnorm_cnn", "conv1.out"): (EditError, "group_norm"),
    ("groupnorm_cnn", "conv2.out"): (EditError, "group_norm"),
    # Token mixing is a nonlinear function of each channel: a mean of channels does not stay one.
    ("mixer", "patch_embed.out"): (EditError, "behind an operator"),
    ("gru", "gru.hidden_size"): (EditError, "behind an operator"),
}

each = pytest.mark.parametrize("name", NAMES)


def staged(name: str, edit: Edit, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A zoo model after an edit, written without the library's own verification."""
    model = calm(name, dtype)
    with transaction(model) as tx:
        tx.stage(edit.plan(mapped(name), named_tensors(model)))
    return model


def widenable(name: str) -> list[Width]:
    """The widths of a model that Widen does not refuse."""
    return [w for w in mapped(name).widths.values() if (name, w.name) not in REFUSED]


def check_shapes(name: str, model: nn.Module, width: Width, size: int) -> None:
    """Every tensor has the shape its expressions give with the width at its new size."""
    axes, old = mapped(name), named_tensors(zoo.build(name))
    for tensor, new in named_tensors(model).items():
        expected = list(old[tensor].shape)
        for place in width.appearances:
            if place.tensor == tensor:
                unit = unit_of(axes.tensors[tensor][place.dim], width.name)
                per_unit = int((unit == 0).sum())
                expected[place.dim] += per_unit * (size - width.size)
        assert list(new.shape) == expected, (width.name, tensor)


def test_every_model_has_a_width_and_every_refusal_is_of_one() -> None:
    """The table of refusals names cells that exist, and no model is left without a test."""
    assert all(mapped(name).widths for name in NAMES)
    assert all(width in mapped(name).widths for name, width in REFUSED)


@pytest.mark.parametrize("cell", REFUSED, ids=".".join)
def test_a_refused_width_says_why_and_stays(cell: tuple[str, str]) -> None:
    """A width that cannot be widened exactly is named, and the model is as before."""
    kind, word = REFUSED[cell]
    model, state = zoo.build(cell[0]), zoo.build(cell[0]).state_dict()
    with pytest.raises(kind, match=word), transaction(model) as tx:
        tx.apply(Widen(cell[1], by=2), zoo.example(cell[0]), axes=mapped(cell[0]))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@each
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
def test_widen_keeps_the_function(name: str, dtype: torch.dtype) -> None:
    """Outputs are the same in both modes, with every tensor in its predicted shape."""
    args = zoo.example(name, dtype=dtype)
    before = {training: outputs(calm(name, dtype), args, training) for training in (False, True)}
    for width in widenable(name):
        model = staged(name, Widen(width.name, by=2), dtype)
        check_shapes(name, model, width, width.size + 2)
        for training, expected in before.items():
            gap = difference(expected, outputs(model, args, training))
            assert gap <= TOLERANCE[dtype], (width.name, training)


# Where ReLU happens to be shut for one of the two random units on all of the batch.
ONE_MAY_BE_DEAD = {("inception_branches", "mixed1.branch3.1.out")}


# Adam would blow up gradients that are rounding errors: with plain steps these stay below this.
NOISE = 1e-7


@each
def test_a_widened_model_lives(name: str) -> None:
    """It is applied, copied, saved and trained on; every new unit is read and gets gradient."""
    args = zoo.example(name, batch=8)
    for width in widenable(name):
        model = calm(name)
        with transaction(model) as tx:
            tx.apply(Widen(width.name, by=2), args, axes=mapped(name))
        check_copies(model, args, width.name)
        losses = train(model, args, torch.optim.SGD(model.parameters(), lr=0.05), 3)
        assert all(torch.tensor(losses).isfinite()), width.name
        uses = [_use(name, model, width, unit) for unit in (width.size, width.size + 1)]
        enough = any if (name, width.name) in ONE_MAY_BE_DEAD else all
        assert enough(read > NOISE and learns > 0 for read, learns in uses), (width.name, uses)


def check_copies(model: nn.Module, args: tuple[Any, ...], where: str) -> None:
    """State dict, deepcopy and pickle keep the function."""
    expected = outputs(model, args)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.zero_()
    assert not torch.equal(outputs(twin, args), expected), where
    twin.load_state_dict(model.state_dict())
    for other in (twin, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, args), expected), where


def _use(name: str, model: nn.Module, width: Width, unit: int) -> tuple[float, float]:
    """Sums over a unit's reading entries, and over the last gradient of its making ones."""
    read, learns = 0.0, 0.0
    for place in width.appearances:
        if place.roles == {"elementwise"}:
            continue
        old = mapped(name).tensors[place.tensor][place.dim]
        expr = resize_expr(old, width.name, width.size + 2)
        where = torch.from_numpy(np.flatnonzero(unit_of(expr, width.name) == unit))
        tensor = model.get_parameter(place.tensor)
        if "consumer" in place.roles:
            read += float(tensor.detach().index_select(place.dim, where).abs().sum())
        if "producer" in place.roles and tensor.grad is not None:
            learns += float(tensor.grad.index_select(place.dim, where).abs().sum())
    return read, learns


@each
def test_narrow_fits(name: str) -> None:
    """One unit fewer: every tensor has its predicted shape, and the model trains on."""
    args = zoo.example(name)
    for width in mapped(name).widths.values():
        model = staged(name, Narrow(width.name, by=1))
        check_shapes(name, model, width, width.size - 1)
        losses = train(model, args, torch.optim.SGD(model.parameters(), lr=1e-3), 3)
        assert all(torch.tensor(losses).isfinite()), width.name


# --- coupling: what no layer reads can go --------------------------------------------------------

# A norm's statistics depend on every unit, read or not: these cells are outside this law.
NORMED = {
    ("gpt", "tok.out"): "layer_norm",
    ("vit", "patch_embed.out"): "layer_norm",
    ("mixer", "patch_embed.out"): "layer_norm",
    # Heads times head size is the stream itself here, and the stream is normalised.
    ("gpt_nano", "transformer.h.0.attn.n_head"): "layer_norm",
    ("gpt_nano", "transformer.wpe.head_size"): "layer_norm",
    ("encoder_layer", "block.self_attn.num_heads"): "layer_norm",
    ("encoder_layer", "block.self_attn.head_dim"): "layer_norm",
    ("llama", "embed_tokens.out"): "mean_square",
    ("groupnorm_cnn", "conv1.out"): "group_norm",
    ("groupnorm_cnn", "conv2.out"): "group_norm",
    ("gru", "gru.hidden_size"): "layer_norm",
    ("bert", "embeddings.word_embeddings.out"): "layer_norm",
    ("encoder_decoder", "encoder.0.self_attn.out.out"): "layer_norm",
    ("moe", "embed.out"): "layer_norm",
}


def silence(model: nn.Module, axes: AxisMap, width: Width, unit: int) -> None:
    """Zero what reads a unit; in a dot product over the width, what makes the left operand."""
    tensors = named_tensors(model)
    for place in width.appearances:
        if place.role == "consumer":
            at = unit_of(axes.tensors[place.tensor][place.dim], width.name) == unit
            tensors[place.tensor].data.index_fill_(
                place.dim, torch.from_numpy(at).nonzero()[:, 0], 0
            )
    for mixer in width.mixers:
        for side in mixer.sides[0]:
            at = unit_of(axes.tensors[side.tensor][side.dim], width.name) == unit
            mine = [position for position in side.positions if at[position]]
            tensors[side.tensor].data.index_fill_(side.dim, torch.tensor(mine), 0)


def test_the_cells_outside_the_coupling_law_are_the_normed_ones() -> None:
    """The law below skips exactly the widths a norm mixes over."""
    found = {
        (name, width.name): mixer.kind
        for name in NAMES
        for width in mapped(name).widths.values()
        for mixer in width.mixers
        if mixer.kind != "dot"
    }
    assert found == NORMED


@each
def test_what_no_layer_reads_can_be_removed(name: str) -> None:
    """Narrowing away a unit whose readers are zero changes no output."""
    args, axes = zoo.example(name), mapped(name)
    for width in axes.widths.values():
        if (name, width.name) in NORMED:
            continue
        model, unit = calm(name), width.size // 2
        silence(model, axes, width, unit)
        before = outputs(model, args)
        scores = [float(u != unit) for u in range(width.size)]
        with transaction(model) as tx:
            tx.apply(Narrow(width.name, by=1, scores={width.name: scores}), args, axes=axes)
        assert difference(before, outputs(model, args)) <= 1e-5, width.name
