"""What is loaded is what was saved: every edit, every tensor, every state, to the bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.operations import OPERATIONS
from tests.laws.test_table import row
from tests.laws.world import NAMES, mapped
from torch import nn

from neuroexapt import (
    NeuroExaptError,
    load,
    save,
    transaction,
)
from neuroexapt.capture.run import named_tensors
from neuroexapt.guard.lineage import lineage
from neuroexapt.testing.snapshot import bits
from neuroexapt.testing.world import World, world

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
SLICE = ("small_cnn", "gpt_nano", "lstm", "moe")
MODELS = NAMES if os.environ.get("NEUROEXAPT_ALL_CHECKPOINTS") else SLICE


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a loaded model must have of the one that was saved."""
    state: dict[str, Any] = {name: bits(t) for name, t in named_tensors(model).items()}
    for path, module in model.named_modules():
        state[f"module {path}"] = type(module), module.training, sorted(module._modules)
        state[f"numbers {path}"] = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) or name == "config"
        }
    for name, parameter in model.named_parameters():
        state[f"trained {name}"] = parameter.requires_grad
    names = {id(t): n for n, t in reversed(list(named_tensors(model).items()))}
    state["tied"] = {n: names[id(t)] for n, t in named_tensors(model).items()}
    return {**state, "lineage": lineage(model)}


def first_edit(single: World, operation: str) -> bool:
    """Make the first edit of an operation that this model takes."""
    for edit in OPERATIONS[operation](single.axes, single.model):
        try:
            with transaction(single.model, single.optimizer) as tx:
                tx.apply(edit, single.args, single.kwargs, axes=single.axes)
        except NeuroExaptError:
            continue
        return True
    return False


def loaded(single: World, folder: Path) -> World:
    """Save a world, and load it into what its factory builds."""
    held = single.optimizer

    def factory() -> dict[str, Any]:
        model = single.row.build(single.dtype)
        trained = list(model.parameters())[1:]
        groups = [{**g, "params": [trained.pop()]} for g in held.param_groups if trained]
        return {"model": model, "optimizer": torch.optim.AdamW(groups, lr=0.5)}

    save(folder, single.model, optimizer=held)
    run = load(factory, folder)
    return World(
        single.row,
        single.axes,
        single.dtype,
        run["model"],
        run["optimizer"],
        single.args,
        single.kwargs,
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_operation_is_loaded_into_a_model_as_its_factory_builds_it(
    name: str, tmp_path: Path
) -> None:
    """Bits, structure, numbers and flags are those saved, and training goes on bit for bit."""
    done = 0
    for operation in OPERATIONS:
        single = world(row(name), mapped(name))
        if not first_edit(single, operation):
            continue
        done += 1
        again = loaded(single, tmp_path)
        assert state_of(again.model) == state_of(single.model), operation
        assert again.train(2) == single.train(2), operation
        ours, theirs = state_of(again.model), state_of(single.model)
        assert ours == theirs, (operation, [k for k in ours if ours[k] != theirs.get(k)][:5])
    assert done >= len(OPERATIONS) // 3
