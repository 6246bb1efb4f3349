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
_BACKBONE: Mapping[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_SWIN_BACKBONE: Mapping[str, Any] = {
    "model_type": "swin",
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_DETECTOR: Mapping[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 6,
    "num_labels": 5,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": _BACKBONE,
}

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
    (
        "vitdet",
        "VitDetModel",
        {**IMAGE, "residual_block_indices": [0], "window_block_indices": [1], "window_size": 2},
    ),
    (
        "dpt",
        "DPTForDepthEstimation",
        {
            **IMAGE,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 16, 24, 32],
            "fusion_hidden_size": 16,
            "is_hybrid": False,
        },
    ),
    (
        "glpn",
        "GLPNForDepthEstimation",
        {
            **_STAGES,
            "num_attention_heads": [1, 2, 2, 4],
            "sr_ratios": [4, 2, 1, 1],
            "decoder_hidden_size": 16,
        },
    ),
    (
        "yolos",
        "YolosForObjectDetection",
        {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 4},
    ),
    (
        "upernet",
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": _BACKBONE,
            "hidden_size": 16,
            "pool_scales": [1, 2],
            "num_labels": 5,
            "auxiliary_in_channels": 24,
            "auxiliary_channels": 8,
            "auxiliary_num_convs": 1,
        },
    ),
    ("detr", "DetrForObjectDetection", _DETECTOR),
    ("table_transformer", "TableTransformerForObjectDetection", _DETECTOR),
    ("conditional_detr", "ConditionalDetrForObjectDetection", _DETECTOR),
    (
        "rt_detr",
        "RTDetrForObjectDetection",
        {
            **_DETECTOR,
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [16, 24, 32],
            "backbone_config": {
                "model_type": "rt_detr_resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16, 24, 32],
                "depths": [1, 1, 1, 1],
                "out_features": ["stage2", "stage3", "stage4"],
                "layer_type": "basic",
                "hidden_act": "relu",
            },
            "decoder_in_channels": [32, 32, 32],
            "decoder_n_points": 2,
            "num_denoising": 0,
            "feat_strides": [8, 16, 32],
        },
    ),
    ("superpoint", "SuperPointForKeypointDetection", {"encoder_hidden_sizes": [8, 8, 16, 16]}),
    (
        "depth_anything",
        "DepthAnythingForDepthEstimation",
        {
            "backbone_config": {
                "model_type": "dinov2",
                **IMAGE,
                "mlp_ratio": 2,
                "out_features": ["stage1", "stage2"],
                "reshape_hidden_states": False,
            },
            "patch_size": 8,
            "reassemble_hidden_size": 32,
            "reassemble_factors": [2, 1],
            "neck_hidden_sizes": [8, 16],
            "fusion_hidden_size": 8,
            "head_hidden_size": 8,
        },
    ),
)


def _video(frames: int = 4) -> Inputs:
    return (), {"pixel_values": torch.randn(2, frames, 3, 32, 32)}


def _masked_video() -> Inputs:
    masked = torch.zeros(2, 32, dtype=torch.bool)
    masked[:, ::2] = True
    return (), {"pixel_values": torch.randn(2, 4, 3, 32, 32), "bool_masked_pos": masked}


def _special() -> list[Case]:
    segmenter: dict[str, Any] = {
        "backbone_config": _SWIN_BACKBONE,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "num_labels": 5,
    }
    mask2former = {
        **segmenter,
        "hidden_dim": 32,
        "mask_feature_size": 32,
        "feature_size": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_feedforward_dim": 32,
        "dim_feedforward": 32,
        "num_attention_heads": 4,
        "num_queries": 6,
        "output_auxiliary_logits": False,
    }
    maskformer = {
        **segmenter,
        "fpn_feature_size": 32,
        "mask_feature_size": 32,
        "decoder_config": {"model_type": "detr", **_DETECTOR},
    }
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
        case("mask2former", "Mask2FormerForUniversalSegmentation", mask2former, large),
        case("maskformer", "MaskFormerForInstanceSegmentation", maskformer, large),
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
