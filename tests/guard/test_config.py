"""A model's config follows an edit where it can say it, and stays with a note where it cannot."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from neuroexapt import Narrow, Widen, apply, map_axes, transaction
from neuroexapt.guard import config_sizes
from neuroexapt.guard.config_sizes import build, sizes_of

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
T5: dict[str, Any] = {
    "vocab_size": 90,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

# Class, settings, keyword input, the pattern of all widths inside MLPs, the numbers that say them.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor], str, tuple[str, ...]]] = {
    "llama": (
        "LlamaForCausalLM",
        GROUPED,
        {"input_ids": IDS},
        "*.gate_proj.out",
        ("intermediate_size",),
    ),
    "gpt2": ("GPT2LMHeadModel", TEXT, {"input_ids": IDS}, "*.c_fc.out", ("n_inner",)),
    "bert": ("BertModel", TEXT, {"input_ids": IDS}, "*.intermediate.*", ("intermediate_size",)),
    "t5": (
        "T5ForConditionalGeneration",
        T5,
        {"input_ids": IDS, "labels": IDS[:, :5].clone()},
        "*.wi.out",
        ("d_ff",),
    ),
    "vit": (
        "ViTModel",
        IMAGE,
        {"pixel_values": PIXELS},
        "*.fc1.out",
        ("intermediate_size",),
    ),
    "clip": (
        "CLIPModel",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 24},
        {"input_ids": IDS, "pixel_values": PIXELS},
        "*.fc1.out",
        ("text_config.intermediate_size", "vision_config.intermediate_size"),
    ),
}


def pretrained(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**copy.deepcopy(settings))).eval()


def number(config: Any, path: str) -> Any:
    for step in path.split("."):
        config = getattr(config, step)
    return config


def same_function(one: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> bool:
    with torch.no_grad():
        first, second = (model.eval()(**inputs)[0] for model in (one, other))
    return torch.allclose(first, second, atol=1e-6)


# --- transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_config_that_can_say_the_edit_follows_it(name: str, tmp_path: Path) -> None:
    kind, settings, inputs, widths, paths = MODELS[name]
    model = pretrained(kind, settings)
    done = apply(model, Narrow(widths, to=48), (), inputs)
    assert done.notes == ()
    assert [number(model.config, path) for path in paths] == [48] * len(paths)
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    assert same_function(fresh, model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same_function(loaded, model, inputs)


def test_configs_that_parts_hold_a_copy_of_follow_too() -> None:
    kind, settings, inputs, widths, _ = MODELS["t5"]
    model = pretrained(kind, settings)
    assert model.encoder.config is not model.config
    apply(model, Narrow(widths, to=48), (), inputs)
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    assert {config.d_ff for config in configs} == {48}


def test_layers_that_differ_leave_the_config_and_say_so_until_they_agree() -> None:
    kind, settings, inputs, *_ = MODELS["llama"]
    model = pretrained(kind, settings)
    first = apply(model, Narrow("model.layers.0.mlp.gate_proj", to=48), (), inputs)
    (note,) = first.notes
    assert note.startswith("config: left as it is")
    assert "intermediate_size" in note
    assert "(64, 48)" in note
    assert model.config.intermediate_size == 64
    second = apply(model, Narrow("model.layers.1.mlp.gate_proj", to=48), (), inputs)
    assert second.notes == ()
    assert model.config.intermediate_size == 48


def test_heads_whose_size_follows_the_stream_leave_the_config() -> None:
    kind, settings, inputs, *_ = MODELS["bert"]
    model = pretrained(kind, settings)
    before = model.config.to_dict()
    done = apply(model, Narrow("*.query", to=2), (), inputs)
    assert "no value of hidden_size fits" in done.notes[0]
    assert model.config.to_dict() == before


@pytest.mark.parametrize("kind", ["MistralForCausalLM", "Qwen3ForCausalLM"])
def test_fewer_heads_are_not_taken_for_smaller_ones(kind: str) -> None:
    model = pretrained(kind, GROUPED)
    done = apply(model, Narrow("*.self_attn.q_proj.out", to=1), (), {"input_ids": IDS})
    config = model.config
    assert done.notes == ()
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)


def test_a_head_size_that_was_left_out_is_said_when_it_no_longer_follows() -> None:
    model = pretrained("MixtralForCausalLM", {**TEXT, "num_key_value_heads": 2})
    assert model.config.head_dim is None
    done = apply(model, Narrow("*.self_attn.q_proj.out", to=1), (), {"input_ids": IDS})
    config = model.config
    assert done.notes == ()
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    type(model)(config).load_state_dict(model.state_dict())


def test_a_factor_that_modules_hold_keeps_a_config_from_saying_half_of_it() -> None:
    """The scale of the logits stays with the model; one built anew would choose another."""
    model = pretrained("LlamaForCausalLM", GROUPED)
    edit = Narrow("*.self_attn.q_proj.head_size", by=1)
    done = apply(model, edit, (), {"input_ids": IDS})
    assert "head_dim = 6 gives every size and another function" in done.notes[0]
    assert "scaling would be 0.408, is 0.354" in done.notes[0]
    assert model.config.head_dim == 8


def test_an_epsilon_that_follows_a_wider_stream_is_said_as_well() -> None:
    model = pretrained("LlamaForCausalLM", GROUPED)
    assert apply(model, Widen("model.embed_tokens", to=40), (), {"input_ids": IDS}).notes == ()
    assert model.config.hidden_size == 40
    assert model.config.rms_norm_eps == pytest.approx(8e-7)
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    assert same_function(fresh, model, {"input_ids": IDS})


def test_a_stream_whose_scale_a_model_derives_from_its_width_stays_exact() -> None:
    model = pretrained("GemmaForCausalLM", GROUPED)
    with torch.no_grad():
        before = model(input_ids=IDS)[0]
    done = apply(model, Widen("*.o_proj.out", to=40), (), {"input_ids": IDS})
    assert model.get_input_embeddings().weight.shape == (90, 40)
    assert "hidden_size = 40 gives every size and another function" in done.notes[0]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS)[0], before, atol=1e-5)


def test_numbers_that_the_class_of_a_config_refuses_are_not_set(tmp_path: Path) -> None:
    """Llama wants its stream to be a multiple of its heads, whatever their size."""
    model = pretrained("LlamaForCausalLM", {**GROUPED, "num_key_value_heads": 4})
    done = apply(model, Narrow("*.self_attn.q_proj.out", to=3), (), {"input_ids": IDS})
    assert "num_attention_heads = 3" in done.notes[0]
    assert "is refused" in done.notes[0]
    assert model.config.num_attention_heads == 4
    model.save_pretrained(tmp_path)  # checks the config


def test_a_roll_back_restores_every_config() -> None:
    kind, settings, inputs, widths, _ = MODELS["t5"]
    model = pretrained(kind, settings)
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    before = [copy.deepcopy(vars(config)) for config in configs]
    with transaction(model) as tx:
        tx.apply(Narrow(widths, to=48), (), inputs)
        assert model.config.d_ff == 48
        tx.roll_back()
    assert [vars(config) for config in configs] == before
    assert apply(model, Narrow(widths, to=40), (), inputs).notes == ()
    assert model.config.d_ff == 40


# --- other models with a config --------------------------------------------------------------


class Config:
    """A config of no library."""

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        self.width, self.hidden = width, hidden

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))


class Net(nn.Module):
    """Built from its config; counts how often."""

    built = 0

    def __init__(self, config: Config) -> None:
        super().__init__()
        type(self).built += 1
        self.config = config
        self.inp, self.out = nn.Linear(4, config.width), nn.Linear(config.hidden, 3)
        self.mid = nn.Linear(config.width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mid(self.inp(x).relu()).relu())


class Scaled(Net):
    """Its forward reads the config."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(self.config.hidden) ** -0.5


class Demanding(Net):
    """Cannot be built from a config that an edit could give."""

    def __init__(self, config: Config) -> None:
        if config.hidden != 12:
            raise LookupError("no such size")
        super().__init__(config)


class Moody(Net):
    """Cannot be built twice."""

    def __init__(self, config: Config) -> None:
        if Moody.built:
            raise LookupError("only once")
        super().__init__(config)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _from_anew() -> Iterator[None]:
    yield
    for kind in (Net, Scaled, Demanding, Moody):
        kind.built = 0


def test_any_object_that_can_say_what_it_holds_is_a_config() -> None:
    net = Net(Config())
    assert apply(net, Narrow("mid", to=9), (X,)).notes == ()
    assert vars(net.config) == {"width": 8, "hidden": 9}


def test_a_config_inside_a_module_without_one_follows() -> None:
    model = nn.Sequential(Net(Config()), nn.Linear(3, 2))
    assert apply(model, Widen("0.inp", to=10), (X,)).notes == ()
    assert vars(model[0].config) == {"width": 10, "hidden": 12}
    apply(model, Narrow("0.inp", to=6), (X,))
    assert (model[0].config.width, model[0].inp.out_features) == (6, 6)


def test_a_number_that_the_forward_reads_is_left() -> None:
    net = Scaled(Config())
    before = net(X).detach()
    done = apply(net, Widen("mid", to=16), (X,))
    assert "hidden = 16 gives every size and another function" in done.notes[0]
    assert net.config.hidden == 12
    assert torch.allclose(net(X), before)


def test_a_model_that_cannot_be_built_with_other_numbers_is_left_alone() -> None:
    net = Demanding(Config())
    done = apply(net, Narrow("mid", to=9), (X,))
    assert "no numbers give 9" in done.notes[0]
    assert net.config.hidden == 12


def test_a_model_that_cannot_be_built_is_tried_once_and_left_alone() -> None:
    net = Moody(Config())
    for size in (9, 8):
        done = apply(net, Narrow("mid", to=size), (X,))
        assert "cannot build Moody from it: LookupError: only once" in done.notes[0]
    assert (net.config.hidden, net.mid.out_features) == (12, 8)


@pytest.mark.parametrize("kind", [Net, Demanding, Moody])
def test_nothing_that_was_learnt_keeps_a_model(kind: type[Net]) -> None:
    net = kind(Config())
    apply(net, Narrow("mid", to=9), (X,))
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_a_model_that_is_slow_to_build_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_sizes, "SECONDS", 0.0)
    net = Net(Config())
    for size in (9, 8):
        done = apply(net, Narrow("mid", to=size), (X,))
        assert "takes too long" in done.notes[0]
    assert (net.config.hidden, net.mid.out_features, Net.built) == (12, 8, 2)


def test_what_was_learnt_of_a_model_is_kept() -> None:
    net = Net(Config())
    apply(net, Narrow("mid", to=9), (X,))
    first = Net.built
    apply(net, Narrow("mid", to=8), (X,))
    assert Net.built - first <= 2  # the config with 8, and that with its factors
    assert net.config.hidden == 8


def test_a_module_that_needs_more_than_its_config_is_no_owner() -> None:
    class Part(Net):
        def __init__(self, config: Config, index: int) -> None:
            super().__init__(config)
            self.index = index

    part = Part(Config(), 1)
    assert apply(part, Narrow("mid", to=9), (X,)).notes == ()
    assert part.config.hidden == 12


def test_building_moves_no_random_state() -> None:
    net = Net(Config())
    random.seed(0)
    torch.manual_seed(0)
    expected = random.random(), torch.rand(1)
    random.seed(0)
    torch.manual_seed(0)
    apply(net, Narrow("mid", to=9), (X,))
    assert (random.random(), torch.rand(1)) == expected


def test_a_model_is_built_without_memory_for_its_weights() -> None:
    built = build(Net, Config(width=1_000_000, hidden=1_000_000))
    assert all(parameter.is_meta for parameter in built.parameters())
    assert sizes_of(built)["mid.weight", 0] == 1_000_000


def test_widths_bound_to_a_config_are_left_to_the_map() -> None:
    """A number that the forward views by follows with the width, before any config is looked at."""

    class Heads(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.mid(self.inp(x).relu()).view(x.shape[0], self.config.hidden)
            return self.out(hidden.relu())

    net = Heads(Config())
    assert any(a.name == "config.hidden" for a in map_axes(net, (X,)).attributes)
    assert apply(net, Narrow("mid", to=9), (X,)).notes == ()
    assert net.config.hidden == 9
