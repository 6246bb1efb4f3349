"""How the axis map scales: chains of conv-BN-ReLU, and a GPT of 175 billion parameters on meta.

    python benchmarks/scale.py

Prints processor seconds on one thread. Time per operator should not grow with the model; a model on
the meta device must need no memory for its weights.
"""

from __future__ import annotations

import gc
import resource
import sys
import time

import torch
from torch import Tensor, nn

from neuroexapt import AxisMap, map_axes


class Block(nn.Module):
    """A pre-norm GPT block with fused query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.ln_1(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, -1))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder as large as GPT-3 (Brown et al. 2020, table 2.1) by default."""

    def __init__(self, width: int = 12288, heads: int = 96, layers: int = 96) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50257, width), nn.Embedding(2048, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 50257, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def chain(blocks: int) -> nn.Sequential:
    """``blocks`` times convolution, batch norm, ReLU."""
    layers: list[nn.Module] = []
    for number in range(blocks):
        layers += [nn.Conv2d(8 if number else 3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 2, 1))


def timed(model: nn.Module, *args: Tensor) -> tuple[AxisMap, float]:
    """The map and the processor seconds it took: the least of three."""
    seconds = []
    for _ in range(3):
        gc.collect()
        start = time.process_time()
        axes = map_axes(model, args)
        seconds.append(time.process_time() - start)
    return axes, min(seconds)


def peak() -> float:
    """Largest resident memory of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    timed(chain(3), torch.randn(2, 3, 8, 8))  # imports and caches
    per_operator = []
    for blocks in (10, 100, 1000):
        axes, seconds = timed(chain(blocks), torch.randn(2, 3, 8, 8))
        operators = sum(len(trace.calls) for trace in axes.traces)
        per_operator.append(seconds / operators)
        print(
            f"{blocks:>5} conv-BN-ReLU  {seconds:6.2f} s  {operators:>6} operators  "
            f"{1e3 * per_operator[-1]:.3f} ms each  {len(axes.widths)} widths"
        )
    print(f"time per operator, 1,000 against 100 blocks: {per_operator[2] / per_operator[1]:.2f}x")
    before = peak()
    with torch.device("meta"):
        model = GPT()
        ids = torch.zeros(1, 8, dtype=torch.long)
    parameters = sum(p.numel() for p in model.parameters())
    start = time.process_time()
    axes = map_axes(model, (ids,))
    print(
        f"GPT of {parameters / 1e9:.0f} B parameters on meta: {time.process_time() - start:.1f} s, "
        f"{len(axes.widths)} widths, {peak() - before:.2f} GB more resident memory"
    )


if __name__ == "__main__":
    main()
