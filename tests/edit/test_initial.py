"""How new units start: as strong as their siblings, from rows that are given, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from neuroexapt import PruneWeights, Widen, apply, map_axes
from neuroexapt.edit.initial import split_positions
from neuroexapt.errors import EditError
from neuroexapt.measure import growth_directions

X = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def net() -> nn.Module:
    """Two convolutions with batch norm, flattened into a head."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(X))


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_new_units_answer_as_strongly_as_their_siblings(kind: str, scale: float) -> None:
    """The mean square before the activation is that of the old units at any size of weights."""
    torch.manual_seed(0)
    first: nn.Module = nn.Conv2d(3, 200, 3) if kind == "conv" else nn.Linear(40, 200)
    head: nn.Module = nn.Conv2d(200, 2, 1) if kind == "conv" else nn.Linear(200, 2)
    model = nn.Sequential(first, nn.ReLU(), head)
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[0].bias.zero_()  # type: ignore[operator]
    x = torch.randn(200, 3, 5, 5) if kind == "conv" else torch.randn(500, 40)
    apply(model, Widen("0", by=200), (x,))
    with torch.no_grad():
        answers = model[0](x).movedim(1, 0).flatten(1).square().mean(1)
    assert float(answers[200:].mean() / answers[:200].mean()) == pytest.approx(1.0, abs=0.1)


def test_given_rows_are_what_the_new_units_start_with() -> None:
    """For a maker, its bias and a norm's shift; readers are zero, and the function stays."""
    model = net()
    before = outputs(model)
    rows = {
        "0.weight": torch.randn(3, 3, 3, 3),
        "0.bias": torch.tensor([1.0, 2.0, 3.0]),
        "1.running_var": torch.tensor([4.0, 5.0, 6.0]),
    }
    apply(model, Widen("0", by=3, rows=rows), (X,))
    for name, row in rows.items():
        assert torch.equal(model.state_dict()[name][16:], row)
    assert float(model.state_dict()["1.weight"][16:].min()) == 1.0
    assert not model.state_dict()["3.weight"][:, 16:].any()
    torch.testing.assert_close(outputs(model), before)


def test_rows_go_through_a_product_of_axes() -> None:
    """A unit of several rows: heads of a fused projection get theirs in the order of the tensor."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 3 * 2 * 4), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return torch.as_tensor(self.out(mixed.transpose(1, 2).flatten(2)))

    model, x = Fused(), torch.randn(2, 3, 8)
    (heads,) = (w for w in map_axes(model, (x,)).widths.values() if w.size == 2)
    old, rows = model.qkv.weight.detach().clone(), torch.arange(12.0)[:, None].expand(12, 8)
    apply(model, Widen(heads.name, by=1, rows={"qkv.weight": rows}), (x,))
    new = model.qkv.weight.detach().view(3, 3, 4, 8)
    assert torch.equal(new[:, :2], old.view(3, 2, 4, 8))
    assert torch.equal(new[:, 2], rows.view(3, 4, 8))


ROW = torch.zeros(3, 3, 3, 3)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Widen("0", by=3, init="net2net"), "init='net2net'"),
        (Widen("0", by=3, init="split", rows={"0.weight": ROW}), 'rows together with init="split"'),
        (Widen("*", by=3, rows={"0.weight": ROW}), "rows together with the pattern"),
        (Widen("0", by=2, rows={"0.weight": ROW}), r"shape \(3, 3, 3, 3\).*shape \(2, 3, 3, 3\)"),
        (Widen("0", by=3, rows={"0.weight": ROW / 0}), "not all finite"),
        (Widen("0", by=3, rows={"3.weight": ROW}), "makes '0.out' or holds a number a unit"),
        (Widen("0", by=3, rows={"nowhere": ROW}), "makes '0.out' or holds a number a unit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_said_beforehand(edit: Widen, words: str) -> None:
    """Every problem is an EditError of `check`; the model stays."""
    model = net()
    state = copy.deepcopy(model.state_dict())
    assert edit.check(map_axes(model, (X,)))
    with pytest.raises(EditError, match=words):
        apply(model, edit, (X,))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_rows_beside_a_norm_over_the_width_are_refused() -> None:
    """There new entries have one place where they leave the norm alone."""
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    with pytest.raises(EditError, match="'layer_norm' mixes"):
        apply(model, Widen("0", by=2, rows={"0.weight": torch.zeros(2, 4)}), (torch.randn(3, 4),))


def test_readers_that_are_computed_cannot_be_shared_out() -> None:
    """A weight norm over a row would see the parts: refused with the tensor's name."""
    reader = nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), reader), torch.randn(3, 4)
    with pytest.raises(EditError, match=r"parametrizations\.weight\.original1"):
        apply(model, Widen("0", by=2, init="split"), (x,))
    assert apply(model, Widen("0", by=2), (x,)).max_difference < 1e-6


def test_a_pattern_splits_what_it_can() -> None:
    """Widths under a norm stay, and the description says so."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    )
    x = torch.randn(3, 4)
    done = apply(model, Widen("*", by=0.5, init="split"), (x,))
    assert (model[0].out_features, model[2].out_features) == (6, 7)
    assert "'0.out' stays: 'layer_norm' mixes" in done.description


@pytest.mark.parametrize("init", ["zero_out", "split"])
def test_new_units_of_a_pruned_layer_are_not_shut_out(init: str) -> None:
    """torch.nn.utils.prune's masks are open for new units, and those of split ones are copied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    for layer in (0, 2):
        prune.l1_unstructured(model[layer], "weight", 0.5)
    x = torch.randn(32, 4)
    done = apply(model, Widen("0", by=6, init=init), (x,))
    assert done.max_difference < 1e-6
    masks = model[0].weight_mask, model[2].weight_mask.T
    for mask in masks:
        old, new = mask[:6], mask[6:]
        origins = list(split_positions(6, 12)[6:])
        assert torch.equal(new, old[origins] if init == "split" else torch.ones_like(new))
        assert 0 < float(old.sum()) < old.numel()
    before = model[2].weight_orig.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    assert (model[2].weight_orig - before)[:, 6:].abs().max() > 0


def test_rows_for_a_layer_with_masks_are_tried_without_them() -> None:
    """The candidates of a pruned layer are those of a dense one whose old units are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x, y = torch.randn(32, 4), torch.randn(32, 2)
    apply(model, PruneWeights("*", share=0.5), (x,))
    dense = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "nx_mask" not in k})
    found = [
        growth_directions(
            net,
            lambda m, batch: (m(batch[0]) - batch[1]).square().mean(),
            [(x, y)],
            map_axes(net, (x,)),
            "0",
            2,
        )
        for net in (model, dense)
    ]
    assert found[0].keys() == {"0.weight", "0.bias"}
    for name, row in found[0].items():
        torch.testing.assert_close(row, found[1][name])
    assert apply(model, Widen("0", by=2, rows=found[0]), (x,)).max_difference < 1e-6
