"""The arms of a comparison: each is a plan for the same loop."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from benchmarks.outcome.tasks import Data, Task
from benchmarks.outcome.train import Plan, Run, train
from torch import nn

from neuroexapt import Settings
from neuroexapt.plan import Candidate, Decision, Limits, State, Survey
from neuroexapt.train import changes
from neuroexapt.train.search import Search
from neuroexapt.train.survey import Surveyor

Pick = Callable[[Sequence[Candidate]], Candidate]


def arms(task: Task, data: Data, seed: int) -> Iterator[tuple[str, Run]]:
    """Every arm of one seed, one after the other."""
    settings = Settings(seed=seed)
    yield "fixed", train(task, data, seed, Plan(task.network))
    yield "tuned", train(task, data, seed, Plan(task.tuned))
    evolved = train(task, data, seed, Plan(task.network, settings))
    yield "evolved", evolved
    dice = random.Random(seed)
    with picking(dice.choice):
        yield "random", train(task, data, seed, Plan(task.network, settings))
    with picking(lambda candidates: min(candidates, key=lambda c: (c.flops, c.parameters))):
        yield "macs", train(task, data, seed, Plan(task.network, settings))
    yield "scratch", train(task, data, seed, Plan(lambda: renewed(evolved.model, seed)))
    share = evolved.parameters / sum(p.numel() for p in task.network().parameters())
    if share < 1 and _has_torch_pruning():
        prune = pruned(task, data, share)
        yield "pruned", train(task, data, seed, Plan(task.tuned, at=(0.4, prune)))


def renewed(model: nn.Module, seed: int) -> nn.Module:
    """The same architecture with new weights."""
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return fresh.train()


@contextmanager
def picking(pick: Pick) -> Iterator[None]:
    """An evolver whose choices are made without its signals, under the same limits and checks."""

    def choose(
        state: State,
        settings: Settings,
        limits: Limits,
        candidates: Sequence[Candidate],
        now: tuple[int, int],
        **_: Any,
    ) -> tuple[State, Decision]:
        fitting = [
            c
            for c in candidates
            if limits.excess(now[0] + c.parameters, now[1] + c.flops) <= limits.excess(*now)
        ]
        return state, Decision(pick(fitting) if fitting else None, "picked without signals")

    def survey(self: Search, surveyor: Surveyor) -> Survey:
        found = surveyor.sized(surveyor.fitted())
        return surveyor.grown(found) if not self.state.compute_bound else found

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(changes, "choose", choose))
        stack.enter_context(mock.patch.object(Search, "survey", survey))
        yield


def _has_torch_pruning() -> bool:
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        return False
    return True


def pruned(task: Task, data: Data, share: float) -> Callable[[nn.Module, Any], None]:
    """Prune to a share of the parameters with torch-pruning's Taylor score; moments are lost."""
    import torch_pruning as tp

    def change(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        inputs, targets = data.train
        example = inputs[:2]
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        before = sum(p.numel() for p in model.parameters())
        pruner = tp.pruner.MetaPruner(
            model, example, importance=tp.importance.TaylorImportance(), global_pruning=False,
            pruning_ratio=0.95, iterative_steps=60, ignored_layers=[head],
        )  # fmt: skip
        while sum(p.numel() for p in model.parameters()) > share * before:
            model.zero_grad()
            task.loss_fn(model, (inputs[: task.batch], targets[: task.batch])).backward()
            pruner.step()
        optimizer.state.clear()
        optimizer.param_groups[0]["params"] = list(model.parameters())
        optimizer.zero_grad()

    return change


def told(results: Mapping[str, Run]) -> str:
    """One line of scores."""
    return ", ".join(f"{name} {run.score:.2f}" for name, run in results.items())
