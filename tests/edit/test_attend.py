"""Inserted attention: against its formula by hand, at the start and once it has learned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import InsertAttention, Narrow, Widen, apply, map_axes
from neuroexapt.edit.gates import ConvBlockAttention, SelfAttention, SpatialGate, SqueezeExcite
from neuroexapt.errors import EditError, VerifyError

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KINDS = ("squeeze_excite", "spatial", "cbam", "self")


def seeded(make: Any) -> Any:
    """The same weights at every call, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().double()


def net() -> nn.Sequential:
    """Convolution, norm, activation, convolution."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
        )
    )


def opened(module: nn.Module) -> Any:
    """The module with every weight away from zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.double().parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.4 * noise
    return module


def both(model: nn.Module, *args: Tensor) -> list[Tensor]:
    """Outputs in evaluation and training mode, of a copy."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        return [twin.train(training)(*args) for training in (False, True)]


# --- formulas --------------------------------------------------------------------------------


def test_squeeze_and_excitation_by_hand() -> None:
    """One gate a channel, from its mean over space, between 0 and 2."""
    module = opened(SqueezeExcite(8, 3, channel=1))
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    hidden = (x.sum((2, 3)) / 20 @ module.reduce.weight.T + module.reduce.bias).clamp(min=0)
    gate = 2 / (1 + (-(hidden @ module.expand.weight.T + module.expand.bias)).exp())
    torch.testing.assert_close(module(x), torch.einsum("nchw,nc->nchw", x, gate))
    last = SqueezeExcite(8, 3, channel=3).double()
    last.load_state_dict(module.state_dict())
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), module(x))


def test_a_spatial_gate_by_hand() -> None:
    """One gate a place: the convolution sees the squeezed channels around it."""
    module = opened(SpatialGate(8, 3, spatial=2, kernel=3))
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    weight, bias = module.squeeze.weight[:, :, 0, 0], module.squeeze.bias
    hidden = (torch.einsum("nchw,kc->nkhw", x, weight) + bias[:, None, None]).clamp(min=0)
    around = torch.nn.functional.pad(hidden, (1, 1, 1, 1))
    logits = torch.stack(
        [
            (around[:, :, i : i + 3, j : j + 3] * module.gate.weight[0]).sum((1, 2, 3))
            for i in range(5)
            for j in range(4)
        ],
        dim=1,
    ).view(2, 1, 5, 4)
    torch.testing.assert_close(module(x), x * 2 / (1 + (-logits - module.gate.bias).exp()))


def test_cbam_by_hand() -> None:
    """Channel gates from mean and maximum, then place gates from both over channels."""
    module = opened(ConvBlockAttention(8, 3, spatial=1, kernel=1))
    x = torch.randn(2, 8, 7, dtype=torch.float64)

    def squeeze(rows: Tensor) -> Tensor:
        return (rows @ module.reduce.weight.T + module.reduce.bias).clamp(min=0)

    both = squeeze(x.mean(2)) + squeeze(x.max(2).values)
    y = x * 2 * (both @ module.expand.weight.T + module.expand.bias).sigmoid()[:, :, None]
    weight = module.place.weight[0, :, 0]
    logits = weight[0] * y.mean(1) + weight[1] * y.max(1).values + module.place.bias
    torch.testing.assert_close(module(x), y * 2 * logits.sigmoid()[:, None])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("channel", [1, 2])
def test_self_attention_is_torchs(channel: int, causal: bool) -> None:
    """The same as ``nn.MultiheadAttention`` with the same weights."""
    module = opened(SelfAttention(8, heads=2, channel=channel, causal=causal))
    reference = nn.MultiheadAttention(8, 2, batch_first=True).double()
    layers = (module.query, module.key, module.value)
    reference.in_proj_weight.data = torch.cat([layer.weight for layer in layers]).detach()
    reference.in_proj_bias.data = torch.cat([layer.bias for layer in layers]).detach()
    reference.out_proj.load_state_dict(module.out.state_dict())
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    expected, _ = reference(x, x, x, attn_mask=mask)
    given = x.transpose(1, 2) if channel == 1 else x
    out = module(given)
    torch.testing.assert_close(out.transpose(1, 2) if channel == 1 else out, expected)


# --- in a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_exact_and_learns(kind: str) -> None:
    """Exact in both modes; the last layer learns at step one, all others at step two."""
    model = net()
    before = both(model, X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = apply(model, InsertAttention("2", kind), (X,), optimizer=optimizer)
    assert done.max_difference <= 1e-12
    for old, new in zip(before, both(model, X), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        named = {n.split(".", 2)[-1]: p for n, p in model.named_parameters() if "nx_" in n}
        moved.append({n for n, p in named.items() if p.grad is not None and p.grad.abs().max() > 0})
    last = {"squeeze_excite": {"expand"}, "spatial": {"gate"}, "cbam": {"expand", "place"}}
    assert {name.split(".")[0] for name in moved[0]} == last.get(kind, {"out"})
    # The bias of the keys shifts all logits of a query alike: it has no gradient, ever.
    still = {"key.bias"} if kind == "self" else set()
    negligible = {n for n in named if n in still and named[n].grad.abs().max() < 1e-12}
    assert moved[1] | negligible == set(named)


@pytest.mark.parametrize("kind", KINDS)
def test_every_width_can_change_afterwards(kind: str) -> None:
    """The map sees through it: each width grows exactly, or is refused by its mean; and shrinks."""
    model = net()
    apply(model, InsertAttention("2", kind, heads=2), (X,))
    opened(model[2])
    axes = map_axes(model, (X,))
    assert not axes.unknown
    before = both(model, X)
    names = list(axes.widths)
    assert any("nx_" in name for name in names)
    for name in names:
        twin = copy.deepcopy(model)
        if kind == "cbam" and name == "0.out":
            assert Widen(name, by=1).check(axes)
        else:
            apply(twin, Widen(name, by=1), (X,))
            for old, new in zip(before, both(twin, X), strict=True):
                torch.testing.assert_close(new, old, rtol=0, atol=1e-10)
        apply(copy.deepcopy(model), Narrow(name, by=1), (X,))


def test_the_stream_of_attention_takes_its_heads_along() -> None:
    """Widening the stream keeps the number of heads and their size."""
    model = net()
    apply(model, InsertAttention("2", "self", heads=2), (X,))
    apply(model, Widen("0", by=4), (X,))
    inner = model[2].nx_after
    assert (inner.query.in_features, inner.query.out_features, inner.heads) == (12, 8, 2)


class Decoder(nn.Module):
    """A recurrent net over tokens, samples first or not."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=batch_first)
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        if not self.rnn.batch_first:
            return torch.as_tensor(self.head(self.rnn(self.embed(x).transpose(0, 1))[0]))
        return torch.as_tensor(self.head(self.rnn(self.embed(x))[0]))


TOKENS = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))


def test_causal_attention_does_not_look_ahead() -> None:
    """Other later tokens change no earlier output; without ``causal`` they do."""
    other = TOKENS.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 11
    for causal in (True, False):
        model = seeded(Decoder)
        apply(model, InsertAttention("rnn", "self", heads=2, causal=causal), (TOKENS,))
        opened(model.rnn.nx_after)
        same = torch.equal(model(TOKENS)[:, :4], model(other)[:, :4])
        assert same is causal


def test_a_sequence_must_say_whether_it_is_causal() -> None:
    """No guess: either would be wrong in half of all models."""
    axes = map_axes(seeded(Decoder), (TOKENS,))
    for kind in ("self", "squeeze_excite"):
        (problem,) = InsertAttention("rnn", kind).check(axes)
        assert "causal=None" in problem.seen
    (problem,) = InsertAttention("rnn", "squeeze_excite", causal=True).check(axes)
    assert problem.next_step == "use kind='self'"
    assert not InsertAttention("rnn", "squeeze_excite", causal=False).check(axes)


def test_samples_are_never_mixed() -> None:
    """Where the batch is the second dimension, attention over the first two is refused."""
    axes = map_axes(seeded(lambda: Decoder(batch_first=False)), (TOKENS,))
    for kind in ("self", "squeeze_excite"):
        (problem,) = InsertAttention("rnn", kind, causal=False).check(axes)
        assert "batch" in problem.seen
    assert not InsertAttention("embed", "self", causal=False).check(axes)


def test_one_sample_does_not_see_another() -> None:
    """Changing one sample of the batch changes no other's output."""
    for kind in KINDS:
        model = net().eval()
        apply(model, InsertAttention("2", kind), (X,))
        opened(model[2])
        other = X.clone()
        other[0] += 1
        torch.testing.assert_close(model(X)[1:], model(other)[1:], rtol=0, atol=1e-12)


def test_too_many_positions_are_refused_unless_said() -> None:
    """The message has the cost; a limit given lifts it."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)))
    axes = map_axes(model, (torch.randn(2, 3, 33, 32, dtype=torch.float64),))
    (problem,) = InsertAttention("0", "self").check(axes)
    assert problem.seen == "1056 positions, which cost 9e+06 multiplications a sample"
    assert not InsertAttention("0", "self", most_positions=1056).check(axes)
    assert not InsertAttention("0", "squeeze_excite").check(axes)


WRONG: dict[str, tuple[InsertAttention, str]] = {
    "kind": (InsertAttention("2", "linear"), "kind='linear'"),
    "heads": (InsertAttention("2", "self", heads=3), "heads=3 on 8 channels"),
    "no heads": (InsertAttention("2", "self", heads=0), "heads=0"),
    "kernel": (InsertAttention("2", "cbam", kernel=4), "kernel=4"),
    "reduction": (InsertAttention("2", reduction=0), "reduction=0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_told_beforehand(case: str) -> None:
    """By ``check``, and raised by ``plan``."""
    edit, seen = WRONG[case]
    axes = map_axes(net(), (X,))
    assert seen in [problem.seen for problem in edit.check(axes)]
    with pytest.raises(EditError):
        edit.plan(axes, {})


def test_features_without_positions_are_refused() -> None:
    """A vector has nothing to attend over."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    for kind in KINDS:
        problems = InsertAttention("1", kind).check(map_axes(model, (torch.randn(4, 3),)))
        assert "positions behind the channels" in problems[0].needed


def test_verification_would_see_an_open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The promise is measured: attention that starts away from one is taken back."""
    monkeypatch.setattr(nn.init, "zeros_", nn.init.ones_)
    model = net()
    names = list(model.state_dict())
    with pytest.raises(VerifyError):
        apply(model, InsertAttention("2"), (X,))
    assert list(model.state_dict()) == names
