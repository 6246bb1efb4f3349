"""What an evolver costs on steps that do not sample: ``python benchmarks/overhead.py``.

Two copies of one small CNN train in turns, step by step, in one process: one by itself, one with
`evolver.step()` behind each optimizer step. The figure is the ratio of their times, and the time
of the call itself beside that of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuroexapt import Evolver

CALLS = 100_000


def network() -> nn.Module:
    """A small CNN; the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Arm:
    """A model in training, and what is called behind each step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    behind: Callable[[], None] = lambda: None

    def seconds(self, batch: tuple[Tensor, Tensor]) -> float:
        """The time of one training step."""
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss_fn(self.model, batch).backward()
        self.optimizer.step()
        self.behind()
        return time.perf_counter() - started


def arms(batches: list[tuple[Tensor, Tensor]]) -> tuple[Arm, Arm, Evolver]:
    """One by itself, one with an evolver."""
    plain, evolving = network(), network()
    made = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (plain, evolving)]
    evolver = Evolver(evolving, made[1], loss_fn=loss_fn, holdout=batches)
    return Arm(plain, made[0]), Arm(evolving, made[1], evolver.step), evolver


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.manual_seed(0)
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(4)]
    plain, evolving, evolver = arms(batches)
    ratios, alone = [], []
    for number in range(options.steps):
        batch = batches[number % len(batches)]
        # In turns, the first one changing: what slows the machine down meets both.
        if number % 2:
            without, beside = plain.seconds(batch), evolving.seconds(batch)
        else:
            beside, without = evolving.seconds(batch), plain.seconds(batch)
        ratios.append(beside / without)
        alone.append(without)
    started = time.perf_counter()
    for _ in range(CALLS):
        evolver.step()
    call = (time.perf_counter() - started) / CALLS
    step = statistics.median(alone)
    print(f"a step of training        {step * 1e3:8.3f} ms (median of {options.steps})")
    print(f"with evolver.step()       {statistics.median(ratios):8.4f} of it (median of pairs)")
    print(f"evolver.step() by itself  {call * 1e6:8.3f} us, {100 * call / step:.4f} % of a step")


if __name__ == "__main__":
    main()
