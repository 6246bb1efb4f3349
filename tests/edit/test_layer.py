"""Inserted layers: new ones, and copies of blocks that hand on their input at first."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt import (
    InsertAttention,
    InsertLayer,
    Narrow,
    PruneWeights,
    Widen,
    apply,
    map_axes,
    transaction,
)
from neuroexapt.edit import Edit
from neuroexapt.edit.copies import Blend
from neuroexapt.edit.passing import silenced
from neuroexapt.errors import EditError
from neuroexapt.testing.snapshot import changes, snapshot
from tests import zoo
from tests.laws.world import mapped

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def both(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    """Flat outputs in evaluation and training mode, of a copy, without chance."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        return [zoo.flat(twin.train(training)(*args)) for training in (False, True)]


# --- which weights silence a block ---------------------------------------------------------------

SILENT: dict[tuple[str, str], set[str] | None] = {
    ("llama", "layers.0"): {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    ("gpt", "blocks.1"): {"attn.proj.weight", "attn.proj.bias", "mlp.2.weight", "mlp.2.bias"},
    ("resnet_basic", "layer1.0"): {"bn2.weight", "bn2.bias"},
    ("resnet_bottleneck", "layer2.1"): {"bn3.weight", "bn3.bias"},
    ("resnet_basic", "layer2.0"): None,  # it projects
    ("norm_free_residual", "blocks.0"): {"conv2.weight", "conv2.bias"},
    ("preact_dict", "blocks.0"): {"conv2.weight"},
    ("mobilenet", "block1"): {"conv.7.weight", "conv.7.bias"},
    ("mobilenet", "separable"): None,  # no residual connection
    ("vit", "blocks.0.attn"): None,
}


@pytest.mark.parametrize(("name", "path"), SILENT)
def test_the_last_maps_of_every_branch(name: str, path: str) -> None:
    """What is zero in a copy, block by block."""
    assert silenced(mapped(name), path) == SILENT[name, path]


def called_with(model: nn.Module, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """What a block takes and gives when the model runs."""
    seen: list[tuple[Any, Any]] = []
    block.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    model(*args)
    return seen[0]


@pytest.mark.parametrize("name", ["resnet_bottleneck", "llama", "gpt_nano", "vit", "mixer", "unet"])
def test_silent_blocks_hand_on_what_they_get(name: str) -> None:
    """Brute force: wherever weights are named, a block without them is the identity on its
    own output."""
    axes, found = mapped(name), 0
    for path in axes.modules:
        names = silenced(axes, path) if path else None
        if names is None:
            continue
        found += 1
        model = zoo.build(name)
        block = model.get_submodule(path)
        twin = copy.deepcopy(block)
        args, out = called_with(model, block, zoo.example(name))
        for silent in names:
            nn.init.zeros_(twin.get_parameter(silent))
        assert torch.equal(twin(out.clone(), *args[1:]), out), path
    assert found == {"resnet_bottleneck": 2, "mixer": 3, "vit": 3, "unet": 0}.get(name, 2)


class Tricky(nn.Module):
    """Blocks that look residual and are not, or that zeros would not silence."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = nn.Linear(6, 6), form
        self.norm, self.scale = nn.LayerNorm(6), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.form == "subtracted":
            return y - x
        if self.form == "relu inside":
            return (torch.relu(x) + y).clamp(min=-1)
        if self.form == "constant":
            return x + (self.scale + 1.0) * torch.sigmoid(y)
        if self.form == "post-norm":
            return self.norm(x + y)
        if self.form == "through a view":
            z = x.clone()
            z[:, :3] += self.scale[:3].cos()
            return z + y
        if self.form == "root mean square":
            return x + y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return x + torch.cos(y)


FORMS = ["subtracted", "relu inside", "constant", "post-norm", "through a view", "cosine"]


@pytest.mark.parametrize("form", [*FORMS, "root mean square"])
def test_a_block_that_cannot_be_silenced_gets_a_gate(form: str) -> None:
    """Nothing is claimed, and the copy behind the gate is exact all the same."""
    model = nn.Sequential(nn.Linear(6, 6), Tricky(form), nn.Linear(6, 2)).double()
    before = both(model, (X,))
    done = apply(model, InsertLayer("1", kind="copy"), (X,))
    assert isinstance(model[1].nx_next, Blend)
    assert done.max_difference == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, both(model, (X,)), strict=True))


# --- learning ------------------------------------------------------------------------------------

COPIED = {
    "llama": "layers.0",
    "gpt_nano": "transformer.h.1",
    "resnet_basic": "layer1",
    "mixer": "blocks.0",
    "norm_free_residual": "blocks.1",
    "encoder_layer": "block",
    "bert": "layer.0",
    "mobilenet": "block1",
    "moe": "norm",
}


def owners(names: Iterable[str]) -> set[str]:
    """The modules of parameters."""
    return {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize("name", COPIED)
def test_a_copy_is_exact_and_learns(name: str) -> None:
    """The silent maps (or the gate) learn at step one, all that learns in the block at step two."""
    path = COPIED[name]
    model = zoo.build(name, dtype=torch.float64)
    args = zoo.example(name, dtype=torch.float64)
    before = both(model, args)
    silent = silenced(map_axes(model, args), path) or {"gate.scale"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    done = apply(model, InsertLayer(path, kind="copy"), args, optimizer=optimizer)
    assert done.max_difference <= 1e-12
    for old, new in zip(before, both(model, args), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-11)
    block, new_block = model.get_submodule(path), model.get_submodule(f"{path}.nx_next")
    moved: list[set[str]] = []
    for _ in range(2):
        optimizer.zero_grad()
        zoo.loss(model, args).backward()
        optimizer.step()
        grads = {n: p.grad for n, p in new_block.named_parameters() if p.grad is not None}
        moved.append({n for n, g in grads.items() if g.abs().max() > 1e-14})
    # A shift in front of a norm has no gradient; the weight beside it has.
    assert moved[0] <= set(silent)
    assert owners(moved[0]) == owners(silent)
    learns = {
        n
        for n, p in block.named_parameters()
        if "nx_next" not in n and p.grad is not None and p.grad.abs().max() > 1e-14
    }
    prefix = "" if "gate.scale" not in silent else "nx_block."
    assert moved[1] - {"gate.scale"} >= {f"{prefix}{n}" for n in learns}


@pytest.mark.parametrize("hidden", [None, 3, 40])
def test_an_mlp_is_exact_and_learns(hidden: int | None) -> None:
    """Its last layer at step one, its first at step two; behind tokens as behind vectors."""
    for name, path in (("gpt", "blocks.0"), ("mlp", "net.2")):
        model = zoo.build(name, dtype=torch.float64)
        args = zoo.example(name, dtype=torch.float64)
        before = both(model, args)
        apply(model, InsertLayer(path, hidden=hidden), args)
        first, _, last = model.get_submodule(path).nx_after
        features = 16
        assert (first.in_features, first.out_features) == (features, hidden or features)
        assert all(torch.equal(a, b) for a, b in zip(before, both(model, args), strict=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        zoo.loss(model, args).backward()
        assert first.weight.grad.abs().max() == 0 < last.weight.grad.abs().max()
        optimizer.step()
        zoo.loss(model, args).backward()
        assert first.weight.grad.abs().max() > 0


# --- how a block is called -----------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with a scale and a mask beside its input, and a number of its place."""

    def __init__(self, layer_idx: int = 0) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(6), nn.Linear(6, 6)
        self.layer_idx, self.dilation = layer_idx, layer_idx + 1

    def forward(self, x: Tensor, scale: float, *, mask: Tensor | None = None) -> Any:
        y = F.gelu(self.inner(self.norm(x)) * scale)
        if mask is not None:
            y = y * mask
        return x + self.inner(y), y


class Stack(nn.Module):
    """Blocks in a row, called with further inputs or by keyword."""

    def __init__(self, depth: int = 3, keyword: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(i) for i in range(depth)])
        self.head, self.keyword = nn.Linear(6, 2), keyword

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0).to(x)
        for block in self.blocks:
            x = block(x=x, scale=0.5)[0] if self.keyword else block(x, 0.5, mask=mask)[0]
        return self.head(x)


def stack(**options: Any) -> Any:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Stack(**options).double()


def waken(model: nn.Module) -> None:
    """Give everything inserted other weights than its start."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "nx_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * noise.to(parameter)


def test_a_copy_gets_the_further_inputs_of_its_block() -> None:
    """Against the loop written out: x, then the block, then its copy, with scale and mask."""
    model = stack()
    apply(model, InsertLayer("blocks.1", kind="copy"), (X,))
    waken(model)
    x, mask = X, (X > 0).to(X)
    further = model.blocks[1].nx_next
    assert isinstance(further, Block)
    with transaction(model) as tx:  # the blocks without their grafts, for the reference
        plain = [copy.deepcopy(block) for block in model.blocks]
        tx.roll_back()
    del plain[1]._modules["nx_next"]
    plain[1].__class__ = Block
    for block in (plain[0], plain[1], further, plain[2]):
        x = block(x, 0.5, mask=mask)[0]
    torch.testing.assert_close(model(X), model.head(x))


def test_a_block_called_by_keyword_alone_is_refused() -> None:
    """Which of its inputs the stream is cannot be told."""
    axes = map_axes(stack(keyword=True), (X,))
    (problem,) = InsertLayer("blocks.0", kind="copy").check(axes)
    assert problem.seen == "a call by keyword alone"
    assert not InsertLayer("blocks.0").check(axes)


def test_places_go_on_counting() -> None:
    """Each copy gets the next free place; numbers that count something else stay."""
    model = stack()
    for path in ("blocks.1", "blocks.0", "blocks.1"):
        apply(model, InsertLayer(path, kind="copy"), (X,))
    blocks = model.blocks
    assert [block.layer_idx for block in blocks] == [0, 1, 2]
    children = [blocks[1].nx_next, blocks[0].nx_next, blocks[1].nx_next2]
    assert [child.layer_idx for child in children] == [3, 4, 5]
    assert [child.dilation for child in children] == [2, 1, 2]
    assert not any("nx_next" in child._modules for child in children)


class Stages(nn.Module):
    """Two stages of blocks that are counted through."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [nn.Sequential(*(Row(2 * stage + i) for i in range(2))) for stage in range(2)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class Row(Block):
    """A block without further inputs."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, 1.0)[0]


def test_a_count_through_stages_goes_on() -> None:
    """A block of the first stage, then a whole stage with its copy: all places are free ones."""
    model = Stages().double()
    apply(model, InsertLayer("stages.0.1", kind="copy"), (X,))
    assert model.stages[0][1].nx_next.layer_idx == 4
    apply(model, InsertLayer("stages.0", kind="copy"), (X,))
    places = [m.layer_idx for m in model.modules() if isinstance(m, Row)]
    assert sorted(places) == list(range(8))


def test_copies_widen_and_narrow_like_their_blocks() -> None:
    """The stream goes through them, their own widths are their own, all exactly."""
    model = zoo.build("gpt", dtype=torch.float64)
    args = zoo.example("gpt", dtype=torch.float64)
    apply(model, InsertLayer("blocks.0", kind="copy"), args)
    apply(model, InsertLayer("blocks.1", hidden=5), args)
    waken(model)
    before = both(model, args)
    axes = map_axes(model, args)
    names = ["blocks.0.nx_next.mlp.0.out", "blocks.1.nx_after.0.out", "tok.out"]
    for name in names:
        twin = copy.deepcopy(model)
        apply(twin, Widen(name, by=axes.one(name).multiple), args)
        for old, new in zip(before, both(twin, args), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-10)
        apply(copy.deepcopy(model), Narrow(name, by=1), args)


class Padded(nn.Module):
    """torch's own encoder on sentences of unlike length; token 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed, self.encoder = nn.Embedding(11, 8), nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(self.embed(x), src_key_padding_mask=x == 0)
        return y.masked_fill((x == 0).unsqueeze(-1), 0.0)


@pytest.mark.parametrize(
    "edit",
    [
        InsertLayer("encoder.layers.0", "copy"),
        InsertLayer("encoder.layers.1"),
        InsertAttention("encoder.layers.0", "self", heads=2, causal=False),
        InsertLayer("encoder"),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_batches_in_evaluation_mode(edit: Edit) -> None:
    """Without gradients torch takes another way through its encoder; the output is the same."""
    model, x = Padded().double(), torch.tensor([[3, 5, 7, 0, 0], [1, 2, 3, 4, 5]])
    apply(model, edit, (x,))
    waken(model)
    expected = model.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert model.encoder.use_nested_tensor is (edit.place == "encoder")


# --- what is copied, and what is not -------------------------------------------------------------


def test_new_parameters_join_the_groups_of_those_they_copy() -> None:
    """Norms of the copy stay out of weight decay where those of the block do."""
    model = stack()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]
    )
    apply(model, InsertLayer("blocks.0", kind="copy"), (X,), optimizer=optimizer)
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    for parameter in model.parameters():
        assert [id(parameter) in group for group in held] == [
            parameter.dim() > 1,
            parameter.dim() < 2,
        ]


def test_hooks_flags_and_shared_objects() -> None:
    """Hooks of the user are not copied, the config is shared, a frozen norm stays frozen."""
    model = stack()
    config = {"hidden": 6}
    model.config = model.blocks[0].config = config
    model.blocks[0].owner = [model]
    model.blocks[0].last = model.blocks[0].inner(X)  # a value that a forward left there
    seen: list[str] = []
    model.blocks[0].inner.register_forward_hook(lambda *_: seen.append("called"))
    model.blocks[0].norm.eval()
    apply(model, InsertLayer("blocks.0", kind="copy"), (X,))
    further = model.blocks[0].nx_next
    assert further.config is config
    assert further.owner[0] is model
    assert (further.norm.training, further.inner.training) == (False, True)
    seen.clear()
    model(X)
    assert seen == ["called"] * 2  # the block calls its linear layer twice, the copy unheard


def test_weight_norm_goes_along() -> None:
    """What makes a weight, a hook or a parametrization of torch's, is part of the block."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)).double()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[0])
    torch.nn.utils.parametrizations.weight_norm(model[1])
    for path in ("0", "1"):
        apply(model, InsertLayer(path, kind="copy"), (X,))
    inner: Any = [model[place].nx_next.nx_block for place in (0, 1)]
    inner[0].weight_g.data *= 2
    inner[1].parametrizations.weight.original0.data *= 2
    for place in (0, 1):
        inner[place](X)
        torch.testing.assert_close(inner[place].weight, 2 * model[place].weight)


def test_the_copy_of_a_frozen_block_learns() -> None:
    """The block stays frozen."""
    model = stack()
    model.blocks[0].requires_grad_(False)
    apply(model, InsertLayer("blocks.0", kind="copy"), (X,))
    further = model.blocks[0].nx_next
    assert all(p.requires_grad for p in further.parameters())
    own = [p for n, p in model.blocks[0].named_parameters() if "nx_" not in n]
    assert not any(p.requires_grad for p in own)


@pytest.mark.parametrize("kind", ["mlp", "copy"])
def test_copies_files_and_compilation(kind: str) -> None:
    """Deep copy, pickle, state dict and one compiled graph do the same."""
    model = stack()
    for path in ("blocks.0", "blocks.2"):
        apply(model, InsertLayer(path, kind=kind), (X,))
    waken(model)
    expected = model(X)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), expected)
    other = stack()
    for path in ("blocks.0", "blocks.2"):
        apply(other, InsertLayer(path, kind=kind), (X,))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), expected)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["mlp", "copy"])
def test_taking_it_back_leaves_no_trace(kind: str) -> None:
    """Every bit is as before, the optimizer too."""
    model = stack()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).square().mean().backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.raises(ZeroDivisionError), transaction(model, optimizer) as tx:  # noqa: PT012
        tx.apply(InsertLayer("blocks.1", kind=kind), (X,))
        raise ZeroDivisionError
    assert not changes(before, snapshot(model, optimizer))


SPECS: list[Edit] = [
    InsertLayer("blocks.0"),
    InsertLayer("blocks.0", "copy"),
    InsertAttention("blocks.0.attn", "self", causal=True),
    InsertAttention("blocks.1", causal=False),
]


@pytest.mark.parametrize("edit", SPECS, ids=repr)
def test_the_size_is_known_beforehand(edit: Edit) -> None:
    """What a plan forecasts is what is made; nothing of the model is taken for new."""
    model = zoo.build("gpt")
    args = zoo.example("gpt")
    apply(model, InsertLayer("blocks.0", "copy"), args)  # not part of a further copy
    (insertion,) = edit.plan(map_axes(model, args), dict(model.named_parameters())).insertions
    forecast = insertion.spec.preview(model)
    assert all(tensor.is_meta for tensor in forecast)
    before = sum(p.numel() for p in model.parameters())
    apply(model, edit, args)
    added = sum(p.numel() for p in model.parameters()) - before
    assert sum(t.numel() for t in forecast if t.requires_grad) == added


# --- refusals ------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, InsertLayer, str]] = {
    "kind": ("mlp", InsertLayer("net.0", "twin"), "kind='twin'"),
    "hidden": ("mlp", InsertLayer("net.0", hidden=0), "hidden=0"),
    "hidden of a copy": ("gpt", InsertLayer("blocks.0", "copy", 8), "kind='copy' and hidden=8"),
    "maps": ("small_cnn", InsertLayer("features.0"), "output (4, 8, 16, 16) with channels"),
    "shape": ("small_cnn", InsertLayer("features.3", "copy"), "input (4, 8, 8, 8), output"),
    "weights": ("mlp", InsertLayer("net.2", "copy"), "a module without weights"),
    "root": ("gpt", InsertLayer("", "copy"), "the whole model"),
    "dictionary": ("preact_dict", InsertLayer("", "copy"), "an output of type dict"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_told_beforehand(case: str) -> None:
    """By ``check``, and raised by ``plan``."""
    name, edit, seen = WRONG[case]
    problems = edit.check(mapped(name))
    assert any(problem.seen.startswith(seen) for problem in problems)
    with pytest.raises(EditError):
        edit.plan(mapped(name), {})


def test_a_pruned_block_is_copied_with_its_masks() -> None:
    """What writes to the stream is zero in the copy, though a mask stands before it."""
    model, args = zoo.build("gpt"), zoo.example("gpt")
    apply(model, PruneWeights("*", share=0.5), args)
    done = apply(model, InsertLayer("blocks.0", "copy"), args)
    assert done.max_difference == 0
    assert any("nx_next" in name and "nx_mask" in name for name, _ in model.named_buffers())


def test_what_was_inserted_is_no_weight_of_a_block() -> None:
    """A ReLU with attention behind it is still a module that has nothing to copy."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    args = (torch.randn(2, 3, 6, 6),)
    apply(model, InsertAttention("1"), args)
    with pytest.raises(EditError, match="a module without weights"):
        apply(model, InsertLayer("1", "copy"), args)


def test_what_cannot_be_copied_is_refused_with_the_reason() -> None:
    """A replaced forward runs the old module; a lock cannot be copied. Nothing is left behind."""
    import threading

    for spoil, reason in (("forward", "replaced on this instance"), ("lock", "cannot pickle")):
        model = stack()
        inner = model.blocks[0].inner
        setattr(inner, spoil, inner.forward if spoil == "forward" else threading.Lock())
        before = snapshot(model)
        with pytest.raises(EditError, match=reason):
            apply(model, InsertLayer("blocks.0", kind="copy"), (X,))
        assert not changes(before, snapshot(model))
