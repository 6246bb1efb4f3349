"""The law of the room: measuring leaves the model and the generators as they were, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuroexapt import map_axes
from neuroexapt.measure import (
    ablation_losses,
    activation_memory,
    activations,
    count_flops,
    count_parameters,
    evaluate,
    gate_slopes,
    gather,
    gradients,
    latency,
    layers,
    measure,
    reader_inputs,
    signals,
    tensor_bytes,
    undisturbed,
    unit_scores,
)


class Restless(nn.Module):
    """A model that changes as much as a forward may: statistics, buffers, random numbers."""

    cache: Tensor | None
    calls: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen_norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.outer = nn.Linear(6, 2)
        self.register_buffer("cache", None)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(3))
        self.register_buffer("spread", torch.ones(1).expand(5))
        self.fails_at: int | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.cache = inputs.detach().clone()
        self.last = self.last + 1
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(2))
        hidden = self.frozen_norm(self.norm(self.inner(inputs)))
        if self.fails_at is not None and int(self.calls) >= self.fails_at:
            raise ValueError("half-way")
        noise = random.random() + float(np.random.rand())
        return noise + torch.as_tensor(self.outer(self.drop(hidden)))


def restless() -> Restless:
    torch.manual_seed(0)
    model = Restless()
    model.frozen_norm.eval()
    model(torch.randn(8, 4)).sum().backward()
    del model.late
    model.cache = None
    model.calls.zero_()
    return model


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(s)) for s in range(3)]


def shuffled() -> torch.utils.data.DataLoader[Tensor]:
    rows: Any = torch.cat(BATCHES)
    return torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)


AXES = map_axes(restless(), (BATCHES[0],))
MEASUREMENTS: dict[str, Callable[[nn.Module], object]] = {
    "gradients": lambda model: list(gradients(model, loss_fn, BATCHES)),
    "gradients, shuffled": lambda model: list(gradients(model, loss_fn, shuffled())),
    "gradients, first item only": lambda model: next(gradients(model, loss_fn, BATCHES)),
    "activations": lambda model: activations(
        model, loss_fn, BATCHES, ["inner", "norm"], channel_dim={}, limit=5
    ),
    "activations, shuffled": lambda model: activations(
        model, loss_fn, shuffled(), ["inner"], channel_dim={}
    ),
    "gate_slopes": lambda model: gate_slopes(model, loss_fn, BATCHES, AXES),
    "reader_inputs": lambda model: reader_inputs(model, loss_fn, BATCHES, AXES, products=True),
    "unit_scores": lambda model: unit_scores(model, loss_fn, BATCHES, AXES, "fisher"),
    "evaluate": lambda model: evaluate(model, loss_fn, BATCHES),
    "evaluate, shuffled": lambda model: evaluate(model, loss_fn, shuffled()),
    "gather": lambda model: gather(model, loss_fn, BATCHES, AXES, needs=["rows", "blocks"]),
    "signals": lambda model: measure(
        model, loss_fn, BATCHES, AXES, [s for s in signals() if "info" not in s]
    ),
    "information": lambda model: measure(
        model, loss_fn, BATCHES * 3, AXES, ["usable_information"], targets=lambda x: x[:, 0]
    ),
    "layers left out": lambda model: ablation_losses(model, loss_fn, BATCHES, AXES),
    "latency": lambda model: latency(model, (BATCHES[0],), calls=3),
    "memory of activations": lambda model: activation_memory(model, loss_fn, BATCHES[0]),
    "count_flops": lambda model: count_flops(model, BATCHES[0]),
    "count_parameters": count_parameters,
    "tensor_bytes": tensor_bytes,
    "layers": layers,
}


def bits(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.contiguous().numpy().tobytes())


def state_of(model: nn.Module) -> dict[str, object]:
    """All that must not change, comparable with ==."""
    modules = dict(model.named_modules())
    held = {
        f"{path}.{name}": item for path, m in modules.items() for name, item in m._buffers.items()
    }
    return {
        "parameters": {name: (id(p), bits(p.detach())) for name, p in model.named_parameters()},
        "grads": {name: (id(p.grad), bits(p.grad)) for name, p in model.named_parameters()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "buffers": {name: (id(item), bits(item)) for name, item in held.items()},
        "flags": {path: module.training for path, module in modules.items()},
        "hooks": {
            path: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for path, m in modules.items()
        },
        "python": random.getstate(),
        "numpy": str(np.random.get_state(legacy=False)),
        "torch": bits(torch.get_rng_state()),
        "modes": (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()),
    }


def test_the_model_of_these_tests_would_show_a_disturbance() -> None:
    """A plain forward changes buffers and all three generators, so the law can fail."""
    model = restless()
    before = state_of(model)
    np.random.seed(1)
    loss_fn(model, BATCHES[0])
    after = state_of(model)
    changed = {key for key in before if before[key] != after[key]}
    assert changed >= {"buffers", "python", "numpy", "torch"}


@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS.keys())
@pytest.mark.parametrize("training", [True, False])
def test_a_measurement_changes_nothing(
    measure: Callable[[nn.Module], object], training: bool
) -> None:
    """Parameters, .grad, buffers, generators, flags and hooks are bit-equal afterwards."""
    model = restless()
    model.norm.train(training)
    torch.backends.mha.set_fastpath_enabled(True)
    before = state_of(model)
    measure(model)
    assert state_of(model) == before


@pytest.mark.parametrize(
    "name", [name for name in MEASUREMENTS if name[0] in "gae" and name != "all signals"]
)
@pytest.mark.parametrize("call", [1, 2])
def test_a_measurement_that_fails_half_way_changes_nothing(name: str, call: int) -> None:
    """An exception out of the model, in the first or a later batch, leaves everything as it was."""
    model = restless()
    # Buffers are restored between the items of `gradients`: only its first call can be counted.
    model.fails_at = 1 if name.startswith(("gradients", "gate_slopes")) else call
    before = state_of(model)
    with pytest.raises(ValueError, match="half-way"):
        MEASUREMENTS[name](model)
    assert state_of(model) == before


def test_count_flops_that_fails_half_way_changes_nothing() -> None:
    """The same law for a failing forward under the counter."""
    model = restless()
    model.fails_at = 1
    before = state_of(model)
    with pytest.raises(ValueError, match="half-way"):
        count_flops(model, BATCHES[0])
    assert state_of(model) == before


def test_an_unknown_module_leaves_no_hook_behind() -> None:
    """When the second path does not exist, the first has no hook."""
    model = restless()
    before = state_of(model)
    with pytest.raises(Exception, match="inxer"):
        activations(model, loss_fn, BATCHES, ["inner", "inxer"], channel_dim={})
    assert state_of(model) == before


def test_nothing_is_changed_between_the_items_of_gradients() -> None:
    """The caller may train on between two items: the model is whole and its own."""
    model = restless()
    before = state_of(model)
    for _ in gradients(model, loss_fn, BATCHES):
        assert state_of(model) == before


def test_a_live_graph_of_the_user_survives_a_measurement() -> None:
    """Measuring between forward and backward does not invalidate saved buffers."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    loss = model(BATCHES[0]).square().mean()
    evaluate(model, loss_fn, BATCHES)
    list(gradients(model, loss_fn, BATCHES))
    loss.backward()
    assert model[0].weight.grad is not None


def test_training_with_measurements_equals_training_without() -> None:
    """Ten steps with dropout and batch statistics end in the same bits, measured or not."""
    ends = []
    for measured in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
        optimizer = torch.optim.Adam(model.parameters())
        for step in range(10):
            optimizer.zero_grad()
            loss_fn(model, BATCHES[step % 3] + torch.randn(8, 4)).backward()
            if measured:
                evaluate(model, loss_fn, BATCHES)
                list(gradients(model, loss_fn, BATCHES))
                activations(model, loss_fn, BATCHES, ["1"], channel_dim={})
                count_flops(model, BATCHES[0])
            optimizer.step()
        ends.append({name: bits(item) for name, item in model.state_dict().items()})
    assert ends[0] == ends[1]


def test_a_buffer_shared_by_two_modules_stays_shared() -> None:
    """Restoring keeps the tensor object, so sharing survives."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[1].running_mean = model[0].running_mean
    before = state_of(model)
    with undisturbed(model):
        loss_fn(model, BATCHES[0])
    assert state_of(model) == before
    assert model[1].running_mean is model[0].running_mean


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_the_generator_of_the_accelerator_is_restored() -> None:
    """Dropout masks drawn on the accelerator do not advance the user's generator."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)).to(device)
    generator = torch.get_device_module(device)
    before = generator.get_rng_state()
    list(gradients(model, loss_fn, [batch.to(device) for batch in BATCHES]))
    evaluate(model, loss_fn, [batch.to(device) for batch in BATCHES])
    assert torch.equal(generator.get_rng_state(), before)
