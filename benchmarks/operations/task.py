"""The shape of a comparison: a task, a moment in its training, and the arms that change it there.

A file of this folder with a function ``section() -> Section`` is a part of the page; there is
nothing to register.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.operations.data import Batch, Data, cifar10, digits
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 64


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch (images, labels)."""
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Moment:
    """A model in the middle of its training, as an arm finds it.

    Attributes:
        model: changed in place.
        optimizer: the one that trains it.
        batches: training batches to measure on.
        seed: of this run; the same for all arms.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: tuple[Batch, ...]
    seed: int

    @property
    def args(self) -> tuple[Tensor]:
        """Example input, for the map and for ``apply``."""
        return (self.batches[0][0],)


Change = Callable[[Moment], object]


@dataclass(frozen=True)
class Task:
    """Train ``before`` steps, change, train ``after`` steps with the rate annealed to zero.

    Attributes:
        data: ``"digits"`` or ``"cifar10"``.
        network: makes the model.
        before: steps before the change.
        after: steps after it, on the same batches in every arm.
        rate: learning rate of AdamW.
    """

    data: str
    network: Callable[[], nn.Module]
    before: int
    after: int
    rate: float = 1e-2

    def load(self, seed: int, folder: Path) -> Data:
        """The data, split by seed."""
        return cifar10(seed, folder) if self.data == "cifar10" else digits(seed)


@dataclass(frozen=True)
class Setting:
    """One place on one task; the first arm is the one that the others are compared with."""

    name: str
    task: Task
    arms: Mapping[str, Change]


@dataclass(frozen=True)
class Section:
    """A part of the page: a question, and the settings that answer it."""

    title: str
    about: str
    settings: tuple[Setting, ...]


class SmallCnn(nn.Module):
    """Three stages of convolution, batch norm and ReLU, pooled, and a linear head."""

    def __init__(self, channels: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if len(layers) < 8 else []
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits


def mlp(width: int = 12) -> nn.Module:
    """Two hidden layers on the pixels of a digit."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def digits_cnn() -> nn.Module:
    """For 8x8 digits."""
    return SmallCnn(1, (4, 6, 8))


def cifar_cnn() -> nn.Module:
    """For 16x16 photographs."""
    return SmallCnn(3, (6, 10, 12))


DIGITS_MLP = Task("digits", mlp, before=300, after=300)
DIGITS_CNN = Task("digits", digits_cnn, before=300, after=300)
CIFAR_CNN = Task("cifar10", cifar_cnn, before=400, after=400)
