"""What removed units gave is given back, exactly where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuroexapt import AxisMap, Narrow, PruneWeights, apply, map_axes
from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import Width, find_readers, unit_of
from neuroexapt.errors import EditError, MeasureError
from neuroexapt.guard import transaction
from neuroexapt.measure import ReaderInputs, reader_inputs
from neuroexapt.testing import Row, check_cell
from tests import zoo
from tests.laws.world import NAMES, calm, difference, mapped, outputs


def no_loss(model: nn.Module, batch: Any) -> Tensor:
    """What is measured does not depend on the loss."""
    model(*batch)
    return torch.zeros(())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Experts(nn.Module):
    """Two experts in one batched product, each with rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Parameter(torch.randn(2, 6, 3))
        self.shift = nn.Parameter(torch.randn(2, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x)).unflatten(0, (2, -1))
        return torch.baddbmm(self.shift, hidden, self.down)


class Tagger(nn.Module):
    """An LSTM whose hidden units are read by itself at the next step and by a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Transposed(nn.Module):
    """A weight of shape (in, out), with its bias added by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 3))
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) @ self.down + self.shift


def conv(reader: nn.Module, channels: int = 6) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, channels, 3), nn.ReLU(), reader)


# name: model, input, the width that is narrowed, the weight that reads it
READERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),
        (64, 4),
        "0.out",
        "2.weight",
    ),
    "linear over time": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)),
        (8, 5, 4),
        "0.out",
        "2.weight",
    ),
    "in, out": (Transposed, (64, 4), "up.out", "down"),
    "experts": (Experts, (64, 4), "up.out", "down"),
    "conv": (lambda: conv(nn.Conv2d(6, 3, 3)), (6, 2, 9, 8), "0.out", "2.weight"),
    "padded, strided, dilated": (
        lambda: conv(nn.Conv2d(6, 3, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1))),
        (6, 2, 9, 8),
        "0.out",
        "2.weight",
    ),
    "circular": (
        lambda: conv(nn.Conv2d(6, 3, 3, padding=1, padding_mode="circular")),
        (6, 2, 9, 8),
        "0.out",
        "2.weight",
    ),
    "grouped": (
        lambda: conv(nn.Conv2d(12, 4, 3, padding=1, groups=2), 12),
        (6, 2, 9, 8),
        "0.out",
        "2.weight",
    ),
    "transposed": (
        lambda: conv(nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1, output_padding=1)),
        (6, 2, 9, 8),
        "0.out",
        "2.weight",
    ),
    "transposed, dilated": (
        lambda: conv(nn.ConvTranspose2d(6, 3, 2, stride=3, dilation=2)),
        (6, 2, 9, 8),
        "0.out",
        "2.weight",
    ),
    "flattened": (
        lambda: conv(nn.Sequential(nn.Flatten(), nn.Linear(6 * 42, 3))),
        (300, 2, 9, 8),
        "0.out",
        "2.1.weight",
    ),
    "recurrent": (Tagger, (16, 5, 3), "rnn.hidden_size", "rnn.weight_hh_l0"),
}

each_reader = pytest.mark.parametrize("name", READERS)


def built(name: str) -> tuple[nn.Module, Tensor, AxisMap, str, str]:
    make, shape, width, reader = READERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make().double()
    x = draw(*shape)
    axes = map_axes(model, (x,))
    names = {w for w in axes.widths if w == width or w.startswith(width.split(".")[0])}
    width = width if width in axes.widths else min(names)
    return model, x, axes, width, reader


def given(model: nn.Module, x: Tensor, axes: AxisMap, *, products: bool = False) -> ReaderInputs:
    parts = [x] if isinstance(model, Experts) else x.chunk(2)  # its experts go by row
    return reader_inputs(model, no_loss, [(part,) for part in parts], axes, products=products)


class Results:
    """The results of one weight's operator, bias left out, over all rows: (rows, out)."""

    def __init__(self, model: nn.Module, x: Tensor, reader: str) -> None:
        found = find_readers(map_axes(model, (x,)))[reader]
        self.model, self.x, self.reader = model, x, found

    def mean(self) -> Tensor:
        """Mean over rows and positions, from what the model itself computes."""
        named = named_tensors(self.model)
        weight, bias = named[self.reader.tensor], named[self.reader.bias]
        total: list[Tensor] = []
        owner = self.model.get_submodule(self.reader.tensor.rpartition(".")[0])

        def take(_m: nn.Module, _i: Any, out: Any) -> None:
            total.append(out.detach())

        handle = owner.register_forward_hook(take)
        with torch.no_grad():
            self.model.eval()(self.x)
        handle.remove()
        out = total[0]
        if out.dim() == 4:
            return out.mean((0, 2, 3)) - bias
        if weight.dim() == 3:
            return out.mean(1, keepdim=True) - bias
        return out.flatten(0, -2).mean(0) - bias


@each_reader
def test_means_are_those_of_what_each_entry_multiplies(name: str) -> None:
    """The mean result is the sum of the weights times the means, whatever the operator."""
    if name == "recurrent":
        pytest.skip("no operator of the LSTM shows its products; see the constant units below")
    model, x, axes, _, reader = built(name)
    found = find_readers(axes)[reader]
    weight = named_tensors(model)[reader].detach()
    blocks = weight.reshape(found.blocks, -1, *weight.shape[1:])
    over = [d for d in range(1, blocks.dim()) if d != found.out + 1]
    expected = Results(model, x, reader).mean()
    mean = (blocks * given(model, x, axes).means[reader]).sum(over)
    torch.testing.assert_close(mean.reshape(expected.shape), expected, rtol=1e-9, atol=1e-9)


@each_reader
@pytest.mark.parametrize("fit", [False, True], ids=["mean", "least squares"])
def test_the_mean_result_stays(name: str, fit: bool) -> None:
    """With units gone the reader's mean result is what it was, on the data it was measured on."""
    if name == "recurrent":
        pytest.skip("its inputs change with its own results")
    model, x, axes, width, reader = built(name)
    named = named_tensors(model)
    bias = find_readers(axes)[reader].bias
    before = Results(model, x, reader).mean() + named[bias].detach()
    inputs = given(model, x, axes, products=fit)
    plain = Narrow(width, by=2, score="random")
    full = Narrow(width, by=2, score="random", means=inputs.means, products=inputs.products)
    twin, _, _, _, _ = built(name)
    apply(twin, plain, (x,))
    apply(model, full, (x,))
    after = Results(model, x, reader).mean() + named_tensors(model)[bias].detach()
    other = Results(twin, x, reader).mean() + named_tensors(twin)[bias].detach()
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert (other - before).abs().max() > 1e-3  # without it the mean moves


def doubled(name: str) -> tuple[nn.Module, Tensor, AxisMap, str, Width]:
    """A model whose last unit is made as the first one is, and read by weights of its own."""
    model, x, axes, at, _ = built(name)
    width, named = axes.widths[at], named_tensors(model)
    for place in width.appearances:
        if place.roles & {"producer", "elementwise"} or place.tensor.startswith("rnn.weight"):
            units = unit_of(axes.tensors[place.tensor][place.dim], at)
            if "consumer" in place.roles and place.dim == find_readers(axes)[place.tensor].dim:
                continue
            first, last = (np.flatnonzero(units == u) for u in (0, width.size - 1))
            with torch.no_grad():
                tensor = named[place.tensor]
                tensor.index_copy_(
                    place.dim,
                    torch.from_numpy(last),
                    tensor.index_select(place.dim, torch.from_numpy(first)),
                )
    return model, x, axes, at, width


@each_reader
def test_a_copy_is_folded_without_loss(name: str) -> None:
    """A unit that repeats another one can go: least squares hands its weights to the other."""
    model, x, axes, at, width = doubled(name)
    inputs = given(model, x, axes, products=True)
    before = outputs(model, (x,))
    scores = {at: [float(unit < width.size - 1) for unit in range(width.size)]}
    plain, _, _, _, _ = doubled(name)
    apply(plain, Narrow(at, by=1, scores=scores), (x,))
    edit = Narrow(
        at, by=1, scores=scores, means=inputs.means, products=inputs.products, ridge=1e-12
    )
    done = apply(model, edit, (x,))
    assert "least squares" in done.description
    assert difference(before, outputs(model, (x,))) < 1e-8
    assert difference(before, outputs(plain, (x,))) > 1e-3


def test_least_squares_is_the_minimum() -> None:
    """The new weights minimise the squared error plus the ridge, as a generic solver finds."""
    model, x, axes, at, reader = built("linear")
    weight, bias = (named_tensors(model)[n].detach().clone() for n in (reader, "2.bias"))
    hidden = torch.relu(model[0](x)).detach()  # type: ignore[index, operator]
    inputs = given(model, x, axes, products=True)
    scores = {at: [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]}
    edit = Narrow(at, to=4, scores=scores, means=inputs.means, products=inputs.products, ridge=0.1)
    apply(model, edit, (x,))
    kept, gone = [1, 3, 4, 5], [0, 2]
    centred = hidden - hidden.mean(0)
    held = 0.1 * centred[:, kept].var(0, unbiased=False).mean()
    # Minimise |gone - kept B|^2 / n + held |B|^2: rows of sqrt(held) stand for the ridge.
    rows = torch.cat([centred[:, kept], (held * len(x)).sqrt() * torch.eye(4).double()])
    goal = torch.cat([centred[:, gone], torch.zeros(4, 2).double()])
    slope = torch.linalg.lstsq(rows, goal).solution
    expected = weight[:, kept] + weight[:, gone] @ slope.T
    torch.testing.assert_close(model[2].weight.detach(), expected)  # type: ignore[index]
    lost = (hidden @ weight.T - hidden[:, kept] @ expected.T).mean(0)
    torch.testing.assert_close(model[2].bias.detach(), bias + lost)  # type: ignore[index]


# --- units that are constant ---------------------------------------------------------------------


def still(name: str, width: Width, unit: int) -> nn.Module:
    """A zoo model in which a unit has one value, whatever the input."""
    model, axes = calm(name, torch.float64), mapped(name)
    named = named_tensors(model)
    generator = torch.Generator().manual_seed(1)
    for place in width.appearances:
        units = torch.from_numpy(unit_of(axes.tensors[place.tensor][place.dim], width.name))
        at = torch.nonzero(units == unit)[:, 0]
        tensor = named[place.tensor].data
        if "consumer" in place.roles or not tensor.is_floating_point():
            continue
        if "producer" in place.roles:
            tensor.index_fill_(place.dim, at, 0)
        else:
            shape = [len(at) if d == place.dim else n for d, n in enumerate(tensor.shape)]
            values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
            tensor.index_copy_(place.dim, at, values)
    return model


def is_free(model: nn.Module, axes: AxisMap, width: Width, found: ReaderInputs, unit: int) -> bool:
    """Whether the unit is constant for readers that can be shifted and do not pad it; and not 0."""
    readers, nonzero = find_readers(axes), False
    convs = {f"{p}.weight": m for p, m in model.named_modules() if hasattr(m, "padding")}
    for place in width.appearances:
        reader = readers.get(place.tensor)
        if "consumer" not in place.roles or reader is None:
            continue
        padding: Any = getattr(convs.get(place.tensor), "padding", 0)
        padded = any(padding) if isinstance(padding, tuple) else bool(padding)
        if not reader.shifted or padded or isinstance(convs.get(place.tensor), nn.ConvTranspose2d):
            return False
        units = unit_of(axes.tensors[place.tensor][place.dim], width.name)
        at = torch.from_numpy(np.flatnonzero(units[:: reader.inner] == unit))
        products = found.products[place.tensor][0]
        squares = products.diagonal()[at] / products[-1, -1]
        mean = products[at, -1] / products[-1, -1]
        if bool(((squares - mean.square()).abs() > 1e-12).any()):
            return False
        nonzero |= bool((mean.abs() > 1e-3).any())
    return nonzero


# How many widths of a model such a unit can be planted in.
CONSTANT: dict[str, int] = {
    "reference_cnn": 2, "small_cnn": 1, "resnet_bottleneck": 7, "densenet": 1, "mobilenet": 5,
    "unet": 1, "gpt": 6, "gpt_nano": 2, "vit": 6, "mlp": 1, "se_resnet": 1, "groupnorm_cnn": 1,
    "conv1d_net": 1, "conv3d_net": 1, "mixer": 4, "hardcoded_flatten": 1, "vae": 1,
    "preact_dict": 1, "inception_branches": 7, "encoder_layer": 1, "resnet_basic": 0, "gru": 1,
    "llama": 0, "bert": 7, "encoder_decoder": 2, "moe": 3, "graph_net": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_unit_goes_without_a_trace(name: str) -> None:
    """Its value moves into the biases, or running means, behind its readers."""
    args = zoo.example(name, batch=6, dtype=torch.float64)
    axes, seen = mapped(name), 0
    for width in axes.widths.values():
        if any(mixer.kind != "dot" for mixer in width.mixers) or width.size < 2:
            continue
        unit = width.size // 2
        model = still(name, width, unit)
        found = reader_inputs(model, no_loss, [args], axes, [width.name], products=True)
        if not is_free(model, axes, width, found, unit):
            continue
        seen += 1
        before = outputs(model, args)
        scores = {width.name: [float(u != unit) for u in range(width.size)]}
        edit = Narrow(width.name, by=1, scores=scores, means=found.means)
        with transaction(model) as tx:
            tx.stage(edit.plan(axes, named_tensors(model)))
        assert difference(before, outputs(model, args)) < 1e-9, width.name
    assert seen == CONSTANT.get(name, seen)


def test_batch_norm_takes_the_mean_in_both_modes() -> None:
    """A convolution without bias gives the mean to the running mean behind it."""
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4)
    ).double()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, 1.5  # type: ignore[operator]
    x = draw(4, 2, 8, 8)
    model(x)
    axes = map_axes(model, (x,))
    found = reader_inputs(model, no_loss, [(x,)], axes)
    before = {mode: outputs(model, (x,), mode) for mode in (False, True)}
    scores = {"0.out": [1.0, 1.0, 0.0, 1.0, 1.0]}
    done = apply(model, Narrow("0", by=1, scores=scores, means=found.means), (x,))
    assert "3.running_mean" in done.description
    for mode, expected in before.items():
        assert difference(expected, outputs(model, (x,), mode)) < 1e-10


# --- what is not made up for, and what is refused ------------------------------------------------


def test_readers_without_a_place_for_it_are_named() -> None:
    """No bias, no batch norm: the description says so, and nothing else is touched."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2, bias=False)).double()
    x = draw(8, 4)
    axes = map_axes(model, (x,))
    found = given(model, x, axes)
    weight = model[2].weight.detach().clone()  # type: ignore[operator]
    edit = Narrow("0", to=4, scores={"0.out": [1, 1, 1, 1, 0, 0]}, means=found.means)
    done = apply(model, edit, (x,))
    assert "not made up for: '2.weight' (it has neither a bias" in done.description
    assert torch.equal(model[2].weight, weight[:, :4])  # type: ignore[arg-type]


def test_a_tied_reader_is_not_fitted() -> None:
    """A fit would change the embedding that is the same tensor."""
    model, args = calm("gpt_nano"), zoo.example("gpt_nano")
    axes = mapped("gpt_nano")
    found = reader_inputs(model, no_loss, [args], axes, products=True)
    edit = Narrow("*head_size", by=1, means=found.means, products=found.products)
    done = apply(model, edit, args)
    assert "'transformer.wte.weight' (its weight makes units as well" in done.description
    assert model.lm_head.weight is model.transformer["wte"].weight  # type: ignore[index, union-attr]


def test_a_weight_norm_is_not_guessed_at() -> None:
    """What is read is computed from the weight: it is named, not measured."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.utils.parametrizations.weight_norm(model[2])
    x = torch.randn(4, 4)
    axes = map_axes(model, (x,))
    readers = find_readers(axes)
    assert {r.why_not for r in readers.values()} <= {"read in a form computed from it"}
    assert not reader_inputs(model, no_loss, [(x,)], axes).means


def test_a_masked_reader_keeps_its_mask() -> None:
    """The mean is matched and the fit made with what the mask lets through."""
    model, x, _, at, _ = built("linear")
    apply(model, PruneWeights("2", share=0.5, score="random"), (x,))
    mask = model.get_buffer("2.nx_mask_weight").clone()
    axes = map_axes(model, (x,))
    found = given(model, x, axes, products=True)
    before = model(x).detach().mean(0)
    scores = {at: [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]}
    edit = Narrow(at, by=2, scores=scores, means=found.means, products=found.products)
    apply(model, edit, (x,))
    assert torch.equal(model.get_buffer("2.nx_mask_weight"), mask[:, [1, 3, 4, 5]])
    assert not named_tensors(model)["2.weight"][~mask[:, [1, 3, 4, 5]]].any()
    torch.testing.assert_close(model(x).detach().mean(0), before)


def test_inputs_are_seen_under_autocast() -> None:
    """The weights that are read there are copies in half precision."""
    model, x, axes, _, _ = built("linear")
    model, x = model.float(), x.float()

    def half(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return no_loss(model, batch)

    found = reader_inputs(model, half, [(x,)], axes).means["2.weight"]
    expected = given(model, x, axes).means["2.weight"]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


def test_nothing_measured_is_said() -> None:
    """A generator that has been read to its end gives no batch."""
    model, _, axes, _, _ = built("linear")
    with pytest.raises(MeasureError, match="no batch"):
        reader_inputs(model, no_loss, iter(()), axes)


def test_a_model_without_data_is_narrowed_alone() -> None:
    """On the meta device there is nothing to make up for."""
    model, x, axes, at, _ = built("linear")
    found = given(model, x, axes, products=True)
    ghost = model.to("meta")
    edit = Narrow(at, by=2, score="random", means=found.means, products=found.products)
    done = apply(ghost, edit, (x.to("meta"),))
    assert "it has no values yet" in done.description
    assert [p.shape[0] for p in ghost.parameters()] == [4, 4, 3, 3]


def _wrong(model: nn.Module, x: Tensor) -> Mapping[str, Narrow]:
    found = given(model, x, map_axes(model, (x,)), products=True)
    mean, products = found.means["2.weight"], found.products["2.weight"]
    return {
        "means of another": Narrow("0", by=1, means={"9.weight": mean}),
        "products without means": Narrow("0", by=1, products={"2.weight": products}),
        "old means": Narrow("0", by=1, means={"2.weight": mean[..., :-1]}),
        "old products": Narrow(
            "0", by=1, means=found.means, products={"2.weight": products[:, 1:, 1:]}
        ),
        "no ridge": Narrow("0", by=1, means=found.means, ridge=0.0),
        "no such score": Narrow("0", by=1, score="taylor"),
        "half a multiple": Narrow("0", by=1, multiple_of=0),
    }


@pytest.mark.parametrize("case", _wrong(built("linear")[0], built("linear")[1]))
def test_what_does_not_fit_is_refused(case: str) -> None:
    """Before anything is written, with the name of what is wrong."""
    model, x, _, _, _ = built("linear")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(EditError):
        apply(model, _wrong(model, x)[case], (x,))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_several_widths_at_once() -> None:
    """With a glob the biases are shifted and narrowed themselves: constant units leave no trace."""
    layers = [nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[1], layer.bias[1] = 0.0, 2.0  # type: ignore[operator]
    x = draw(8, 3)
    before = outputs(model, (x,))
    found = given(model, x, map_axes(model, (x,)))
    scores = {"0.out": [1, 0, 1, 1, 1, 1], "2.out": [1, 0, 1, 1, 1]}
    apply(model, Narrow("*", by=1, scores=scores, means=found.means), (x,))
    assert [p.shape[0] for p in model.parameters()] == [5, 5, 4, 4, 2, 2]
    assert difference(before, outputs(model, (x,))) < 1e-12


LAWS = ("mlp", "resnet_basic", "unet", "gpt_nano", "llama", "lstm", "moe", "graph_net")


@pytest.mark.parametrize("name", LAWS)
def test_every_law_holds_with_least_squares(name: str) -> None:
    """All widths of a model at once, every reader fitted: each law of an edit is kept."""
    entry = zoo.entry(name)
    args = entry.args(4)

    def fitted(axes: AxisMap, model: nn.Module) -> list[Narrow]:
        found = reader_inputs(model, no_loss, [args], axes, products=True)
        return [Narrow("*", by=1, means=found.means, products=found.products)]

    cell = check_cell(fitted, Row(name, entry.make, args), maps=partial(mapped, name))
    assert cell.kept, cell.reason
