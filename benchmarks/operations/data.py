"""Real images: scikit-learn's digits, and a part of CIFAR-10 from its parquet files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
CIFAR_TRAIN, CIFAR_TEST = 6000, 3000


@dataclass(frozen=True)
class Data:
    """Images (N, C, H, W) with labels: to train on, and to compare on."""

    train: Batch
    test: Batch


def split(images: Tensor, labels: Tensor, train: int, seed: int) -> Data:
    """Another random split for each seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, rest = order[:train], order[train:]
    return Data((images[first], labels[first]), (images[rest], labels[rest]))


def digits(seed: int) -> Data:
    """1,797 handwritten digits of 8x8 pixels, 900 of them to train on."""
    images, labels = _digits()
    return split(images, labels, 900, seed)


@cache
def _digits() -> Batch:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def cifar10(seed: int, folder: Path) -> Data:
    """CIFAR-10 at 16x16 pixels: 9,000 images of its training file, 6,000 of them to train on."""
    images, labels = _cifar10(folder)
    return split(images, labels, CIFAR_TRAIN, seed)


@cache
def _cifar10(folder: Path) -> Batch:
    from PIL import Image
    from pyarrow import parquet

    rows = parquet.read_table(folder / "train.parquet").slice(0, CIFAR_TRAIN + CIFAR_TEST)
    files = [io.BytesIO(row["bytes"]) for row in rows["img"].to_pylist()]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    small = F.avg_pool2d(images, 2)
    mean, spread = small.mean((0, 2, 3), keepdim=True), small.std((0, 2, 3), keepdim=True)
    return (small - mean) / spread, torch.tensor(rows["label"].to_pylist())
