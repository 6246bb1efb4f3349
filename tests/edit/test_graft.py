"""Inserted branches: the module stays what it was to everything that looks at it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import InsertAttention, InsertConv, InsertResidual, Narrow, Widen, apply, map_axes
from neuroexapt.edit import Edit, grafted_class, original_class

EDITS: list[Edit] = [
    InsertConv("features.2"),
    InsertResidual("features"),
    InsertConv("features"),
    InsertConv("features.2", mode="identity", bias=True),
    InsertAttention("features.2", "squeeze_excite"),
    InsertAttention("features", "self", heads=1),
]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Features in a Sequential, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3, stride=2, padding=1),
        )
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.features(x).mean((2, 3))))


def net() -> Net:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Net()


def grafted(*edits: Edit, awake: bool = True) -> Net:
    """The net with insertions whose gates are open, so that their branches take part."""
    model = net()
    for edit in edits:
        apply(model, edit, (X,))
    for name, parameter in model.named_parameters():
        if awake and ".nx_" in name:
            torch.nn.init.constant_(parameter, 0.1)
    return model


def out(model: nn.Module, x: Tensor = X) -> Tensor:
    """The output in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.as_tensor(model(x))


each = pytest.mark.parametrize("edit", EDITS, ids=repr)


@each
def test_the_branch_takes_part(edit: Edit) -> None:
    """The helper of this file opens the gates: the tests below test something."""
    assert not torch.allclose(out(net()), out(grafted(edit)))
    assert torch.equal(out(net()), out(grafted(edit, awake=False)))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved,
}


@each
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_the_same_model(edit: Edit, way: str) -> None:
    """Same outputs, same classes, and the copy's branches are its own."""
    model = grafted(edit)
    twin = COPIES[way](model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(out(twin), out(model))
    if way != "copy":
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


@each
def test_weights_can_be_saved_and_loaded(edit: Edit) -> None:
    """A state dict goes through a file into another model with the same edit."""
    model, other = grafted(edit), grafted(edit, awake=False)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(out(other), out(model))


@each
def test_it_compiles_as_one_graph(edit: Edit) -> None:
    """``torch.compile`` with fullgraph follows the graft, and so does an edit made afterwards."""
    model = grafted(edit)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(out(compiled), out(model))
    apply(compiled, Widen("features.0", by=2), (X,))
    torch.testing.assert_close(out(compiled), out(model))
    torch._dynamo.reset()


@each
def test_it_exports(edit: Edit) -> None:
    """``torch.export`` gives a program with the same outputs and the branch's weights."""
    model = grafted(edit).eval()
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), out(model))
    assert any(".nx_" in name for name in program.state_dict)


@each
def test_names_identities_and_classes_stay(edit: Edit) -> None:
    """Every parameter and module that was there is the same object under the same name."""
    model = net()
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    kinds = {path: type(module) for path, module in modules.items()}
    apply(model, edit, (X,))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    now = dict(model.named_modules())
    assert all(now[path] is module for path, module in modules.items())
    assert all(isinstance(now[path], kind) for path, kind in kinds.items())
    place = model.get_submodule(edit.place)
    assert original_class(place) is kinds[edit.place]
    assert type(place) is grafted_class(kinds[edit.place])
    assert type(place).__name__ == f"Grafted{kinds[edit.place].__name__}"
    assert repr(place).startswith(f"Grafted{kinds[edit.place].__name__}(")
    assert "nx_" in repr(model)


# --- containers ----------------------------------------------------------------------------------


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """A plain and a grafted Sequential of the same layers."""
    return net().features, grafted(InsertConv("features"), InsertResidual("features")).features


def test_a_grafted_sequential_counts_and_iterates_as_before() -> None:
    """Branches are no layers: length, iteration, index and membership do not see them."""
    plain, graft = pair()
    assert {name for name in graft._modules if not name.isdigit()} == {"nx_after", "nx_skip"}
    assert len(graft) == len(plain) == 4
    assert [type(m) for m in graft] == [type(m) for m in plain]
    assert list(graft) == [graft[i] for i in range(4)] == [graft[i - 4] for i in range(4)]
    assert graft.get_submodule("nx_skip") not in list(graft)
    for index in (4, -5):
        with pytest.raises(IndexError):
            graft[index]


@pytest.mark.parametrize(
    "part", [slice(None), slice(1, 3), slice(-1, None), slice(0, 4, 2)], ids=str
)
def test_a_slice_is_a_plain_sequential(part: slice) -> None:
    """It holds the very layers, under the names a plain slice has."""
    plain, graft = pair()
    assert type(graft[part]) is nn.Sequential
    assert list(graft[part]) == list(graft)[part]
    assert list(graft[part]._modules) == list(plain[part]._modules)


def _delete(layers: nn.Sequential) -> None:
    del layers[1]


def _delete_slice(layers: nn.Sequential) -> None:
    del layers[1:3]


def _set(layers: nn.Sequential) -> None:
    layers[-1] = nn.Tanh()


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "append": lambda layers: layers.append(nn.Tanh()),
    "insert": lambda layers: layers.insert(1, nn.Tanh()),
    "insert at the end": lambda layers: layers.insert(4, nn.Tanh()),
    "extend": lambda layers: layers.extend([nn.Tanh(), nn.Sigmoid()]),
    "pop": lambda layers: layers.pop(2),
    "add in place": lambda layers: layers.__iadd__(nn.Sequential(nn.Tanh())),
    "delete": _delete,
    "delete a slice": _delete_slice,
    "set": _set,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_grafted_sequential_is_edited_as_before(change: str) -> None:
    """The user's own surgery gives the layers it gives on a plain one; the branches stay."""
    plain, graft = pair()
    for layers in (plain, graft):
        CHANGES[change](layers)
    assert [type(m) for m in graft] == [type(m) for m in plain]
    visible = [name for name in graft._modules if not name.startswith("nx_")]
    assert visible == list(plain._modules)
    assert {"nx_after", "nx_skip"} <= set(graft._modules)
    assert len(graft + nn.Sequential(nn.Tanh())) == len(plain) + 1


# --- several at one place, nested, at the root ---------------------------------------------------


def test_two_insertions_at_one_place() -> None:
    """The second gets a name of its own and stands behind the first."""
    model = grafted(InsertConv("features.2"), InsertConv("features.2", kernel=1))
    assert [n for n, _ in model.features[2].named_children()] == ["nx_after", "nx_after2"]
    first, second = (child.eval() for child in model.features[2].children())
    y = torch.rand(2, 6, 8, 8)
    middle = y + first(y)
    torch.testing.assert_close(model.eval().features[2](y), middle + second(middle))


@pytest.mark.parametrize("edit", [InsertConv(""), InsertResidual("")], ids=repr)
def test_an_insertion_at_the_root(edit: Edit) -> None:
    """The model the user holds is itself grafted, and is the same object."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    before = out(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply(model.train(), edit, (X,), optimizer=optimizer)
    assert torch.equal(out(model), before)
    new = [n for n, _ in model.named_parameters() if n.startswith("nx_")]
    assert new
    assert len(optimizer.param_groups[0]["params"]) == 4 + len(new)
    assert len(model) == 3


@pytest.mark.parametrize("training", [True, False])
def test_a_branch_has_the_mode_of_its_module(training: bool) -> None:
    """A frozen part of the model gets no branch that counts batch statistics."""
    model = net()
    model.features.train(training)
    apply(model, InsertConv("features.2"), (X,))
    assert all(m.training is training for m in model.features.modules())


def test_two_nested_residuals() -> None:
    """A skip inside a span that has one."""
    model = grafted(InsertResidual("features.3"), InsertResidual("features"))
    x = torch.rand(2, 3, 8, 8)
    model.eval()
    layers, outer = model.features, model.features.get_submodule("nx_skip")
    hidden = layers[2](layers[1](layers[0](x)))
    weight = torch.nn.functional.conv2d(
        hidden, layers[3].weight, layers[3].bias, stride=2, padding=1
    )
    expected = weight + layers[3].nx_skip(hidden) + outer(x)
    torch.testing.assert_close(layers(x), expected)


@each
@pytest.mark.parametrize(
    "change", [Widen("features.0", by=2), Narrow("features.0", by=2)], ids=repr
)
def test_widths_change_after_an_insertion(edit: Edit, change: Edit) -> None:
    """The map sees through a graft, and the branch's own channels follow."""
    model = grafted(edit)
    before = out(model)
    done = apply(model.train(), change, (X,))
    assert model.features[0].weight.shape[0] == 6 + (2 if isinstance(change, Widen) else -2)
    if isinstance(change, Widen):
        assert done.max_difference <= 1e-5
        torch.testing.assert_close(out(model), before)
    model.train()(X).sum().backward()


def test_the_width_of_a_branch_can_change_alone() -> None:
    """What the inserted convolution makes is tied to the stream it is added to."""
    model = grafted(InsertConv("features.2"))
    axes = map_axes(model, (X,))
    tensors = {place.tensor for place in axes.one("features.0").appearances}
    assert {"features.2.nx_after.0.weight", "features.2.nx_after.3.scale"} <= tensors


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_convolution_for_every_rank(rank: int) -> None:
    """One, two and three spatial dimensions."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    model = nn.Sequential(conv(2, 4, 3, padding=1), nn.ReLU(), conv(4, 2, 1))
    x = torch.randn(3, 2, *[5] * rank)
    before = out(model, x)
    apply(model.train(), InsertConv("1", kernel=5), (x,))
    branch = model[1].nx_after
    assert type(branch[0]) is conv
    assert branch[0].kernel_size == (5,) * rank
    assert torch.equal(out(model, x), before)


def test_features_last_get_a_linear_projection() -> None:
    """A span of linear layers gets a linear skip with a zero gate, or one gate a feature."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 6), nn.Tanh()), nn.Linear(6, 6), nn.Tanh())
    x = torch.randn(4, 7, 3)
    before = out(model, x)
    apply(model, InsertResidual("0"), (x,))
    apply(model, InsertResidual("1"), (x,))
    assert isinstance(model[0].nx_skip[0], nn.Linear)
    assert model[1].nx_skip.scale.shape == (6,)
    assert torch.equal(out(model, x), before)


def test_hooks_fire_once() -> None:
    """The user's hooks on a grafted module see its whole output, once a call."""
    model, seen, whole = net(), list[str](), list[Tensor]()
    place = model.features[2]
    place.register_forward_pre_hook(lambda *_: seen.append("pre"))
    place.register_forward_hook(lambda *_: seen.append("post"))
    place.register_forward_hook(lambda module, args, result: whole.append(result))
    place.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.features[3].register_forward_pre_hook(lambda module, args: whole.append(args[0]))
    apply(model, InsertConv("features.2"), (X,))
    torch.nn.init.ones_(model.features[2].nx_after[3].scale)
    seen.clear()
    model(X).sum().backward()
    assert seen == ["pre", "post", "backward"]
    assert torch.equal(whole[-2], whole[-1])


class Named(nn.Module):
    """Calls its block by keyword in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.keyword = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.block(input=x) if self.keyword else self.block(x))


def test_a_skip_finds_its_input_by_keyword() -> None:
    """A grafted module may be called by keyword, as before."""
    model = Named()
    apply(model, InsertResidual("block"), (X,))
    torch.nn.init.ones_(model.block.nx_skip.scale)
    expected = out(model)
    model.keyword = True
    assert torch.equal(out(model), expected)


class Stateful(nn.Conv2d):
    """A layer that leaves a cache out of its pickle."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": None}


def test_a_layers_own_state_for_copies_is_respected() -> None:
    """A class that says what of it is copied says so for its grafted instances too."""
    model = nn.Sequential(Stateful(3, 3, 3, padding=1))
    model[0].cache = object()  # type: ignore[assignment]
    apply(model, InsertConv("0"), (X,))
    assert copy.deepcopy(model)[0].cache is None
