"""InsertResidual over a span of modules: what it adds, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuroexapt import (
    AddRegularization,
    InsertAttention,
    InsertConv,
    InsertPool,
    InsertResidual,
    Narrow,
    Widen,
    apply,
)
from neuroexapt.edit.hold import Hold
from neuroexapt.errors import EditError, UnknownPlaceError
from neuroexapt.testing import changes, snapshot

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A list of layers called in the user's own loop, perhaps each in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Tanh()) for _ in range(3)
        )
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 4)
        self.checkpointed: Callable[..., Any] = lambda module, x: module(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = self.checkpointed(layer, x)
        return torch.as_tensor(self.head(self.checkpointed(self.down, x).mean((2, 3))))


EDITS = {
    "identity": InsertResidual("layers.0", to="layers.2"),
    "projection": InsertResidual("layers.1", to="down"),
    "into": InsertResidual("layers.0", to="layers.1.0"),
    "out of": InsertResidual("layers.0.1", to="layers.0"),
}
each = pytest.mark.parametrize("kind", EDITS)


def net() -> Net:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Net().double()


def out(model: nn.Module, x: Tensor = X) -> Tensor:
    """The output in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.as_tensor(model(x.double()))


def grafted(*kinds: str, awake: bool = True) -> Net:
    """The net with residual connections whose gates are open."""
    model = net()
    for kind in kinds:
        done = apply(model, EDITS[kind], (X.double(),))
        assert done.max_difference == 0.0
    for name, parameter in model.named_parameters():
        if awake and ".nx_" in name:
            torch.nn.init.constant_(parameter, 0.1)
    return model


def by_hand(model: Net, kind: str, x: Tensor) -> Tensor:
    """The forward with its skip written out."""
    first, last = EDITS[kind].span, EDITS[kind].to
    assert last is not None
    branch = model.get_submodule(f"{last}.nx_join.branch")
    plain, kept = net().eval(), list[Tensor]()
    plain.get_submodule(first).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    plain.get_submodule(last).register_forward_hook(lambda *a: a[2] + branch(kept[0]))
    return torch.as_tensor(plain(x))


@each
def test_the_input_of_the_first_is_added_to_the_output_of_the_last(kind: str) -> None:
    """With open gates the model is the one with the skip written by hand; at first it is itself."""
    model = grafted(kind)
    torch.testing.assert_close(out(model), by_hand(model.eval(), kind, X.double()))
    assert not torch.allclose(out(model), out(net()))
    assert torch.equal(out(grafted(kind, awake=False)), out(net()))


@each
def test_nothing_stays_alive_after_a_forward(kind: str) -> None:
    """What was kept for the end of the skip is let go there."""
    model, inputs = grafted(kind), list[weakref.ref[Tensor]]()
    place = model.get_submodule(EDITS[kind].span)
    place.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    out(model)
    model.train()(X.double()).sum().backward()
    gc.collect()
    assert [one() for one in inputs] == [None, None]


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved(model),
}


def _saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@each
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_a_hold_of_its_own(kind: str, way: str) -> None:
    """Both ends of a copy share one hold, which is not the original's."""
    model = grafted(kind)
    model.checkpointed = checkpoint  # a function that can be pickled
    twin = COPIES[way](model)
    model.checkpointed = twin.checkpointed = net().checkpointed
    holds = [[m for m in one.modules() if isinstance(m, Hold)] for one in (model, twin)]
    assert [len(found) for found in holds] == [1, 1]
    assert holds[0][0] is not holds[1][0]
    assert torch.equal(out(twin), out(model))


@each
def test_it_compiles_and_exports(kind: str) -> None:
    """One graph, the same outputs; gradients too."""
    model = grafted(kind)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(out(compiled), out(model))
    grads = []
    for way in (model.train(), compiled):
        model.zero_grad()
        way(X.double()).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1])
    torch._dynamo.reset()
    program = torch.export.export(model.eval(), (X.double(),))
    torch.testing.assert_close(program.module()(X.double()), out(model))


@pytest.mark.parametrize("kinds", [("identity",), ("projection",), ("identity", "projection")])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpoints_give_the_same_gradients(kinds: tuple[str, ...], whole: bool) -> None:
    """Both ends in checkpoints of their own, or the whole model in one; nothing stays alive."""
    grads = []
    for checkpointed in (False, True):
        model = grafted(*kinds).train()
        x = X.double().clone().requires_grad_()
        if checkpointed and not whole:
            model.checkpointed = lambda m, x: checkpoint(m, x, use_reentrant=False)
        run = checkpoint(model, x, use_reentrant=False) if checkpointed and whole else model(x)
        run.square().sum().backward()
        assert all(not m.held for m in model.modules() if isinstance(m, Hold))
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_reentrant_checkpoint_inside_is_an_error() -> None:
    """It runs the end of the skip apart from the graph of its beginning: torch refuses."""
    model = grafted("identity").train()
    model.checkpointed = lambda m, x: checkpoint(m, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="a second time"):
        model(X.double().requires_grad_()).sum().backward()


def test_the_end_alone_is_an_error() -> None:
    """A part of the model that holds only the end cannot know what to add."""
    model = grafted("identity")
    out(model)
    with pytest.raises(RuntimeError, match="without its beginning"):
        model.layers[2](torch.zeros(1, 6, 4, 4).double())


def test_connections_may_share_ends_and_cross() -> None:
    """Two from one module, two to one module, one across another: each takes its own input."""
    model, x = net(), X.double()
    spans = [("layers.0", "layers.2"), ("layers.0", "layers.1"), ("layers.1", "layers.2")]
    for first, last in spans:
        apply(model, InsertResidual(first, to=last), (x,))
    gates = [("layers.2.nx_join", 2.0), ("layers.1.nx_join", 3.0), ("layers.2.nx_join2", 5.0)]
    for path, value in gates:
        torch.nn.init.constant_(model.get_submodule(path).branch.scale, value)
    model.eval()
    plain = net().eval()
    a = plain.stem(x)
    b = plain.layers[0](a)
    c = plain.layers[1](b) + 3 * a
    d = plain.layers[2](c) + 2 * a + 5 * b
    torch.testing.assert_close(model(x), plain.head(plain.down(d).mean((2, 3))))


@each
@pytest.mark.parametrize("edit", [Widen("stem", by=2), Narrow("stem", by=2)], ids=repr)
def test_widths_follow_through_the_connection(kind: str, edit: Any) -> None:
    """The map sees where the skip leads, and the branch's own weights follow."""
    model = grafted(kind)
    before = out(model)
    done = apply(model.train(), edit, (X.double(),))
    if isinstance(edit, Widen):
        assert done.max_difference < 1e-10
        torch.testing.assert_close(out(model), before)
    model.train()(X.double()).sum().backward()


def test_new_parameters_train_at_the_rate_of_the_last_module() -> None:
    """They join its optimizer group, and their gate moves at once."""
    model = net().train()
    groups = [{"params": model.stem.parameters()}, {"params": model.down.parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    apply(model, EDITS["projection"], (X.double(),), optimizer=optimizer)
    new = [p for n, p in model.named_parameters() if ".nx_" in n]
    assert {id(p) for p in new} <= {id(p) for p in optimizer.param_groups[1]["params"]}
    model(X.double()).square().sum().backward()
    optimizer.step()
    norm = model.down.get_submodule("nx_join.branch.1")
    assert bool((norm.weight != 0).all())


SHAPES: dict[str, tuple[list[nn.Module], tuple[int, ...], type[nn.Module]]] = {
    "1d": ([nn.Conv1d(3, 5, 3, stride=2, padding=1), nn.ReLU()], (2, 3, 9), nn.Conv1d),
    "2d": ([nn.Conv2d(3, 5, 3, stride=2), nn.AvgPool2d(2)], (2, 3, 13, 9), nn.Conv2d),
    "3d": ([nn.Conv3d(3, 5, 3, padding=1), nn.MaxPool3d(2)], (2, 3, 4, 6, 8), nn.Conv3d),
    "features": ([nn.Linear(3, 5), nn.Tanh()], (2, 3), nn.Linear),
    "sequence": ([nn.Linear(3, 7), nn.Linear(7, 5)], (2, 6, 3), nn.Linear),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_projections_of_every_rank(shape: str) -> None:
    """Stride and channels come from the shapes at both ends."""
    layers, size, kind = SHAPES[shape]
    model, x = nn.Sequential(*layers), torch.randn(size)
    before = model.eval()(x)
    apply(model.train(), InsertResidual("0", to="1"), (x,))
    assert torch.equal(model.eval()(x), before)
    projection = model.get_submodule("1.nx_join.branch")[0]
    assert type(projection) is kind
    assert projection(x).shape == before.shape


class Looped(nn.Module):
    """Calls one layer twice, and another before it."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.early, self.late = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.late(self.twice(self.twice(self.early(x)))))


@pytest.mark.parametrize(
    ("edit", "kind", "words"),
    [
        (InsertResidual("late", to="early"), EditError, "'early' before 'late'"),
        (InsertResidual("early", to="twice"), EditError, "'twice' 2 times"),
        (InsertResidual("twice", to="late"), EditError, "'twice' 2 times"),
        (InsertResidual("early", to="lat"), UnknownPlaceError, "'late'"),
        (InsertResidual("erly", to="late"), UnknownPlaceError, "'early'"),
    ],
    ids=repr,
)
def test_ends_that_do_not_run_once_and_in_order_are_refused(
    edit: InsertResidual, kind: type[EditError], words: str
) -> None:
    """What is kept for the end would be of another run, or nothing."""
    model, x = Looped(), torch.randn(3, 4)
    before = snapshot(model)
    with pytest.raises(kind, match=words):
        apply(model, edit, (x,))
    assert not changes(before, snapshot(model))
    apply(model, InsertResidual("early", to="late"), (x,))


@pytest.mark.parametrize(
    "edit", [InsertConv, InsertPool, InsertAttention, InsertResidual, AddRegularization]
)
def test_nothing_is_inserted_where_it_would_do_nothing(edit: Any) -> None:
    """What keeps a skip's input puts out what nobody reads."""
    net, x = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3))), torch.randn(2, 4, 6, 6)
    apply(net, InsertResidual("0", to="2"), (x,))
    before = snapshot(net)
    with pytest.raises(EditError, match="the beginning of a skip"):
        apply(net, edit("0.nx_hold"), (x,))
    assert not changes(before, snapshot(net))
