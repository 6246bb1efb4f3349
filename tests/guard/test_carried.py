"""What a resized tensor carries with it: identity, ties, hooks, tags, flags, formats, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuroexapt import Narrow, Widen, apply, map_axes, transaction
from neuroexapt.edit import Edit
from neuroexapt.errors import EditError
from neuroexapt.guard import Transaction

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    """Two convolutions around a norm."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)
    )


BOTH: list[Edit] = [Widen("0", by=2), Narrow("0", by=2)]
each = pytest.mark.parametrize("edit", BOTH, ids=repr)


def and_back(model: nn.Module, edit: Edit, x: Tensor = X) -> None:
    """Make an edit and take it back."""
    with pytest.raises(KeyboardInterrupt), transaction(model) as tx:
        _apply_and_fail(tx, edit, x)


def _apply_and_fail(tx: Transaction, edit: Edit, x: Tensor) -> None:
    tx.apply(edit, (x,))
    raise KeyboardInterrupt


@each
@pytest.mark.parametrize("back", [False, True])
def test_hooks_of_tensors_fire_once(edit: Edit, back: bool) -> None:
    """Gradient hooks and post-accumulate hooks, after the edit and after its way back."""
    model, seen = net(), list[tuple[str, tuple[int, ...]]]()
    weight = model[0].weight
    first = weight.register_hook(lambda grad: seen.append(("hook", tuple(grad.shape))))
    second = weight.register_post_accumulate_grad_hook(
        lambda tensor: seen.append(("post", tuple(tensor.shape)))
    )
    model(X).sum().backward()
    seen.clear()
    if back:
        and_back(model, edit)
    else:
        apply(model, edit, (X,))
    assert not seen  # a verification is nobody's training step
    model(X).sum().backward()
    assert seen == [("hook", tuple(weight.shape)), ("post", tuple(weight.shape))]
    first.remove()
    second.remove()
    seen.clear()
    model(X).sum().backward()
    assert not seen


@each
def test_a_hook_that_changes_gradients_goes_on_doing_so(edit: Edit) -> None:
    """Doubling by a hook doubles after the edit too."""
    model = net().eval()
    model[0].weight.register_hook(lambda grad: 2 * grad)
    apply(model, edit, (X,))
    (plain,) = torch.autograd.grad(model(X).sum(), [model[3].weight])
    assert plain is not None
    twin = net().eval()
    apply(twin, edit, (X,))
    twin.load_state_dict(model.state_dict())
    model(X).square().sum().backward()
    twin(X).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, 2 * twin[0].weight.grad)


class Tagged(nn.Parameter):
    """A parameter class of the user's own."""


@each
@pytest.mark.parametrize("back", [False, True])
def test_identity_class_and_tags_stay(edit: Edit, back: bool) -> None:
    """The object, its class and its attributes."""
    model = net()
    model[0].weight = Tagged(model[0].weight.detach())
    weight = model[0].weight
    weight.no_decay = {"reason": "tagged"}
    running = model[1].running_mean
    running.note = "mine"
    if back:
        and_back(model, edit)
    else:
        apply(model, edit, (X,))
    assert model[0].weight is weight
    assert type(weight) is Tagged
    assert weight.no_decay == {"reason": "tagged"}
    assert model[1].running_mean is running
    assert running.note == "mine"


@each
def test_frozen_parameters_stay_frozen(edit: Edit) -> None:
    """And trainable ones trainable."""
    model = net()
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    apply(model, edit, (X,))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model[0].weight.grad is None


@each
def test_dtype_and_memory_format_stay(edit: Edit) -> None:
    """A bfloat16 model in channels_last, with its gradients."""
    model = net().to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = X.to(torch.bfloat16).to(memory_format=torch.channels_last)
    model(x).sum().backward()
    apply(model, edit, (x,))
    for layer in (0, 3):
        for tensor in (model[layer].weight, model[layer].weight.grad):
            assert tensor.dtype == torch.bfloat16
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert not tensor.is_contiguous()
    assert model[1].running_mean.dtype == torch.bfloat16
    assert model[1].num_batches_tracked.dtype == torch.int64


def test_gradients_are_carried() -> None:
    """Old entries keep their accumulated gradient, new ones have none; no gradient stays None."""
    model = net()
    model(X).square().sum().backward()
    old = model[0].weight.grad.clone()
    reader = model[3].weight.grad.clone()
    model[1].weight.grad = None
    apply(model, Widen("0", by=2), (X,))
    assert torch.equal(model[0].weight.grad[:6], old)
    assert not model[0].weight.grad[6:].any()
    assert torch.equal(model[3].weight.grad[:, :6], reader)
    assert model[1].weight.grad is None
    apply(model, Narrow("0", to=3, scores={"0.out": [0, 1, 0, 1, 0, 1, 0, 0]}), (X,))
    assert torch.equal(model[0].weight.grad, old[[1, 3, 5]])
    assert torch.equal(model[3].weight.grad, reader[:, [1, 3, 5]])


class Tied(nn.Module):
    """An autoencoder whose decoder reads the encoder's weight, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(5, 4, bias=False)
        self.up = nn.Module()
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            torch.tanh(F.linear(x, self.down.weight)), torch.as_tensor(self.up.weight).T
        )


class Embedded(nn.Module):
    """A language model whose head is its embedding, and whose stream has no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.tanh(self.hidden(self.embed(tokens)))))


@pytest.mark.parametrize("by", [2, -2])
@pytest.mark.parametrize(
    ("model", "names", "x"),
    [
        (Tied, ("down.weight", "up.weight"), torch.ones(3, 5)),
        (Embedded, ("embed.weight", "head.weight"), torch.arange(7)[None]),
    ],
    ids=["tied", "embedded"],
)
def test_tied_tensors_stay_tied(
    model: type[nn.Module], names: tuple[str, str], x: Tensor, by: int
) -> None:
    """One object under both names, resized once, with one entry in the optimizer."""
    built = model()
    optimizer = torch.optim.Adam(built.parameters())
    built(x).square().sum().backward()
    optimizer.step()
    size = built.get_parameter(names[0]).shape
    (at,) = map_axes(built, (x,)).widths
    if model is Tied and by > 0:
        # Zero where it reads and zero where it makes: such a unit could never learn.
        with pytest.raises(EditError, match="tied"):
            apply(built, Widen(at, by=by), (x,), optimizer=optimizer)
        return
    apply(built, Widen(at, by=by) if by > 0 else Narrow(at, by=-by), (x,), optimizer=optimizer)
    first, second = (dict(built.named_parameters(remove_duplicate=False))[n] for n in names)
    assert first is second
    assert sum(first.shape) == sum(size) + by
    assert optimizer.state[first]["exp_avg"].shape == first.shape
    optimizer.zero_grad()
    built(x).square().sum().backward()
    optimizer.step()


class Buffered(nn.Module):
    """A buffer that is not saved, along the width."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.arange(1.0, 5.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.second(self.first(x) * self.scale))


@pytest.mark.parametrize("edit", [Widen("first", by=2), Narrow("first", by=2)], ids=repr)
def test_buffers_that_are_not_saved_follow(edit: Edit) -> None:
    """They are resized, and stay out of the state dict."""
    model = Buffered()
    scale = model.scale
    apply(model, edit, (torch.ones(2, 3),))
    assert model.scale is scale
    assert scale.shape == model.first.bias.shape
    assert "scale" not in model.state_dict()
    assert not isinstance(scale, nn.Parameter)


@each
def test_the_users_own_references_stay_valid(edit: Edit) -> None:
    """A list of parameters made before the edit clips the gradients made after it."""
    model = net()
    held = list(model.parameters())
    apply(model, edit, (X,))
    model(X).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(held, 0.1)
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    assert float(norms.norm()) == pytest.approx(0.1, rel=1e-3)
