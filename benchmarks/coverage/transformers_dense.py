"""Models of transformers that segment, detect or estimate depth, and backbones for them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.coverage.case import Case
from benchmarks.coverage.tiny import IMAGE, case, images, installed

_STAGES: Mapping[str, Any] = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_stages": 4,
    "num_encoder_blocks": 4,
    "num_labels": 5,
    "image_size": 32,
}
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


def _segmenters() -> list[Case]:
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
    large = partial(images, 64)
    return [
        case("mask2former", "Mask2FormerForUniversalSegmentation", mask2former, large),
        case("maskformer", "MaskFormerForInstanceSegmentation", maskformer, large),
    ]


def cases() -> tuple[Case, ...]:
    """One case a row, when transformers is installed."""
    if not installed():
        return ()
    return (*(case(*row, images) for row in _ROWS), *_segmenters())
