"""Decoders with a cache after a removal: step by step they compute what they compute at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from neuroexapt import RemoveLayer, apply, transaction
from neuroexapt.errors import EditError
from neuroexapt.testing import changes, snapshot

IDS = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
COMMON = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def model(kind: str, **settings: Any) -> nn.Module:
    """A tiny decoder with weights large enough to tell tokens and positions apart."""
    common = {**COMMON, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": None}
    if kind != "GPT2":
        common |= {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(**{**common, **settings})
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        built: nn.Module = getattr(transformers, head)(config)
        for parameter in built.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, 0.4)
    return built.eval()


def step_by_step(decoder: nn.Module) -> float:
    """How far the logits are from those of the whole sequence, when it comes in three parts."""
    with torch.no_grad():
        whole, cache, parts = decoder(IDS, use_cache=False).logits, None, []
        for part in IDS.split((4, 1, 2), dim=1):
            answer = decoder(part, past_key_values=cache, use_cache=True)
            cache, parts = answer.past_key_values, [*parts, answer.logits]
    return float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max())


PLACES = {"Llama": "model.layers", "Qwen2": "model.layers", "GPT2": "transformer.h"}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("gone", [["0"], ["1"], ["2"], ["0", "1"], ["0.attn"]], ids=str)
def test_the_cache_is_right_after_a_removal(kind: str, gone: list[str]) -> None:
    """The first block, a middle one, the last one, two, the attention of one; then generate."""
    decoder: Any = model(kind)
    assert step_by_step(decoder) < 1e-5
    for at in gone:
        at = at if kind == "GPT2" else at.replace("attn", "self_attn")
        done = apply(decoder, RemoveLayer(f"{PLACES[kind]}.{at}"), (IDS,), {"use_cache": False})
        assert done.notes
    assert decoder.config.num_hidden_layers == 3
    assert step_by_step(decoder) < 1e-5
    ways = [decoder.generate(IDS, max_new_tokens=6, use_cache=way) for way in (True, False)]
    assert torch.equal(*ways)
    assert len(set(ways[0][:, 7:].flatten().tolist())) > 2


def test_an_empty_cache_is_what_renumbering_prevents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the logits of the second part are far off: the tests above test something."""
    monkeypatch.setattr("neuroexapt.guard.writing.renumber", lambda *args: None)
    decoder = model("Llama")
    apply(decoder, RemoveLayer("model.layers.0"), (IDS,), {"use_cache": False})
    assert step_by_step(decoder) > 0.1


def test_numbers_go_back_with_the_layer() -> None:
    """Rolling back gives every block its own number again."""
    decoder = model("Llama")
    before = snapshot(decoder)
    with transaction(decoder) as tx:
        tx.apply(RemoveLayer("model.layers.0"), (IDS,), {"use_cache": False})
        numbers = [b.self_attn.layer_idx for b in decoder.model.layers[1:]]  # type: ignore[union-attr]
        assert numbers == [0, 2]
        tx.roll_back()
    assert not changes(before, snapshot(decoder))


def test_a_number_is_taken_over_by_a_layer_of_the_same_kind() -> None:
    """Sliding and full attention keep caches of their own kind; the last of a kind stays."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    decoder: Any = model("Gemma2", layer_types=kinds, sliding_window=4)
    apply(decoder, RemoveLayer("model.layers.0"), (IDS,), {"use_cache": False})
    assert [decoder.model.layers[n].self_attn.layer_idx for n in (1, 2)] == [1, 0]
    assert step_by_step(decoder) < 1e-5
    for last in (1, 2):
        with pytest.raises(EditError, match="only layer of its kind"):
            apply(decoder, RemoveLayer(f"model.layers.{last}"), (IDS,), {"use_cache": False})
    assert step_by_step(decoder) < 1e-5
