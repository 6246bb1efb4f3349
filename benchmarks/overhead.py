"""What watching costs beside training: ``python benchmarks/overhead.py``.

Copies of one network train in turns, step by step, in one process: one by itself, one with
`evolver.step()` behind each optimizer step, one with `Watch.step()`, which looks at one step in
50. The figures are medians of paired ratios, the time of the call itself, and the memory that a
watch holds beside that of the training (weights, gradients, optimizer, activations of a step), by
tensors and by the peak of the process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuroexapt import Evolver, map_axes
from neuroexapt.measure import Watch, activation_memory, read_signals, tensor_bytes
from neuroexapt.measure.watch import EVERY, STEPS

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


def reference() -> nn.Module:
    """Three convolutions and two linear layers, 2,193,674 parameters."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        parts += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        parts += [nn.MaxPool2d(2)] if outputs < 128 else []
    head = [nn.Flatten(), nn.Linear(8192, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10)]
    return nn.Sequential(*parts, *head)


@dataclass(frozen=True)
class Task:
    """A network and a batch size."""

    make: Callable[[], nn.Module]
    batch: int

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Four random ones."""
        g = torch.Generator().manual_seed(0)
        images = [torch.randn(self.batch, 3, 32, 32, generator=g) for _ in range(4)]
        return [(x, torch.randint(10, (self.batch,), generator=g)) for x in images]


TASKS = {"small": Task(network, 16), "reference": Task(reference, 128)}


def in_turns(first: Arm, second: Arm, batches: list[Any], steps: int) -> tuple[Any, Any]:
    """Seconds of each step of both; the first one changes, so what slows down meets both."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(steps):
        batch = batches[number % len(batches)]
        for arm in (0, 1) if number % 2 else (1, 0):
            times[arm].append((first, second)[arm].seconds(batch))
    return times


def watched(task: Task, *, every: int) -> tuple[Arm, Watch]:
    """An arm with a watch behind its steps."""
    model = task.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = Watch(model, map_axes(model, (task.batches()[0][0][:2],)), every=every)
    return Arm(model, optimizer, watch.step), watch


def watching(name: str, steps: int) -> None:
    """Print what a watch costs on one network."""
    task = TASKS[name]
    batches, between = task.batches(), 5
    model = task.make()
    plain = Arm(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    arm, watch = watched(task, every=between)
    without, beside = in_turns(plain, arm, batches, steps)
    # Hooks go on at the end of the step before and come off at the end of the watched one.
    groups = [
        (sum(beside[at : at + between]) / sum(without[at : at + between]) - 1) * between
        for at in range(between, steps - between, between)
    ]
    a_look = statistics.median(groups)
    print(f"\n{name}, batch {task.batch}, a step {statistics.median(without) * 1e3:.1f} ms")
    print(
        f"a watched step costs more by {a_look:7.3f} of a step; one in {EVERY}: "
        f"{100 * a_look / EVERY:.2f} %"
    )
    started = time.process_time()
    readings = read_signals(watch.evidence())
    spent = (time.process_time() - started) / statistics.median(without)
    print(f"{len(readings)} readings from it cost     {spent:7.1f} steps")
    for _ in range(STEPS * between):
        arm.seconds(batches[0])
    training = tensor_bytes(arm.model, arm.optimizer)
    training += activation_memory(arm.model, loss_fn, batches[0])
    print(
        f"held by the watch           {watch.held_bytes() / 2**20:7.2f} MiB, "
        f"{100 * watch.held_bytes() / training:.2f} % of the training's {training / 2**20:.1f}"
    )
    kinds = ("plain", "watched")
    rounds = [{kind: _peak(name, kind) for kind in kinds} for _ in range(3)]
    peaks = {kind: statistics.median(one[kind] for one in rounds) for kind in kinds}
    more = peaks["watched"] - peaks["plain"]
    print(
        f"peak of the process         {more / 2**20:7.2f} MiB more, "
        f"{100 * more / peaks['plain']:.2f} % of {peaks['plain'] / 2**20:.0f}"
    )


def _peak(name: str, kind: str) -> int:
    """Bytes a process of its own takes at most for 110 steps."""
    command = [sys.executable, __file__, "--peak", name, kind]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak(name: str, kind: str) -> None:
    """Train 110 steps and print the most memory this process had, in bytes."""
    task = TASKS[name]
    arm, _ = watched(task, every=EVERY if kind == "watched" else 10**9)
    batches = task.batches()
    for number in range(110):
        arm.seconds(batches[number % len(batches)])
    # Not `ru_maxrss`: that of a new process begins with what its parent had.
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)


def evolving(steps: int) -> None:
    """Print what `evolver.step()` costs."""
    batches = TASKS["small"].batches()
    plain, other, evolver = arms(batches)
    without, beside = in_turns(plain, other, batches, steps)
    ratios = [b / a for a, b in zip(without, beside, strict=True)]
    started = time.perf_counter()
    for _ in range(CALLS):
        evolver.step()
    call = (time.perf_counter() - started) / CALLS
    step = statistics.median(without)
    print(f"a step of training        {step * 1e3:8.3f} ms (median of {steps})")
    print(f"with evolver.step()       {statistics.median(ratios):8.4f} of it (median of pairs)")
    print(f"evolver.step() by itself  {call * 1e6:8.3f} us, {100 * call / step:.4f} % of a step")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(*options.peak)
        return
    evolving(options.steps)
    watching("small", options.steps)
    watching("reference", max(60, options.steps // 5))


if __name__ == "__main__":
    main()
