"""One training loop for all arms: the same data, schedule and computing, counted in FLOPs."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from benchmarks.outcome.tasks import Batch, Data, Task
from torch import nn

from neuroexapt import Budget, Evolver, Settings
from neuroexapt.capture import capture
from neuroexapt.guard import reestimate
from neuroexapt.guard.memory import activation_bytes
from neuroexapt.measure import count_flops, count_parameters, evaluate

INTERVALS = 16
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Run:
    """What came out of one arm.

    Attributes:
        score: on the test data, read once; see ``Task.better``.
        holdout: loss on the held-out data, after everything.
        seconds: processor time of the arm.
        overhead: share of the computing that went into signals, trials and roll-backs.
        memory: peak, final and time-averaged megabytes: weights, gradients, optimizer state and
            the activations of a step.
        model: the network.
        changes: what was kept, in order.
    """

    score: float
    holdout: float
    parameters: int
    flops: int
    steps: int
    seconds: float
    overhead: float
    memory: tuple[float, float, float]
    model: nn.Module = field(repr=False)
    changes: tuple[str, ...] = ()


Change = Callable[[nn.Module, torch.optim.Optimizer], None]


@dataclass(frozen=True)
class Plan:
    """How an arm differs from plain training of the starting network.

    Attributes:
        network: makes the model.
        evolve: settings of an evolver, or None for none.
        at: a change by hand at a share of the computing, or None.
    """

    network: Callable[[], nn.Module]
    evolve: Settings | None = None
    at: tuple[float, Change] | None = None


def train(task: Task, data: Data, seed: int, plan: Plan) -> Run:
    """Train one arm until its computing is used up."""
    torch.manual_seed(seed)
    started = time.process_time()
    model = plan.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate)
    holdout = split(data.holdout, task.batch)
    evolver = None
    if plan.evolve is not None:
        budget = Budget(params=task.params, compute=task.compute)
        evolver = Evolver(
            model, optimizer, loss_fn=task.loss_fn, holdout=holdout, budget=budget,
            settings=plan.evolve,
        )  # fmt: skip
    meter = _Meter(task, model, optimizer, data.train[0][: task.batch])
    change, interval = plan.at, 1
    for batch in batches(task, data, seed):
        share = meter.spent / task.compute if evolver is None else evolver.progress or 0.0
        if share >= 1:
            break
        if change is not None and share >= change[0]:
            change[1](model, optimizer)
            change = None
            meter.look()
        for group in optimizer.param_groups:
            group["lr"] = task.rate * rate_at(share)
        model.train()
        optimizer.zero_grad()
        task.loss_fn(model, batch).backward()
        optimizer.step()
        meter.step()
        if evolver is not None:
            evolver.step(batch)
            if (evolver.progress or 0.0) * INTERVALS >= interval:
                evolver.end_epoch()
                interval = int((evolver.progress or 0.0) * INTERVALS) + 1
                meter.look()
    if evolver is not None:
        evolver.close()
    seconds = time.process_time() - started
    reestimate(model, task.loss_fn, list(itertools.islice(batches(task, data, seed), 16)))
    overhead = evolver.meter.own / evolver.meter.spent if evolver is not None else 0.0
    return Run(
        score(task, model, data.test),
        evaluate(model, task.loss_fn, holdout).loss,
        count_parameters(model),
        count_flops(model, (data.test[0][:1],)),
        meter.steps,
        seconds,
        overhead,
        meter.memory,
        model,
        kept(evolver) if evolver is not None else (),
    )


class _Meter:
    """FLOPs spent, and memory over time, of one arm."""

    def __init__(
        self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor
    ) -> None:
        self.task, self.model, self.optimizer, self.inputs = task, model, optimizer, inputs
        self.steps = 0
        self.spent = 0.0
        self._bytes: list[tuple[float, float]] = []
        self.look()

    def look(self) -> None:
        """Measure the model as it is now."""
        self._flops = 3.0 * count_flops(self.model, (self.inputs[:1],)) * len(self.inputs)
        trace = capture(self.model, (self.inputs,), {})
        # Weights, gradients and two moments: what AdamW holds from its first step on.
        self._now = 4.0 * 4 * count_parameters(self.model) + activation_bytes(trace)

    def step(self) -> None:
        """One training step."""
        self.steps += 1
        self.spent += self._flops
        self._bytes.append((self._flops, self._now))

    @property
    def memory(self) -> tuple[float, float, float]:
        """Peak, final, and average over the computing, in megabytes."""
        total = sum(weight for weight, _ in self._bytes)
        mean = sum(weight * size for weight, size in self._bytes) / total
        peak = max(size for _, size in self._bytes)
        return peak / _MEGABYTE, self._now / _MEGABYTE, mean / _MEGABYTE


def kept(evolver: Evolver) -> tuple[str, ...]:
    """The changes that stayed, with the share of steps at which they were made."""
    events = evolver.journal.events
    names = {e["id"]: f"{e['kind']} {e['at']}" for e in events if e["event"] == "proposal"}
    more = {e["id"]: len(e.get("also", ())) for e in events if e["event"] == "proposal"}
    verdicts = [e for e in events if e["event"] == "verdict" and e["verdict"] == "kept"]
    return tuple(
        f"epoch {e['epoch']}: {names[e['id']]}" + (f" +{more[e['id']]}" if more[e["id"]] else "")
        for e in verdicts
    )


def split(data: Batch, size: int) -> list[Batch]:
    """In batches."""
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def batches(task: Task, data: Data, seed: int) -> Iterator[Batch]:
    """Training batches without end."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = data.train
    while True:
        for at in torch.randperm(len(targets), generator=generator).split(task.batch):
            if len(at) == task.batch:
                x = inputs[at]
                yield (task.augment(x, generator) if task.augment else x), targets[at]


def rate_at(share: float) -> float:
    """One cycle: up over the first 15 % of the computing, down to nothing at its end."""
    if share < 0.15:
        return 0.1 + 0.9 * share / 0.15
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - 0.15) / 0.85)))


@torch.no_grad()
def score(task: Task, model: nn.Module, data: Batch) -> float:
    """Accuracy in percent, or the loss, on data that nothing was decided on."""
    model.eval()
    if task.better == "loss":
        return evaluate(model, task.loss_fn, split(data, task.batch)).loss
    right = [model(x).argmax(1).eq(y).sum().item() for x, y in split(data, 500)]
    return 100 * sum(right) / len(data[1])
