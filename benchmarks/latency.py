"""What one operation costs beside one training step of the same model, in the same process.

    python benchmarks/latency.py                    # both models, about ten minutes on two cores
    python benchmarks/latency.py gpt --rounds 3

A training step is forward, backward and optimizer at batch 8. An operation is plan, write and
verify with the map given; then it is taken back, so that all start from one model. The map is
timed apart. Steps and operations take turns; the median of each is printed, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuroexapt import InsertConv, InsertResidual, Narrow, PruneWeights, Widen, map_axes
from neuroexapt.edit import Edit
from neuroexapt.guard import transaction

BATCH = 8


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand (He et al. 2016)."""

    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        outputs = 4 * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """25.6 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)
        )
        inputs, stages = 64, []
        for number, (planes, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            for block in range(blocks):
                stages.append(Bottleneck(inputs, planes, 2 if number and not block else 1))
                inputs = 4 * planes
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    """A pre-norm block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.ln_2(x))))


class GPT(nn.Module):
    """A decoder of 100 million parameters, its head tied to the embedding."""

    def __init__(self, width: int = 768, layers: int = 12, vocabulary: int = 20_000) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(Block(width, 12) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224)


def _texts(batch: int) -> Tensor:
    return torch.randint(0, 20_000, (batch, 64))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], list[Edit]]] = {
    "resnet50": (
        ResNet50,
        _images,
        [
            Widen("blocks.7.conv1", by=0.25),
            Narrow("blocks.7.conv1", by=0.25),
            InsertConv("blocks.7"),
            InsertResidual("blocks.7"),
            PruneWeights("blocks.7.conv2.weight", share=0.5),
        ],
    ),
    "gpt": (
        GPT,
        _texts,
        [
            Widen("blocks.5.fc", by=0.25),
            Narrow("blocks.5.fc", by=0.25),
            InsertResidual("blocks.5"),
            PruneWeights("blocks.5.fc.weight", share=0.5),
        ],
    ),
}


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(name: str, rounds: int, example: int) -> None:
    """Print the table of one model."""
    make, batch, edits = MODELS[name]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, few = batch(BATCH), batch(example)

    def step() -> None:
        optimizer.zero_grad()
        out = model(x)
        out.square().mean().backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    axes = map_axes(model, (few,))

    def operation(edit: Edit) -> float:
        tx = transaction(model, optimizer)
        spent = seconds(lambda: tx.apply(edit, (few,), axes=axes))
        tx.roll_back()
        return spent

    steps, maps = [], []
    spent: dict[Edit, list[float]] = {edit: [] for edit in edits}
    for _ in range(rounds):
        steps.append(seconds(step))
        optimizer.zero_grad()
        maps.append(seconds(lambda: map_axes(model, (few,))))
        for edit in edits:
            spent[edit].append(operation(edit))
    base = statistics.median(steps)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"\n{name}, {count:.1f} M parameters; example of {example}; {rounds} rounds")
    print(f"{'one training step at batch 8':44} {base:7.2f} s")
    print(f"{'the map':44} {statistics.median(maps):7.2f} s {statistics.median(maps) / base:6.2f}")
    for edit, times in spent.items():
        text = f"{type(edit).__name__}({edit.place})"
        middle = statistics.median(times)
        print(f"{text:44} {middle:7.2f} s {middle / base:6.2f}", flush=True)


def main() -> None:
    """Both models, with an example of two samples and with one of eight."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, nargs="*", default=[2, BATCH])
    chosen = parser.parse_args()
    for name in chosen.models or MODELS:
        for example in chosen.examples:
            measure(name, chosen.rounds, example)


if __name__ == "__main__":
    main()
