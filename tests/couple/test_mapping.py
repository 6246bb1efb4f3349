"""The axis map of whole models: names, reasons, attributes, and that nothing is disturbed."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuroexapt import map_axes
from neuroexapt.couple import AxisMap
from neuroexapt.errors import CaptureError, EditError, PinnedError, UnknownPlaceError
from tests import zoo
from tests.couple import models
from tests.couple.dead_units import MIXING, TOLERANCE, named, worst_difference

X = torch.zeros(3, 4)


@torch.library.custom_op("neuroexapt_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x * 2


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mystery(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return mystery(x)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def roles(axes: AxisMap, width: str) -> dict[tuple[str, int], str]:
    return {(p.tensor, p.dim): p.role for p in axes.widths[width].appearances}


def attributes(axes: AxisMap) -> dict[str, str]:
    """``module.attribute`` to the expression it repeats."""
    return {
        f"{a.module}.{a.name}".lstrip("."): " ".join(map(str, a.exprs)) for a in axes.attributes
    }


def test_names_and_roles_of_an_mlp() -> None:
    """A width is named after the layer that makes it; the next layer reads it."""
    axes = map_axes(mlp(), (X,))
    assert {name: width.size for name, width in axes.widths.items()} == {"0.out": 8, "2.out": 6}
    assert roles(axes, "0.out") == {
        ("0.weight", 0): "producer",
        ("0.bias", 0): "elementwise",
        ("2.weight", 1): "consumer",
    }
    assert set(axes.pinned) == {"0.in", "4.out"}
    assert "input" in axes.pinned["0.in"].reason
    assert "output" in axes.pinned["4.out"].reason
    assert attributes(axes)["2.in_features"] == "0.out"


def test_a_literal_pins_with_its_line() -> None:
    """`x.view(-1, 512)` holds the channels; the reason shows file, line and code."""
    axes = map_axes(models.Literal(), (torch.zeros(2, 3, 8, 8),))
    assert not axes.widths
    reason = axes.pinned["conv.out"].reason
    assert "x = x.view(-1, 512)" in reason
    assert "models.py:" in reason


def test_grouped_queries_bind_their_attributes() -> None:
    """Key heads and head size are widths; all three numbers in the module follow."""
    model = models.Grouped()
    axes = map_axes(model, (torch.zeros(2, 7, 5),))
    bound = attributes(axes)
    keys, size = axes.widths[bound["kv_heads"]], axes.widths[bound["head_dim"]]
    assert (keys.size, size.size) == (2, 6)
    assert {t for t, _ in roles(axes, size.name)} >= {f"{n}.weight" for n in "qkvo"}
    assert bound["heads"].startswith(f"{keys.name} * ")
    assert (model.heads, model.kv_heads, model.head_dim) == (4, 2, 6)


def test_many_layers_of_one_class_are_settled_at_once() -> None:
    """What one line of code taught about an attribute holds for every layer that runs it."""
    layers = [nn.Sequential(models.Grouped(), nn.Linear(3, 5)) for _ in range(4)]
    axes = map_axes(nn.Sequential(*layers), (torch.zeros(2, 7, 5),))
    bound = attributes(axes)
    names = {bound[f"{number}.0.head_dim"] for number in range(4)}
    assert len(names) == 4
    assert names <= set(axes.widths)


def test_an_unknown_operator_pins_and_is_listed() -> None:
    """A custom operator without a rule stands in `unknown` with the path that called it."""
    axes = map_axes(
        nn.Sequential(nn.Linear(4, 8), Mystery(), nn.Linear(8, 6), nn.Linear(6, 2)), (X,)
    )
    assert axes.unknown == {"neuroexapt_tests.mystery.default": ("1",)}
    assert set(axes.widths) == {"2.out"}
    assert "has no rule" in axes.pinned["0.out"].reason


@pytest.mark.parametrize(
    ("at", "found"),
    [
        ("0.out", ["0.out"]),
        ("0", ["0.out"]),
        ("1", ["0.out"]),
        ("*.out", ["0.out", "2.out"]),
        ("[02]", ["0.out", "2.out"]),
    ],
)
def test_find_by_name_path_and_glob(at: str, found: list[str]) -> None:
    """A width is found by its own name, by a module it leaves, or by a glob over both."""
    assert [width.name for width in map_axes(mlp(), (X,)).find(at)] == found


@pytest.mark.parametrize(
    ("at", "error", "words"),
    [
        ("2.outt", UnknownPlaceError, "'2.out'"),
        ("nothing*", UnknownPlaceError, "glob"),
        ("4", PinnedError, "contract with its caller"),
        ("0.in", PinnedError, "contract with its caller"),
    ],
)
def test_find_says_why_not(at: str, error: type[Exception], words: str) -> None:
    """An unknown place gives near names, a pinned one its reason."""
    with pytest.raises(error, match=words):
        map_axes(mlp(), (X,)).find(at)


def test_one_refuses_several_widths() -> None:
    """An ambiguous place lists the names to choose from."""
    with pytest.raises(EditError, match=r"'0\.out' \(8\), '2\.out' \(6\)"):
        map_axes(mlp(), (X,)).one("*")


def everything(model: nn.Module) -> list[Any]:
    """All that a map could disturb, as comparable values."""
    return [
        [(n, id(t), t.detach().clone().numpy().tobytes()) for n, t in named(model).items()],
        [(n, None if p.grad is None else p.grad.tolist()) for n, p in model.named_parameters()],
        [(n, m.training, sorted(vars(m)), len(m._forward_hooks)) for n, m in model.named_modules()],
        torch.random.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("make", [mlp, models.Branching, models.Failing])
def test_nothing_is_disturbed(make: Callable[[], nn.Module]) -> None:
    """Tensors, gradients, flags, hooks and random states are bit-equal, also after a failure."""
    model = make()
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = everything(model)
    if make is models.Failing:
        with pytest.raises(CaptureError):
            map_axes(model, (X,))
    else:
        map_axes(model, (X,))
    assert everything(model) == before


def test_the_example_input_is_not_written_on() -> None:
    """An in-place operator on the input works on a copy, with real tensors too."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(0)
            return self.fc(x) if x.sum() < 1 else x

    x = torch.ones(2, 4)
    map_axes(Overwrites(), (x,))
    assert x.tolist() == torch.ones(2, 4).tolist()


def test_a_branch_on_data_runs_on_real_copies() -> None:
    """Where fake tensors refuse, real copies are used, and the map says so."""
    axes = map_axes(models.Branching(), (X,))
    assert {w.size for w in axes.widths.values()} == {6}
    assert any("real copies were used" in note for note in axes.notes)


def test_a_failing_forward_names_the_module() -> None:
    """The error shows which module failed, what it said, and the shapes that were given."""
    with pytest.raises(CaptureError, match=r"body\.3") as caught:
        map_axes(models.Failing(), (X,))
    assert "(3, 4)" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_one_mode_is_enough() -> None:
    """Batch norm refuses a batch of one in training; the map stands on the evaluation run."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    axes = map_axes(net, (torch.zeros(1, 4),))
    assert set(axes.widths) == {"0.out"}
    assert axes.notes == ("the forward did not run in training mode on this example input",)


def test_a_billion_parameters_need_no_memory() -> None:
    """A model on the meta device maps, and nothing of the size of a weight is allocated."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(16384, 32768), nn.ReLU(), nn.Linear(32768, 16384))
    tracemalloc.start()
    axes = map_axes(net, (torch.zeros(1, 16384, device="meta"),))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert axes.widths["0.out"].size == 32768
    assert all(trace.fake for trace in axes.traces)
    assert peak < 50e6
    assert sum(p.numel() for p in net.parameters()) > 1e9


def test_dicts_and_keywords() -> None:
    """Inputs and outputs inside containers are pinned like any other."""
    batch = {"x": torch.zeros(3, 4)}
    axes = map_axes(models.FromDict(), (batch,), {"side": torch.zeros(3, 3)})
    assert set(axes.widths) == {"a.out"}
    assert {"a.in", "b.in", "out.out"} <= set(axes.pinned)


def test_tied_weights_are_one_appearance_under_both_names() -> None:
    """The table produces and consumes the stream; both names have the same axes."""
    axes = map_axes(models.Tied(), (torch.zeros(2, 3, dtype=torch.long),))
    assert axes.tensors["embed.weight"] == axes.tensors["head.weight"]
    [stream] = axes.widths.values()
    ends = {
        p.tensor: p.roles for p in stream.appearances if p.tensor in ("embed.weight", "head.weight")
    }
    assert ends == {name: {"producer", "consumer"} for name in ("embed.weight", "head.weight")}
    assert "rows taken by number" in next(p.reason for p in axes.pinned.values() if p.size == 11)


def test_a_head_of_training_alone_is_followed() -> None:
    """The auxiliary head reads the width, though the evaluation run never meets it."""
    axes = map_axes(models.Auxiliary(), (X,))
    assert roles(axes, "body.out")[("aux.weight", 1)] == "consumer"


def test_an_unused_parameter_is_pinned() -> None:
    """What the forward never meets could follow nothing."""
    net = mlp()
    net.register_parameter("spare", nn.Parameter(torch.zeros(8)))
    axes = map_axes(net, (X,))
    pins = [p for p in axes.pinned.values() if p.appearances[0].tensor == "spare"]
    assert [(p.size, "not used in this forward" in p.reason) for p in pins] == [(8, True)]


def test_user_hooks_run_and_survive() -> None:
    """A hook of the user is part of the forward, and is there afterwards."""
    net, seen = mlp(), []
    net[0].register_forward_hook(lambda module, args, output: seen.append(type(output)) or -output)
    axes = map_axes(net, (X,))
    assert len(net[0]._forward_hooks) == 1
    assert seen
    assert set(axes.widths) == {"0.out", "2.out"}


@pytest.mark.parametrize("row", zoo.ZOO, ids=lambda row: row.name)
def test_couplings_of_the_zoo(row: zoo.Entry) -> None:
    """In every model of the zoo a silent unit of every unmixed width can be taken out."""
    model, args = zoo.build(row.name, dtype=torch.float64), zoo.example(row.name, 2, torch.float64)
    axes = map_axes(model, args)
    assert axes.widths
    assert not axes.unknown
    for width in axes.widths.values():
        if not any(m.kind in MIXING or m.scale == "inverse_sqrt" for m in width.mixers):
            assert worst_difference(model, args, axes, width, width.size - 1) < TOLERANCE, (
                width.name
            )
