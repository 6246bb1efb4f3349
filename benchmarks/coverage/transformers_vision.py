"""Vision models of transformers, mostly with a classification head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from benchmarks.coverage.case import Case
from benchmarks.coverage.tiny import IMAGE, Inputs, case, images, installed

_STAGES: Mapping[str, Any] = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_stages": 4,
    "num_encoder_blocks": 4,
    "num_labels": 5,
    "image_size": 32,
}
_WINDOWS: Mapping[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 5,
}
_MOBILE: Mapping[str, Any] = {"image_size": 32, "num_labels": 5, "hidden_sizes": [16, 24, 32]}

# Name, class, settings; the input is images of 32 pixels.
_ROWS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("vit", "ViTForImageClassification", IMAGE),
    ("deit", "DeiTForImageClassification", IMAGE),
    ("deit-distilled", "DeiTForImageClassificationWithTeacher", IMAGE),
    (
        "beit",
        "BeitForImageClassification",
        {**IMAGE, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
    ),
    ("data2vec-vision", "Data2VecVisionForImageClassification", IMAGE),
    ("dinov2", "Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 2}),
    (
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        {**IMAGE, "mlp_ratio": 2, "num_register_tokens": 2},
    ),
    ("dinov3_vit", "DINOv3ViTModel", IMAGE),
    ("ijepa", "IJepaForImageClassification", IMAGE),
    ("vit_msn", "ViTMSNForImageClassification", IMAGE),
    (
        "vit_mae",
        "ViTMAEForPreTraining",
        {
            **IMAGE,
            "decoder_hidden_size": 24,
            "decoder_intermediate_size": 48,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
        },
    ),
    ("pixio", "PixioModel", {**IMAGE, "mlp_ratio": 2}),
    ("siglip-vision", "SiglipForImageClassification", {"vision_config": IMAGE, "num_labels": 5}),
    ("clip-classifier", "CLIPForImageClassification", {"vision_config": IMAGE, "num_labels": 5}),
    ("swin", "SwinForImageClassification", _WINDOWS),
    ("swinv2", "Swinv2ForImageClassification", _WINDOWS),
    ("donut-swin", "DonutSwinForImageClassification", _WINDOWS),
    (
        "swin2sr",
        "Swin2SRForImageSuperResolution",
        {**_WINDOWS, "patch_size": 1, "window_size": 8, "num_heads": [2, 2], "depths": [1, 1]},
    ),
    ("convnext", "ConvNextForImageClassification", _STAGES),
    ("convnextv2", "ConvNextV2ForImageClassification", _STAGES),
    ("resnet", "ResNetForImageClassification", {**_STAGES, "embedding_size": 8}),
    (
        "resnet-basic",
        "ResNetForImageClassification",
        {**_STAGES, "embedding_size": 8, "layer_type": "basic"},
    ),
    (
        "regnet",
        "RegNetForImageClassification",
        {**_STAGES, "embedding_size": 8, "groups_width": 4},
    ),
    ("bit", "BitForImageClassification", {**_STAGES, "embedding_size": 8, "num_groups": 2}),
    (
        "mobilenet_v1",
        "MobileNetV1ForImageClassification",
        {**_MOBILE, "depth_multiplier": 0.25},
    ),
    (
        "mobilenet_v2",
        "MobileNetV2ForImageClassification",
        {**_MOBILE, "depth_multiplier": 0.25},
    ),
    (
        "mobilevit",
        "MobileViTForImageClassification",
        {**_MOBILE, "neck_hidden_sizes": [4, 8, 8, 16, 16, 24, 32], "num_attention_heads": 2},
    ),
    (
        "poolformer",
        "PoolFormerForImageClassification",
        {**_STAGES, "mlp_ratio": 2.0},
    ),
    (
        "pvt",
        "PvtForImageClassification",
        {
            **_STAGES,
            "num_attention_heads": [1, 2, 2, 4],
            "sequence_reduction_ratios": [4, 2, 1, 1],
            "mlp_ratios": [2, 2, 2, 2],
        },
    ),
    (
        "pvt_v2",
        "PvtV2ForImageClassification",
        {**_STAGES, "num_attention_heads": [1, 2, 2, 4], "sr_ratios": [4, 2, 1, 1]},
    ),
    (
        "segformer",
        "SegformerForSemanticSegmentation",
        {
            **_STAGES,
            "num_attention_heads": [1, 2, 2, 4],
            "sr_ratios": [4, 2, 1, 1],
            "decoder_hidden_size": 16,
        },
    ),
    (
        "cvt",
        "CvtForImageClassification",
        {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "num_labels": 5},
    ),
    (
        "focalnet",
        "FocalNetForImageClassification",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "num_labels": 5,
        },
    ),
    (
        "efficientnet",
        "EfficientNetForImageClassification",
        {
            "image_size": 32,
            "num_labels": 5,
            "hidden_dim": 320,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.3,
        },
    ),
    (
        "swiftformer",
        "SwiftFormerForImageClassification",
        {"num_labels": 5, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "mlp_ratio": 2},
    ),
    (
        "textnet",
        "TextNetForImageClassification",
        {
            "num_labels": 5,
            "stem_out_channels": 8,
            "hidden_sizes": [8, 8, 16, 16, 24],
            "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3]], [[3, 3]], [[3, 3]]],
            "conv_layer_strides": [[1], [2], [2], [2]],
        },
    ),
    (
        "hiera",
        "HieraForImageClassification",
        {
            "image_size": [32, 32],
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "patch_padding": [1, 1],
            "masked_unit_size": [4, 4],
            "embed_dim": 8,
            "depths": [1, 1, 1],
            "num_heads": [1, 2, 4],
            "num_query_pool": 2,
            "query_stride": [2, 2],
            "num_labels": 5,
        },
    ),
    (
        "hgnet_v2",
        "HGNetV2ForImageClassification",
        {
            "num_labels": 5,
            "stem_channels": [3, 8, 8],
            "hidden_sizes": [16, 24, 32, 40],
            "stage_in_channels": [8, 16, 24, 32],
            "stage_mid_channels": [8, 8, 8, 8],
            "stage_out_channels": [16, 24, 32, 40],
            "stage_num_blocks": [1, 1, 1, 1],
            "stage_numb_of_layers": [2, 2, 2, 2],
        },
    ),
)


def _video(frames: int = 4) -> Inputs:
    return (), {"pixel_values": torch.randn(2, frames, 3, 32, 32)}


def _special() -> list[Case]:
    levit = {
        "image_size": 64,
        "num_labels": 5,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    }
    mobile = {
        "image_size": 64,
        "num_labels": 5,
        "width_multiplier": 0.25,
        "n_attn_blocks": [1, 1, 1],
    }
    video = {**IMAGE, "num_frames": 4, "tubelet_size": 2}
    large = partial(images, 64)
    return [
        case("levit", "LevitForImageClassification", levit, large),
        case("mobilevitv2", "MobileViTV2ForImageClassification", mobile, large),
        case(
            "timesformer", "TimesformerForVideoClassification", {**IMAGE, "num_frames": 4}, _video
        ),
        case("videomae", "VideoMAEForVideoClassification", video, _video),
        case("vivit", "VivitForVideoClassification", {**video, "tubelet_size": [2, 8, 8]}, _video),
    ]


def cases() -> tuple[Case, ...]:
    """One case a row, when transformers is installed."""
    if not installed():
        return ()
    return (*(case(*row, images) for row in _ROWS), *_special())
