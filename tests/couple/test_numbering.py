"""Experts chosen by number are a width: one that is never chosen can go without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import Narrow, Widen, apply, map_axes
from neuroexapt.couple import Width
from neuroexapt.errors import EditError, PinnedError

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
EXPERTS, HIDDEN, NEVER = 4, 6, 1


class Mixture(nn.Module):
    """Four experts, stacked in two parameters; how they are chosen is a subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = EXPERTS
        self.stem = nn.Linear(5, 8)
        self.router = nn.Linear(8, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 8, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gates, numbers = self.router(x).softmax(-1).topk(2, -1)
        return torch.as_tensor(self.head(x + self.mix(x, gates, numbers)))

    def mix(self, x: Tensor, gates: Tensor, numbers: Tensor) -> Tensor:
        """(B, 8), (B, 2), (B, 2) -> (B, 8)."""
        raise NotImplementedError


class Masked(Mixture):
    """All experts work; a scattered gate silences those not chosen."""

    def mix(self, x: Tensor, gates: Tensor, numbers: Tensor) -> Tensor:
        gate = gates.new_zeros(x.shape[0], self.experts).scatter(1, numbers, gates)
        hidden = torch.einsum("bd,edh->beh", x, self.up).relu()
        return (torch.einsum("beh,ehd->bed", hidden, self.down) * gate[..., None]).sum(1)


class Gathered(Mixture):
    """The matrices of the chosen experts are taken by number."""

    def mix(self, x: Tensor, gates: Tensor, numbers: Tensor) -> Tensor:
        hidden = torch.einsum("bd,bkdh->bkh", x, self.up[numbers]).relu()
        return (torch.einsum("bkh,bkhd->bkd", hidden, self.down[numbers]) * gates[..., None]).sum(1)


class Grouped(Mixture):
    """Rows sorted by expert, as many for each as a tally says."""

    def mix(self, x: Tensor, gates: Tensor, numbers: Tensor) -> Tensor:
        chosen, order = numbers.flatten().sort()
        ends = torch.histc(chosen.float(), bins=self.experts, min=0, max=self.experts - 1)
        rows, offs = x[order // 2], ends.cumsum(0).to(torch.int32)
        up, down = self.up.bfloat16(), self.down.bfloat16()
        hidden = torch.nn.functional.grouped_mm(rows.bfloat16(), up, offs=offs).relu()
        made = torch.nn.functional.grouped_mm(hidden, down, offs=offs).to(x.dtype)
        return torch.zeros_like(x).index_add(0, order // 2, made * gates.flatten()[order, None])


class Weighted(Mixture):
    """The number itself is computed with: an expert's position means something."""

    def mix(self, x: Tensor, gates: Tensor, numbers: Tensor) -> Tensor:
        gate = gates.new_zeros(x.shape[0], self.experts).scatter(1, numbers, gates * numbers)
        hidden = torch.einsum("bd,edh->beh", x, self.up).relu()
        return (torch.einsum("beh,ehd->bed", hidden, self.down) * gate[..., None]).sum(1)


BY_NUMBER = [Masked, Gathered, Grouped]
each = pytest.mark.parametrize("kind", BY_NUMBER)


def made(kind: type[Mixture]) -> Mixture:
    """The same weights at every call; one expert is never chosen."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = kind()
    with torch.no_grad():
        model.router.bias[NEVER] = -1e9
        if kind is Grouped:  # its kernel asks for rows of 16 bytes
            model.up = nn.Parameter(torch.randn(EXPERTS, 8, 8))
            model.down = nn.Parameter(torch.randn(EXPERTS, 8, 8))
    return model


def experts(model: Mixture) -> Width:
    """The width whose units are experts."""
    widths = map_axes(model, (X,)).widths.values()
    return next(w for w in widths if any((p.tensor, p.dim) == ("up", 0) for p in w.appearances))


@each
def test_an_expert_that_is_never_chosen_goes_without_a_trace(kind: type[Mixture]) -> None:
    """Its rows leave the router and its matrices both stacks; the outputs stay to the bit."""
    model = made(kind)
    width = experts(model)
    places = {(place.tensor, place.dim) for place in width.appearances}
    assert places == {("up", 0), ("down", 0), ("router.weight", 0), ("router.bias", 0)}
    with torch.no_grad():
        before = model(X)
    scores = [float(unit != NEVER) for unit in range(EXPERTS)]
    apply(model, Narrow(width.name, by=1, scores={width.name: scores}), (X,))
    assert model.up.shape[0] == model.router.out_features == model.router.weight.shape[0] == 3
    with torch.no_grad():
        assert torch.equal(model(X), before)


@each
def test_what_cannot_be_is_refused(kind: type[Mixture]) -> None:
    """Fewer experts than are chosen; a new one, which would take its share from the others."""
    model = made(kind)
    name = experts(model).name
    with pytest.raises(EditError, match="at least 2 and fewer"):
        apply(model, Narrow(name, to=1), (X,))
    with pytest.raises(EditError, match="mixes over this width"):
        apply(model, Widen(name, by=1), (X,))
    assert model.up.shape[0] == EXPERTS


def test_numbers_that_are_computed_with_pin_their_axis() -> None:
    """An expert's own number in the result: taking one out would renumber the others."""
    with pytest.raises(PinnedError, match="named by number"):
        apply(made(Weighted), Narrow("router", by=1), (X,))
