"""Every law on models whose weights have masks already: later edits carry the masks along."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import nn

from neuroexapt import AxisMap, PruneWeights, map_axes, transaction
from neuroexapt.capture.masks import is_mask
from neuroexapt.testing import Row, check_cell
from tests import zoo
from tests.laws.operations import ON_MASKED, OPERATIONS, Choice
from tests.laws.world import mapped

FAMILIES = ("groupnorm_cnn", "gpt_nano", "encoder_layer", "lstm", "moe")


MORE: dict[str, Choice] = {
    **ON_MASKED,
    "PruneWeights": lambda axes, model: [PruneWeights("*", share=0.6)],
    **{name: OPERATIONS[name] for name in ("Widen", "Narrow", "RemoveLayer")},
}


@cache
def row(name: str) -> Row:
    """A zoo model, half of whose weights are masked."""
    entry = zoo.entry(name)

    def make() -> nn.Module:
        model = entry.make()
        with transaction(model) as tx:
            tx.apply(PruneWeights("*", share=0.5), entry.args(4), axes=mapped(name))
        return model

    return Row(f"masked {name}", make, entry.args(4))


@cache
def masked_map(name: str, dtype: torch.dtype = torch.float32) -> AxisMap:
    return map_axes(row(name).build(dtype), row(name).inputs(dtype)[0])


@pytest.mark.parametrize("operation", MORE)
@pytest.mark.parametrize("name", FAMILIES)
def test_cell(operation: str, name: str) -> None:
    """It is made, and keeps every law."""
    cell = check_cell(MORE[operation], row(name), maps=partial(masked_map, name))
    if (operation, name) == ("RemoveLayer", "lstm"):  # as without masks
        assert "an input in the shape of the output" in cell.reason
    else:
        assert cell.kept, cell.reason


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mask_leaves_the_map_as_it_was(name: str) -> None:
    """The same widths, places, roles, pins and mixers, masks aside; all that they need to know
    of a mask is that new entries are kept."""
    plain, masked = mapped(name), masked_map(name)
    for old, new in ((plain.widths, masked.widths), (plain.pinned, masked.pinned)):
        assert list(old) == list(new)
        for before, after in zip(old.values(), new.values(), strict=True):
            places = [place for place in after.appearances if not is_mask(place.tensor)]
            assert places == list(before.appearances)
            others = [place for place in after.appearances if is_mask(place.tensor)]
            assert all((place.roles, place.fill) == ({"elementwise"}, "one") for place in others)
    for width in plain.widths.values():
        assert masked.widths[width.name].mixers == width.mixers


def test_the_operations_that_need_masks_are_here() -> None:
    assert set(ON_MASKED) <= set(MORE)
