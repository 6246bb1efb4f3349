"""Text encoders of transformers, mostly with a classification head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.coverage.case import Case
from benchmarks.coverage.tiny import FREE, SIZES, Inputs, case, installed, token_ids, tokens

_LABELS: Mapping[str, Any] = {**SIZES, "num_labels": 5}
_FREE: Mapping[str, Any] = {**FREE, "num_labels": 5}
_EMBEDDED: Mapping[str, Any] = {**_LABELS, "embedding_size": 16}
_SPARSE: Mapping[str, Any] = {**_LABELS, "attention_window": 4, "block_size": 4}

# Name, class, settings; the input is token ids with a mask.
_ROWS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("bert", "BertForSequenceClassification", _LABELS),
    ("bert-masked", "BertForMaskedLM", _LABELS),
    ("roberta", "RobertaForSequenceClassification", _LABELS),
    ("xlm-roberta", "XLMRobertaForMaskedLM", _LABELS),
    ("xlm-roberta-xl", "XLMRobertaXLForSequenceClassification", _LABELS),
    ("roberta_prelayernorm", "RobertaPreLayerNormForSequenceClassification", _LABELS),
    ("camembert", "CamembertForTokenClassification", _LABELS),
    ("albert", "AlbertForSequenceClassification", _EMBEDDED),
    ("electra", "ElectraForSequenceClassification", _EMBEDDED),
    ("distilbert", "DistilBertForSequenceClassification", {**_LABELS, "dim": 32, "hidden_dim": 64}),
    (
        "deberta",
        "DebertaForSequenceClassification",
        {**_LABELS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    (
        "deberta_v2",
        "DebertaV2ForSequenceClassification",
        {
            **_LABELS,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "share_att_key": True,
        },
    ),
    ("mpnet", "MPNetForSequenceClassification", _LABELS),
    ("xlnet", "XLNetForSequenceClassification", {**_FREE, "d_inner": 64, "d_head": 8}),
    (
        "mobilebert",
        "MobileBertForSequenceClassification",
        {**_EMBEDDED, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    ),
    ("squeezebert", "SqueezeBertForSequenceClassification", {**_LABELS, "embedding_size": 32}),
    ("convbert", "ConvBertForSequenceClassification", {**_LABELS, "embedding_size": 32}),
    (
        "funnel",
        "FunnelForSequenceClassification",
        {
            "vocab_size": 90,
            "num_labels": 5,
            "block_sizes": [1, 1],
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 64,
        },
    ),
    ("longformer", "LongformerForSequenceClassification", _SPARSE),
    (
        "big_bird",
        "BigBirdForSequenceClassification",
        {**_SPARSE, "attention_type": "original_full"},
    ),
    ("ernie", "ErnieForSequenceClassification", _LABELS),
    ("fnet", "FNetForSequenceClassification", _LABELS),
    ("modernbert", "ModernBertForSequenceClassification", {**_LABELS, "local_attention": 4}),
    ("roformer", "RoFormerForSequenceClassification", _EMBEDDED),
    ("rembert", "RemBertForSequenceClassification", {**_LABELS, "input_embedding_size": 16}),
    ("megatron_bert", "MegatronBertForSequenceClassification", _LABELS),
    ("ibert", "IBertForSequenceClassification", _LABELS),
    ("canine", "CanineForSequenceClassification", {**_LABELS, "local_transformer_stride": 4}),
    ("esm", "EsmForSequenceClassification", {**_LABELS, "mask_token_id": 3}),
    (
        "xlm",
        "XLMForSequenceClassification",
        {**_LABELS, "emb_dim": 32, "n_layers": 2, "n_heads": 4},
    ),
    (
        "flaubert",
        "FlaubertForSequenceClassification",
        {**_LABELS, "emb_dim": 32, "n_layers": 2, "n_heads": 4},
    ),
    ("data2vec-text", "Data2VecTextForSequenceClassification", _LABELS),
    ("luke", "LukeForSequenceClassification", {**_LABELS, "entity_vocab_size": 20}),
    ("splinter", "SplinterForQuestionAnswering", _LABELS),
    ("yoso", "YosoForSequenceClassification", {**_LABELS, "use_expectation": True}),
    ("mra", "MraForSequenceClassification", _LABELS),
    ("xmod", "XmodForSequenceClassification", {**_LABELS, "default_language": "en_XX"}),
    ("nomic_bert", "NomicBertForSequenceClassification", _LABELS),
    ("eurobert", "EuroBertForSequenceClassification", {**_LABELS, "num_key_value_heads": 2}),
    (
        "reformer",
        "ReformerForSequenceClassification",
        {
            **_LABELS,
            "attention_head_size": 8,
            "attn_layers": ["local", "local"],
            "feed_forward_size": 64,
            "axial_pos_shape": [5, 2],
            "axial_pos_embds_dim": [16, 16],
            "local_attn_chunk_length": 5,
            "is_decoder": False,
        },
    ),
    (
        "layoutlm",
        "LayoutLMForSequenceClassification",
        {**_LABELS, "max_2d_position_embeddings": 64},
    ),
    (
        "lilt",
        "LiltForSequenceClassification",
        {**_LABELS, "hidden_size": 48, "max_2d_position_embeddings": 64},
    ),
    ("markuplm", "MarkupLMForSequenceClassification", {**_LABELS, "max_depth": 4}),
)


def _without_mask() -> Inputs:
    """Nystromformer does not take a mask when it has fewer landmarks than tokens."""
    return (), {"input_ids": token_ids()}


def cases() -> tuple[Case, ...]:
    """One case a row, when transformers is installed."""
    if not installed():
        return ()
    landmarks = {**_LABELS, "num_landmarks": 5, "segment_means_seq_len": 10, "conv_kernel_size": 3}
    return (
        *(case(*row, tokens) for row in _ROWS),
        case("nystromformer", "NystromformerForSequenceClassification", landmarks, _without_mask),
    )
