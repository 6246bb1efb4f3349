"""Encoder-decoder language models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.coverage.case import Case
from benchmarks.coverage.tiny import (
    HALVES,
    Inputs,
    case,
    installed,
    token_ids,
    tokens,
    translation,
)

_T5: Mapping[str, Any] = {
    **HALVES,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}
# Names that prophetnet refuses, since its halves may differ.
_ONE_DEPTH = ("num_hidden_layers", "encoder_layers", "decoder_layers")
_HALVES_ONLY = {key: value for key, value in HALVES.items() if key not in _ONE_DEPTH}

# Name, class, settings; the input is a source with its mask, and labels.
_ROWS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("t5", "T5ForConditionalGeneration", _T5),
    ("t5-gated", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
    ("mt5", "MT5ForConditionalGeneration", _T5),
    ("umt5", "UMT5ForConditionalGeneration", _T5),
    ("longt5", "LongT5ForConditionalGeneration", {**_T5, "local_radius": 3}),
    (
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        {
            **_T5,
            "num_decoder_layers": 2,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
    ),
    ("bart", "BartForConditionalGeneration", HALVES),
    ("mbart", "MBartForConditionalGeneration", HALVES),
    ("mvp", "MvpForConditionalGeneration", HALVES),
    ("plbart", "PLBartForConditionalGeneration", HALVES),
    ("pegasus", "PegasusForConditionalGeneration", HALVES),
    (
        "pegasus_x",
        "PegasusXForConditionalGeneration",
        {**HALVES, "num_global_tokens": 2, "block_size": 2},
    ),
    ("marian", "MarianMTModel", HALVES),
    ("blenderbot", "BlenderbotForConditionalGeneration", HALVES),
    ("blenderbot_small", "BlenderbotSmallForConditionalGeneration", HALVES),
    (
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        {
            **_HALVES_ONLY,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "ngram": 2,
            "num_buckets": 8,
        },
    ),
    (
        "led",
        "LEDForConditionalGeneration",
        {
            **HALVES,
            "attention_window": 4,
            "max_encoder_position_embeddings": 40,
            "max_decoder_position_embeddings": 40,
        },
    ),
    (
        "bigbird_pegasus",
        "BigBirdPegasusForConditionalGeneration",
        {**HALVES, "attention_type": "original_full"},
    ),
    ("m2m_100", "M2M100ForConditionalGeneration", HALVES),
    (
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        {**HALVES, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    ),
)


def _same_length() -> Inputs:
    """FSMT shifts the source itself, so labels are as long as it."""
    return (), {**tokens()[1], "labels": token_ids()}


def cases() -> tuple[Case, ...]:
    """One case a row, when transformers is installed."""
    if not installed():
        return ()
    fsmt = {**HALVES, "src_vocab_size": 90, "tgt_vocab_size": 90, "langs": ["a", "b"]}
    return (
        *(case(*row, translation) for row in _ROWS),
        case("fsmt", "FSMTForConditionalGeneration", fsmt, _same_length),
    )
