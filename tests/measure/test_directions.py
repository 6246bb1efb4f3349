"""Rows for new units: against brute force, in closed form, on the whole zoo, and undisturbed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests import zoo
from tests.laws.world import NAMES, calm, difference, mapped, outputs
from torch import Tensor, nn

from neuroexapt import Widen, apply, map_axes
from neuroexapt.capture.run import named_tensors
from neuroexapt.errors import MeasureError
from neuroexapt.guard import transaction
from neuroexapt.measure import directions, growth_directions
from neuroexapt.measure.newcomers import reader_gradients, real, site_of
from neuroexapt.testing import changes, snapshot

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class Gated(nn.Module):
    """Two makers of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


class Twice(nn.Module):
    """A reader that is called twice, beside another one, with what it puts out overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.read, self.other = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).tanh()
        return self.read(y).relu_() + self.read(y.square()) + self.other(input=y)


class Conv1D(nn.Module):
    """A linear layer with a transposed weight, as GPT-2 has it in transformers."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(into, out)),
            nn.Parameter(torch.zeros(out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)), (6,), "0.out"),
    "transposed": (
        lambda: nn.Sequential(Conv1D(5, 6), nn.GELU(), Conv1D(3, 5)),
        (6,),
        "0.out",
    ),
    "gated": (Gated, (6,), "gate.out"),
    "twice": (Twice, (6,), "body.out"),
    "conv": (conv, (2, 8, 8), "0.out"),
    "flattened": (conv, (2, 8, 8), "4.out"),
}


def built(net: str) -> tuple[nn.Module, list[Batch], str]:
    """A net in double precision and in training mode, its batches and its width."""
    make, shape, width = NETS[net]
    torch.manual_seed(3)
    model = make().double()
    batches = [(torch.randn(16, *shape).double(), torch.randn(16, 3).double()) for _ in range(3)]
    return model.train(), batches, width


@pytest.mark.parametrize("net", NETS)
def test_gradients_of_old_units_are_those_of_the_readers(net: str) -> None:
    """Entry by entry what backward gives."""
    model, batches, at = built(net)
    site = site_of(model, loss_fn, map_axes(model, batches[0][:1]), at)
    found = reader_gradients(site, *real(site, batches[0]))
    loss_fn(model, batches[0]).backward()
    total = sum(float(r.module.weight.grad.square().sum()) for r in site.readers)  # type: ignore[union-attr, operator]
    assert float(found.square().sum()) == pytest.approx(total)


@pytest.mark.parametrize("net", NETS)
def test_the_best_candidate_is_the_one_brute_force_finds(
    net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each candidate is really added, and backward gives its columns; answers by least squares."""
    monkeypatch.setattr(directions, "_POOL", 7)
    monkeypatch.setattr(directions, "_RIDGE", 1e-9)  # brute force has none
    model, batches, at = built(net)
    axes = map_axes(model, batches[0][:1])
    site = site_of(model, loss_fn, axes, at)
    size, pool = site.width.size, directions._random_pool(site, 7)
    worth = []
    for candidate in range(len(pool) * size):
        rows = directions._rows(site, pool, [candidate])
        worth.append(_worth(model, batches, at, rows, size))
    chosen = growth_directions(model, loss_fn, batches, axes, at, 1)
    worth = [value for value in worth if value == value]  # a candidate may be silent on the data
    assert _worth(model, batches, at, chosen, size) >= 0.99 * max(worth)
    assert max(worth) > 1.2 * sorted(worth)[len(worth) // 2]


def _worth(
    model: nn.Module, batches: list[Batch], at: str, rows: dict[str, Tensor], size: int
) -> float:
    """|E[g a']|^2 / E[a'^2] of one added unit, by adding it."""
    wide = copy.deepcopy(model)
    apply(wide, Widen(at, by=1, rows=rows), batches[0][:1])
    site = site_of(wide.train(), loss_fn, map_axes(wide, batches[0][:1]), at)
    answers, columns = [], []
    for batch in batches:
        seen, sent = real(site, batch)
        answers.append(directions.answers(site, seen))
        columns.append(reader_gradients(site, seen, sent))
    a, d = torch.cat(answers, 1), torch.stack(columns).mean(0)
    fit = torch.linalg.lstsq(a[:size].T, a[size]).solution
    left = a[size] - fit @ a[:size]
    return float((d[size] - fit @ d[:size]).square().sum() / left.square().mean())


def test_the_missing_direction_is_found_in_closed_form() -> None:
    """A linear student lacks one rank of its teacher: the row is along the input of that rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Identity(), nn.Linear(2, 4, bias=False))
    missing, out = torch.zeros(8), torch.randn(4)
    missing[3:5] = torch.tensor([0.6, -0.8])
    with torch.no_grad():
        model[0].weight[:, 3:5] = 0
    batches = []
    for _ in range(4):
        x = torch.randn(512, 8)
        batches.append((x, (model(x) + (x @ missing)[:, None] * out).detach()))
    axes = map_axes(model, batches[0][:1])
    rows = growth_directions(model, loss_fn, batches, axes, "0", 1, "gradient")
    row = rows["0.weight"][0]
    assert abs(float(row @ missing / row.norm())) > 0.99
    old = batches[0][0] @ model[0].weight.detach().T
    strength = (batches[0][0] @ row).std() / old.std(0).median()
    assert float(strength) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("kind", directions.KINDS)
def test_what_is_chosen_explains_more_than_what_is_drawn(kind: str) -> None:
    """Least squares on the new units' answers, on new data: how much of the error they can take."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 4))
    batches = [(x, teacher(x).detach()) for x in torch.randn(8, 256, 10).unbind()]
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(50):
        optimizer.zero_grad()
        loss_fn(model, batches[step % 4]).backward()
        optimizer.step()
    axes = map_axes(model, batches[0][:1])
    rows = growth_directions(model, loss_fn, batches[:4], axes, "0", 3, kind)
    assert _explained(model, Widen("0", by=3, rows=rows), batches[4:]) > 1.5 * _explained(
        model, Widen("0", by=3), batches[4:]
    )


@torch.no_grad()
def _explained(model: nn.Module, edit: Widen, batches: list[Batch]) -> float:
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    left = y - model(x)
    wide = copy.deepcopy(model)
    apply(wide, edit, (x,))
    answers = torch.cat([wide[1](wide[0](x)), torch.ones(len(x), 1)], 1)  # type: ignore[index, operator]
    old = answers[:, [0, 1, 2, 3, 4, 5, -1]]
    errors = [left - a @ torch.linalg.lstsq(a, left).solution for a in (old, answers)]
    return float(errors[0].square().mean() - errors[1].square().mean())


@pytest.mark.parametrize("kind", directions.KINDS)
def test_choosing_leaves_no_trace(kind: str) -> None:
    """Parameters, gradients, buffers, flags, hooks and random states are as before, to the bit."""
    model, batches, at = built("conv")
    model.insert(3, nn.Dropout(0.5))  # type: ignore[operator]
    axes = map_axes(model, batches[0][:1])
    loss_fn(model, batches[0]).backward()
    before = snapshot(model)
    rows = growth_directions(model, loss_fn, batches, axes, at, 2, kind)
    assert changes(before, snapshot(model)) == []
    again = growth_directions(model, loss_fn, batches, axes, at, 2, kind)
    assert all(torch.equal(row, again[name]) for name, row in rows.items())


# Widths between plain layers, one of each kind of model: here an error would be a failure.
PLAIN = {
    ("mlp", "net.0.out"),
    ("reference_cnn", "features.8.out"),
    ("densenet", "block2.0.conv.out"),
    ("mobilenet", "block1.conv.0.out"),
    ("gpt", "blocks.0.attn.heads"),
    ("llama", "layers.1.mlp.gate_proj.out"),
    ("llama", "layers.0.self_attn.num_kv_heads"),
    ("vae", "decoder.2.out"),
    ("conv1d_net", "net.4.out"),
    ("conv3d_net", "conv1.out"),
    ("se_resnet", "se.fc.0.out"),
}


@pytest.mark.parametrize("name", NAMES)
def test_rows_fit_or_the_reason_is_given_on_the_whole_zoo(name: str) -> None:
    """Every width: rows that Widen takes exactly, or an error of ours before anything ran."""
    args, model = zoo.example(name), calm(name)
    for width in mapped(name).widths.values():
        try:
            rows = growth_directions(model, zoo.loss, [args], mapped(name), width.name, 2)
        except MeasureError:
            assert (name, width.name) not in PLAIN
            continue  # any other error fails
        twin = calm(name)
        before = outputs(twin, args)
        with transaction(twin) as tx:
            edit = Widen(width.name, by=2, rows=rows)
            tx.stage(edit.plan(mapped(name), named_tensors(twin)))
        assert difference(before, outputs(twin, args)) <= 1e-5, width.name


@pytest.mark.parametrize("kind", directions.KINDS)
def test_little_data_gives_some_rows_and_broken_data_an_error(kind: str) -> None:
    """One constant sample tells nothing apart; a NaN is named."""
    model, x = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), torch.zeros(1, 1)
    axes = map_axes(model, (x,))
    rows = growth_directions(model, loss_fn, [(x, x)], axes, "0", 2, kind)
    assert rows["0.weight"].shape == (2, 1)
    assert rows["0.weight"].isfinite().all()
    assert rows["0.weight"].abs().min() > 0
    with pytest.raises(MeasureError, match="NaN or infinite"):
        growth_directions(model, loss_fn, [(x / 0, x)], axes, "0", 2, kind)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        "candidates",
        "'layer_norm' mixing",
    ),
    "gated": (Gated, "gradient", "units made by gate.weight, up.weight"),
    "kind": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), "best", "kind='best'"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_be_chosen_is_said(row: str) -> None:
    """The error names what stands in the way."""
    make, kind, words = REFUSED[row]
    model, batch = make(), (torch.randn(4, 6), torch.randn(4, 3))
    axes = map_axes(model, batch[:1])
    with pytest.raises(MeasureError, match=words):
        growth_directions(model, loss_fn, [batch], axes, next(iter(axes.widths)), 2, kind)
