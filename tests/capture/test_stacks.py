"""Which numbers count layers, which configs say how many there are, and which do neither."""

from __future__ import annotations

from typing import Any

from torch import nn

from neuroexapt.capture.attributes import Attribute
from neuroexapt.capture.stacks import Stack, find_stacks


class Part(nn.Module):
    """A module with whatever numbers."""

    def __init__(self, *children: nn.Module, **numbers: Any) -> None:
        super().__init__()
        for name, value in numbers.items():
            setattr(self, name, value)
        self.parts = nn.ModuleList(children)


class Config:
    """What models are built from."""

    def __init__(self, **said: Any) -> None:
        self.__dict__.update(said)

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))


def names(model: nn.Module) -> list[tuple[str, str]]:
    """Container and attribute of every stack."""
    return [(stack.container, stack.name) for stack in find_stacks(model)]


def only(model: nn.Module) -> Stack:
    """The one stack of a model."""
    (stack,) = find_stacks(model)
    return stack


def test_numbers_in_step_with_their_place_count() -> None:
    """From zero or from one, directly in the layer or anywhere inside of it."""
    for start in (0, 1):
        layers = [Part(Part(place=i + start), width=8) for i in range(3)]
        stack = only(nn.Sequential(*layers))
        assert (stack.name, stack.first, stack.count) == ("place", start, 3)
        assert stack.counters[1] == (Attribute("1.parts.0", "place"), 1 + start)


def test_numbers_that_measure_do_not_count() -> None:
    """Sizes, strides, equal numbers, numbers out of step, those of torch's own layers."""
    layers = [
        Part(dilation=i, hidden=i + 1, depth=4, twice=2 * i, late=i + 5, up=3 - i) for i in range(3)
    ]
    assert not find_stacks(nn.ModuleList(layers))
    assert not find_stacks(nn.ModuleList([nn.Linear(i + 1, i + 1) for i in range(3)]))


def test_a_single_layer_counts_by_its_name() -> None:
    """One number says nothing of steps."""
    assert names(nn.ModuleList([Part(layer_idx=0, other=0)])) == [("", "layer_idx")]


def test_layers_of_unlike_kinds_share_a_count() -> None:
    """Attention here, a state there: the same name in other places."""
    layers = [Part(Part(layer_idx=0)), Part(layer_idx=1), Part(Part(Part(layer_idx=2)))]
    assert only(nn.ModuleList(layers)).count == 3


def test_parts_of_layers_are_counted_by_themselves() -> None:
    """Experts start anew in each layer: they are no count of layers."""
    layers = [Part(Part(expert=0), Part(expert=1), layer_idx=i) for i in range(2)]
    found = {(stack.container, stack.name) for stack in find_stacks(nn.ModuleList(layers))}
    assert found == {("", "layer_idx"), ("0.parts", "expert"), ("1.parts", "expert")}


def test_a_count_may_go_on_in_the_next_container() -> None:
    """Stages of layers, counted through."""
    stages = [Part(*(Part(layer_idx=2 * stage + i) for i in range(2))) for stage in range(2)]
    first, second = find_stacks(nn.ModuleList(stages))
    assert (first.first, first.count, second.first, second.count) == (0, 2, 2, 2)


def test_inserted_copies_are_counted() -> None:
    """They need not be in step, and the next one is behind them."""
    layers = nn.ModuleList([Part(layer_idx=i) for i in range(2)])
    layers[0].add_module("nx_next", Part(layer_idx=2))
    assert only(layers).count == 3


def built(container: str, config: Config, depth: int = 2) -> nn.Module:
    """Layers inside modules that hold a config."""
    layers: nn.Module = nn.ModuleList([Part(layer_idx=i) for i in range(depth)])
    for name in reversed(container.split(".")):
        holder = nn.Module()
        holder.add_module(name, layers)
        layers = holder
    layers.config = config
    return layers


def test_what_a_config_says() -> None:
    """Numbers of layers and lists with an entry a layer; nothing else that is equal by chance."""
    config = Config(
        num_hidden_layers=2, n_heads=2, max_window_layers=2, layer_types=["a", "b"], kinds=[1, 2]
    )
    stack = only(built("layers", config))
    assert [at.name for at in stack.totals] == ["config.num_hidden_layers"]
    assert stack.tables == ((Attribute("", "config.layer_types"), ["a", "b"]),)
    assert not only(built("layers", config, depth=3)).totals


def test_either_side_of_an_encoder_and_decoder_has_its_number() -> None:
    """One without a side counts for both."""
    config = Config(encoder_layers=2, decoder_layers=2, num_layers=2)
    for side in ("encoder", "decoder"):
        found = {at.name for at in only(built(f"{side}.layers", config)).totals}
        assert found == {f"config.{side}_layers", "config.num_layers"}


def test_a_config_of_another_part_says_nothing() -> None:
    """Only those around the layers, or inside of them."""
    model = nn.Module()
    model.add_module("text", built("layers", Config(n_layer=2)))
    model.add_module("image", built("layers", Config(n_layer=2)))
    text, image = find_stacks(model)
    assert [at.module for at in (*text.totals, *image.totals)] == ["text", "image"]


def test_a_layer_may_have_taken_over_the_number_of_a_removed_one() -> None:
    """By name alone: the next free number is behind that of the last layer there was."""
    layers = [Part(), Part(layer_idx=0, place=0), Part(layer_idx=2, place=2)]
    layers[0].add_module("nx_pass", nn.Identity())
    stack = only(nn.ModuleList(layers))
    assert (stack.name, stack.first, stack.last, stack.count) == ("layer_idx", 0, 2, 3)
    layers[1].add_module("nx_pass", nn.Identity())
    ends = only(nn.ModuleList([layers[0], Part(layer_idx=0), layers[2]]))
    assert (ends.first, ends.last) == (0, 2)
