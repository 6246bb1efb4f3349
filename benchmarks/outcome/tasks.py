"""The tasks: real data in three parts, a starting network, and how much computing a run may use."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Inputs and targets: to train on, to decide on, and to report on (read once)."""

    train: Batch
    holdout: Batch
    test: Batch


@dataclass(frozen=True)
class Task:
    """One comparison.

    Attributes:
        name: as the page calls it.
        load: the data of a seed.
        network: the starting network.
        tuned: the same network, its regularisation tuned by hand.
        compute: training FLOPs of a run (a step is three forwards).
        params: limit on the parameters, as a share of the start; None where growth is the point.
        batch: samples per step.
        rate: the highest learning rate of the one-cycle schedule.
        augment: what is done to a training batch, or None.
        better: ``"accuracy"`` (percent, higher is better) or ``"loss"`` (nats).
    """

    name: str
    load: Callable[[int], Data]
    network: Callable[[], nn.Module]
    tuned: Callable[[], nn.Module]
    compute: float
    params: float | None
    batch: int = 128
    rate: float = 3e-3
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    better: str = "accuracy"

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :func:`loss_fn`."""
        return loss_fn(model, batch)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over samples, or over positions of sequences."""
    logits: Tensor = model(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


class ReferenceCnn(nn.Module):
    """Three conv-BN-ReLU blocks and a two-layer classifier: 2,193,674 parameters."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, pool in ((3, 32, True), (32, 64, True), (64, 128, False)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pool else []
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(128 * 64, 256), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(256, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits


def flipped_and_shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, move each by up to an eighth of its size."""
    count, _, height, width = images.shape
    reach = height // 8
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, [reach] * 4)
    top, left = torch.randint(0, 2 * reach + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    return padded[
        torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None]
    ].permute(0, 3, 1, 2)


def parts(inputs: Tensor, targets: Tensor, sizes: tuple[int, int], seed: int) -> Data:
    """A random split: training, holdout, and the rest for the test."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    split = order.split([*sizes, len(order) - sum(sizes)])
    return Data(*((inputs[part], targets[part]) for part in split))


@cache
def _cifar(folder: Path, name: str, count: int) -> Batch:
    from PIL import Image
    from pyarrow import parquet

    rows = parquet.read_table(folder / f"{name}.parquet").slice(0, count)
    files = [io.BytesIO(row["bytes"]) for row in rows["img"].to_pylist()]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
    spread = torch.tensor([0.2470, 0.2435, 0.2616])[:, None, None]
    return (images - mean) / spread, torch.tensor(rows["label"].to_pylist())


def cifar10(folder: Path | None) -> Task:
    """CIFAR-10: 10,000 images to train on, 2,000 to decide on, 5,000 of the test file."""

    def load(seed: int) -> Data:
        images, labels = _cifar(_given(folder) / "cifar10", "train", 12_000)
        data = parts(images, labels, (10_000, 2_000), seed)
        return Data(data.train, data.holdout, _cifar(_given(folder) / "cifar10", "test", 5_000))

    return Task(
        "cifar10",
        load,
        ReferenceCnn,
        lambda: ReferenceCnn(dropout=0.0),
        compute=3.95e12,
        params=None,
        rate=1e-3,
        augment=flipped_and_shifted,
    )


def mlp(sizes: tuple[int, ...], dropout: float = 0.0) -> nn.Module:
    """Fully connected layers with ReLU, dropout behind each hidden one if there is any."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def digits(_folder: Path | None) -> Task:
    """Scikit-learn's 1,797 digits, 900 to train on; a network that starts with 8 hidden units."""

    def load(seed: int) -> Data:
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32) / 16
        return parts(images, torch.tensor(found.target), (900, 300), seed)

    start = (64, 8, 10)
    return Task(
        "digits", load, lambda: mlp(start), lambda: mlp(start), compute=9.1e8, params=None,
        batch=64, rate=1e-2,
    )  # fmt: skip


def tabular(_folder: Path | None) -> Task:
    """Scikit-learn's breast cancer data, 569 rows of 30 columns; an oversized network."""

    def load(seed: int) -> Data:
        from sklearn.datasets import load_breast_cancer

        found = load_breast_cancer()
        rows = torch.tensor(found.data, dtype=torch.float32)
        rows = (rows - rows.mean(0)) / rows.std(0)
        return parts(rows, torch.tensor(found.target), (285, 114), seed)

    sizes = (30, 128, 128, 2)
    return Task(
        "tabular", load, lambda: mlp(sizes, 0.5), lambda: mlp(sizes, 0.2), compute=3e9,
        params=None, batch=19, rate=1e-3,
    )  # fmt: skip


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class CharGpt(nn.Module):
    """Characters (N, T) to logits (N, T, vocabulary)."""

    def __init__(self, vocabulary: int = 65, size: int = 64, layers: int = 1) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, size), nn.Embedding(64, size)
        self.blocks = nn.ModuleList([_Block(size, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def shakespeare(folder: Path | None) -> Task:
    """Characters of Shakespeare, 64 at a time; a transformer of one layer."""

    def load(seed: int) -> Data:
        text = (_given(folder) / "tinyshakespeare.txt").read_text()
        numbers = {letter: number for number, letter in enumerate(sorted(set(text)))}
        ids = torch.tensor([numbers[letter] for letter in text])
        rows = ids[: len(ids) // 65 * 65].view(-1, 65)
        data = parts(rows[:, :-1], rows[:, 1:], (14_000, 1_000), seed)
        return Data(data.train, data.holdout, (data.test[0][:1_500], data.test[1][:1_500]))

    return Task(
        "shakespeare", load, CharGpt, CharGpt, compute=6e11, params=None, batch=32,
        rate=3e-3, better="loss",
    )  # fmt: skip


def _given(folder: Path | None) -> Path:
    if folder is None:
        raise SystemExit("this task reads files: pass --data FOLDER")
    return folder


TASKS: dict[str, Callable[[Path | None], Task]] = {
    "cifar10": cifar10,
    "digits": digits,
    "shakespeare": shakespeare,
    "tabular": tabular,
}
