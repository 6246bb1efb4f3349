"""What a run writes down, and that it leaves no trace elsewhere."""

from __future__ import annotations

import copy
import functools
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from neuroexapt.capture import RunFailure, Trace, capture, refs_in
from neuroexapt.capture.run import Attribute, capture_both
from neuroexapt.errors import CaptureError


class Small(nn.Module):
    """A child, a function, an in-place operator and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.head = nn.Linear(6, 2)
        self.parts = 2

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        h += 1
        return self.head(h).view(self.parts, -1)


class Fails(nn.Module):
    """Draws, flips its children's flags, and then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        np.random.rand()
        torch.rand(2)
        self.inner.eval()
        return self.inner(x)


def ops(trace: Trace) -> list[str]:
    return [call.op for call in trace.calls]


X = torch.zeros(4, 4)


def test_operators_in_order_with_their_modules() -> None:
    """Each call has its operator and the innermost module that made it."""
    trace = capture(Small(), (X,))
    made = [(call.op, call.module) for call in trace.calls]
    assert made == [
        ("aten.t", "body.0"),
        ("aten.addmm", "body.0"),
        ("aten.relu", "body.1"),
        ("aten.add_", ""),
        ("aten.t", "head"),
        ("aten.addmm", "head"),
        ("aten.view", ""),
    ]
    assert [call.pointwise for call in trace.calls if call.op == "aten.relu"] == [True]


def test_source_lines_are_the_users() -> None:
    """A call made inside torch is shown at the user's line that led to it."""
    trace = capture(Small(), (X,))
    [add] = [call for call in trace.calls if call.op == "aten.add_"]
    assert add.source is not None
    assert Path(add.source.file) == Path(__file__)
    assert add.source.code == "h += 1"
    assert add.place == f"test_run.py:{add.source.line} h += 1"
    relu = next(call for call in trace.calls if call.op == "aten.relu")
    assert relu.source is not None
    assert relu.source.code == "h = self.body(x)"


def test_a_call_without_user_code_is_placed_by_its_module() -> None:
    """Where torch alone stands between the caller and the operator there is a module path."""
    trace = capture(nn.Sequential(nn.Linear(4, 2)), (X,))
    assert all(call.place for call in trace.calls)


def test_in_place_operators_keep_their_tensor() -> None:
    """`h += 1` gives the same ref; a tensor reshaped in place becomes another one."""
    trace = capture(Small(), (X,))
    [add] = [call for call in trace.calls if call.op == "aten.add_"]
    assert add.outputs[0] == add.inputs[0]

    class Reshapes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 1).unsqueeze_(0)

    [made, reshaped] = capture(Reshapes(), (X,)).calls
    assert reshaped.inputs == made.outputs
    assert reshaped.inputs[0] != reshaped.outputs[0]
    assert (reshaped.inputs[0].shape, reshaped.outputs[0].shape) == ((4, 4), (1, 4, 4))


def test_module_runs_have_their_tensors() -> None:
    """Modules appear in order of completion, a shared one once per call."""
    shared = nn.Linear(4, 4)
    trace = capture(nn.Sequential(shared, nn.Tanh(), shared), (X,))
    assert [run.path for run in trace.runs] == ["0", "1", "0", ""]
    assert trace.runs[0].outputs == trace.runs[1].inputs
    assert trace.runs[-1].inputs == trace.inputs
    assert trace.runs[-1].outputs == trace.outputs


def test_tied_parameters_share_a_ref() -> None:
    """Both names of a tied parameter mean one tensor, and buffers are listed too."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    tensors = capture(net, (X,)).tensors
    assert tensors["0.weight"] == tensors["2.weight"]
    assert tensors["0.bias"] != tensors["2.bias"]
    assert "1.running_mean" in tensors


def test_refs_of_two_runs_never_meet() -> None:
    """Ids are unique over runs, so that two traces can live in one table."""
    first, second = (capture(Small(), (X,)) for _ in range(2))
    known = {ref.id for call in first.calls for ref in (*call.inputs, *call.outputs)}
    assert not known & {ref.id for call in second.calls for ref in refs_in(call.args)}


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_asked_for_is_run(training: bool) -> None:
    """Dropout runs in training mode alone, whatever the model's own flags say."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(not training)
    trace = capture(net, (X,), training=training)
    assert trace.training is training
    assert any("bernoulli" in op or "dropout" in op for op in ops(trace)) is training
    assert net.training is not training


def test_shapes_and_attributes_of_a_resized_run() -> None:
    """A parameter is seen with another shape and an attribute with another value, for one run."""
    model = Small()
    shapes = {
        "body.0.weight": (9, 4),
        "body.0.bias": (9,),
        "head.weight": (3, 9),
        "head.bias": (3,),
    }
    trace = capture(model, (X,), shapes=shapes, attributes={Attribute("", "parts"): 3})
    assert trace.outputs[0].shape == (3, 4)
    assert model.parts == 2
    assert model.head.weight.shape == (2, 6)


def test_a_resized_run_that_fails_keeps_what_it_saw() -> None:
    """The calls before the failure, its cause and its module are carried by the exception."""
    model = Small()
    with pytest.raises(RunFailure) as caught:
        capture(model, (X,), shapes={"head.weight": (2, 7)}, attributes={Attribute("", "parts"): 4})
    assert [call.op for call in caught.value.calls][:4] == [
        "aten.t",
        "aten.addmm",
        "aten.relu",
        "aten.add_",
    ]
    assert caught.value.module == "head"
    assert model.parts == 2


def test_attention_is_seen_in_its_parts() -> None:
    """In evaluation mode too: the fused inference kernel is turned off for the run."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    trace = capture(layer, (torch.zeros(2, 5, 8),), training=False)
    assert not any("transformer" in op or "multi_head" in op for op in ops(trace))
    used = {ref for call in trace.calls for ref in call.inputs if call.op == "aten.t"}
    weights = {ref for name, ref in trace.tensors.items() if ref.shape[1:]}
    assert weights <= used


def globals_now() -> list[Any]:
    """Every global that a run touches."""
    return [
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.random.get_rng_state().tolist(),
        torch.backends.mha.get_fastpath_enabled(),
        logging.getLogger("torch._subclasses.fake_tensor").disabled,
        dict(torch_module._global_forward_hooks),
        dict(torch_module._global_forward_pre_hooks),
        dict(torch_module._global_forward_hooks_always_called),
        torch.is_grad_enabled(),
        len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
    ]


@pytest.mark.parametrize("fast_path", [False, True])
@pytest.mark.parametrize("make", [Small, Fails, nn.Dropout])
def test_every_global_is_put_back(make: Any, fast_path: bool) -> None:
    """Random states, hooks, switches and flags are as before, after success and failure."""
    model = make()
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    flags = [module.training for module in model.modules()]
    was = torch.backends.mha.get_fastpath_enabled()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    try:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        log.disabled = fast_path
        before = globals_now()
        for training in (False, True):
            if make is Fails:
                with pytest.raises(RunFailure):
                    capture(model, (X,), training=training)
            else:
                capture(model, (X,), training=training)
        assert globals_now() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
        log.disabled = False
    assert [module.training for module in model.modules()] == flags


def test_real_tensors_where_fake_ones_refuse() -> None:
    """A branch on data runs on copies: the model's own tensors and buffers are not written."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.fc(x) if bool((x > 1).any()) else -self.fc(x)

    model = Branch()
    state = copy.deepcopy(model.state_dict())
    trace = capture(model, (torch.randn(5, 4),), training=True)
    assert not trace.fake
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_both_modes_or_the_one_that_runs() -> None:
    """Batch norm refuses one value per channel in training: the evaluation run is enough."""
    assert [t.training for t in capture_both(Small(), (X,))] == [False, True]
    [only] = capture_both(nn.BatchNorm1d(4), (torch.zeros(1, 4),))
    assert only.training is False


def test_no_run_goes_through() -> None:
    """The error names the module, the input's shapes, and keeps the cause."""
    with pytest.raises(CaptureError, match=r"inner\.1") as caught:
        capture_both(Fails(), (X,))
    assert "(4, 4)" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_interrupt_puts_everything_back() -> None:
    """A KeyboardInterrupt in the forward passes through and leaves no hook or mode behind."""

    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = Interrupted().train()
    before = globals_now()
    with pytest.raises(KeyboardInterrupt):
        capture(model, (X,))
    assert globals_now() == before
    assert model.training


@functools.lru_cache
def _remembered(size: int) -> Tensor:
    return torch.arange(size)


def _hidden(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    cached = functools.lru_cache(function)

    @functools.wraps(function)
    def wrapper(size: int) -> Tensor:
        return cached(size)

    return wrapper


class Remembering(nn.Module):
    """Keeps tensors in caches outside of the module: plainly, and in a decorator's closure."""

    @staticmethod
    @_hidden
    def positions(size: int) -> Tensor:
        return torch.arange(size)

    def forward(self, x: Tensor) -> Tensor:
        return x + _remembered(x.shape[1]) + self.positions(x.shape[1])


def test_function_caches_keep_no_tensor_of_a_look() -> None:
    """Neither does the next look see what they hold, nor the next real forward."""
    model = Remembering()
    first, second = (capture(model, (torch.zeros(2, 5),)) for _ in range(2))
    assert [call.op for call in first.calls] == [call.op for call in second.calls]
    assert first.calls[0].op == "aten.arange"
    assert model(torch.zeros(2, 5)).tolist() == [[0, 2, 4, 6, 8]] * 2
    assert _remembered.cache_info().currsize == 1
