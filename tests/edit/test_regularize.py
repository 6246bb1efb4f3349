"""AddRegularization: dropout, stochastic depth and weight decay, against what they should do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from neuroexapt import AddRegularization, Narrow, Widen, apply, transaction
from neuroexapt.edit import StochasticDepth
from neuroexapt.errors import EditError, GuardError, UnknownPlaceError
from neuroexapt.guard.verify import WithoutChance
from neuroexapt.testing.snapshot import changes, snapshot

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(self.relu(self.conv1(x)))
        branch += self.shortcut(x)
        return torch.relu(branch)


class Net(nn.Module):
    """Two residual blocks, dropout of the user's own, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Block(3, 6), Block(6, 6))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.drop(self.body(x).mean((2, 3)))))


def net() -> Net:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Net()


def out(model: nn.Module, x: Tensor = X, seed: int | None = None) -> Tensor:
    """The output in evaluation mode, or in training mode from a seed."""
    model.train(seed is not None)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed or 0)
        return torch.as_tensor(model(x))


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_maps_lose_whole_channels(rank: int) -> None:
    """Behind a convolution whole channels are zero, the others scaled by 1 / (1 - p)."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    model = nn.Sequential(conv(3, 64, 1), nn.Tanh())
    x = torch.randn(32, 3, *[4] * rank)
    before = out(model, x)
    done = apply(model, AddRegularization("1", strength=0.3), (x,))
    assert type(model[1].nx_then) is (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[rank - 1]
    assert done.max_difference == 0.0
    assert torch.equal(out(model, x), before)
    ratio = (out(model, x, seed=1) / before).flatten(2)
    assert torch.equal(ratio.amax(2) > 0.5, ratio.amin(2) > 0.5)
    kept = ratio[:, :, 0] > 0.5
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.7))
    assert abs(float(kept.float().mean()) - 0.7) < 0.05  # 2048 draws: 5 standard errors


@pytest.mark.parametrize(
    ("model", "shape", "at"),
    [
        (nn.Sequential(nn.Linear(5, 7), nn.ReLU()), (4, 5), "1"),
        (nn.Sequential(nn.Linear(5, 7), nn.ReLU()), (4, 6, 5), "1"),
        (nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU()), (4, 3, 5, 5), "0"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), (4, 3, 5, 5), "1"),
        (nn.Sequential(nn.Embedding(9, 7), nn.Linear(7, 2)), None, "0"),
        (nn.LSTM(5, 7, batch_first=True), (4, 6, 5), ""),
    ],
    ids=["features", "sequence", "one channel", "flattened", "embedding", "lstm"],
)
def test_features_are_dropped_one_by_one(
    model: nn.Module, shape: tuple[int, ...] | None, at: str
) -> None:
    """Plain dropout where channels do not stand before space, or where there is only one."""
    x = torch.randn(shape) if shape else torch.randint(0, 9, (4, 6))
    apply(model, AddRegularization(at, "dropout", 0.2), (x,))
    assert type(model.get_submodule(f"{at}.nx_then".lstrip("."))) is nn.Dropout


def test_dropout_of_the_only_number_is_refused() -> None:
    """A sample that is one number would be dropped itself."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())
    with pytest.raises(EditError, match="one number a sample"):
        apply(model, AddRegularization("0"), (torch.randn(4, 3),))


@pytest.mark.parametrize("kind", ["dropout", "stochastic_depth"])
def test_the_strength_changes_later_and_zero_takes_it_away(kind: str) -> None:
    """The second edit at one place sets, the third removes; then the class is the user's again."""
    model = net()
    at = "body.1.conv2"
    before = snapshot(model)
    apply(model, AddRegularization(at, kind, 0.4), (X,))
    apply(model, AddRegularization(at, kind, 0.1), (X,))
    assert [m.p for m in model.modules() if isinstance(m, (nn.Dropout2d, StochasticDepth))] == [0.1]
    apply(model, AddRegularization(f"{at}.nx_then", kind, 0.2), (X,))
    assert model.get_submodule(f"{at}.nx_then").p == 0.2
    apply(model, AddRegularization(at, kind, 0), (X,))
    # The edits that were made stay written down, for a checkpoint to make them again.
    assert changes(before, snapshot(model)) == ["module '' _nx_lineage"]
    assert type(model.get_submodule(at)) is nn.Conv2d


def test_dropout_of_the_users_own_is_set() -> None:
    """At a dropout module the edit is a change of its probability."""
    model = net()
    apply(model, AddRegularization("drop", "dropout", 0.25), (X,))
    assert model.drop.p == 0.25
    apply(model, AddRegularization("drop", "dropout", 0), (X,))
    assert model.drop.p == 0
    assert type(model.drop) is nn.Dropout


def test_two_kinds_stand_at_one_place() -> None:
    """Dropout and stochastic depth behind the same module are two things."""
    model = net()
    apply(model, AddRegularization("body.1.conv2", "dropout", 0.1), (X,))
    apply(model, AddRegularization("body.1.conv2", "stochastic_depth", 0.2), (X,))
    apply(model, AddRegularization("body.1.conv2", "dropout", 0), (X,))
    kinds = [type(m) for m in model.body[1].conv2.children()]
    assert kinds == [StochasticDepth]


# --- stochastic depth -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["body.1.conv2", "body.0.conv2"])
def test_whole_samples_lose_their_branch(at: str) -> None:
    """In training a block gives either its shortcut or the shortcut and twice the branch."""
    model = net().double()
    x = X.double()
    block = model.body[int(at[5])]
    stream = x if at[5] == "0" else model.body[0](x).detach()
    branch = block.conv2(block.relu(block.conv1(stream))).detach()
    shortcut = block.shortcut(stream).detach()
    apply(model, AddRegularization(at, "stochastic_depth", 0.5), (x,))
    result = out(block, stream, seed=3)
    dropped, doubled = torch.relu(shortcut), torch.relu(shortcut + 2 * branch)
    is_dropped = (result - dropped).abs().flatten(1).amax(1) < 1e-12
    is_doubled = (result - doubled).abs().flatten(1).amax(1) < 1e-12
    assert bool((is_dropped ^ is_doubled).all())
    assert bool(is_dropped.any())
    assert bool(is_doubled.any())


@pytest.mark.parametrize(
    ("at", "why"),
    [
        ("body.1", "reads"),
        ("body.1.conv1", "relu"),
        ("body.0.shortcut", "no stream"),
        ("body.1.shortcut", "2 operators|no stream|conv"),
        ("head", "output of the model"),
    ],
)
def test_what_is_no_branch_is_refused(at: str, why: str) -> None:
    """The message says what else reads the output, and names branches near it."""
    with pytest.raises(EditError, match=why) as caught:
        apply(net(), AddRegularization(at, "stochastic_depth", 0.5), (X,))
    if at.startswith("body"):
        assert "conv2'" in caught.value.next_step


def test_the_dimension_of_samples_need_not_be_the_first() -> None:
    """A branch inside code that puts time first is dropped per sample all the same."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            return (x + self.inner(x)).transpose(0, 1)

    model, x = TimeFirst(), torch.randn(4, 7, 5)
    apply(model, AddRegularization("inner", "stochastic_depth", 0.5), (x,))
    assert model.inner.nx_then.dim == 1
    same = (out(model, x, seed=0) == x).flatten(1)
    assert torch.equal(same.all(1), same.any(1))


# --- weight decay ---------------------------------------------------------------------------------


def fit(model: nn.Module, optimizer: Optimizer, scheduler: Any, closure: bool) -> None:
    """Six steps on one batch."""

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model(X.double()).square().mean()
        value.backward()
        return torch.as_tensor(value)

    for _ in range(6):
        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("closure", [False, True])
def test_decay_is_adamws(closure: bool) -> None:
    """Bit by bit what AdamW does with a group of its own, at a changing learning rate."""
    ours, theirs = net().double().eval(), net().double().eval()
    decayed = [p for n, p in theirs.named_parameters() if n.startswith("body.1") and p.dim() > 1]
    rest = [p for p in theirs.parameters() if all(p is not other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    optimizers = [AdamW(ours.parameters(), weight_decay=0.0), AdamW(groups)]
    done = apply(
        ours,
        AddRegularization("body.1", "weight_decay", 0.3),
        (X.double(),),
        optimizer=optimizers[0],
    )
    assert done.description == "weight decay of 0.3 for 2 parameters"
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        fit(model, optimizer, scheduler, closure)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
    assert len(optimizers[0].param_groups) == 1


def hooks(optimizer: Optimizer) -> list[Any]:
    """What runs before each step."""
    return [
        (key, hook, dict(hook.strengths))
        for key, hook in vars(optimizer)["_optimizer_step_pre_hooks"].items()
    ]


def test_decay_is_set_added_to_and_taken_away() -> None:
    """One hook an optimizer, a strength a parameter; at zero everywhere the hook is gone."""
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    for at, strength in (("head", 0.1), ("body.*.bias", 0.2), ("head.weight", 0.5), ("head", 0.3)):
        apply(model, AddRegularization(at, "weight_decay", strength), (X,), optimizer=optimizer)
    ((_, _, strengths),) = hooks(optimizer)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: s for p, s in strengths.items()}
    biases = [n for n in names.values() if n.startswith("body") and n.endswith("bias")]
    assert found == {"head.weight": 0.3, **dict.fromkeys(biases, 0.2)}
    apply(model, AddRegularization("", "weight_decay", 0), (X,), optimizer=optimizer)
    assert set(names[id(p)] for p in hooks(optimizer)[0][2]) == set(biases)
    apply(model, AddRegularization("*", "weight_decay", 0), (X,), optimizer=optimizer)
    assert hooks(optimizer) == []


def test_decay_goes_with_a_parameter_that_grows() -> None:
    """A parameter keeps its object, so its decay follows through other edits, and a roll back."""
    model = net()
    optimizer = Adam(model.parameters())
    apply(model, AddRegularization("head", "weight_decay", 0.1), (X,), optimizer=optimizer)
    before = hooks(optimizer)
    tx = transaction(model, optimizer)
    tx.apply(Widen("body.1.conv1", by=2), (X,))
    tx.apply(AddRegularization("body", "weight_decay", 0.2), (X,))
    tx.apply(AddRegularization("head", "weight_decay", 0), (X,))
    assert hooks(optimizer) != before
    tx.roll_back()
    assert hooks(optimizer) == before
    apply(model, Narrow("body.1", by=1), (X,), optimizer=optimizer)
    assert hooks(optimizer) == before
    assert next(iter(before[0][2])) is model.head.weight


def test_decay_without_the_optimizer_is_refused() -> None:
    """Weight decay acts at the optimizer's steps: without one there is nothing to change."""
    model = net()
    with pytest.raises(GuardError, match="no optimizer"):
        apply(model, AddRegularization("head", "weight_decay", 0.1), (X,))
    other = SGD(model.body.parameters(), lr=0.1)
    with pytest.raises(GuardError, match="does not hold it"):
        apply(model, AddRegularization("head", "weight_decay", 0.1), (X,), optimizer=other)
    assert hooks(other) == []


def test_a_tied_weight_is_found_under_either_name() -> None:
    """Parameters are chosen by any of their names."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    optimizer, ids = SGD(model.parameters(), lr=0.1), torch.randint(0, 7, (3, 5))
    apply(model, AddRegularization("1", "weight_decay", 0.1), (ids,), optimizer=optimizer)
    assert next(iter(hooks(optimizer)[0][2])) is model[0].weight


# --- settings and laws ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "kind", "words"),
    [
        (AddRegularization("drop", "noise"), EditError, "stochastic_depth"),
        (AddRegularization("drop", strength=1.0), EditError, r"\[0, 1\)"),
        (AddRegularization("drop", strength=-0.1), EditError, r"\[0, 1\)"),
        (AddRegularization("drop", strength=float("nan")), EditError, r"\[0, 1\)"),
        (AddRegularization("drop", strength="0.1"), EditError, r"\[0, 1\)"),  # type: ignore[arg-type]
        (AddRegularization("head", "weight_decay", -1), EditError, "0 or more"),
        (AddRegularization("head", strength=0), EditError, "has put no dropout"),
        (AddRegularization("heda"), UnknownPlaceError, "'head'"),
        (AddRegularization("heda", "weight_decay"), UnknownPlaceError, "'head'"),
        (AddRegularization("drop", "weight_decay"), EditError, "no weight"),
        (AddRegularization("*.scale", "weight_decay"), EditError, "no parameter"),
        (AddRegularization("*"), EditError, "a module path"),
    ],
    ids=repr,
)
def test_settings_are_checked(edit: AddRegularization, kind: type[EditError], words: str) -> None:
    """What makes no sense is refused before anything is written, with the way out."""
    model = net()
    with pytest.raises(kind, match=words):
        apply(model, edit, (X,), optimizer=SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("kind", ["dropout", "stochastic_depth"])
def test_the_model_stays_a_model(kind: str) -> None:
    """Copies, pickles, saved weights, compiled and exported forms draw and compute alike."""
    model = net()
    apply(model, AddRegularization("body.1.conv2", kind, 0.5), (X,))
    expected, drawn = out(model), out(model, seed=5)
    assert not torch.equal(expected, drawn)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(twin), expected)
        assert torch.equal(out(twin, seed=5), drawn)
    model.load_state_dict(net().state_dict())
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(out(compiled), expected)
    assert out(compiled, seed=1).isfinite().all()
    torch._dynamo.reset()
    program = torch.export.export(model.eval(), (X,))
    torch.testing.assert_close(program.module()(X), expected)


@pytest.mark.parametrize("operator", ["bernoulli_", "native_dropout"])
def test_verification_takes_the_mean_of_either_way_to_drop(operator: str) -> None:
    """Processors draw a mask, accelerators have an operator of their own."""
    x = torch.rand(3, 4)
    with torch.no_grad(), WithoutChance():  # type: ignore[no-untyped-call]
        if operator == "native_dropout":
            result = torch.native_dropout(x, 0.4, True)[0]
        else:
            result = StochasticDepth(0.4).train()(x)
    torch.testing.assert_close(result, x)
