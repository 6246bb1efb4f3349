"""What can change in a model, what changes with it, and what cannot change and why.

Run: python examples/inspect_model.py
The same as a table: neuroexapt inspect examples.inspect_model:network --input 1,3,32,32
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuroexapt import map_axes


class Block(nn.Module):
    """A residual block: what it adds to must keep the width of what it reads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


class Network(nn.Module):
    """A stem, a block, and a head whose input size somebody wrote as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = Block(16)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.hidden = nn.Linear(8 * 16, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.block(self.stem(x)))
        x = nn.functional.adaptive_avg_pool2d(x, 4)
        return self.head(self.hidden(x.view(-1, 128)).relu())


def network() -> nn.Module:
    """The model, as ``neuroexapt inspect`` wants it: built without arguments."""
    return Network()


def main() -> None:
    axes = map_axes(network(), (torch.zeros(2, 3, 32, 32),))

    print("widths")
    for width in axes.widths.values():
        print(f"  {width.name}: {width.size} units")
        for place in width.appearances:
            print(f"    {place.tensor} dimension {place.dim}: {place.role}")

    print("pinned")
    for pin in axes.pinned.values():
        if not pin.reason.startswith("a kernel size"):
            print(f"  {pin.name} ({pin.size}): {pin.reason}")

    print("operators without a rule:", ", ".join(axes.unknown) or "none")


if __name__ == "__main__":
    main()
