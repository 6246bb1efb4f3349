"""The coverage benchmark: it finds what is right, and what is wrong does not pass."""

from __future__ import annotations

import copy
import importlib.util
import json
import multiprocessing
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.coverage.case import Case, all_cases
from benchmarks.coverage.check import _made, check
from benchmarks.coverage.oracle import permutation, silent_units
from benchmarks.coverage.outputs import changed, difference, fingerprint, tensors_of
from benchmarks.coverage.page import headline, page
from benchmarks.coverage.result import STAGES, Result, Stage, from_row
from benchmarks.coverage.runner import isolated
from torch import nn

from neuroexapt import AxisMap, map_axes
from neuroexapt.couple import Leaf
from neuroexapt.errors import EditError, VerifyError
from neuroexapt.guard.transaction import Transaction


class Gated(nn.Module):
    """Two branches of one width under a layer norm, and a third of a width of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate = nn.Linear(5, 8), nn.Linear(5, 8)
        self.norm, self.hidden, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.norm(self.body(x) * torch.sigmoid(self.gate(x)))
        return self.head(torch.relu(self.hidden(mixed)))


def _inputs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(3, 5),), {}


def _case(make: Callable[[], nn.Module]) -> Case:
    return Case("own/model", make, _inputs)


def _mapped() -> tuple[nn.Module, AxisMap, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    model, args = Gated(), (torch.randn(3, 5),)
    return model, map_axes(model, args), args


def _without_appearance(axes: AxisMap, tensor: str, dim: int) -> AxisMap:
    """A map that has missed that this dimension follows."""
    dims = list(axes.tensors[tensor])
    dims[dim] = Leaf("missed", 8)
    widths = {
        name: replace(
            width,
            appearances=tuple(
                place for place in width.appearances if (place.tensor, place.dim) != (tensor, dim)
            ),
        )
        for name, width in axes.widths.items()
    }
    return replace(axes, widths=widths, tensors={**axes.tensors, tensor: tuple(dims)})


def test_every_case_has_a_name_of_its_own_and_a_family() -> None:
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases) >= 50
    assert all(case.family and case.name != case.family for case in cases)
    if importlib.util.find_spec("transformers"):
        assert len(cases) >= 150


def test_cases_are_chosen_by_globs() -> None:
    chosen = all_cases("plain/*net,plain/lenet")
    assert chosen
    assert all(case.name.startswith("plain/") for case in chosen)


@pytest.mark.parametrize("case", all_cases("plain/lenet,plain/film"), ids=lambda case: case.name)
def test_a_case_of_the_zoo_passes_every_stage(case: Case) -> None:
    result = check(case)
    assert {name: result.stages[name].status for name in STAGES} == dict.fromkeys(STAGES, "ok")
    assert result.full
    assert result.safe
    assert 0 < result.facts["narrowed"] < 0.9 * result.facts["parameters"]
    assert result.facts["widened"] == result.facts["widths"] > 0


def test_no_norm_is_left_at_ones_and_zeros() -> None:
    model = _made(_case(Gated))
    assert all(parameter.std() > 0 for parameter in model.parameters())
    again = _made(_case(Gated))
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_a_model_that_breaks_by_itself_is_no_success() -> None:
    result = check(_case(lambda: nn.Linear(4, 2)))
    assert result.stages["map"].status == "refused"
    assert result.stages["alone"].status == "crash"
    assert not result.full
    assert not result.safe


def test_a_model_without_a_free_width_is_safe_and_not_full() -> None:
    result = check(_case(lambda: nn.Linear(5, 2)))
    assert result.stages["narrow"].status == "refused"
    assert result.safe
    assert not result.full


def _never_verified(*_: Any, **__: Any) -> None:
    raise VerifyError("output", seen="another", needed="the same", next_step="none")


def _never_planned(*_: Any, **__: Any) -> None:
    raise EditError("body", seen="a norm", needed="none", next_step="another width")


@pytest.mark.parametrize(
    ("apply", "narrow", "widen"),
    [(_never_verified, "taken back", "taken back"), (_never_planned, "refused", "ok")],
)
def test_refusals_are_safe_and_not_full(
    apply: Callable[..., None], narrow: str, widen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transaction, "apply", apply)
    result = check(_case(Gated))
    assert (result.stages["narrow"].status, result.stages["widen"].status) == (narrow, widen)
    assert result.safe
    assert not result.full


def test_a_refusal_that_leaves_a_trace_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(self: Transaction, *_: Any, **__: Any) -> None:
        self.model.eval()
        self.model.get_submodule("head").bias.data[0] = 7.0  # type: ignore[union-attr, operator]
        _never_planned()

    monkeypatch.setattr(Transaction, "apply", touched)
    result = check(_case(Gated))
    assert result.stages["narrow"].status == result.stages["widen"].status == "wrong"
    assert not result.safe


def test_the_oracles_agree_with_a_right_map() -> None:
    model, axes, args = _mapped()
    assert permutation(lambda: copy.deepcopy(model), axes, args, {}).wrong == {}
    assert permutation(lambda: copy.deepcopy(model), axes, args, {}).checked == 2
    assert silent_units(lambda: copy.deepcopy(model), axes, args, {}).wrong == {}
    assert silent_units(lambda: copy.deepcopy(model), axes, args, {}).checked == 1


@pytest.mark.parametrize("place", [("gate.weight", 0), ("norm.weight", 0), ("hidden.weight", 1)])
def test_permutation_notices_a_tensor_that_the_map_has_missed(place: tuple[str, int]) -> None:
    model, axes, args = _mapped()
    with torch.no_grad():
        model.get_parameter("norm.weight").copy_(torch.arange(8.0))
    wrong = permutation(
        lambda: copy.deepcopy(model), _without_appearance(axes, *place), args, {}
    ).wrong
    assert list(wrong) == ["body.out"]


def test_silent_units_notice_a_map_that_ties_the_wrong_tensors() -> None:
    model, axes, args = _mapped()
    # Both widths have eight units, so exchanged sides of a weight fit in shape.
    first, second = axes.tensors["hidden.weight"]
    tensors = {**axes.tensors, "hidden.weight": (second, first)}
    assert silent_units(
        lambda: copy.deepcopy(model), replace(axes, tensors=tensors), args, {}
    ).wrong
    assert permutation(lambda: copy.deepcopy(model), replace(axes, tensors=tensors), args, {}).wrong


def test_widths_of_two_units_cannot_hide_each_other() -> None:
    model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    args = (torch.randn(3, 5),)
    axes = map_axes(model, args)
    first, second = axes.tensors["2.weight"]
    mixed = replace(axes, tensors={**axes.tensors, "2.weight": (second, first)})
    assert permutation(lambda: copy.deepcopy(model), axes, args, {}).wrong == {}
    assert permutation(lambda: copy.deepcopy(model), mixed, args, {}).wrong


class Noisy(nn.Module):
    """Noise for each unit, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.dropout(self.body(x), 0.5, training=True)
        return self.head(hidden + torch.randn_like(hidden) + torch.rand(8))


def test_chance_is_no_failure() -> None:
    model, args = Noisy(), (torch.randn(3, 5),)
    axes = map_axes(model, args)
    assert permutation(lambda: copy.deepcopy(model), axes, args, {}).wrong == {}
    assert silent_units(lambda: copy.deepcopy(model), axes, args, {}).wrong == {}


def test_a_fingerprint_sees_tensors_attributes_and_flags() -> None:
    model = Gated()
    before = fingerprint(model)
    assert changed(model, before) == []
    with torch.no_grad():
        model.head.bias[0] += 1e-6
    assert changed(model, before) == ["head.bias tensor"]
    model.norm.eps = 0.5
    model.gate.eval()
    assert set(changed(model, before)) == {"gate training", "norm eps", "head.bias tensor"}


def test_a_fingerprint_sees_into_a_config() -> None:
    model = Gated()
    model.config = SimpleNamespace(heads=4, inner={"width": 8}, refs=[weakref.ref(model.head)])
    before = fingerprint(model)
    model.config.refs = [weakref.ref(model.head)]
    assert changed(model, before) == []
    model.config.inner["width"] = 9
    assert changed(model, before) == [" config.inner.width"]


def test_differences_are_relative_and_see_shapes_and_infinities() -> None:
    a = torch.tensor([100.0, -float("inf")])
    assert difference([a], [a.clone()]) == 0.0
    assert difference([torch.tensor([101.0])], [torch.tensor([100.0])]) == pytest.approx(0.01)
    assert difference([a], [torch.tensor([100.0, 0.0])]) == float("inf")
    assert difference([torch.zeros(2)], [torch.zeros(3)]) == float("inf")
    assert len(tensors_of({"a": (a, [a]), "b": 3})) == 2


def _dies(name: str, sender: Connection) -> None:
    sender.send(("map", Result(name)))
    raise SystemExit(3)


def _sleeps(name: str, sender: Connection) -> None:
    sender.send(("narrow", Result(name, {"map": Stage("ok")})))
    time.sleep(60)


def test_a_dead_process_and_an_endless_one_are_counted() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.coverage.check"])
    dead = isolated(_dies, "own/dead", 60)
    assert dead.stages["map"].status == "crash"
    assert "code 3" in dead.stages["map"].reason
    started = time.monotonic()
    slow = isolated(_sleeps, "own/slow", 4.0)
    assert {name: stage.status for name, stage in slow.stages.items()} == {
        "map": "ok",
        "narrow": "hang",
    }
    assert time.monotonic() - started < 30


def test_the_page_counts_and_names_what_failed() -> None:
    stages = {name: Stage("ok") for name in STAGES}
    facts = {"parameters": 10, "narrowed": 6, "widths": 2, "widened": 2, "share": 1.0}
    good = Result("own/good", stages, {**facts, "map_seconds": 0.1})
    bad = Result("own/bad", {**stages, "narrow": Stage("crash", "IndexError: 24")}, dict(facts))
    assert headline([good, bad]).startswith("2 models: 1 full (50.0%), 1 safe (50.0%), map 0.10 s")
    text = page([good, bad], [])
    assert "| all | 2 | 1 | 1 | 100% | 60% | 0.10 |" in text
    assert "- **own/bad**, narrow, crash: IndexError: 24" in text


def test_a_result_survives_json() -> None:
    stages = {"map": Stage("ok", "a note", 0.5), "narrow": Stage("hang")}
    result = Result("own/x", stages, {"widths": 3}, ["aten.fft"], {"an index": 2})
    assert from_row(json.loads(json.dumps(asdict(result)))) == result


def test_a_permutation_moves_every_unit() -> None:
    _, axes, _ = _mapped()
    from benchmarks.coverage.oracle import _shuffled

    for width in axes.widths.values():
        order = _shuffled(width)
        assert sorted(order) == list(range(width.size))
        assert not (order == np.arange(width.size)).any()
