"""Every operation on every model of the zoo: it keeps its promise, or is refused with a reason.

A new operation is a row in ``OPERATIONS`` and inherits every law; what it refuses is listed in
``REFUSED`` with a word of the reason, and every other cell must be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import pytest
from torch import nn

from neuroexapt import (
    AddRegularization,
    AxisMap,
    ExpandBottleneck,
    IncreaseCapacity,
    InsertAttention,
    InsertConv,
    InsertLayer,
    InsertPool,
    InsertResidual,
    Narrow,
    PruneWeights,
    RemoveLayer,
    Widen,
)
from neuroexapt.edit import Edit, Squeeze, registered
from neuroexapt.testing import Row, check_cell
from tests import zoo
from tests.laws.world import NAMES, mapped

Choice = Callable[[AxisMap, nn.Module], Iterable[Edit]]


def widths(axes: AxisMap) -> list[str]:
    """Names of all widths, those that most tensors have first: a stream before a hidden layer."""
    order = sorted(axes.widths.values(), key=lambda width: -len(width.appearances))
    return [width.name for width in order]


def paths(axes: AxisMap, model: nn.Module) -> list[str]:
    """Paths of all modules that run, containers and blocks first, the root last."""
    inner = [path for path in axes.modules if path]
    blocks = [path for path in inner if any(model.get_submodule(path).children())]
    return [*blocks, *(path for path in inner if path not in blocks), ""]


def spans(axes: AxisMap) -> list[Edit]:
    """Residual connections over several modules, the farthest ends first."""
    order = [path for path in axes.modules if path]
    ends = [(first, last) for first in order for last in reversed(order) if first != last]
    return [InsertResidual(first, to=last) for first, last in ends]


OPERATIONS: dict[str, Choice] = {
    "Widen": lambda axes, model: [Widen(name, by=2) for name in widths(axes)],
    "Narrow": lambda axes, model: [Narrow(name, by=1) for name in widths(axes)],
    "PruneWeights": lambda axes, model: [PruneWeights("*", share=0.5)],
    "InsertConv": lambda axes, model: [InsertConv(path) for path in paths(axes, model)],
    "InsertLayer": lambda axes, model: [InsertLayer(path) for path in paths(axes, model)],
    "InsertLayer of copies": lambda axes, model: [
        InsertLayer(path, "copy") for path in paths(axes, model)
    ],
    "InsertAttention": lambda axes, model: [
        InsertAttention(path, causal=False) for path in paths(axes, model)
    ],
    "InsertAttention of positions": lambda axes, model: [
        InsertAttention(path, "self", heads=1, causal=True) for path in paths(axes, model)
    ],
    "InsertPool": lambda axes, model: [InsertPool(path) for path in paths(axes, model)],
    "RemoveLayer": lambda axes, model: [RemoveLayer(path) for path in paths(axes, model)],
    "InsertResidual": lambda axes, model: [InsertResidual(path) for path in paths(axes, model)],
    "InsertResidual of several modules": lambda axes, model: spans(axes),
    "IncreaseCapacity": lambda axes, model: [IncreaseCapacity(2.0)],
    "ExpandBottleneck": lambda axes, model: [
        ExpandBottleneck((Squeeze(name, axes.widths[name].size, axes.widths[name].size, 1e3),))
        for name in widths(axes)
    ],
    "AddRegularization of dropout": lambda axes, model: [
        AddRegularization(path, "dropout", 0.3) for path in paths(axes, model)
    ],
    "AddRegularization of depth": lambda axes, model: [
        AddRegularization(path, "stochastic_depth", 0.3) for path in paths(axes, model)
    ],
    "AddRegularization of weights": lambda axes, model: [AddRegularization("", "weight_decay")],
}

# These change what has been pruned; their cells are in ``test_masked.py``.
ON_MASKED = {"MakePermanent", "RegrowWeights"}

NO_IMAGES = ("gpt", "mlp", "llama", "shared_module", "encoder_layer", "lstm", "gru", "bert")
NO_IMAGES += ("encoder_decoder", "moe", "graph_net")
TOKENS = ("gpt_nano", "vit")
REFUSED: dict[tuple[str, str], str] = {
    ("InsertConv", name): "with one to three spatial dimensions" for name in NO_IMAGES
}
REFUSED |= {
    ("InsertLayer", name): "features in the last dimension"
    for name in ("unet", "pixel_shuffle_net", "generator")
}
NO_BLOCK = ("small_cnn", "hardcoded_flatten", "vae", "pixel_shuffle_net", "lstm", "graph_net")
REFUSED |= {("InsertLayer of copies", n): "the shape of its input" for n in NO_BLOCK}
REFUSED |= {
    (f"InsertAttention{kind}", name): "positions behind the channels"
    for kind in ("", " of positions")
    for name in ("mlp", "shared_module")
}
REFUSED |= {
    ("RemoveLayer", name): "an input in the shape of the output"
    for name in ("hardcoded_flatten", "pixel_shuffle_net", "lstm", "graph_net")
}
REFUSED |= {
    ("InsertPool", name): "with one to three spatial dimensions" for name in (*NO_IMAGES, *TOKENS)
}
REFUSED |= {
    ("InsertPool", name): "an output of the shape it has now"
    for name in ("unet", "pixel_shuffle_net", "generator")
}
REFUSED["InsertPool", "mixer"] = "spatial positions behind the channels"
REFUSED["InsertPool", "hardcoded_flatten"] = "a size computed from the input"
NO_STREAM = ("reference_cnn", "small_cnn", "densenet", "unet", "mlp", "groupnorm_cnn", "conv1d_net")
NO_STREAM += ("conv3d_net", "shared_module", "hardcoded_flatten", "vae", "pixel_shuffle_net")
NO_STREAM += ("inception_branches", "lstm", "gru", "moe", "generator", "graph_net")
REFUSED |= {("AddRegularization of depth", name): "a sum with the stream" for name in NO_STREAM}


@cache
def row(name: str) -> Row:
    """A zoo model as a row of the table."""
    entry = zoo.entry(name)
    return Row(name, entry.make, entry.args(4))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_cell(operation: str, name: str) -> None:
    """All laws hold, or the refusal is the one expected."""
    cell = check_cell(OPERATIONS[operation], row(name), axes=mapped(name))
    expected = REFUSED.get((operation, name))
    if expected is None:
        assert cell.kept, cell.reason
    else:
        assert not cell.kept, f"{cell.edit} is made by now: take its cell out of REFUSED"
        assert expected in cell.reason


def test_every_operation_has_a_row_and_every_refusal_a_cell() -> None:
    """Registered edits of the library and rows are the same; no refusal is listed in vain."""
    own = {n for n, kind in registered().items() if kind.__module__.startswith("neuroexapt.")}
    assert {operation.split()[0] for operation in OPERATIONS} | ON_MASKED == own
    assert set(REFUSED) <= {(operation, name) for operation in OPERATIONS for name in NAMES}


def test_the_zoo_has_every_family() -> None:
    """At least 25 models, of every family that users train."""
    families = {"reference_cnn", "resnet_basic", "densenet", "mobilenet", "unet", "conv1d_net"}
    families |= {"conv3d_net", "lstm", "gru", "mlp", "mixer", "vit", "gpt", "llama", "bert"}
    families |= {"encoder_decoder", "moe", "vae", "generator", "graph_net", "shared_module"}
    families |= {"gpt_nano"}  # tied embeddings
    assert families <= set(NAMES)
    assert len(NAMES) >= 25
