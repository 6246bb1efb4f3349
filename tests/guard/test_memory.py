"""The memory an edit needs is known before it is made, and refused with figures."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import InsertConv, InsertResidual, Narrow, Widen, map_axes, transaction
from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import Edit
from neuroexapt.errors import GuardError, NeuroExaptError
from neuroexapt.guard.memory import activation_bytes, available, forecast, resident
from neuroexapt.testing import changes, snapshot
from tests import zoo
from tests.laws.world import NAMES, mapped, train

EDITS: list[Edit] = [Widen("*", by=0.5), Narrow("*", by=0.25)]


def in_use(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and gradients, each object once."""
    tensors = {id(t): t for t in named_tensors(model).values()}
    grads = [t.grad for t in tensors.values() if t.grad is not None]
    return sum(t.numel() * t.element_size() for t in (*tensors.values(), *grads))


def state_in_use(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of its state, step counts apart."""
    held = [value for state in optimizer.state.values() for value in state.values()]
    return sum(v.numel() * v.element_size() for v in held if isinstance(v, Tensor) and v.dim())


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: type(edit).__name__)
@pytest.mark.parametrize("name", NAMES)
def test_the_forecast_is_what_is_measured(name: str, edit: Edit) -> None:
    """To the byte, for weights, gradients and the state of Adam."""
    model, args = zoo.build(name), zoo.example(name)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, args, optimizer, 1)
    try:
        patch = edit.plan(mapped(name), named_tensors(model))
    except NeuroExaptError:
        return  # refused: there is nothing to forecast
    expected = forecast(patch, model, [optimizer])
    before = in_use(model), state_in_use(optimizer)
    with transaction(model, optimizer) as tx:
        tx.stage(patch)
    assert in_use(model) - before[0] == expected.weights
    assert state_in_use(optimizer) - before[1] == expected.optimizer
    assert expected.peak >= expected.transient > 0


@pytest.mark.parametrize("edit", [InsertConv("features.2"), InsertResidual("features")], ids=repr)
def test_the_forecast_of_an_insertion(edit: Edit) -> None:
    """New modules to the byte; their state once the optimizer has met them."""
    name = "small_cnn"
    model, args = zoo.build(name), zoo.example(name)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, args, optimizer, 1)
    optimizer.zero_grad()
    patch = edit.plan(mapped(name), named_tensors(model))
    expected = forecast(patch, model, [optimizer])
    before = in_use(model), state_in_use(optimizer)
    with transaction(model, optimizer) as tx:
        tx.stage(patch)
    assert in_use(model) - before[0] == expected.weights
    train(model, args, optimizer, 1)
    grown = state_in_use(optimizer) - before[1]
    assert grown == pytest.approx(expected.optimizer, rel=0.1)  # batch norm's buffers have none


def test_an_edit_that_does_not_fit_is_refused_untouched() -> None:
    """With what it needs and what there is; one byte more is enough."""
    name = "small_cnn"
    model, args = zoo.build(name), zoo.example(name)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, args, optimizer, 1)
    edit = Widen("features.0", by=8)
    needed = forecast(edit.plan(mapped(name), named_tensors(model)), model, [optimizer]).peak
    before = snapshot(model, optimizer)
    tx = transaction(model, optimizer, memory=needed - 1)
    with pytest.raises(GuardError, match=r"KiB needed on cpu; needed at most the .* allowed"):
        tx.apply(edit, args, axes=mapped(name))
    assert not changes(before, snapshot(model, optimizer))
    with pytest.raises(GuardError, match="activations of a step after Widen"):
        transaction(model, optimizer, memory=needed).apply(edit, args, axes=mapped(name))
    assert not changes(before, snapshot(model, optimizer))
    transaction(model, optimizer, memory=64 * needed).apply(edit, args, axes=mapped(name))


def test_a_model_larger_than_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit of the user's, what the device has free counts."""
    monkeypatch.setattr("neuroexapt.guard.memory.available", lambda device: 100)
    model = zoo.build("small_cnn")
    with pytest.raises(GuardError, match="100 bytes that are free"):
        transaction(model).apply(Widen("features.0", by=8), zoo.example("small_cnn"))


def test_activations_are_counted_by_their_bytes() -> None:
    """Two matrix products and a ReLU: what they put out, views and in-place writes apart."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Unflatten(1, (2, 4)))
    (trace, _) = map_axes(net, (torch.zeros(5, 4),)).traces
    assert activation_bytes(trace) == 5 * 8 * 4


def test_what_the_system_says_is_plausible() -> None:
    """Free memory is some of the machine's; a large tensor shows in this process."""
    free, before = available(torch.device("cpu")), resident()
    if free is None or before is None:
        pytest.skip("the system does not tell")
    assert 2**20 < free < 2**50
    block = torch.ones(2**24)
    after = resident()
    assert after is not None
    assert after - before > 0.9 * block.nbytes
    del block
    gc.collect()
