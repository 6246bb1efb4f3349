"""Signals on a trained network with two planted squeezes and a planted width full of copies."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from neuroexapt import map_axes
from neuroexapt.measure import Reading, measure

WIDTHS = (16, 3, 24, 5, 32, 16)
PLACES = ("0.out", "3.out", "6.out", "10.out", "13.out", "16.out")
SQUEEZED = {"3.out", "10.out"}
COPIED = "13.out"

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def digits() -> tuple[list[Batch], list[Batch]]:
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    train = list(zip(x[:1200].split(64), y[:1200].split(64), strict=True))
    return train, list(zip(x[1200:1760].split(56), y[1200:1760].split(56), strict=True))


def trained(train: list[Batch]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    inputs = 1
    for number, width in enumerate(WIDTHS):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if number == 2 else []
        inputs = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(3):
        for batch in train:
            optimizer.zero_grad()
            loss_fn(net, batch).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def readings() -> dict[str, dict[str, Reading]]:
    """Readings by signal and width; the wide layer's 32 units are 4 of them, 8 times each."""
    train, holdout = digits()
    net = trained(train)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.startswith(("13.", "14.")) and tensor.dim():
                tensor.copy_(tensor[:4].repeat(8, *[1] * (tensor.dim() - 1)))
    axes = map_axes(net, (holdout[0][0],))
    names = [
        "saturation", "participation_ratio", "total_correlation", "redundancy", "duplicate_units",
        "removal_loss", "taylor", "fisher", "information_drop",
    ]  # fmt: skip
    found: dict[str, dict[str, Reading]] = {}
    for reading in measure(net, loss_fn, holdout, axes, names):
        found.setdefault(reading.signal, {})[reading.at] = reading
    return found


@pytest.mark.parametrize(
    ("signal", "highest"),
    [
        ("saturation", True),
        ("participation_ratio", True),
        ("total_correlation", False),
        ("redundancy", False),
        ("removal_loss", True),
        ("taylor", True),
        ("fisher", True),
    ],
)
def test_both_squeezes_come_first(
    readings: dict[str, dict[str, Reading]], signal: str, highest: bool
) -> None:
    """Of six widths the two squeezed ones stand at the end that says so."""
    by_width = readings[signal]
    assert set(by_width) == set(PLACES)
    order = sorted(by_width, key=lambda name: by_width[name].value, reverse=highest)
    assert set(order[:2]) == SQUEEZED


def test_the_width_of_copies_is_recognised(readings: dict[str, dict[str, Reading]]) -> None:
    """28 of 32 units are copies; a direction in eight is in use; nothing else comes near."""
    assert readings["duplicate_units"][COPIED].value == 28
    assert readings["saturation"][COPIED].value < 0.14
    assert readings["redundancy"][COPIED].value > 0.98
    shared = {name: reading.value for name, reading in readings["total_correlation"].items()}
    assert shared.pop(COPIED) > 3 * max(shared.values())


def test_information_falls_into_the_first_squeeze(
    readings: dict[str, dict[str, Reading]],
) -> None:
    """Three channels cannot hold what sixteen did: the drop is the largest, beyond its error."""
    drops = readings["information_drop"]
    assert max(drops, key=lambda name: drops[name].value) in {"3.out", COPIED}
    assert drops["3.out"].value > (drops["3.out"].error or 0.0) > 0
