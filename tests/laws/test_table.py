"""Every operation on every model of the zoo: it keeps its promise, or is refused with a reason.

A new operation is a row in ``OPERATIONS`` and inherits every law; what it refuses is listed in
``REFUSED`` with a word of the reason, and every other cell must be kept.
"""

from __future__ import annotations

from functools import cache, partial

import pytest

from neuroexapt.edit import registered
from neuroexapt.testing import Row, check_cell
from tests import zoo
from tests.laws.operations import ON_MASKED, OPERATIONS
from tests.laws.world import NAMES, mapped

# Families of models, by what they do not have.
NO_IMAGES = ("gpt", "mlp", "llama", "shared_module", "encoder_layer", "lstm", "gru", "bert")
NO_IMAGES += ("encoder_decoder", "moe", "graph_net")
NO_BRANCH = ("reference_cnn", "small_cnn", "densenet", "unet", "mlp", "groupnorm_cnn", "vae")
NO_BRANCH += ("conv1d_net", "conv3d_net", "shared_module", "hardcoded_flatten", "generator")
NO_BRANCH += ("pixel_shuffle_net", "inception_branches", "lstm", "gru", "moe", "graph_net")
IMAGES_OUT = ("unet", "pixel_shuffle_net", "generator")
NO_SHAPE_KEPT = ("hardcoded_flatten", "pixel_shuffle_net", "lstm", "graph_net")
NO_BLOCK = ("small_cnn", "hardcoded_flatten", "vae", "pixel_shuffle_net", "lstm", "graph_net")
VECTORS = ("mlp", "shared_module")

# Operation, a part of the reason, the models on which it is refused.
REFUSALS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("InsertConv", "one to three spatial dimensions", NO_IMAGES),
    ("InsertConv identity", "one to three spatial dimensions", (*NO_IMAGES, "gpt_nano")),
    ("InsertAttention", "needed positions", VECTORS),
    ("InsertAttention self", "needed positions", VECTORS),
    ("InsertLayer", "needed features in the last dimension", IMAGES_OUT),
    ("InsertLayer copy", "the shape of its input", NO_BLOCK),
    ("InsertPool", "one to three spatial dimensions", (*NO_IMAGES, "gpt_nano", "vit")),
    ("InsertPool", "an output of the shape it has now", IMAGES_OUT),
    ("InsertPool", "spatial positions behind the channels", ("mixer",)),
    ("InsertPool", "a size computed from the input", ("hardcoded_flatten",)),
    ("RemoveLayer", "an input in the shape of the output", NO_SHAPE_KEPT),
    ("AddRegularization depth", "a sum with the stream", NO_BRANCH),
)
REFUSED = {(operation, name): reason for operation, reason, names in REFUSALS for name in names}


@cache
def row(name: str) -> Row:
    """A zoo model as a row of the table."""
    entry = zoo.entry(name)
    return Row(name, entry.make, entry.args(4))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_cell(operation: str, name: str) -> None:
    """All laws hold, or the refusal is the one expected."""
    cell = check_cell(OPERATIONS[operation], row(name), maps=partial(mapped, name))
    expected = REFUSED.get((operation, name))
    if expected is None:
        assert cell.kept, cell.reason
    else:
        assert not cell.kept, f"{cell.edit} is made by now: take its cell out of REFUSED"
        assert expected in cell.reason


def test_every_operation_has_a_row_and_every_refusal_a_cell() -> None:
    """Registered edits of the library and rows are the same; no refusal is listed in vain."""
    own = {n for n, kind in registered().items() if kind.__module__.startswith("neuroexapt.")}
    assert {operation.split()[0] for operation in (*OPERATIONS, *ON_MASKED)} == own
    assert set(REFUSED) <= {(operation, name) for operation in OPERATIONS for name in NAMES}


def test_the_zoo_has_every_family() -> None:
    """At least 25 models, of every family that users train."""
    families = {"reference_cnn", "resnet_basic", "densenet", "mobilenet", "unet", "conv1d_net"}
    families |= {"conv3d_net", "lstm", "gru", "mlp", "mixer", "vit", "gpt", "llama", "bert"}
    families |= {"encoder_decoder", "moe", "vae", "generator", "graph_net", "shared_module"}
    families |= {"gpt_nano"}  # tied embeddings
    assert families <= set(NAMES)
    assert len(NAMES) >= 25
