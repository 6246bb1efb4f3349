"""Masks hold single weights at zero: chosen as told, kept through training, copies and edits."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt import (
    InsertResidual,
    Narrow,
    PruneWeights,
    Widen,
    apply,
    map_axes,
    transaction,
)
from neuroexapt.capture.masks import MASK, is_mask
from neuroexapt.edit import Edit, MakePermanent, grafted_class
from neuroexapt.edit.sparsity import lamp
from neuroexapt.edit.weights import found_weights
from neuroexapt.errors import EditError, UnknownPlaceError, VerifyError
from neuroexapt.measure import dense_gradients
from neuroexapt.testing.snapshot import changes, snapshot
from tests import zoo
from tests.laws.world import NAMES, mapped, outputs

FAMILIES = ("resnet_bottleneck", "densenet", "mobilenet", "unet", "groupnorm_cnn", "shared_module")
FAMILIES += ("gpt_nano", "llama", "encoder_layer", "lstm", "moe")
every = pytest.mark.parametrize("name", NAMES)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Masks by the name of their parameter, ties included."""
    buffers = model.named_buffers(remove_duplicate=False)
    return {name.replace(MASK, ""): mask for name, mask in buffers if is_mask(name)}


def stored(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def all_zero(model: nn.Module) -> bool:
    """Whether every masked entry is exactly zero where it is stored."""
    kept = stored(model)
    return all(bool((kept[name][~mask] == 0).all()) for name, mask in masks_of(model).items())


def zeroed(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A model without masks whose weights are zero where the masks are."""
    with torch.no_grad():
        for name, mask in masks.items():
            stored(model)[name][~mask] = 0
    return model


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.body(x)))


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def mlp(dtype: torch.dtype = torch.float32) -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return MLP().to(dtype)


def pruned(share: float = 0.5, **kwargs: Any) -> MLP:
    model = mlp()
    apply(model, PruneWeights("*", share=share, **kwargs), (X,))
    return model


# --- the whole zoo ---------------------------------------------------------------------------


@every
def test_a_pruned_model_is_the_dense_model_with_zeros(name: str) -> None:
    """To the last roundings, in both modes; and exactly the share asked for is zero."""
    model, args = zoo.build(name), zoo.example(name)
    with transaction(model) as tx:
        done = tx.apply(PruneWeights("*", share=0.5), args, axes=mapped(name))
    masks = masks_of(model)
    dense = zeroed(zoo.build(name), masks)
    for training in (False, True):
        found, expected = outputs(model, args, training), outputs(dense, args, training)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    chosen = found_weights(mapped(name), "*")
    total = sum(stored(model)[n].numel() for n in chosen)
    assert sum(int((~masks[n]).sum()) for n in chosen) == int(total / 2 + 0.5)
    assert f"{int(total / 2 + 0.5):,} of {total:,} weights are zero (50.0 %)" in done.description


@every
def test_only_weights_that_multiply_are_pruned_by_a_pattern(name: str) -> None:
    """No bias, norm, position, gate or embedding: what a linear, a convolution, attention or a
    recurrent kernel reads with is left."""
    chosen = set(found_weights(mapped(name), "*"))
    model = zoo.build(name)
    linear: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            linear.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            linear.add(id(module.in_proj_weight))
        elif isinstance(module, nn.RNNBase):
            linear.update(id(w) for n, w in module.named_parameters() if "weight" in n)
    assert chosen == {n for n, p in model.named_parameters() if id(p) in linear}


@pytest.mark.parametrize("name", FAMILIES)
def test_widths_change_with_a_mask_as_without(name: str) -> None:
    """The map of a masked model has the same widths, roles and pins, and a width that grows
    brings no masked entry."""
    model, args = zoo.build(name), zoo.example(name)
    apply(model, PruneWeights("*", share=0.5), args)
    axes, plain = map_axes(model, args), mapped(name)

    def places(entry: Any) -> list[Any]:
        return [place for place in entry.appearances if not is_mask(place.tensor)]

    for old, new in ((plain.widths, axes.widths), (plain.pinned, axes.pinned)):
        assert {n: (e.size, places(e)) for n, e in new.items()} == {
            n: (e.size, places(e)) for n, e in old.items()
        }
    assert {n: w.mixers for n, w in axes.widths.items()} == {
        n: w.mixers for n, w in plain.widths.items()
    }
    zeros = {n: int((~mask).sum()) for n, mask in masks_of(model).items()}
    before = outputs(model, args)
    grown = next(n for n in axes.widths if not Widen(n, by=1.0).check(axes))
    with transaction(model) as tx:
        tx.apply(Widen(grown, by=1.0), args, axes=axes)
    assert {n: int((~mask).sum()) for n, mask in masks_of(model).items()} == zeros
    for weight, mask in masks_of(model).items():
        assert mask.shape == stored(model)[weight].shape
    torch.testing.assert_close(outputs(model, args), before, rtol=1e-4, atol=1e-5)


# --- which weights ---------------------------------------------------------------------------


def test_a_global_share_is_one_threshold_over_all_weights() -> None:
    """Brute force: sort every magnitude."""
    dense, model = mlp(), pruned(0.3)
    weights = {n: p.detach() for n, p in dense.named_parameters() if n in masks_of(model)}
    everything = torch.cat([w.abs().flatten() for w in weights.values()]).sort().values
    threshold = everything[int(0.3 * everything.numel() + 0.5)]
    assert set(weights) == {"body.0.weight", "head.weight"}
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, weights[name].abs() >= threshold)


def test_a_share_by_layer_is_that_share_in_each() -> None:
    model = pruned(0.25, scope="layer")
    for name, mask in masks_of(model).items():
        weight = stored(mlp())[name].abs()
        assert int((~mask).sum()) == int(0.25 * weight.numel() + 0.5)
        assert weight[mask].min() >= weight[~mask].max()


@pytest.mark.parametrize("count", [0.1, 0.5, 0.9])
def test_equal_weights_are_pruned_to_the_exact_count(count: float) -> None:
    """Ties do not take more or fewer than asked for."""
    model = nn.Linear(10, 10)
    nn.init.ones_(model.weight)
    apply(model, PruneWeights("weight", share=count), (torch.randn(3, 10),))
    assert int((model.weight == 0).sum()) == round(100 * count)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_n_of_every_m_inputs_are_kept(n: int, m: int) -> None:
    """The best n of each group, along the inputs of a linear, a convolution and its transpose."""
    layers = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ConvTranspose2d(16, 8, 2, stride=2),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )
    before = [layers[i].weight.detach().clone() for i in (0, 1, 3)]
    apply(layers, PruneWeights("*", pattern=(n, m)), (torch.randn(2, 8, 2, 2),))
    for i, weight, dim in zip((0, 1, 3), before, (1, 0, 1), strict=True):
        groups = weight.abs().movedim(dim, -1).reshape(-1, m)
        mask = layers[i].nx_mask_weight.movedim(dim, -1).reshape(-1, m)
        assert (mask.sum(1) == n).all()
        lowest_kept = groups.masked_fill(~mask, torch.inf).amin(1)
        assert (lowest_kept >= groups.masked_fill(mask, 0).amax(1)).all()


def test_a_pattern_leaves_and_names_what_it_does_not_fit() -> None:
    """By a glob; a weight that is named is refused, with the figures."""
    layers = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    args = (torch.randn(3, 6),)
    done = apply(layers, PruneWeights("*", pattern=(2, 4)), args)
    assert "'0.weight' stays: 6 inputs" in done.description
    assert set(masks_of(layers)) == {"1.weight"}
    with pytest.raises(EditError, match=r"0.weight: got 6 inputs; needed .* 4 divides.*to 8"):
        apply(layers, PruneWeights("0", pattern=(2, 4)), args)


def test_lamp_is_its_formula() -> None:
    """Brute force over every pair of weights."""
    weight = torch.randn(7, 5, dtype=torch.float64)
    squares = weight.flatten().square()
    expected = [float(s / squares[squares >= s].sum()) for s in squares]
    assert lamp(weight).flatten().tolist() == pytest.approx(expected)


def test_scores_of_the_user_decide() -> None:
    """The lowest scores go, whatever the weights are."""
    model = mlp()
    scores = {"body.0.weight": torch.rand(16, 6), "head.weight": torch.rand(3, 16) + 1}
    apply(model, PruneWeights("*", share=0.5, scores=scores), (X,))
    kept = masks_of(model)
    everything = torch.cat([s.flatten() for s in scores.values()]).sort().values
    for name, mask in kept.items():
        assert torch.equal(mask, scores[name] >= everything[72])


def test_random_scores_follow_their_seed() -> None:
    first, same, other = (pruned(score="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.body[0].nx_mask_weight, same.body[0].nx_mask_weight)
    assert not torch.equal(first.body[0].nx_mask_weight, other.body[0].nx_mask_weight)


def test_places_and_what_is_skipped() -> None:
    """Names, paths, globs; a path without such weights means the module's own."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    args = (torch.randint(0, 9, (3, 5)),)
    axes = map_axes(model, args)
    assert found_weights(axes, "*") == ("1.weight", "2.weight")
    assert found_weights(axes, "") == ("1.weight", "2.weight")
    assert found_weights(axes, "*", ("2",)) == ("1.weight",)
    assert found_weights(axes, "0") == ("0.weight",)
    assert found_weights(axes, "1.bias") == ("1.bias",)
    with pytest.raises(UnknownPlaceError, match=r"near names: .*'1.weight'"):
        found_weights(axes, "1.wieght")
    with pytest.raises(UnknownPlaceError):
        found_weights(axes, "*", ("fc",))
    with pytest.raises(EditError, match="none of them a weight"):
        found_weights(axes, "*.bias")


def test_pruning_goes_on_from_what_is_pruned() -> None:
    """A weight once masked stays masked; less than there is, is refused."""
    model = pruned(0.4)
    before = {n: mask.clone() for n, mask in masks_of(model).items()}
    apply(model, PruneWeights("*", share=0.7), (X,))
    after = masks_of(model)
    assert all(not after[n][~mask].any() for n, mask in before.items())
    assert sum(int((~mask).sum()) for mask in after.values()) == int(0.7 * 144 + 0.5)
    with pytest.raises(EditError, match=r"share=0.5 of 144 weights, 101 of which are masked"):
        apply(model, PruneWeights("*", share=0.5), (X,))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (PruneWeights("*"), "exactly one"),
        (PruneWeights("*", share=0.5, pattern=(2, 4)), "exactly one"),
        (PruneWeights("*", share=1.0), "between 0 and 1"),
        (PruneWeights("*", share=True), "between 0 and 1"),
        (PruneWeights("*", pattern=(4, 4)), "0 < n < m"),
        (PruneWeights("*", share=0.5, scope="row"), "one of"),
        (PruneWeights("*", share=0.5, score="l1"), "one of"),
        (PruneWeights("*", share=0.99), "a weight left in every tensor"),
        (PruneWeights("*", share=0.5, scores={"head.weight": torch.ones(3, 16)}), "no scores"),
        (PruneWeights("head", share=0.5, scores={"head.weight": torch.ones(3)}), r"\(3, 16\)"),
        (MakePermanent("head"), "have been pruned"),
    ],
    ids=repr,
)
def test_what_cannot_be_pruned_is_refused_before_anything_is_written(
    edit: Edit, words: str
) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(EditError, match=words):
        apply(model, edit, (X,))
    assert changes(before, snapshot(model)) == []


def test_all_problems_are_listed() -> None:
    found = PruneWeights("nowhere", share=2, scope="row", score="l1").check(map_axes(mlp(), (X,)))
    assert len(found) == 4


# --- training --------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_is_that_of_a_model_whose_gradients_are_masked(kind: str) -> None:
    """Twenty steps with momentum gathered before; the dense model is masked by hand."""
    model, dense = mlp(torch.float64), mlp(torch.float64)
    x, y = X.double(), torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()
    ours, theirs = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](dense.parameters())

    def step(net: nn.Module, optimizer: Any, masks: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        for name, mask in masks.items():
            grad = stored(net)[name].grad
            assert grad is not None
            grad *= mask
        optimizer.step()

    for _ in range(5):
        step(model, ours, {})
        step(dense, theirs, {})
    apply(model, PruneWeights("*", share=0.5), (x,), optimizer=ours)
    masks = masks_of(model)
    zeroed(dense, masks)
    for name, mask in masks.items():
        for value in theirs.state[stored(dense)[name]].values():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                value *= mask
    for _ in range(20):
        step(model, ours, {})
        step(dense, theirs, masks)
    assert all_zero(model)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(stored(model)[name], parameter, rtol=1e-6, atol=1e-9)


def test_a_step_with_gradients_from_before_the_edit_moves_no_masked_weight() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    apply(model, PruneWeights("*", share=0.5), (X,), optimizer=optimizer)
    optimizer.step()
    assert all_zero(model)


def test_an_optimizer_that_moves_all_entries_does_not_move_the_function() -> None:
    """One that is not elementwise may fill the stored entries; the mask has the last word."""
    model = pruned()
    with torch.no_grad():
        for name, mask in masks_of(model).items():
            stored(model)[name][~mask] = torch.nan
    assert torch.equal(model.eval()(X), pruned().eval()(X)) or model(X).isnan().any()
    with torch.no_grad():
        for name, mask in masks_of(model).items():
            stored(model)[name][~mask] = 3.0
    assert torch.equal(model.eval()(X), pruned().eval()(X))
    apply(model, MakePermanent(), (X,))
    assert torch.equal(model.eval()(X), pruned().eval()(X))


# --- the model stays a model -----------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **kwargs: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.rnn = kind(6, 8, batch_first=True, **kwargs)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.rnn(self.embed(x))[0].mean(1)))


class Mixed(nn.Module):
    """Convolution, attention, cells, lists of parameters, a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.mix = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.maps = nn.ParameterList([nn.Parameter(torch.randn(8, 8) / 3)])
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.conv(x).transpose(1, 2))
        h = self.cell(x[:, 0], x[:, 1])
        return torch.as_tensor(self.second(self.first(F.linear(h, self.maps[0])).tanh()))


def _made(make: Callable[[], nn.Module], *args: Tensor) -> Callable[[], tuple[nn.Module, Any]]:
    def made() -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = make()
            model(*args)
            return model, args

    return made


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
IDS = torch.arange(15).view(3, 5) % 11
MODELS = {
    "lstm": _made(lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), IDS),
    "projected": _made(lambda: Recurrent(nn.LSTM, proj_size=4), IDS),
    "gru": _made(lambda: Recurrent(nn.GRU, bias=False), IDS),
    "mixed": _made(Mixed, torch.linspace(-1, 1, 72).view(3, 4, 6)),
}
kinds = pytest.mark.parametrize("kind", MODELS)


def sparse(kind: str) -> tuple[nn.Module, Any]:
    """A pruned model that has been trained for a step."""
    model, args = MODELS[kind]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    apply(model, PruneWeights("*", share=0.5), args, optimizer=optimizer)
    model(*args).square().sum().backward()
    optimizer.step()
    assert all_zero(model)
    return model.eval(), args


def out(model: nn.Module, args: Any) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(*args))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


@kinds
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
def test_a_copy_is_masked_too(kind: str, way: Callable[[nn.Module], nn.Module]) -> None:
    """Also a copy of the copy, and training the copy leaves the model alone."""
    model, args = sparse(kind)
    expected = out(model, args)
    twin = way(way(model))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(out(twin, args), expected)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    twin(*args).square().sum().backward()
    optimizer.step()
    assert all_zero(twin)
    assert torch.equal(out(model, args), expected)


@kinds
def test_a_state_dict_holds_zeros_and_masks(kind: str) -> None:
    """It goes into a model with the same edit, and other masks are overwritten."""
    model, args = sparse(kind)
    other, _ = MODELS[kind]()
    apply(other, PruneWeights("*", share=0.5, score="random"), args)
    assert not torch.equal(out(other, args), out(model, args))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(out(other, args), out(model, args))
    assert all_zero(other)


@kinds
def test_it_can_be_called_with_other_weights(kind: str) -> None:
    """``functional_call`` reads its stand-ins through the mask, and the model keeps its own."""
    model, args = sparse(kind)
    expected = out(model, args)
    doubled = {name: p.detach() * 2 for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(doubled[name])
        found = torch.func.functional_call(model, doubled, args)
    torch.testing.assert_close(found, out(twin, args))
    assert torch.equal(out(model, args), expected)


@kinds
@pytest.mark.filterwarnings("ignore:The tensor attribute")  # any recurrent module's, masked or not
def test_it_exports(kind: str) -> None:
    model, args = sparse(kind)
    program = torch.export.export(copy.deepcopy(model), args)
    torch.testing.assert_close(program.module()(*args), out(model, args))


@pytest.mark.parametrize("kind", ["mixed", "mlp"])
def test_it_compiles_as_one_graph_and_again_when_masks_change(kind: str) -> None:
    """Masks are inputs of the graph, so that one that changes is seen."""
    model, args = sparse(kind) if kind in MODELS else (mlp().eval(), (X,))
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    before = out(compiled, args)
    apply(compiled, PruneWeights("*", share=0.7), args)
    torch.testing.assert_close(out(compiled, args), out(model, args))
    assert not torch.allclose(out(compiled, args), before)
    apply(compiled, PruneWeights("*", share=0.8, scope="layer"), args)
    torch.testing.assert_close(out(compiled, args), out(model, args))
    apply(compiled, MakePermanent(), args)
    torch.testing.assert_close(out(compiled, args), out(model, args))
    torch._dynamo.reset()


@kinds
def test_names_identities_and_the_way_back(kind: str) -> None:
    """Every parameter is the object it was; taking the edit back restores every bit."""
    model, args = MODELS[kind]()
    optimizer = torch.optim.Adam(model.parameters())
    model(*args).square().sum().backward()
    optimizer.step()
    before, held = snapshot(model, optimizer), dict(model.named_parameters())
    with transaction(model, optimizer) as tx:
        tx.apply(PruneWeights("*", share=0.5), args)
        assert all(dict(model.named_parameters())[n] is p for n, p in held.items())
        tx.apply(PruneWeights("*", share=0.6), args)
        tx.apply(MakePermanent(), args)
        tx.roll_back()
    assert changes(before, snapshot(model, optimizer)) == []


def test_tied_weights_share_their_mask() -> None:
    model, args = sparse("mixed")
    first, second = model.get_submodule("first"), model.get_submodule("second")
    assert torch.equal(first.nx_mask_weight, second.nx_mask_weight)
    assert stored(model)["second.weight"] is stored(model)["first.weight"]
    found = found_weights(map_axes(model, args), "second")
    assert found == ("first.weight",)


@pytest.mark.parametrize("change", [Widen("rnn", by=4), Narrow("rnn", by=4)], ids=repr)
def test_a_recurrent_width_changes_with_its_masks(change: Edit) -> None:
    """After a forward and a backward, and again."""
    model, args = sparse("lstm")
    before = out(model, args)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        apply(model, change, args, optimizer=optimizer)
        if isinstance(change, Widen):
            torch.testing.assert_close(out(model, args), before)
        for name, mask in masks_of(model).items():
            assert mask.shape == stored(model)[name].shape
        if stored(model)["rnn.weight_hh_l0"].shape[1] <= 4:
            break
    model.train()(*args).sum().backward()
    optimizer.step()
    assert all_zero(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_layout_and_frozen_weights_stay(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model[0].weight.requires_grad_(False)
    args = (torch.randn(2, 4, 6, 6).to(dtype, memory_format=torch.channels_last),)
    apply(model, PruneWeights("*", share=0.5), args)
    for i in (0, 2):
        kept = stored(model)[f"{i}.weight"]
        assert kept.dtype == model[i].weight.dtype == dtype
        assert kept.stride() == model[i].weight.stride() == model[i].nx_mask_weight.stride()
        assert kept.is_contiguous(memory_format=torch.channels_last)
    assert not stored(model)["0.weight"].requires_grad
    assert stored(model)["2.weight"].requires_grad
    assert model.double()[0].nx_mask_weight.dtype == torch.bool


def test_make_permanent_gives_the_class_back() -> None:
    """Zeros stay, the buffer goes, and an insertion beside the mask stays."""
    model = pruned()
    apply(model, InsertResidual("body"), (X,))
    apply(model, InsertResidual("body.0"), (X,))
    expected = out(model, (X,))
    zeros = {n: ~mask for n, mask in masks_of(model).items()}
    done = apply(model, MakePermanent(), (X,))
    assert done.max_difference == 0.0
    assert torch.equal(out(model, (X,)), expected)
    assert not masks_of(model)
    assert type(model.head) is nn.Linear
    assert type(model.body[0]) is grafted_class(nn.Linear)
    assert all(torch.equal(stored(model)[n] == 0, zero) for n, zero in zeros.items())


class Around(nn.Module):
    """Reads its weight past the attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc._parameters["weight"], self.fc.bias)


def test_a_weight_read_around_its_mask_is_refused() -> None:
    """The forward would use the stored weight, which nothing holds at zero."""
    model = Around()
    before = snapshot(model)
    with pytest.raises(VerifyError, match=r"fc.weight: got 'aten.t' reading it without its mask"):
        apply(model, PruneWeights("*", share=0.5), (X,))
    assert changes(before, snapshot(model)) == []


def test_a_parametrized_weight_is_left_alone() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3))
    apply(model, PruneWeights("*", share=0.5), (X,))
    assert set(masks_of(model)) == {"1.weight"}
    with pytest.raises(EditError, match="parametrization has to be removed"):
        apply(model, PruneWeights("0", share=0.5), (X,))


def test_a_transformers_model_is_pruned_with_its_config_in_step() -> None:
    """Layers that store (in, out), a tied head, a config that follows an edit made later."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=12,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    kwargs = {"input_ids": torch.arange(12).view(2, 6)}
    done = apply(model, PruneWeights("*", pattern=(2, 4)), (), kwargs)
    assert done.notes == ()
    attention = model.transformer.h[0].attn.c_attn
    groups = attention.nx_mask_weight.T.reshape(-1, 4)
    assert (groups.sum(1) == 2).all()
    assert "lm_head.weight" in masks_of(model)
    assert "transformer.wte.weight" in masks_of(model)

    def loss_fn(net: nn.Module, batch: Any) -> Tensor:
        return torch.as_tensor(net(**batch).logits.square().mean())

    gradients = dense_gradients(model, loss_fn, [kwargs])
    assert gradients["transformer.wte.weight"].shape == (40, 16)
    done = apply(model, Narrow("*.mlp.c_fc.out", to=48), (), kwargs)
    assert done.notes == ()
    assert config.n_inner == 48
    expected = model(**kwargs).logits
    twin = transformers.GPT2LMHeadModel(config).eval()
    twin.load_state_dict({n: v for n, v in model.state_dict().items() if not is_mask(n)})
    torch.testing.assert_close(twin(**kwargs).logits, expected)
