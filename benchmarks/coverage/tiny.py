"""Builds tiny models of transformers from a class name and settings: no network, random weights."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks.coverage.case import Case
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# Most configurations know these names or map theirs to them; one that does not keeps them unused.
SIZES: Mapping[str, Any] = {
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
# For the few models that refuse to be told a length or a depth.
FREE: Mapping[str, Any] = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
# For encoder-decoder models, whose halves have sizes of their own.
HALVES: Mapping[str, Any] = {
    **SIZES,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
}
IMAGE: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


def installed() -> bool:
    """Whether transformers can be imported."""
    return find_spec("transformers") is not None


def build(model_class: str, settings: Mapping[str, Any]) -> nn.Module:
    """A model of this class from its own configuration class."""
    kind = getattr(importlib.import_module("transformers"), model_class)
    # Copied, since configurations keep the lists that they are given.
    model: nn.Module = kind(kind.config_class(**copy.deepcopy(dict(settings))))
    return model


def case(
    name: str, model_class: str, settings: Mapping[str, Any], inputs: Callable[[], Inputs]
) -> Case:
    """A case of the family ``transformers``."""
    return Case(f"transformers/{name}", partial(build, model_class, settings), inputs)


def token_ids(length: int = 10, vocab: int = 90) -> Tensor:
    """Two rows of ordinary tokens; the first ids are left to special ones."""
    return torch.randint(5, vocab, (2, length))


def tokens(length: int = 10) -> Inputs:
    """What a tokenizer gives for two sentences, the second one shorter."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -3:] = 0
    return (), {"input_ids": token_ids(length), "attention_mask": mask}


def labelled(length: int = 10) -> Inputs:
    """Token ids with labels, as for a step of language modelling."""
    ids = token_ids(length)
    return (), {"input_ids": ids, "labels": ids}


def translation(length: int = 10) -> Inputs:
    """A source with its mask and labels of another length."""
    return (), {**tokens(length)[1], "labels": token_ids(7)}


def images(size: int = 32, channels: int = 3) -> Inputs:
    """Four images, since a batch norm over two values knows their signs alone."""
    return (), {"pixel_values": torch.randn(4, channels, size, size)}


def waveform(length: int = 1200) -> Inputs:
    """Two stretches of sound."""
    return (), {"input_values": torch.randn(2, length)}
