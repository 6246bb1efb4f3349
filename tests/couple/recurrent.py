"""Recurrent models the way users write them, and the widths that each must have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from neuroexapt import AxisMap, map_axes

STEPS, BATCH, FEATURES = 4, 3, 3


class Tagger(nn.Module):
    """Embed, a recurrent network, a head on every step or on the last one."""

    def __init__(self, kind: type[nn.RNNBase], last: bool = True, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, 5)
        self.rnn = kind(5, 6, **options)
        width = (options.get("proj_size") or 6) * (2 if options.get("bidirectional") else 1)
        self.head, self.last = nn.Linear(width, 2), last

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(self.embed(x))
        if self.last:
            out = out[:, -1] if self.rnn.batch_first else out[-1]
        return self.head(out)


class Given(nn.Module):
    """The initial state is made in the forward, from an attribute; final states are read."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.hidden, self.layers = 6, 2
        self.rnn = kind(FEATURES, 6, 2, batch_first=True)
        self.head = nn.Linear(12 if kind is nn.LSTM else 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.zeros(self.layers, x.size(0), self.hidden, dtype=x.dtype)
        if isinstance(self.rnn, nn.LSTM):
            _, (hidden, cells) = self.rnn(x, (first, first.clone()))
            return self.head(torch.cat([hidden[-1], cells[-1]], 1))
        _, hidden = self.rnn(x, first)
        return self.head(hidden[-1])


class Learned(nn.Module):
    """The initial state is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.rnn, self.head = nn.GRU(FEATURES, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x, self.first.expand(-1, x.size(1), -1).contiguous())
        return self.head(out)


class CharLM(nn.Module):
    """A language model over characters."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 6, num_layers=2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(6, 11)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(tokens))[0])


class Translate(nn.Module):
    """Encoder and decoder, which starts in the encoder's last state."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Embedding(11, 4), nn.Embedding(9, 5)
        self.encoder = nn.LSTM(4, 6, batch_first=True)
        self.decoder = nn.LSTM(5, 6, batch_first=True)
        self.out = nn.Linear(6, 9)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.read(source))
        return self.out(self.decoder(self.write(target), state)[0])


class Attend(nn.Module):
    """A decoder that looks at the encoder's outputs; it starts from zeros, or from the encoder."""

    def __init__(self, handed_over: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.GRU(FEATURES, 6), nn.GRU(FEATURES, 6)
        self.out, self.handed_over = nn.Linear(12, 2), handed_over

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, state = self.encoder(source)
        steps, _ = self.decoder(target, state if self.handed_over else None)
        steps, memory = steps.transpose(0, 1), memory.transpose(0, 1)
        weights = torch.softmax(steps @ memory.transpose(1, 2), -1)
        return self.out(torch.cat([steps, weights @ memory], -1))


class Cells(nn.Module):
    """Two cells in a loop; their states start from an attribute, the cell's own, or nothing."""

    def __init__(self, kind: type[nn.RNNCellBase], start: str, **options: Any) -> None:
        super().__init__()
        self.hidden, self.start = 6, start
        self.one = kind(FEATURES, 6, **options)
        self.two = kind(6, 5, **options)
        self.head = nn.Linear(5, 2)

    def first(self, x: Tensor) -> list[Any]:
        if self.start == "none":
            return [None, None]
        batch = x.size(1)
        if self.start == "attribute":
            one = torch.zeros(batch, self.hidden, dtype=x.dtype)
        else:
            one = x.new_zeros(batch, self.one.hidden_size)
        states = [one, x.new_zeros(batch, self.two.hidden_size)]
        if isinstance(self.one, nn.LSTMCell):
            return [(state, state.clone()) for state in states]
        return states

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.first(x)
        for step in x:
            one = self.one(step, one)
            two = self.two(one[0] if isinstance(one, tuple) else one, two)
        return self.head(two[0] if isinstance(two, tuple) else two)


class Packed(nn.Module):
    """Sequences of unlike lengths; the last states are read, or every step."""

    def __init__(self, kind: type[nn.RNNBase], steps: bool, **options: Any) -> None:
        super().__init__()
        self.embed, self.steps = nn.Linear(FEATURES, 5), steps
        self.rnn = kind(5, 6, batch_first=True, **options)
        self.head = nn.Linear(12 if self.rnn.bidirectional else 6, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embed(x), lengths, batch_first=True, enforce_sorted=False
        )
        out, state = self.rnn(packed)
        if self.steps:
            return self.head(pad_packed_sequence(out, batch_first=True)[0])
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat(tuple(hidden[-2:]), 1) if hidden.size(0) > 1 else hidden[-1])


class Stack(nn.Module):
    """Recurrent networks of unlike widths, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.LSTM(FEATURES, 6), nn.GRU(6, 5), nn.LSTM(5, 4, bidirectional=True)]
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x[-1])


class Directions(nn.Module):
    """The directions of a network are added: as halves, or as a dimension of their own."""

    def __init__(self, halves: bool) -> None:
        super().__init__()
        self.rnn, self.halves = nn.LSTM(FEATURES, 6, bidirectional=True), halves
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        if self.halves:
            size = self.rnn.hidden_size
            return self.head(out[..., :size] + out[..., size:])
        return self.head(out.view(*out.shape[:2], 2, -1).sum(2))


class ByHand(nn.Module):
    """A recurrent network of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 6
        self.of_input, self.of_state = nn.Linear(FEATURES, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.size(1), self.hidden)
        for step in x:
            state = torch.tanh(self.of_input(step) + self.of_state(state))
        return self.head(state)


class Flat(nn.Module):
    """One sequence without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(FEATURES, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, 0])[0])


@dataclass(frozen=True)
class Case:
    """A model, its input, and the sizes of all widths that must be found.

    ``mixed``: a dot product is taken over one of them whose sides have a maker in common, so
    that nothing new could stay silent.
    """

    name: str
    make: Callable[[], nn.Module]
    args: Callable[[], tuple[Tensor, ...]]
    widths: tuple[int, ...]
    mixed: bool = False


def steps() -> tuple[Tensor, ...]:
    return (torch.randn(STEPS, BATCH, FEATURES),)


def two_sequences() -> tuple[Tensor, ...]:
    return torch.randn(STEPS, BATCH, FEATURES), torch.randn(STEPS - 1, BATCH, FEATURES)


def texts() -> tuple[Tensor, ...]:
    return torch.randint(0, 9, (BATCH, STEPS)), torch.randint(0, 9, (BATCH, STEPS - 1))


def ragged() -> tuple[Tensor, ...]:
    return torch.randn(BATCH, STEPS, FEATURES), torch.tensor([2, 4, 3])


_NETWORKS: tuple[tuple[type[nn.RNNBase], dict[str, Any]], ...] = (
    (nn.LSTM, {}),
    (nn.GRU, {}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu"}),
)
_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
    {"batch_first": True, "bias": False},
)
_PROJECTED: tuple[dict[str, Any], ...] = (
    {"proj_size": 3},
    {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False},
)


def _named(kind: type[nn.Module], options: dict[str, Any]) -> str:
    return " ".join([kind.__name__, *(f"{key}={value}" for key, value in options.items())])


GRID = tuple(
    Case(
        _named(kind, {**own, **options}),
        lambda kind=kind, options={**own, **options}: Tagger(kind, **options),  # type: ignore[misc]
        steps,
        (5, 6),
    )
    for kind, own in _NETWORKS
    for options in _OPTIONS
) + tuple(
    Case(
        _named(nn.LSTM, options),
        lambda options=options: Tagger(nn.LSTM, last=False, **options),  # type: ignore[misc]
        steps,
        (3, 5, 6),
    )
    for options in _PROJECTED
)

LOOPS = tuple(
    Case(
        f"{kind.__name__} from {start}",
        lambda kind=kind, start=start: Cells(kind, start, bias=start != "none"),  # type: ignore[misc]
        steps,
        (5, 6),
    )
    for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    for start in ("attribute", "cell", "none")
)

WRITTEN = (
    Case("given state, GRU", lambda: Given(nn.GRU), steps, (6,)),
    Case("given states, LSTM", lambda: Given(nn.LSTM), steps, (6,)),
    Case("learned state", Learned, steps, (6,)),
    Case("characters", lambda: CharLM(tied=False), lambda: texts()[:1], (6, 6)),
    Case("characters, tied", lambda: CharLM(tied=True), lambda: texts()[:1], (6,)),
    Case("translation", Translate, texts, (4, 5, 6)),
    Case("attention", lambda: Attend(handed_over=False), two_sequences, (6,)),
    Case("attention, one state", lambda: Attend(handed_over=True), two_sequences, (6,), mixed=True),
    Case("packed LSTM", lambda: Packed(nn.LSTM, steps=False), ragged, (5, 6)),
    Case(
        "packed GRU, both ways",
        lambda: Packed(nn.GRU, steps=False, num_layers=2, bidirectional=True),
        ragged,
        (5, 6),
    ),
    Case("packed, every step", lambda: Packed(nn.LSTM, steps=True), ragged, (5, 6)),
    Case("stack", Stack, steps, (4, 5, 6)),
    Case("directions by halves", lambda: Directions(halves=True), steps, (6,)),
    Case("directions by view", lambda: Directions(halves=False), steps, (6,)),
    Case("by hand", ByHand, steps, (6,)),
    Case("no batch", Flat, steps, (6,)),
)

CASES = (*GRID, *LOOPS, *WRITTEN)


def built(case: Case) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model in double precision, and its input."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, args = case.make().double(), case.args()
    return model, tuple(t.double() if t.is_floating_point() else t for t in args)


def in_parts(model: nn.Module, args: tuple[Tensor, ...]) -> AxisMap:
    """The map of a run in which torch takes recurrent networks apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuroexapt.capture.whole._NETWORKS", frozenset())
        patch.setattr("neuroexapt.capture.whole._CELLS", frozenset())
        axes = map_axes(model, args)
    assert len(axes.traces[0].calls) > len(map_axes(model, args).traces[0].calls)
    assert not axes.unknown
    return axes
