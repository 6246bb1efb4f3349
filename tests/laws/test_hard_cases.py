"""Models and moments that once broke a promise; each stays here so that it does not again."""

from __future__ import annotations

import functools
import math
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from neuroexapt import Narrow, Widen, apply, map_axes
from neuroexapt.errors import CaptureError, EditError, GuardError, VerifyError

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Remembers(nn.Module):
    """A forward that leaves things behind: a cache, a list, a state, a late buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
        self.cache: Tensor | None = None
        self.history: list[Tensor] = []
        self.calls: dict[str, int] = {}
        self.state = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.ones(1)
            self.register_buffer("late", torch.ones(1))
        hidden = self.body(x) * self.cache + self.state
        self.history.append(hidden)
        self.calls["n"] = self.calls.get("n", 0) + 1
        self.state = hidden.detach().mean(0)
        return torch.as_tensor(self.head(hidden))


def test_what_a_forward_leaves_behind_is_not_left_by_a_map() -> None:
    """No cache, no entry, no state, no buffer of a run on fake tensors survives it."""
    model = Remembers()
    state = model.state
    map_axes(model, (X,))
    assert model.cache is None
    assert model.history == []
    assert model.calls == {}
    assert model.state is state
    assert "late" not in model._buffers
    model(X).sum().backward()
    assert type(model.body.weight.grad) is Tensor


def test_a_promise_is_relative_to_outputs_however_small() -> None:
    """A change of some per cent of a tiny output is no rounding."""

    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.h = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            # Adds a number that follows the width: no operator shows that it does.
            return torch.as_tensor((self.h(self.a(x)) + math.log(len(self.a.weight))) * 1e-5)

    model = Faint()
    with pytest.raises(VerifyError):
        apply(model, Widen("a.out", by=4), (X,))
    assert model.a.weight.shape == (8, 6)


def test_a_promise_is_held_to_what_rounding_does() -> None:
    """A network that makes much of one rounding is not refused for another order of summation."""

    class Amplifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.h = nn.Linear(6, 67), nn.Linear(67, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(1e4 * self.h(self.a(x).tanh()))

    torch.manual_seed(0)
    done = apply(Amplifier(), Widen("a.out", by=61), (X,))
    assert done.max_difference > 1e-5


def test_plain_objects_of_a_module_are_put_back() -> None:
    """A state object, a dict in a dict, a config: a look leaves nothing in them."""

    class State:
        def __init__(self) -> None:
            self.running: Tensor | None = None

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state, self.table = State(), {"inner": {"seen": [0]}}
            self.config = types.SimpleNamespace(steps=5)
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            self.config.steps += 1
            self.config.late = y
            self.table["inner"]["seen"].append(x.shape[0])
            self.state.running = y if self.state.running is None else self.state.running + y
            return torch.as_tensor(self.head(self.state.running))

    model = Keeping()
    map_axes(model, (X,))
    assert model.state.running is None
    assert model.table == {"inner": {"seen": [0]}}
    assert vars(model.config) == {"steps": 5}
    model(X).sum().backward()
    assert type(model.body.weight.grad) is Tensor


def test_an_edit_inside_autocast_is_refused_in_words() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(GuardError, match="autocast"):
        apply(model, Widen("0", by=1), (X,))


def test_reentrant_checkpoints_take_part() -> None:
    """They refuse ``autograd.grad``: there the check of gradients says nothing."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.m, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.b(checkpoint(self.m, self.a(x), use_reentrant=True)))

    model = Checkpointed()
    apply(model, Widen("a", by=1), (X,))
    assert all(p.grad is None for p in model.parameters())
    model(X).sum().backward()


class RawAttention(nn.Module):
    """Query, key and value made by ``x @ W`` with W of shape (in, out)."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        make = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1))
        self.q, self.k = (nn.Parameter(make(6, inner) * 0.5) for _ in range(2))
        self.v = nn.Parameter(make(6, 6) * 0.5)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ w for w in (self.q, self.k, self.v))
        return torch.as_tensor(self.head(F.scaled_dot_product_attention(q, k, v)))


@pytest.mark.parametrize("inner", [4, 9])
def test_queries_made_by_columns_keep_the_scale_of_the_logits(inner: int) -> None:
    """The correction goes to the dimension that holds the head, not to dimension 0."""
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    model = RawAttention(inner)
    (width,) = [w for w in map_axes(model, (x,)).widths.values() if w.size == inner]
    done = apply(model, Widen(width.name, by=3), (x,))
    assert done.max_difference < 1e-5
    assert model.q.shape == (6, inner + 3)


class EinsumAttention(nn.Module):
    """Weights of shape (in, heads, head) and scores divided by hand."""

    def __init__(self) -> None:
        super().__init__()
        make = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1))
        self.q, self.k, self.v = (nn.Parameter(make(6, 2, n) * 0.5) for n in (5, 5, 4))
        self.out = nn.Parameter(make(2, 4, 6) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bhtd", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhts,bhsd,hdc->btc", scores.softmax(-1), v, self.out)


def test_every_width_of_attention_by_einsum_widens_exactly() -> None:
    """Heads, head size and value size, each a dimension of its own."""
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    widths = map_axes(EinsumAttention(), (x,)).widths
    assert sorted(width.size for width in widths.values()) == [2, 4, 5]
    for name in widths:
        assert apply(EinsumAttention(), Widen(name, by=2), (x,)).max_difference < 1e-5, name


def test_dead_units_of_a_head_can_go_without_moving_the_logits() -> None:
    """Fewer units divide the scores by a smaller root; the queries make up for it."""
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    model = RawAttention(8)
    with torch.no_grad():
        model.q[:, 4:] = 0
        model.k[:, 4:] = 0
    (width,) = [w for w in map_axes(model, (x,)).widths.values() if w.size == 8]
    scores = {width.name: [1.0] * 4 + [0.0] * 4}
    assert apply(model, Narrow(width.name, to=4, scores=scores), (x,)).max_difference < 1e-5


class Positional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return torch.as_tensor(self.head(hidden * torch.arange(hidden.shape[1])))


class Gram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(1, 4), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x[..., None])
        return torch.as_tensor(self.head((hidden.mT @ hidden).flatten(1)))


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [(Positional, "body.out", "by position"), (Gram, "body.out", "twice a factor")],
)
def test_what_depends_on_position_or_is_squared_is_pinned(
    model: type[nn.Module], name: str, reason: str
) -> None:
    """Removing one unit would change what the others mean."""
    assert reason in map_axes(model(), (X,)).pinned[name].reason


def test_a_tied_autoencoder_is_not_widened_with_units_that_cannot_learn() -> None:
    """Zero where the weight reads is zero where it makes."""

    class Auto(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.w, self.b).tanh(), self.w.t())

    model = Auto()
    (name,) = map_axes(model, (X,)).widths
    with pytest.raises(EditError, match="tied"):
        apply(model, Widen(name, by=2), (X,))


class Lines(nn.Module):
    """Everything on one line: the layers inside share it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
        self.mix = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.mix(self.embed(x))))


def test_a_pin_inside_one_layer_does_not_spread_to_its_neighbours_on_the_line() -> None:
    """The feed-forward width of a torch.nn encoder layer stays free."""
    axes = map_axes(Lines(), (torch.randn(2, 5, 6),))
    assert "mix.linear1.out" in axes.widths


def test_activations_without_a_tag_keep_a_width_free() -> None:
    """Hardswish, hardsigmoid and log-sigmoid work position by position."""
    for activation in (nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(), nn.Mish(), nn.Softplus()):
        model = nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 2))
        assert list(map_axes(model, (X,)).widths) == ["0.out"], activation


class Takes(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.body(x.sub_(1.0))))


def test_the_example_input_is_the_callers() -> None:
    """Even where the model writes on it."""
    example = X.clone()
    apply(Takes(), Widen("body", by=2), (example,))
    assert torch.equal(example, X)


def test_an_edit_in_inference_mode_is_refused() -> None:
    """Its tensors could never be trained."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    with torch.inference_mode(), pytest.raises(GuardError, match="inference mode"):
        apply(model, Widen("0", by=2), (X,))
    assert model[0].weight.shape == (8, 6)


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2)), (X,)),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), (X.double(),)),
    ],
    ids=["lazy", "dtype"],
)
def test_an_example_that_cannot_run_is_a_capture_error(model: Any, args: tuple[Any, ...]) -> None:
    """Lazy parameters, and a dtype that only real tensors refuse."""
    with pytest.raises(CaptureError):
        apply(model(), Widen("0", by=2), args)


def test_a_place_that_is_no_text_is_refused_by_what_it_is() -> None:
    """The index of a layer is not its path."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    with pytest.raises(EditError, match="a int"):
        apply(model, Widen(0, by=2), (X,))  # type: ignore[arg-type]


def test_sizes_may_be_numpy_numbers() -> None:
    """They often come out of a calculation."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    apply(model, Widen("0", by=np.int64(2)), (X,))
    apply(model, Narrow("0", to=np.int64(7)), (X,))
    apply(model, Widen("0", by=np.float64(1.0)), (X,))
    assert model[0].weight.shape == (14, 6)


def test_a_second_optimizer_that_trains_what_was_resized_is_warned_of() -> None:
    """Its state does not follow: it was not given."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    half = torch.optim.Adam(model[1].parameters())
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias: resized.*not in"):
        apply(model, Widen("0", by=2), (X,), optimizer=half)
