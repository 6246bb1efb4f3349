"""Networks of timm and torchvision, with random weights, for those of the two that import.

Every model is a real one: the smallest of its family, on the smallest image that it takes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from benchmarks.coverage.case import Case
from torch import nn


class Row(NamedTuple):
    """The sides of the image (a single number: square) and options of the constructor."""

    size: int | tuple[int, ...]
    options: Mapping[str, Any] = {}


_NO_BACKBONE = {"weights_backbone": None}

TORCHVISION: dict[str, Row] = {
    "alexnet": Row(64),
    "convnext_tiny": Row(64),
    "deeplabv3_mobilenet_v3_large": Row(64, _NO_BACKBONE),
    "densenet121": Row(64),
    "efficientnet_b0": Row(64),
    "efficientnet_v2_s": Row(64),
    "fcn_resnet50": Row(64, {"aux_loss": True, **_NO_BACKBONE}),
    "googlenet": Row(64, {"init_weights": False}),
    "inception_v3": Row(75, {"init_weights": False, "aux_logits": False}),
    "lraspp_mobilenet_v3_large": Row(64, _NO_BACKBONE),
    "maxvit_t": Row(224),
    "mc3_18": Row((4, 32, 32)),
    "mnasnet0_5": Row(64),
    "mobilenet_v2": Row(64),
    "mobilenet_v3_large": Row(64),
    "mobilenet_v3_small": Row(64),
    "r2plus1d_18": Row((4, 32, 32)),
    "r3d_18": Row((4, 32, 32)),
    "regnet_x_400mf": Row(64),
    "regnet_y_400mf": Row(64),
    "resnet18": Row(64),
    "resnet50": Row(64),
    "resnext50_32x4d": Row(64),
    "shufflenet_v2_x0_5": Row(64),
    "squeezenet1_0": Row(64),
    "squeezenet1_1": Row(64),
    "swin3d_t": Row((4, 64, 64)),
    "swin_t": Row(64),
    "swin_v2_t": Row(64),
    "vgg11": Row(32),
    "vgg11_bn": Row(32),
    "vit_b_16": Row(64, {"image_size": 64}),
    "wide_resnet50_2": Row(64),
}

_IMAGE_64 = Row(64, {"img_size": 64})

TIMM: dict[str, Row] = {
    "bat_resnext26ts": Row(256),
    "beit_base_patch16_224": Row(64, {"img_size": 64, "depth": 3}),
    "botnet26t_256": Row(128, {"img_size": 128}),
    "caformer_s18": Row(64),
    "cait_xxs24_224": _IMAGE_64,
    "coat_tiny": _IMAGE_64,
    "coatnet_nano_rw_224": _IMAGE_64,
    "convit_tiny": _IMAGE_64,
    "convmixer_768_32": Row(64),
    "convnextv2_atto": Row(64),
    "crossvit_tiny_240": Row(240),
    "cspresnet50": Row(64),
    "davit_tiny": Row(64),
    "deit_tiny_distilled_patch16_224": _IMAGE_64,
    "densenetblur121d": Row(64, {"block_config": (3, 3, 3, 3)}),
    "dla34": Row(64),
    "dla60_res2net": Row(64),
    "dpn48b": Row(64),
    "eca_nfnet_l0": Row(64),
    "ecaresnext26t_32x4d": Row(64),
    "edgenext_xx_small": Row(64),
    "efficientformer_l1": Row(224),
    "efficientformerv2_s0": _IMAGE_64,
    "efficientvim_m1": Row(64),
    "efficientvit_b0": Row(64),
    "efficientvit_m0": _IMAGE_64,
    "ese_vovnet19b_dw": Row(64),
    "eva02_tiny_patch14_224": Row(56, {"img_size": 56}),
    "fasternet_t0": Row(64),
    "fastvit_t8": Row(64),
    "focalnet_tiny_srf": Row(64),
    "gcresnext26ts": Row(64),
    "gcvit_xxtiny": _IMAGE_64,
    "ghostnet_050": Row(64),
    "ghostnetv2_100": Row(64),
    "gmlp_ti16_224": _IMAGE_64,
    "halonet26t": Row(256),
    "hardcorenas_a": Row(64),
    "hgnetv2_b0": Row(64),
    "hiera_tiny_224": _IMAGE_64,
    "hrnet_w18_small": Row(64),
    "inception_next_atto": Row(64),
    "inception_v4": Row(96),
    "lambda_resnet26t": Row(64),
    "lcnet_035": Row(64),
    "legacy_xception": Row(96),
    "levit_128s": _IMAGE_64,
    "mambaout_femto": Row(64),
    "maxvit_rmlp_pico_rw_256": _IMAGE_64,
    "mixer_s32_224": _IMAGE_64,
    "mixnet_s": Row(64),
    "mobilenetv4_hybrid_medium": Row(64),
    "mobileone_s0": Row(64),
    "mobilevit_xxs": Row(64),
    "mobilevitv2_050": Row(64),
    "mvitv2_tiny": _IMAGE_64,
    "nest_tiny": _IMAGE_64,
    "nextvit_small": Row(64),
    "nf_resnet26": Row(64),
    "pit_ti_224": _IMAGE_64,
    "poolformerv2_s12": Row(64),
    "pvt_v2_b0": Row(64),
    "rdnet_tiny": Row(64),
    "regnetz_b16": Row(64),
    "repghostnet_050": Row(64),
    "repvgg_a0": Row(64),
    "repvit_m0_9": Row(64),
    "res2net50_14w_8s": Row(64),
    "resmlp_12_224": _IMAGE_64,
    "resnest14d": Row(64),
    "resnet10t": Row(64),
    "resnetblur50": Row(64),
    "resnetv2_50x1_bit": Row(64),
    "rexnet_100": Row(64),
    "selecsls42": Row(64),
    "sequencer2d_s": _IMAGE_64,
    "seresnext26t_32x4d": Row(64),
    "shvit_s1": Row(64),
    "skresnext50_32x4d": Row(64),
    "starnet_s1": Row(64),
    "swiftformer_xs": Row(64),
    "swin_tiny_patch4_window7_224": _IMAGE_64,
    "swinv2_cr_tiny_224": _IMAGE_64,
    "tf_efficientnetv2_b0": Row(64),
    "tiny_vit_5m_224": Row(64),
    "tnt_s_patch16_224": _IMAGE_64,
    "tresnet_m": Row(64),
    "twins_svt_small": _IMAGE_64,
    "visformer_tiny": _IMAGE_64,
    "vit_relpos_small_patch16_224": _IMAGE_64,
    "vit_tiny_patch16_224": _IMAGE_64,
    "vit_tiny_r_s16_p8_224": _IMAGE_64,
    "vitamin_small_224": _IMAGE_64,
    "volo_d1_224": _IMAGE_64,
    "xception41p": Row(64),
    "xcit_nano_12_p16_224": _IMAGE_64,
}


def cases() -> tuple[Case, ...]:
    """A case for every row whose package imports here."""
    return (*_rows("torchvision", TORCHVISION), *_rows("timm", TIMM))


def _rows(package: str, table: dict[str, Row]) -> Iterator[Case]:
    if not _imports(package):
        return
    for name, row in table.items():
        make = partial(_MAKERS[package], name, row.options)
        yield Case(f"{package}/{name}", make, partial(_images, row.size))


def _imports(package: str) -> bool:
    """Whether the package is there and fits this torch (RuntimeError: operators are missing)."""
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError):
        return False
    return True


def _make_torchvision(name: str, options: Mapping[str, Any]) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    model: nn.Module = models.get_model(name, weights=None, num_classes=10, **options)
    return model


def _make_timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    timm = importlib.import_module("timm")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **options)
    return model


_MAKERS = {"torchvision": _make_torchvision, "timm": _make_timm}


def _images(size: int | tuple[int, ...]) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
    sides = (size, size) if isinstance(size, int) else size
    return (torch.randn(2, 3, *sides),), {}
