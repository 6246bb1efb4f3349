"""RemoveLayer: what is left computes what the user would write down without the layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import (
    InsertConv,
    InsertResidual,
    RemoveLayer,
    Widen,
    apply,
    map_axes,
    transaction,
)
from neuroexapt.errors import EditError, UnknownPlaceError
from neuroexapt.testing import changes, snapshot
from tests import zoo
from tests.laws import world

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def out(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The first output in evaluation mode."""
    with torch.no_grad():
        result = model.eval()(*args, **kwargs)
    return result[0] if isinstance(result, tuple) else torch.as_tensor(result)


class Block(nn.Module):
    """A pre-norm block of two halves, the second with an inner product."""

    def __init__(self, parallel: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.mixing = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.mlp = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
        self.scale = nn.Parameter(torch.full((6,), 0.5))
        self.drop = nn.Dropout(0.1)
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return self.mlp(self.norm2(x)) + self.mixing(self.norm1(x)) + x
        x = x + self.drop(self.scale * self.mixing(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


def blocks(parallel: bool = False) -> nn.Sequential:
    """Two blocks and a head, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(Block(parallel), Block(parallel), nn.Linear(6, 3))


# --- what is left ----------------------------------------------------------------------------


def test_a_block_passes_its_input() -> None:
    """The model without the block is the model of its other layers."""
    model, plain = blocks(), blocks()
    done = apply(model, RemoveLayer("0"), (X,))
    expected = out(nn.Sequential(plain[1], plain[2]), X)
    assert torch.equal(out(model, X), expected)
    assert done.max_difference == pytest.approx(float((out(plain, X) - expected).abs().max()), 0.5)
    assert len(model) == 3
    assert not list(model[0].parameters())
    assert isinstance(model[0], Block)
    assert model[0].parallel is False


@pytest.mark.parametrize("half", ["mixing", "mlp"])
@pytest.mark.parametrize("parallel", [False, True])
def test_half_a_block_adds_nothing_any_more(half: str, parallel: bool) -> None:
    """The stream goes on without it, not with its input added; beside another branch too."""
    model, plain = blocks(parallel), blocks(parallel)
    done = apply(model, RemoveLayer(f"1.{half}"), (X,))
    assert "adds nothing" in done.description
    plain[1].get_submodule(half).register_forward_hook(lambda m, args, y: torch.zeros_like(y))
    assert torch.equal(out(model, X), out(plain, X))


@pytest.mark.parametrize("inside", ["mixing.0", "mixing.1", "mixing.2", "norm1", "drop", "mlp.1"])
def test_a_layer_of_a_branch_passes_its_input(inside: str) -> None:
    """What is only a part of a branch, or has no weights, is passed over."""
    model, plain = blocks(), blocks()
    apply(model, RemoveLayer(f"0.{inside}"), (X,))
    plain[0].get_submodule(inside).register_forward_hook(lambda m, args, y: args[0])
    assert torch.equal(out(model, X), out(plain, X))


class Nested(nn.Module):
    """Takes its state by keyword and answers with a structure."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.keeps = keeps

    def forward(self, *, state: Tensor, mask: Tensor | None = None) -> Any:
        y = torch.tanh(self.linear(state))
        return y, {"mask": mask, "seen": [state, None]}, y.mean(0) if self.keeps else None


class Holder(nn.Module):
    """Reads some parts of the structure."""

    def __init__(self, keeps: bool = False, reads: bool = False) -> None:
        super().__init__()
        self.block, self.reads = Nested(keeps), reads

    def forward(self, x: Tensor) -> Tensor:
        y, rest, mean = self.block(state=x, mask=x > 0)
        y = y * rest["mask"] * rest["seen"][0]
        return y + mean if self.reads else y


@pytest.mark.parametrize("keeps", [False, True])
def test_the_answer_has_the_structure_of_the_layers_own(keeps: bool) -> None:
    """Inputs stay, plain values stay, an output that nobody reads is None."""
    model = Holder(keeps)
    apply(model, RemoveLayer("block"), (X,))
    assert torch.equal(out(model, X), X * (X > 0) * X)
    assert model.block(state=X, mask=None)[2] is None


class Writing(nn.Module):
    """Writes into the output of its layer while the input is still needed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, None]
        return (self.layer(x).sigmoid_() + x)[:, :, 0]


def test_what_is_passed_is_copied_where_the_model_writes_into_it() -> None:
    """An activation in place behind a removed layer must not change the layer's input."""
    model = Writing()
    apply(model, RemoveLayer("layer"), (X,))
    assert torch.equal(out(model, X), X.sigmoid() + X)
    assert "removed" in repr(model)
    leaf = X.clone().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad is not None


def test_an_insertion_is_taken_away_again() -> None:
    """Two branches and a skip: each goes alone, and the class is the user's own at the end."""
    model = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.ReLU())
    x = torch.randn(3, 2, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before, names = out(model, x), [name for name, _ in model.named_parameters()]
    for edit in (InsertConv("0"), InsertConv("0"), InsertResidual("0")):
        apply(model.train(), edit, (x,), optimizer=optimizer)
    assert not torch.equal(before, out(_awake(copy.deepcopy(model)), x))
    for child in ("nx_after", "nx_skip", "nx_after2"):
        apply(model.train(), RemoveLayer(f"0.{child}"), (x,), optimizer=optimizer)
    assert torch.equal(out(model, x), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model[0]) is nn.Conv1d
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


def _awake(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "nx_" in name:
            nn.init.constant_(parameter, 0.3)
    return model


def test_an_insertion_beside_a_removed_layer_stays() -> None:
    """The layer goes, what was added behind it goes on with the layer's input."""
    model = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 1, 1))
    x = torch.randn(3, 2, 5)
    apply(model, InsertConv("0"), (x,))
    apply(_awake(model), RemoveLayer("0"), (x,))
    model.eval()
    expected = model[1](x + model[0].nx_after(x))
    assert torch.equal(out(model, x), expected)


class Merge(nn.Module):
    """Adds what it makes of its first input to its second."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, hidden: Tensor, stream: Tensor) -> Tensor:
        return torch.as_tensor(self.norm(self.dense(hidden) + stream))


class Merging(nn.Module):
    """A post-norm block the way BERT writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.merge = nn.Linear(6, 6), Merge()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.merge(torch.tanh(self.inner(x)), x) * 2)


def test_of_several_inputs_the_stream_is_passed() -> None:
    """Not the first one, but the one that the output is a sum with."""
    model = Merging()
    apply(model, RemoveLayer("merge"), (X,))
    assert torch.equal(out(model, X), 2 * X)


def _skipped() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(
            nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()
        )
    apply(model, InsertResidual("0.0", to="2"), (X,))
    return model


def test_both_ends_of_a_skip_go_together() -> None:
    """Nothing keeps a tensor for an end that is gone; a beginning does not go alone."""
    model, plain = _skipped(), _skipped()
    with pytest.raises(EditError, match="beginning of a skip that ends outside"):
        apply(model, RemoveLayer("0"), (X,))
    before = snapshot(model)
    tx = transaction(model)
    tx.apply(RemoveLayer("2.nx_join"), (X,))
    assert not [name for name, _ in model.named_modules() if "nx_" in name]
    assert type(model[0][0]) is type(model[2]) is nn.Linear
    tx.roll_back()
    assert not changes(before, snapshot(model))
    apply(model, RemoveLayer("2"), (X,))  # the layer goes, the skip around it stays
    _awake(model)
    expected = plain[1](plain[0](X)) + 0.3 * X
    torch.testing.assert_close(out(model, X), expected.relu().detach())


# --- what goes along -------------------------------------------------------------------------


def _trained(name: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model, args = zoo.build(name), zoo.example(name)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    world.train(model, args, optimizer, 1)
    return model, optimizer, args


REMOVABLE = {
    "resnet_basic": "layer1.1",
    "mobilenet": "block1.conv",
    "gpt_nano": "transformer.h.0",
    "encoder_layer": "block.self_attn",
    "shared_module": "shared",
    "reference_cnn": "features.5",
}


@pytest.mark.parametrize("name", REMOVABLE)
def test_the_laws(name: str) -> None:
    """Rollback, identities, optimizer, training, state dict, copies, one graph."""
    model, optimizer, args = _trained(name)
    before = snapshot(model, optimizer)
    with transaction(model, optimizer) as tx:
        tx.apply(RemoveLayer(REMOVABLE[name]), args)
        tx.roll_back()
    assert not changes(before, snapshot(model, optimizer))
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    apply(model, RemoveLayer(REMOVABLE[name]), args, optimizer=optimizer)
    after = dict(model.named_parameters())
    assert 0 < len(after) < len(parameters)
    assert all(parameters[key] is held for key, held in after.items())
    assert model.get_submodule(REMOVABLE[name]) is modules[REMOVABLE[name]]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} == set(map(id, held))
    assert set(map(id, optimizer.state)) <= set(map(id, held))
    losses = world.train(model, args, optimizer, 5)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert min(losses[1:]) < losses[0]
    expected = world.outputs(model, args)
    twin = copy.deepcopy(model)
    twin.load_state_dict(pickle.loads(pickle.dumps(model)).state_dict())
    assert torch.equal(world.outputs(twin, args), expected)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(world.outputs(compiled, args), expected)
    torch._dynamo.reset()


NO_LAYER_KEEPS_ITS_SHAPE = ("hardcoded_flatten", "pixel_shuffle_net", "lstm", "graph_net")


@pytest.mark.parametrize("name", world.NAMES)
def test_every_module_of_the_zoo(name: str) -> None:
    """Each is removed and put back bit for bit, or refused before anything is written."""
    model, optimizer, args = _trained(name)
    axes, start = world.mapped(name), snapshot(model, optimizer)
    problems = {path: RemoveLayer(path).check(axes) for path, _ in model.named_modules()}
    assert {type(found[0]) for found in problems.values() if found} == {EditError}
    removed = [path for path, found in problems.items() if not found]
    count = sum(p.numel() for p in model.parameters())
    for path in removed[len(removed) // 2 :][:1]:
        own = sum(p.numel() for p in model.get_submodule(path).parameters())
        tx = transaction(model, optimizer)
        assert tx.apply(RemoveLayer(path), args, axes=axes).parameters_after == count - own
        tx.roll_back()
    assert bool(removed) is (name not in NO_LAYER_KEEPS_ITS_SHAPE)
    assert not changes(start, snapshot(model, optimizer))


def test_a_tied_parameter_lives_on() -> None:
    """What another module holds too stays in the model and in the optimizer."""
    model = blocks()
    model[1].mlp[0].weight = model[0].mlp[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    apply(model, RemoveLayer("0"), (X,), optimizer=optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert id(model[1].mlp[0].weight) in held
    assert model[1].mlp[0].weight in optimizer.state


# --- refusals --------------------------------------------------------------------------------

REFUSED: list[tuple[nn.Module, str, str, str]] = [
    (blocks(), "", "at=''", "name the layer"),
    (blocks(), "0.mlp.0", "input (4, 6), output (4, 9)", "remove '0.mlp', which holds it"),
    (blocks(), "2", "output (4, 3)", "keeps its input's shape"),
    (Holder(keeps=True, reads=True), "block", "second output of shape (6,)", "choose"),
    (nn.Sequential(nn.ModuleList([nn.Linear(6, 6)]), nn.Identity()), "0", "not called", "'0.0'"),
]
REFUSED[-1][0].forward = lambda x: REFUSED[-1][0][0][0](x)  # type: ignore[method-assign]


@pytest.mark.parametrize(("model", "at", "seen", "step"), REFUSED, ids=lambda value: str(value)[:9])
def test_refusals_say_why(model: nn.Module, at: str, seen: str, step: str) -> None:
    """Place, what was met, and what to do."""
    (problem,) = RemoveLayer(at).check(map_axes(model, (X,)))
    assert seen in problem.seen
    assert step in problem.next_step


def test_an_inserted_layer_that_changed_its_width_stays() -> None:
    """Nothing could take its place: the layers behind it read another number of channels."""
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    apply(model, InsertConv("0", mode="identity"), (x,))
    apply(model, Widen("0.nx_then.0.out", by=2), (x,))
    (problem,) = RemoveLayer("0.nx_then").check(map_axes(model, (x,)))
    assert "(2, 4, 4, 4) and an output of shape (2, 6, 4, 4)" in problem.seen


class Reader(nn.Module):
    """Reads the weight of its layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.layer.weight


def test_a_weight_that_others_read_stays() -> None:
    """The line that reads it is named."""
    (problem,) = RemoveLayer("layer").check(map_axes(Reader(), (X,)))
    assert "'layer.weight', which test_remove.py" in problem.seen


def test_unknown_removed_and_inserted_places() -> None:
    """Near names; a layer that is gone already; what stands in for it."""
    model = blocks()
    with pytest.raises(UnknownPlaceError, match="near names: '0"):
        apply(model, RemoveLayer("0.mpl"), (X,))
    apply(model, RemoveLayer("0.mlp"), (X,))
    with pytest.raises(EditError, match="removed already"):
        apply(model, RemoveLayer("0.mlp"), (X,))
    with pytest.raises(EditError, match="stands in"):
        apply(model, RemoveLayer("0.mlp.nx_pass"), (X,))
    apply(model, RemoveLayer("0"), (X,))
    assert torch.equal(out(model, X), out(nn.Sequential(model[1], model[2]), X))
