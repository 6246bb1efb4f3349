"""A mask holds through training, copies, compilation, export and later edits."""

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

from neuroexapt import InsertResidual, Narrow, PruneWeights, Widen, apply, map_axes, transaction
from neuroexapt.edit import Edit, MakePermanent, grafted_class
from neuroexapt.edit.weights import found_weights
from neuroexapt.errors import VerifyError
from neuroexapt.testing.snapshot import changes, snapshot
from tests.edit.pruned import X, all_zero, masks_of, mlp, pruned, stored, zeroed

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
