"""What each signal costs, in training steps of the network it is measured on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.overhead import TASKS, loss_fn

from neuroexapt import map_axes
from neuroexapt.measure import gather, signals

BATCHES = 8


@dataclass(frozen=True)
class Cost:
    """Training steps that one measurement takes; of signals, beside what they share."""

    name: str
    steps: float


def _seconds(run: Callable[[], Any], times: int = 3) -> float:
    """Processor time of one run, the median of several."""
    spent = []
    for _ in range(times):
        started = time.process_time()
        run()
        spent.append(time.process_time() - started)
    return statistics.median(spent)


def costs(task: str, rounds: int = 3) -> tuple[list[Cost], list[Cost]]:
    """What passes cost that signals share, and what each signal costs on top."""
    chosen = TASKS[task]
    torch.manual_seed(0)
    model = chosen.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = (chosen.batches() * 2)[:BATCHES]
    axes = map_axes(model, (batches[0][0][:2],))

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model, batches[0]).backward()
        optimizer.step()

    one = _seconds(lambda: [step() for _ in range(5)], rounds) / 5
    shared = [
        Cost(name, _seconds(lambda n=needs: gather(model, loss_fn, batches, axes, needs=n)) / one)  # type: ignore[misc]
        for name, needs in (
            ("rows and targets", ["rows", "targets"]),
            ("blocks", ["blocks"]),
            ("gradients", ["gradients"]),
            ("gates", ["gates"]),
        )
    ]
    found = []
    for signal in signals().values():
        spent = []
        for _ in range(rounds):
            # Anew each time: signals of the same rows remember what they share.
            seen = gather(model, loss_fn, batches, axes, needs=signal.needs)
            spent.append(_seconds(lambda s=signal, e=seen: list(s.read(e)), 1))  # type: ignore[misc]
        found.append(Cost(signal.name, statistics.median(spent) / one))
    return shared, found
