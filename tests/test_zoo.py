"""The zoo itself: every model builds, runs and learns, and disturbs nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import zoo

NAMES = [row.name for row in zoo.ZOO]
CAUSAL = ["gpt", "gpt_nano", "llama"]
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Dropout and sampling draw the same numbers whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nest of dicts and tuples."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in tensors(item)]


def evaluate(model: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """The flattened outputs in eval mode."""
    with torch.no_grad():
        return zoo.flat(model.eval()(*args))


def test_table_has_32_rows_with_unique_names() -> None:
    """The table holds every model once, and a name finds its row."""
    assert len(zoo.ZOO) == len(set(NAMES)) == 32
    assert all(zoo.entry(row.name) is row for row in zoo.ZOO)
    with pytest.raises(KeyError):
        zoo.entry("no such model")


def test_reference_cnn_has_2193674_parameters() -> None:
    """The reference network has exactly the size that the documentation quotes."""
    model = zoo.build("reference_cnn")
    assert sum(p.numel() for p in model.parameters()) == 2_193_674
    features = model.get_submodule("features")
    assert features(*zoo.example("reference_cnn", batch=2)).shape == (2, 128, 8, 8)


@each
def test_build_is_deterministic(name: str) -> None:
    """One seed gives one set of weights, another seed another."""
    first, second = zoo.build(name, seed=3), zoo.build(name, seed=3)
    other = zoo.build(name, seed=4)
    assert first is not second
    assert first.training
    state, again = first.state_dict(), second.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert not all(
        torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True)
    )


@each
def test_example_is_deterministic(name: str) -> None:
    """Example arguments are the same at every call and carry the batch size asked for."""
    first, second = tensors(zoo.example(name, batch=3)), tensors(zoo.example(name, batch=3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(a.shape[0] == 3 for a in first)


@each
def test_global_rng_is_untouched(name: str) -> None:
    """Neither building, nor example arguments, nor the target of the loss draws a global number."""
    before, before_python = torch.get_rng_state(), random.getstate()
    model = zoo.build(name, seed=7).eval()
    zoo.loss(model, zoo.example(name))
    assert torch.equal(before, torch.get_rng_state())
    assert before_python == random.getstate()


@each
def test_dtype_reaches_everything(name: str) -> None:
    """A float64 model has the float32 weights, and computes the same function in float64."""
    single, double = zoo.build(name), zoo.build(name, dtype=torch.float64)
    for p, q in zip(single.parameters(), double.parameters(), strict=True):
        assert q.dtype == torch.float64
        assert torch.equal(p.double(), q)
    out = evaluate(double, zoo.example(name, dtype=torch.float64))
    assert out.dtype == torch.float64
    torch.testing.assert_close(
        evaluate(single, zoo.example(name)).double(), out, rtol=1e-4, atol=1e-5
    )


@each
@pytest.mark.parametrize(("batch", "train"), [(1, False), (4, False), (4, True)])
def test_forward(name: str, batch: int, train: bool) -> None:
    """Every model runs on one example in eval mode, and on four in both modes."""
    model = zoo.build(name).train(train)
    outputs = tensors(model(*zoo.example(name, batch=batch)))
    assert all(out.shape[0] == batch and out.isfinite().all() for out in outputs)


@each
def test_rows_do_not_mix(name: str) -> None:
    """In eval mode an example's output does not depend on what else is in the batch."""
    model = zoo.build(name, dtype=torch.float64)
    args = zoo.example(name, dtype=torch.float64)
    flipped = copy.deepcopy(args)
    for tensor in tensors(flipped):
        tensor.copy_(tensor.flip(0))
    torch.testing.assert_close(evaluate(model, flipped), evaluate(model, args).flip(0))
    assert not torch.allclose(evaluate(model, args), evaluate(model, flipped))


@pytest.mark.parametrize("name", CAUSAL)
def test_decoders_are_causal(name: str) -> None:
    """A decoder's logits at a position do not see later tokens."""
    model = zoo.build(name, dtype=torch.float64).eval()
    (ids,) = zoo.example(name)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % zoo.VOCAB
    a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :-1], b[:, :-1])
    assert not torch.allclose(a[:, -1], b[:, -1])


@each
@pytest.mark.parametrize("train", [False, True])
def test_every_parameter_gets_a_gradient(name: str, train: bool) -> None:
    """The loss reaches every parameter, in both modes and without exception."""
    model = zoo.build(name).train(train)
    value = zoo.loss(model, zoo.example(name))
    assert value.shape == ()
    assert value.isfinite()
    value.backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        # a bias that softmax or batch statistics cancel is zero up to rounding, but not None
        assert parameter.grad.any() or path.endswith("bias"), path


@each
def test_loss_goes_down(name: str) -> None:
    """A few optimizer steps lower the loss."""
    model, args = zoo.build(name).eval(), zoo.example(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    first = zoo.loss(model, args).item()
    for _ in range(5):
        optimizer.zero_grad()
        zoo.loss(model, args).backward()
        optimizer.step()
    assert zoo.loss(model, args).item() < first


@each
def test_state_dict_and_deepcopy_keep_the_function(name: str) -> None:
    """A copy, and a fresh model that loads the state, compute the same outputs."""
    model, args = zoo.build(name, seed=1), zoo.example(name)
    fresh = zoo.build(name, seed=2)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(evaluate(model, args), evaluate(fresh, args))
    assert torch.equal(evaluate(model, args), evaluate(copy.deepcopy(model), args))


def test_ties_are_real() -> None:
    """The tied head of gpt_nano is one parameter, and the shared layer is one module."""
    nano = zoo.build("gpt_nano")
    tied = nano.get_parameter("lm_head.weight")
    assert nano.get_parameter("transformer.wte.weight") is tied
    shared = zoo.build("shared_module")
    calls: list[int] = []
    shared.get_submodule("shared").register_forward_hook(lambda *_: calls.append(1))
    shared(*zoo.example("shared_module"))
    assert len(calls) == 2


def test_vae_samples_only_in_training() -> None:
    """The autoencoder draws noise in train mode and none in eval mode."""
    model, args = zoo.build("vae"), zoo.example("vae")
    assert not torch.equal(zoo.flat(model(*args)), zoo.flat(model(*args)))
    assert torch.equal(evaluate(model, args), evaluate(model, args))
