"""What is loaded is what was saved: every edit, every tensor, every state, to the bit."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.laws.operations import ON_MASKED, OPERATIONS
from tests.laws.test_table import row
from tests.laws.world import NAMES, mapped
from torch import Tensor, nn

from neuroexapt import (
    AddRegularization,
    InsertLayer,
    Narrow,
    NeuroExaptError,
    PruneWeights,
    RemoveLayer,
    Widen,
    apply,
    load,
    map_axes,
    save,
    transaction,
)
from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import Insertion, Patch, Spec, register
from neuroexapt.errors import CheckpointError
from neuroexapt.guard import Trial
from neuroexapt.guard.lineage import lineage
from neuroexapt.testing.snapshot import bits
from neuroexapt.testing.world import World, world

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
SLICE = ("small_cnn", "lstm")
MODELS = NAMES if os.environ.get("NEUROEXAPT_ALL_CHECKPOINTS") else SLICE


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a loaded model must have of the one that was saved."""
    state: dict[str, Any] = {name: bits(t) for name, t in named_tensors(model).items()}
    for path, module in model.named_modules():
        state[f"module {path}"] = type(module), module.training, sorted(module._modules)
        state[f"numbers {path}"] = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) or name == "config"
        }
    for name, parameter in model.named_parameters():
        state[f"trained {name}"] = parameter.requires_grad
    names = {id(t): n for n, t in reversed(list(named_tensors(model).items()))}
    state["tied"] = {n: names[id(t)] for n, t in named_tensors(model).items()}
    return {**state, "lineage": lineage(model)}


def first_edit(single: World, operation: str) -> bool:
    """Make the first edit of an operation that this model takes."""
    for edit in OPERATIONS[operation](single.axes, single.model):
        try:
            with transaction(single.model, single.optimizer) as tx:
                tx.apply(edit, single.args, single.kwargs, axes=single.axes)
        except NeuroExaptError:
            continue
        return True
    return False


def loaded(single: World, folder: Path) -> World:
    """Save a world, and load it into what its factory builds."""
    held = single.optimizer

    def factory() -> dict[str, Any]:
        model = single.row.build(single.dtype)
        trained = list(model.parameters())[1:]
        groups = [{**g, "params": [trained.pop()]} for g in held.param_groups if trained]
        return {"model": model, "optimizer": torch.optim.AdamW(groups, lr=0.5)}

    save(folder, single.model, optimizer=held)
    run = load(factory, folder)
    return World(
        single.row,
        single.axes,
        single.dtype,
        run["model"],
        run["optimizer"],
        single.args,
        single.kwargs,
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_operation_is_loaded_into_a_model_as_its_factory_builds_it(
    name: str, tmp_path: Path
) -> None:
    """Bits, structure, numbers and flags are those saved, and training goes on bit for bit."""
    done = 0
    for operation in OPERATIONS:
        single = world(row(name), mapped(name))
        if not first_edit(single, operation):
            continue
        done += 1
        again = loaded(single, tmp_path)
        assert state_of(again.model) == state_of(single.model), operation
        assert again.train(2) == single.train(2), operation
        ours, theirs = state_of(again.model), state_of(single.model)
        assert ours == theirs, (operation, [k for k in ours if ours[k] != theirs.get(k)][:5])
    assert done >= len(OPERATIONS) // 3


def sequence(draw: random.Random, name: str) -> World:
    """A model in training with some edits in a row, each at a place drawn among all."""
    single, choices = world(row(name), mapped(name)), {**OPERATIONS, **ON_MASKED}
    for _ in range(draw.randrange(2, 6)):
        axes = map_axes(single.model, single.args, single.kwargs)
        edits = list(choices[draw.choice(sorted(choices))](axes, single.model))
        for edit in draw.sample(edits, min(6, len(edits))):
            try:
                with transaction(single.model, single.optimizer) as tx:
                    tx.apply(edit, single.args, single.kwargs, axes=axes)
            except NeuroExaptError:
                continue
            break
        single.train(draw.randrange(2))
    return single


@pytest.mark.parametrize("seed", range(400 if os.environ.get("NEUROEXAPT_ALL_CHECKPOINTS") else 6))
def test_any_sequence_is_loaded_and_goes_on(seed: int, tmp_path: Path) -> None:
    """Edits on edits: masks that are resized, copies of what was pruned, what was removed again."""
    draw = random.Random(seed)
    single = sequence(draw, draw.choice(["small_cnn", "gpt_nano", "lstm", "moe", "resnet_basic"]))
    again = loaded(single, tmp_path)
    assert state_of(again.model) == state_of(single.model)
    assert again.train(1) == single.train(1)
    assert state_of(again.model) == state_of(single.model)


# --------------------------------------------------------------------- what a factory cannot know


@dataclass(frozen=True, kw_only=True)
class ScaledSpec(Spec):
    """A user's own module: a learned factor that starts at one."""

    channels: int

    def make(self, model: nn.Module) -> nn.Module:
        return Scaled(self.channels)


class Scaled(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def stage(model: nn.Module, patch: Patch) -> None:
    with transaction(model) as tx:
        tx.stage(patch)


def scaled(at: str) -> Patch:
    insertion = Insertion(at, "nx_then", ScaledSpec(channels=8), None)
    return Patch(Widen(at, by=1), "exact", "a factor", insertions=(insertion,))


def test_a_spec_of_the_users_own_is_saved_once_it_is_registered(tmp_path: Path) -> None:
    """Unregistered, the edit itself works and the save says what is missing."""
    model = net()
    stage(model, scaled("2"))
    with pytest.raises(CheckpointError, match="register"):
        load(net, save(tmp_path / "a", model))
    register(ScaledSpec)
    model = net()
    stage(model, scaled("2"))
    with torch.no_grad():
        model[2].nx_then.scale.mul_(3)
        model[2].nx_then.seen.add_(2)
    again = load(net, save(tmp_path / "b", model))
    assert state_of(again) == state_of(model)


class Hard(nn.Module):
    """What real models have: ties, buffers that are not saved, halves, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.mix = nn.Linear(8, 8).to(torch.bfloat16)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 9, bias=False)
        self.out.weight = self.words.weight
        self.register_buffer("table", torch.arange(8.0).expand(3, 8), persistent=False)
        self.images = nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.words(x) + self.table[0]
        hidden = hidden + self.mix(hidden.bfloat16()).float()
        return self.out(self.norm(hidden)) + self.images(torch.ones(1, 1, 2, 2)).mean()


def test_ties_transient_buffers_dtypes_strides_and_flags_are_kept(tmp_path: Path) -> None:
    """Each to the bit; what the factory built is the object that is filled."""
    model, x = Hard(), torch.randint(0, 9, (4, 5))
    apply(model, Widen("words", by=4), (x,))
    apply(model, PruneWeights("mix.weight", share=0.5), (x,))
    apply(model, InsertLayer("norm"), (x,))
    model.images.requires_grad_(False)
    model.norm.eval()
    assert model.table.shape == (3, 12)
    made: list[Hard] = []

    def factory() -> Hard:
        made.append(Hard())
        return made[-1]

    again = load(factory, save(tmp_path, model))
    assert again is made[0]
    assert state_of(again) == state_of(model)
    assert again.out.weight is again.words.weight
    assert torch.equal(again(x), model(x))


def test_a_model_built_without_memory_is_filled(tmp_path: Path) -> None:
    """A factory under torch.device("meta") never holds the first weights."""
    model = net()
    apply(model, Narrow("0", by=3), (X,))
    apply(model, InsertLayer("2"), (X,))

    def factory() -> nn.Sequential:
        with torch.device("meta"):
            return net()

    assert state_of(load(factory, save(tmp_path, model))) == state_of(model)


def test_a_model_whose_factory_edits_it_already_goes_on_from_there(tmp_path: Path) -> None:
    """The factory's own edits come first in the lineage, and are not made twice."""

    def factory() -> nn.Sequential:
        model = net()
        apply(model, Narrow("0", to=6), (X,))
        return model

    model = factory()
    apply(model, Widen("0", to=9), (X,))
    path = save(tmp_path, model)
    assert load(factory, path)[0].out_features == 9
    assert load(net, path)[0].out_features == 9

    def other() -> nn.Sequential:
        model = net()
        apply(model, Widen("0", to=10), (X,))
        return model

    with pytest.raises(CheckpointError, match="by the factory"):
        load(other, path)


def test_a_part_that_was_edited_by_itself_is_found(tmp_path: Path) -> None:
    """Edits of a module inside a larger one, and then of the whole, in the order they were made."""

    def factory() -> nn.ModuleDict:
        return nn.ModuleDict({"student": net(), "teacher": net()})

    model = factory()
    apply(model["student"], Widen("0", to=12), (X,))
    apply(model["teacher"], RemoveLayer("2"), (X,))
    apply(model["student"], Narrow("0", to=7), (X,))
    again = load(factory, save(tmp_path, model))
    assert state_of(again) == state_of(model)
    assert again["student"][0].out_features == 7


def test_what_was_taken_back_is_not_remembered(tmp_path: Path) -> None:
    """By an error in a transaction, and by a trial; what was kept is."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tx = transaction(model)
    tx.apply(Widen("0", by=2), (X,))
    tx.roll_back()
    trial = Trial(model, optimizer)
    trial.apply(Narrow("0", by=2), (X,))
    trial.roll_back()
    assert lineage(model) == ()
    trial = Trial(model, optimizer)
    trial.apply(Widen("0", by=2), (X,))
    trial.keep()
    assert [json.loads(entry)["place"] for entry in lineage(model)] == ["0"]
    assert load(net, save(tmp_path, model))[0].out_features == 10


def test_the_lineage_goes_with_copies_and_pickles_and_not_with_the_state_dict() -> None:
    """And a pickle that only holds other sizes does not need this library to be read."""
    model = net()
    apply(model, Narrow("0", by=2), (X,))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert lineage(twin) == lineage(model) != ()
    assert set(model.state_dict()) == set(net().state_dict())
    assert b"neuroexapt" not in pickle.dumps(model)


def test_the_weights_are_a_plain_safetensors_file(tmp_path: Path) -> None:
    """They load into the evolved model by anybody's `load_state_dict`."""
    model = net()
    apply(model, Widen("0", to=11), (X,))
    held = load_file(save(tmp_path, model) / "model.safetensors")
    assert held.keys() == model.state_dict().keys()
    assert all(torch.equal(held[name], t) for name, t in model.state_dict().items())


def test_weight_decay_of_chosen_parameters_goes_on(tmp_path: Path) -> None:
    """It is a hook of the optimizer, which state dicts leave out."""

    def factory() -> dict[str, Any]:
        model = net()
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.5)}

    run = factory()
    edit = AddRegularization("0", "weight_decay", 0.5)
    apply(run["model"], edit, (X,), optimizer=run["optimizer"])
    again = load(factory, save(tmp_path, **run))
    for one in (run, again):
        one["model"][0].weight.grad = torch.zeros(8, 4)
        one["optimizer"].step()
    assert torch.equal(run["model"][0].weight, again["model"][0].weight)
    assert not torch.equal(again["model"][0].weight, load(net, tmp_path)[0].weight)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW capturable lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """State by name: parameters in another order than the model's, one outside of it, an edit."""

    def factory() -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model, outside = net(), nn.Parameter(torch.ones(3))
        groups = [*reversed(list(model.parameters())), outside]
        return {"model": model, "optimizer": OPTIMIZERS[name](groups)}

    def steps(run: dict[str, Any], count: int) -> list[Tensor]:
        outside = run["optimizer"].param_groups[0]["params"][-1]
        for _ in range(count):
            run["optimizer"].zero_grad()
            (run["model"](X).square().mean() + outside.square().sum()).backward()
            run["optimizer"].step()
        return [*run["model"].parameters(), outside]

    run = factory()
    steps(run, 3)
    apply(run["model"], Widen("0", by=3), (X,), optimizer=run["optimizer"])
    apply(run["model"], InsertLayer("2"), (X,), optimizer=run["optimizer"])
    steps(run, 2)
    # The parameter outside of the model is the user's own to save: it is the same one here.
    path = save(tmp_path, **run)
    again = load(factory, path)
    with torch.no_grad():
        mine, theirs = (r["optimizer"].param_groups[0]["params"][-1] for r in (run, again))
        theirs.copy_(mine)
    assert list(map(bits, steps(again, 3))) == list(map(bits, steps(run, 3)))


def test_two_optimizers_and_a_plain_list_of_schedules(tmp_path: Path) -> None:
    """Matrices with one, vectors with another; objects by names of the user's own."""

    def factory() -> dict[str, Any]:
        model = net()
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        both = [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.Adam(vectors)]
        warm = torch.optim.lr_scheduler.MultiStepLR(both[0], [2, 4])
        return {"model": model, "optimizer": both, "warm": warm}

    run = factory()
    for _ in range(3):
        run["model"](X).square().mean().backward()
        for one in run["optimizer"]:
            one.step()
        run["warm"].step()
    apply(run["model"], Narrow("0", by=3), (X,), optimizer=run["optimizer"])
    best = {"loss": float("inf"), (1, 2): torch.arange(3), "note": None}
    again = load(factory, save(tmp_path, **run, best=best))
    assert again["best"]["loss"] == float("inf")
    assert torch.equal(again["best"][1, 2], torch.arange(3))
    assert again["warm"].state_dict() == run["warm"].state_dict()
    for mine, theirs in zip(run["optimizer"], again["optimizer"], strict=True):
        ours, others = mine.state_dict(), theirs.state_dict()
        assert str(ours) == str(others)


def test_random_states_are_restored_with_a_run_and_left_alone_with_a_model(tmp_path: Path) -> None:
    """Loading a model to look at it draws from nobody's generator."""
    model = net()
    path = save(tmp_path, model)
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    run = load(lambda: {"model": net()}, path)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == drawn
    assert run["model"][0].out_features == 8
    after = random.getstate()
    load(lambda: copy.deepcopy(model), path)
    assert random.getstate() == after


def test_hugging_face_configs_are_set_again(tmp_path: Path) -> None:
    """A decoder with fewer heads, a copied and a removed layer, and its config."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=19, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip

    def factory() -> nn.Module:
        return transformers.LlamaForCausalLM(copy.deepcopy(config))

    model, ids = factory().eval(), torch.randint(0, 19, (2, 6))
    inputs = ((ids,), {"use_cache": False})
    apply(model, Narrow("*.mlp.gate_proj.out", to=16), *inputs)
    apply(model, InsertLayer("model.layers.2", "copy"), *inputs)
    apply(model, RemoveLayer("model.layers.0"), *inputs)
    again = load(factory, save(tmp_path, model))
    assert again.config.to_dict() == model.config.to_dict() != config.to_dict()
    assert {k: v for k, v in state_of(again).items() if "numbers" not in k} == {
        k: v for k, v in state_of(model).items() if "numbers" not in k
    }
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **settings), model.generate(ids, **settings))


# --------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 9), *list(net())[1:]),
            r"edit 1 .*'0\.weight' of shape",
        ),
        (lambda: nn.Linear(4, 4), r"edit 1 .*no tensor '0\.weight'"),
        (lambda: net().double(), "float32 in the file, torch.float64 in the model"),
        (
            lambda: nn.Sequential(*net(), nn.Linear(2, 2)),
            "4.bias: got a tensor that is in the model",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(8)), "without a shape"),
        (lambda: 3, "factory: got a int"),
        (lambda: {"optimizer": 1}, "factory: got a dict"),
    ],
)
def test_a_factory_of_something_else_is_refused_by_name(
    factory: Any, message: str, tmp_path: Path
) -> None:
    """The first edit or tensor that does not fit, and what to do."""
    model = net()
    apply(model, Narrow("0", by=2), (X,))
    with pytest.raises(CheckpointError, match=message):
        load(factory, save(tmp_path, model))


def test_ties_must_be_the_same(tmp_path: Path) -> None:
    """Loading one tensor into two places, or two into one, would lose weights in silence."""
    model = Hard()
    path = save(tmp_path, model)

    def apart() -> Hard:
        other = Hard()
        other.out.weight = nn.Parameter(other.out.weight.detach().clone())
        return other

    with pytest.raises(CheckpointError, match=r"out\.weight: .*tied"):
        load(apart, path)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    """An object without a state, a tensor without values; nothing is written."""
    with pytest.raises(CheckpointError, match=r"objects\.loader"):
        save(tmp_path, net(), loader=object())
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        save(tmp_path, net().to("meta"))
    with pytest.raises(CheckpointError, match="keep"):
        save(tmp_path, net(), keep=0)
    assert list(tmp_path.iterdir()) == []


def test_the_last_ones_stay_and_the_newest_is_taken(tmp_path: Path) -> None:
    """Numbers go on; an older one can be named."""
    for number in range(5):
        save(tmp_path, net(), keep=3, epoch=number)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003", "00000004", "00000005"]
    assert load(lambda: {"model": net()}, tmp_path)["epoch"] == 4
    assert load(lambda: {"model": net()}, tmp_path / "00000003")["epoch"] == 2


def test_modules_of_another_class_are_told(tmp_path: Path) -> None:
    """Weights fit whatever stands between them, and the model would compute something else."""
    path = save(tmp_path, net())

    def other() -> nn.Sequential:
        model = net()
        model[2] = nn.GELU()
        return model

    with pytest.warns(UserWarning, match="'2' is a GELU, was a ReLU"):
        load(other, path)


class Caching(nn.Module):
    """A table that grows with the longest input so far, and one that the first forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > len(self.table):
            self.register_buffer("table", torch.arange(float(len(x))), persistent=False)
            self.register_buffer("made", torch.ones(()), persistent=False)
        return self.fc(x) * self.table[: len(x), None]


def test_caches_that_forwards_made_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """They are buffers of another shape than a fresh model has, and no edit made them."""
    model = Caching()
    model(X)
    path = save(tmp_path, model)
    again = load(Caching, path)
    assert torch.equal(again.table, model.table)
    assert torch.equal(again(X), model(X))
    fresh = save(tmp_path, Caching())

    def used() -> Caching:
        built = Caching()
        built(X)
        return built

    assert len(load(used, fresh).table) == 2


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.Sequential(*m[:3], nn.utils.parametrizations.weight_norm(m[3])),
        lambda m: nn.Sequential(nn.utils.prune.random_unstructured(m[0], "weight", 0.5), *m[1:]),
        lambda m: nn.Sequential(nn.utils.parametrizations.spectral_norm(m[0]), *m[1:]),
    ],
    ids=["compiled", "weight norm", "pruned by torch", "spectral norm"],
)
def test_what_users_wrap_models_in_is_loaded(wrap: Any, tmp_path: Path) -> None:
    """Compiled, parametrized, pruned by torch: edited, saved, loaded, the same function."""

    def factory() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return wrap(net())

    model = factory()
    apply(model, Narrow("*0*out", by=2), (X,))
    model(X).sum().backward()
    again = load(factory, save(tmp_path, model))
    assert type(again) is type(model)
    for one in (model, again):
        one.eval()
    assert torch.equal(again(X), model(X))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_a_run_on_an_accelerator_is_loaded_there_and_on_the_cpu(tmp_path: Path) -> None:
    """Values go where the factory builds; counters stay where the optimizer wants them."""
    device = torch.accelerator.current_accelerator()

    def factory(where: Any = device) -> dict[str, Any]:
        model = net().to(where)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}

    run = factory()
    apply(run["model"], Widen("0", by=2), (X.to(device),), optimizer=run["optimizer"])
    apply(run["model"], InsertLayer("2"), (X.to(device),), optimizer=run["optimizer"])
    run["model"](X.to(device)).sum().backward()
    run["optimizer"].step()
    path = save(tmp_path, **run)
    for where in (device, torch.device("cpu")):
        again = load(lambda where=where: factory(where), path)
        assert {p.device.type for p in again["model"].parameters()} == {where.type}
        again["model"](X.to(where)).sum().backward()
        again["optimizer"].step()
