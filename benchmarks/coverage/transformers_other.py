"""Models of transformers for sound, several modalities, time series and decisions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from benchmarks.coverage.case import Case
from benchmarks.coverage.tiny import (
    HALVES,
    IMAGE,
    SIZES,
    Inputs,
    case,
    images,
    installed,
    token_ids,
    tokens,
    waveform,
)

_SPEECH: Mapping[str, Any] = {
    **SIZES,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 8,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "classifier_proj_size": 24,
    "num_labels": 5,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}
_TEXT: Mapping[str, Any] = {**SIZES, "bos_token_id": 1, "eos_token_id": 2}
_PAIR: Mapping[str, Any] = {
    "text_config": _TEXT,
    "vision_config": IMAGE,
    "projection_dim": 16,
}
_SERIES: Mapping[str, Any] = {
    **HALVES,
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 2,
    "input_size": 1,
}
_PATCHES: Mapping[str, Any] = {
    "context_length": 32,
    "patch_length": 8,
    "patch_stride": 8,
    "stride": 8,
    "num_input_channels": 3,
    "d_model": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "num_targets": 5,
}


def _features(bins: int, length: int, name: str = "input_features") -> Inputs:
    return (), {name: torch.randn(2, bins, length), "decoder_input_ids": token_ids(7)}


def _filterbank() -> Inputs:
    return (), {"input_values": torch.randn(2, 64, 16)}


def _frames() -> Inputs:
    return (), {"input_features": torch.randn(2, 24, 20)}


def _speech_to_text() -> Inputs:
    return (), {"input_features": torch.randn(2, 24, 20), "decoder_input_ids": token_ids(7)}


def _two_images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _text_and_image() -> Inputs:
    return (), {**tokens()[1], **_two_images()}


def _image_with_words() -> Inputs:
    boxes = torch.randint(0, 30, (2, 10, 4)).sort(dim=-1).values
    return (), {**tokens()[1], "bbox": boxes, **_two_images()}


def _visual_words() -> Inputs:
    return (), {**tokens()[1], "visual_embeds": torch.randn(2, 4, 24)}


def _lxmert() -> Inputs:
    seen = {"visual_feats": torch.randn(2, 4, 24), "visual_pos": torch.rand(2, 4, 4)}
    return (), {**tokens()[1], **seen}


def _series() -> Inputs:
    past = 10
    return (), {
        "past_values": torch.randn(2, past),
        "past_time_features": torch.randn(2, past, 2),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, 4),
        "future_time_features": torch.randn(2, 4, 2),
    }


def _past() -> Inputs:
    return (), {"past_values": torch.randn(2, 32, 3)}


def _returns() -> Inputs:
    return (), {
        "states": torch.randn(2, 6, 11),
        "actions": torch.randn(2, 6, 3),
        "rewards": torch.randn(2, 6, 1),
        "returns_to_go": torch.randn(2, 6, 1),
        "timesteps": torch.arange(6).repeat(2, 1),
        "attention_mask": torch.ones(2, 6),
    }


def _perceived_text() -> Inputs:
    return (), {"inputs": token_ids(10), "attention_mask": torch.ones(2, 10)}


def _speech() -> list[Case]:
    whisper = {**HALVES, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 40}
    listener = {**HALVES, "input_feat_per_channel": 20, "conv_channels": 16, "num_conv_layers": 2}
    adapted = {**_SPEECH, "feature_projection_input_dim": 20, "add_adapter": False}
    sew = {**_SPEECH, "squeeze_factor": 2}
    spectrogram = {
        **IMAGE,
        "max_length": 64,
        "num_mel_bins": 16,
        "frequency_stride": 8,
        "time_stride": 8,
    }
    return [
        case("wav2vec2", "Wav2Vec2ForSequenceClassification", _SPEECH, waveform),
        case("wav2vec2-ctc", "Wav2Vec2ForCTC", _SPEECH, waveform),
        case("hubert", "HubertForSequenceClassification", _SPEECH, waveform),
        case("wavlm", "WavLMForSequenceClassification", _SPEECH, waveform),
        case("unispeech", "UniSpeechForSequenceClassification", _SPEECH, waveform),
        case("unispeech_sat", "UniSpeechSatForSequenceClassification", _SPEECH, waveform),
        case("data2vec-audio", "Data2VecAudioForSequenceClassification", _SPEECH, waveform),
        case("wav2vec2_conformer", "Wav2Vec2ConformerForSequenceClassification", _SPEECH, waveform),
        case("wav2vec2_bert", "Wav2Vec2BertForSequenceClassification", adapted, _frames),
        case("sew", "SEWForSequenceClassification", sew, waveform),
        case("whisper", "WhisperForConditionalGeneration", whisper, partial(_features, 16, 40)),
        case("speech_to_text", "Speech2TextForConditionalGeneration", listener, _speech_to_text),
        case(
            "audio_spectrogram_transformer", "ASTForAudioClassification", spectrogram, _filterbank
        ),
        case(
            "moonshine",
            "MoonshineForConditionalGeneration",
            {
                **HALVES,
                "encoder_num_hidden_layers": 2,
                "decoder_num_hidden_layers": 2,
                "encoder_num_attention_heads": 4,
                "decoder_num_attention_heads": 4,
            },
            lambda: ((), {**waveform(3000)[1], "decoder_input_ids": token_ids(7)}),
        ),
    ]


def _several_modalities() -> list[Case]:
    layout = {
        **SIZES,
        "num_labels": 5,
        "max_2d_position_embeddings": 64,
        "coordinate_size": 6,
        "shape_size": 4,
        "input_size": 32,
        "patch_size": 8,
        "rel_2d_pos_bins": 8,
        "rel_pos_bins": 8,
        "max_rel_2d_pos": 16,
        "max_rel_pos": 8,
    }
    lxmert = {
        **SIZES,
        "l_layers": 1,
        "x_layers": 1,
        "r_layers": 1,
        "visual_feat_dim": 24,
        "num_qa_labels": 5,
    }
    lxmert.pop("num_hidden_layers")
    vilt = {**SIZES, **IMAGE, "max_image_length": -1}
    return [
        case("clip", "CLIPModel", _PAIR, _text_and_image),
        case("clip-text", "CLIPTextModelWithProjection", {**_TEXT, "projection_dim": 16}, tokens),
        case(
            "clip-vision", "CLIPVisionModelWithProjection", {**IMAGE, "projection_dim": 16}, images
        ),
        case("siglip", "SiglipModel", _PAIR, _text_and_image),
        case("chinese_clip", "ChineseCLIPModel", _PAIR, _text_and_image),
        case("align-text", "AlignTextModel", SIZES, tokens),
        case("blip-vision", "BlipVisionModel", IMAGE, images),
        case("git", "GitForCausalLM", {**SIZES, "vision_config": IMAGE}, _text_and_image),
        case("vilt", "ViltForQuestionAnswering", vilt, _text_and_image),
        case(
            "visual_bert", "VisualBertModel", {**SIZES, "visual_embedding_dim": 24}, _visual_words
        ),
        case("lxmert", "LxmertForQuestionAnswering", lxmert, _lxmert),
        case("layoutlmv3", "LayoutLMv3ForSequenceClassification", layout, _image_with_words),
        case("flava-text", "FlavaTextModel", SIZES, tokens),
    ]


def _without_language() -> list[Case]:
    decisions = {
        "state_dim": 11,
        "act_dim": 3,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "max_ep_len": 20,
    }
    perceiver = {
        **SIZES,
        "num_latents": 6,
        "d_latents": 32,
        "d_model": 32,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "num_labels": 5,
    }
    return [
        case("perceiver-text", "PerceiverForSequenceClassification", perceiver, _perceived_text),
        case("decision_transformer", "DecisionTransformerModel", decisions, _returns),
        case("time_series_transformer", "TimeSeriesTransformerForPrediction", _SERIES, _series),
        case(
            "autoformer",
            "AutoformerForPrediction",
            {**_SERIES, "label_length": 2, "moving_average": 3},
            _series,
        ),
        case("informer", "InformerForPrediction", _SERIES, _series),
        case("patchtst", "PatchTSTForClassification", _PATCHES, _past),
        case("patchtsmixer", "PatchTSMixerForTimeSeriesClassification", _PATCHES, _past),
    ]


def cases() -> tuple[Case, ...]:
    """All of them, when transformers is installed."""
    if not installed():
        return ()
    return (*_speech(), *_several_modalities(), *_without_language())
