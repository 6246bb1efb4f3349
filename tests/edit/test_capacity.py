"""IncreaseCapacity: as many parameters as asked for, never above a limit, the same function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from neuroexapt import IncreaseCapacity, apply, map_axes
from neuroexapt.edit.amount import Amounts
from neuroexapt.errors import EditError
from neuroexapt.measure import count_flops, count_parameters
from tests import zoo
from tests.laws.world import NAMES, calm, difference, mapped, outputs, train

IMAGES = ["reference_cnn", "mobilenet", "mlp", "mixer", "conv1d_net", "unet"]


def grown(name: str, edit: IncreaseCapacity, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A zoo model after the edit."""
    model = calm(name, dtype)
    apply(model, edit, zoo.example(name, dtype=dtype))
    return model


def flops(model: nn.Module, name: str) -> int:
    """FLOPs of one sample, counted while it runs."""
    return count_flops(model, zoo.example(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_arithmetic_is_that_of_real_models(name: str) -> None:
    """Parameters from the map are those of the model; a search ends near its target."""
    axes, model = mapped(name), zoo.build(name)
    before = count_parameters(model)
    assert Amounts(axes).parameters({}) == before
    found = IncreaseCapacity(2.0).search(axes, dict(model.named_parameters()))
    assert abs(found.parameters - 2 * before) <= 0.05 * 2 * before


@pytest.mark.parametrize("name", IMAGES)
def test_flops_are_counted_exactly_where_weights_make_them(name: str) -> None:
    """Predicted parameters and, without attention, FLOPs are those of the grown model."""
    edit = IncreaseCapacity(2.0)
    found = edit.search(mapped(name), dict(zoo.build(name).named_parameters()))
    model = grown(name, edit)
    counted = flops(model, name)
    assert found.parameters == count_parameters(model)
    assert abs(found.flops - counted) <= 1e-3 * counted + 1


@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_flops_of_attention_are_not_underestimated(name: str) -> None:
    """What two activations make is bounded from above."""
    edit = IncreaseCapacity(2.0)
    found = edit.search(mapped(name), dict(zoo.build(name).named_parameters()))
    assert flops(grown(name, edit), name) <= found.flops <= 2 * flops(grown(name, edit), name)


@pytest.mark.parametrize("name", ["llama", "unet"])
def test_wider_and_deeper_is_the_same_function(name: str) -> None:
    """Both modes, to the precision of doubles; then it trains, and every new layer learns."""
    args = zoo.example(name, dtype=torch.float64)
    model = grown(name, IncreaseCapacity(2.0), torch.float64)
    for training in (False, True):
        expected = outputs(calm(name, torch.float64), args, training)
        assert difference(expected, outputs(model, args, training)) <= 1e-10
    new = {n: p.detach().clone() for n, p in model.named_parameters() if ".nx_" in n}
    losses = train(model, args, torch.optim.Adam(model.parameters(), lr=1e-3), 5)
    assert losses[-1] < losses[0]
    assert new
    assert all(not torch.equal(model.get_parameter(n), old) for n, old in new.items())


def test_depth_says_how_growth_is_shared() -> None:
    """At 0 only widths grow, at 1 only layers are added, between both do."""
    counts = {}
    for depth in (0.0, 0.5, 1.0):
        model = calm("resnet_basic")
        apply(model, IncreaseCapacity(2.0, depth=depth), zoo.example("resnet_basic"))
        layers = sum(
            ".nx_after" in n and n.endswith("0.weight") for n, _ in model.named_parameters()
        )
        counts[depth] = (layers, model.conv1.out_channels)
    assert counts[0.0][0] == 0
    assert counts[0.0][1] > counts[0.5][1] >= counts[1.0][1]
    assert counts[1.0][0] > counts[0.5][0] > 0


@pytest.mark.parametrize("name", ["gpt", "mlp"])
def test_limits_are_never_passed(name: str) -> None:
    """Within a limit it grows as far as it goes; where the target is above, it is refused."""
    axes, model = mapped(name), zoo.build(name)
    tensors, before = dict(model.named_parameters()), count_parameters(model)
    limit = int(before * 1.95)
    found = IncreaseCapacity(2.0, parameters=limit).search(axes, tensors)
    assert 1.9 * before <= found.parameters <= limit
    with pytest.raises(EditError, match=f"{limit:,} parameters"):
        IncreaseCapacity(3.0, parameters=limit).plan(axes, tensors)
    now = Amounts(axes).flops({})
    free = IncreaseCapacity(2.0).search(axes, tensors).flops
    assert IncreaseCapacity(2.0, flops=free).search(axes, tensors).flops <= free
    with pytest.raises(EditError, match="FLOPs") as caught:
        IncreaseCapacity(2.0, flops=int(1.01 * now)).plan(axes, tensors)
    assert f"{before:,} parameters" in caught.value.seen


def test_heads_grow_in_number_and_not_in_size() -> None:
    """Of widths that make up one dimension one grows: the number of heads."""
    model: Any = grown("llama", IncreaseCapacity(3.0, depth=0.0))
    plain: Any = calm("llama")
    assert model.layers[0].self_attn.head_dim == plain.layers[0].self_attn.head_dim
    assert (
        model.layers[0].self_attn.q_proj.out_features
        > plain.layers[0].self_attn.q_proj.out_features
    )


def test_new_layers_at_one_place_differ() -> None:
    """Layers of one initialisation would get one gradient."""
    model = calm("mlp")
    apply(model, IncreaseCapacity(4.0, depth=0.9), zoo.example("mlp"))
    first = [p for n, p in model.named_parameters() if ".nx_after" in n and n.endswith(".0.weight")]
    assert len(first) > 1
    assert not any(a.shape == b.shape and torch.equal(a, b) for a in first[:1] for b in first[1:])


def test_it_can_be_made_again_and_copied() -> None:
    """Growing twice by 1.5 is growing; the copy has the same function."""
    model, args = calm("resnet_basic"), zoo.example("resnet_basic")
    expected = outputs(model, args)
    for _ in range(2):
        apply(model, IncreaseCapacity(1.5), args)
    assert difference(expected, outputs(copy.deepcopy(model), args)) <= 1e-5
    assert abs(count_parameters(model) / count_parameters(calm("resnet_basic")) - 2.25) < 0.2
    assert map_axes(model, args).widths


class Fixed(nn.Module):
    """Nothing can change: sizes are written in the code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (IncreaseCapacity(1.0), "factor=1.0"),
        (IncreaseCapacity(float("nan")), "factor=nan"),
        (IncreaseCapacity("2"), "factor='2'"),  # type: ignore[arg-type]
        (IncreaseCapacity(2.0, depth=1.5), "depth=1.5"),
        (IncreaseCapacity(2.0, tolerance=0), "tolerance=0"),
        (IncreaseCapacity(2.0, parameters=-1), "parameters=-1"),
        (IncreaseCapacity(2.0, flops=1.5), "flops=1.5"),  # type: ignore[arg-type]
        (IncreaseCapacity(1.0001), "the nearest that can be reached|nothing larger"),
    ],
    ids=repr,
)
def test_what_makes_no_sense_is_refused(edit: IncreaseCapacity, words: str) -> None:
    """Numbers out of range, and a target finer than a unit is wide."""
    with pytest.raises(EditError, match=words):
        apply(calm("mlp"), edit, zoo.example("mlp"))


def test_a_model_in_which_nothing_can_grow_says_so() -> None:
    """There is no width and no place for a layer."""
    with pytest.raises(EditError, match="no width that can grow"):
        apply(Fixed(), IncreaseCapacity(2.0), (torch.randn(3, 4),))
