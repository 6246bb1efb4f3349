"""Train the arms of a setting, all from the same moment and on the same batches."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.operations.data import Batch, Data
from benchmarks.operations.task import BATCH, Moment, Setting, loss_fn
from torch import nn

MEASURED = 4  # batches an arm may measure on


@dataclass(frozen=True)
class Outcome:
    """One arm of one seed.

    Attributes:
        at_once: test loss right after the change.
        loss: test loss after the further training.
        accuracy: test accuracy then, in percent.
        parameters: of the changed model.
        seconds: the change took.
    """

    section: str
    setting: str
    arm: str
    seed: int
    at_once: float
    loss: float
    accuracy: float
    parameters: int
    seconds: float


def outcomes(name: str, setting: Setting, seed: int, folder: Path) -> Iterator[Outcome]:
    """Every arm of one setting on one seed."""
    task = setting.task
    data = task.load(seed, folder)
    batches = _batches(data, task.before + task.after + MEASURED, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate)
        _train(model, optimizer, batches[: task.before], anneal=False)
        for arm, change in setting.arms.items():
            torch.manual_seed(seed)
            twin, carried = copy.deepcopy((model, optimizer))
            moment = Moment(twin, carried, tuple(batches[-MEASURED:]), seed)
            started = time.perf_counter()
            change(moment)
            seconds = time.perf_counter() - started
            at_once, _ = _test(twin, data)
            _train(twin, carried, batches[task.before : -MEASURED], anneal=True)
            loss, accuracy = _test(twin, data)
            size = sum(p.numel() for p in twin.parameters())
            yield Outcome(
                name, setting.name, arm, seed, at_once, loss, accuracy, size, round(seconds, 3)
            )


def _batches(data: Data, count: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    images, labels = data.train
    found: list[Batch] = []
    while len(found) < count:
        order = torch.randperm(len(labels), generator=generator)
        found += [(images[at], labels[at]) for at in order.split(BATCH) if len(at) == BATCH]
    return found[:count]


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], *, anneal: bool
) -> None:
    model.train()
    rates = [group["lr"] for group in optimizer.param_groups]
    for step, batch in enumerate(batches):
        share = 1 - step / len(batches) if anneal else 1.0
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _test(model: nn.Module, data: Data) -> tuple[float, float]:
    model.eval()
    images, labels = data.test
    logits = model(images)
    loss = float(nn.functional.cross_entropy(logits, labels))
    return loss, 100 * float((logits.argmax(1) == labels).float().mean())
