"""Language models of ``transformers`` generate with a cache of keys and values after a copy of a
block was inserted: each copy has a place of its own in the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from neuroexapt import InsertAttention, InsertLayer, RemoveLayer, apply, map_axes, transaction
from neuroexapt.errors import EditError
from neuroexapt.testing.snapshot import changes, snapshot

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
TEXT: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
GPT = {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
T5 = {"vocab_size": 90, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": 90, "d_model": 32, "max_position_embeddings": 40, "bos_token_id": 1} | {
    f"{side}_{name}": number
    for side in ("encoder", "decoder")
    for name, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
NO_END = {"eos_token_id": None, "pad_token_id": 0, "decoder_start_token_id": 0}
FULL, LOCAL = "full_attention", "sliding_attention"

# Class and settings, where copies are inserted, what the config says afterwards.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "Llama": (
        "LlamaForCausalLM",
        {**TEXT, "head_dim": 8},
        ("model.layers.0", "model.layers.0"),
        {"num_hidden_layers": 4},
    ),
    "GPT2": ("GPT2LMHeadModel", {**GPT, **NO_END}, ("transformer.h.1",), {"n_layer": 3}),
    "Qwen2": (
        "Qwen2ForCausalLM",
        {**TEXT, **SLIDING},
        ("model.layers.1", "model.layers.0"),
        {
            "num_hidden_layers": 4,
            "max_window_layers": 1,
            "layer_types": [FULL, LOCAL, LOCAL, FULL],
        },
    ),
    "Qwen3": (
        "Qwen3ForCausalLM",
        {**TEXT, "head_dim": 8},
        ("model.layers.1",),
        {"num_hidden_layers": 3, "layer_types": [FULL] * 3},
    ),
    "Gemma2": (
        "Gemma2ForCausalLM",
        {**TEXT, "head_dim": 8, "sliding_window": 4},
        ("model.layers.0",),
        {
            "num_hidden_layers": 3,
            "layer_types": [LOCAL, FULL, LOCAL],
        },
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {**T5, **NO_END},
        ("decoder.block.1", "encoder.block.0"),
        {"num_decoder_layers": 3},
    ),
    "BART": (
        "BartForConditionalGeneration",
        {**BART, **NO_END},
        ("model.decoder.layers.0",),
        {"decoder_layers": 3},
    ),
}


def build(name: str, **more: Any) -> Any:
    """A tiny model with weights large enough to tell tokens apart."""
    kind, settings, _, _ = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = getattr(transformers, kind).config_class(**settings | more)
        model = getattr(transformers, kind)(config).double().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def example(model: Any) -> dict[str, Tensor]:
    """Keyword input."""
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return {"input_ids": IDS, **more}


def generated(model: Any, use_cache: bool) -> Tensor:
    """The logits of ten generated tokens."""
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    made = model.generate(IDS, use_cache=use_cache, output_logits=True, **options)
    return torch.stack(made.logits)


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_goes_on(name: str) -> None:
    """Exact after the insertion, with and without a cache; equal once the copy has learned."""
    _, _, paths, said = MODELS[name]
    model = build(name)
    before = generated(model, use_cache=True)
    for path in paths:
        apply(model, InsertLayer(path, kind="copy"), (), example(model))
    assert {key: getattr(model.config, key) for key in said} == said
    after = generated(model, use_cache=True)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    added = [p for n, p in model.named_parameters() if ".nx_" in n]
    optimizer = torch.optim.SGD(added, lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(**example(model), labels=IDS).loss.backward()
        optimizer.step()
    with_cache, without = (generated(model, use_cache=use) for use in (True, False))
    # Some models compute their softmax in float32.
    torch.testing.assert_close(with_cache, without, rtol=0, atol=1e-5)
    assert (with_cache - after).abs().max() > 1e-3


def test_taking_a_copy_back_restores_the_config() -> None:
    """Numbers and lists of it are those of before."""
    model = build("Qwen3")
    before, said = snapshot(model), model.config.to_dict()
    with pytest.raises(ZeroDivisionError), transaction(model) as tx:  # noqa: PT012
        tx.apply(InsertLayer("model.layers.0", kind="copy"), (), example(model))
        assert model.config.num_hidden_layers == 3
        raise ZeroDivisionError
    assert model.config.to_dict() == said
    assert not changes(before, snapshot(model))


def test_causal_attention_without_a_place_in_the_cache_is_refused() -> None:
    """It would see one token at a time while a cache is used."""
    axes = map_axes(build("Llama"), (), {"input_ids": IDS})
    (problem,) = InsertAttention("model.layers.0", "self", causal=True).check(axes)
    assert "cache" in problem.seen
    assert "InsertLayer(kind='copy')" in problem.next_step


def agrees_with_its_cache(model: Any) -> None:
    """What is silent gets weights; then generation is the same with a cache and without."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    with_cache, without = (generated(model, use_cache=use) for use in (True, False))
    torch.testing.assert_close(with_cache, without, rtol=0, atol=1e-9)


# Blocks and parts of them that go (R) and are copied (C), in this order.
ORDERS = ["R0 C1", "C0 R0", "C1 R1", "R1 C0", "C1 R0 C1", "C0 C1 R0"]
PARTS = ["R0.attn C1.attn", "C1.attn R1 C0 R0.attn"]
# The copy has taken over the first number, and goes too.
ORDERS += ["C0 R0 R0.nx_next"]
CROSS = ["R0.self_attn C1 R1", "C0 R0 R0.nx_next.nx_block.self_attn"]


@pytest.mark.parametrize(
    ("name", "order"),
    [(name, order) for name in ("Llama", "GPT2") for order in ORDERS]
    + [("GPT2", order) for order in PARTS]
    + [("BART", order) for order in CROSS],
)
def test_blocks_come_and_go_in_any_order(name: str, order: str) -> None:
    """Each block that is left has a place of its own in the cache, also where a number moved."""
    model = build(name)
    blocks = MODELS[name][2][0].rpartition(".")[0]
    for step in order.split():
        path = f"{blocks}.{step[1:]}"
        edit = RemoveLayer(path) if step[0] == "R" else InsertLayer(path, kind="copy")
        apply(model, edit, (), example(model))
    agrees_with_its_cache(model)


def test_a_lone_layer_hands_its_number_to_its_copy() -> None:
    """Also where only copies are left, the next one gets a free number."""
    model = build("Llama", num_hidden_layers=1)
    for edit in (
        InsertLayer("model.layers.0", kind="copy"),
        RemoveLayer("model.layers.0"),
        InsertLayer("model.layers.0.nx_next", kind="copy"),
    ):
        apply(model, edit, (), example(model))
    layer = model.model.layers[0].nx_next
    assert [layer.self_attn.layer_idx, layer.nx_next.self_attn.layer_idx] == [0, 1]
    agrees_with_its_cache(model)


def test_the_last_layer_that_fills_a_cache_stays() -> None:
    """Else a model with learned positions would take each token for the first one."""
    model = build("GPT2")
    apply(model, RemoveLayer("transformer.h.0.attn"), (), example(model))
    with pytest.raises(EditError, match="last layer that fills a cache"):
        apply(model, RemoveLayer("transformer.h.1.attn"), (), example(model))
    agrees_with_its_cache(model)
