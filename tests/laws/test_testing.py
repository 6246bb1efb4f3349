"""The laws can fail: each is shown a model that breaks it, and every check a bad edit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import AxisMap, InsertConv, InsertResidual, Narrow, Widen, apply, map_axes
from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import Edit, Patch, Rewrite, kind_named, register, registered
from neuroexapt.errors import EditError
from neuroexapt.testing import BrokenLaw, Row, check_cell, check_edit, default_models, laws
from neuroexapt.testing.world import World, world

ROWS = {row.name: row for row in default_models()}
EDIT = InsertConv("1")


@pytest.fixture
def scene() -> tuple[World, Patch, laws.Before]:
    """The small CNN after an insertion, with what there was before it."""
    row = ROWS["cnn"]
    axes = map_axes(row.build(), row.args)
    made = world(row, axes)
    old = laws.before(made)
    patch = EDIT.plan(axes, named_tensors(made.model))
    apply(made.model, EDIT, made.args, optimizer=made.optimizer)
    return made, patch, old


def check_all(made: World, patch: Patch, old: laws.Before) -> None:
    """Every law that looks at a model after an edit."""
    laws.check_promise(made, EDIT, patch, old)
    laws.check_survivors(made, EDIT, patch, old)
    laws.check_optimizer(made, EDIT, old)
    again = copy.deepcopy(made.model)
    laws.check_copies(made, EDIT, again)
    laws.check_training(made, EDIT, old)


def _conv(made: World) -> Any:
    return made.model.get_submodule("4")


def _halve(made: World) -> None:
    with torch.no_grad():
        _conv(made).weight.mul_(0.5)


def _spoil(made: World) -> None:
    with torch.no_grad():
        _conv(made).weight.fill_(float("nan"))


def _other_head(made: World) -> None:
    made.model.set_submodule("8", nn.Linear(128, 3))


def _another_object(made: World) -> None:
    _conv(made).weight = nn.Parameter(_conv(made).weight.detach().clone())


def _another_module(made: World) -> None:
    made.model.set_submodule("2", nn.ReLU())


def _freeze(made: World) -> None:
    _conv(made).weight.requires_grad_(False)


def _reformat(made: World) -> None:
    _conv(made).weight.data = _conv(made).weight.data.contiguous()


def _new_in_double(made: World) -> None:
    made.model.get_submodule("1").register_buffer("fresh", torch.zeros(1, dtype=torch.float64))


def _lose(made: World) -> None:
    made.optimizer.param_groups[0]["params"].pop()


def _twice(made: World) -> None:
    params = made.optimizer.param_groups[0]["params"]
    params.append(params[0])


def _other_group(made: World) -> None:
    first, second = (group["params"] for group in made.optimizer.param_groups)
    second.append(first.pop(0))


def _stale(made: World) -> None:
    made.optimizer.state[nn.Parameter(torch.zeros(2))] = {"step": torch.tensor(1.0)}


def _misfit(made: World) -> None:
    made.optimizer.state[_conv(made).weight]["exp_avg"] = torch.zeros(3)


class Sharing(nn.Conv2d):
    """A layer that is not copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def _shared_copy(made: World) -> None:
    _conv(made).__class__ = Sharing


def _standing_still(made: World) -> None:
    for group in made.optimizer.param_groups:
        group["lr"] = 0.0


def _no_hook(made: World) -> None:
    _conv(made).weight._post_accumulate_grad_hooks.clear()


def _called_twice(made: World) -> None:
    conv = _conv(made)
    conv.register_forward_hook(made.calls["4"])


def _dead_branch(made: World) -> None:
    branch = made.model.get_submodule("1").get_submodule("nx_after")
    for parameter in branch.parameters():
        parameter.register_hook(torch.zeros_like)


BREAKS: dict[str, tuple[Callable[[World], None], str]] = {
    "another function": (_halve, "'exact' keeps the function"),
    "not finite": (_spoil, "outputs stay finite"),
    "another shape": (_other_head, "outputs keep their shape"),
    "another parameter": (_another_object, "survivors keep identity and name"),
    "another module": (_another_module, "survivors keep identity and name"),
    "frozen": (_freeze, "survivors keep their kind"),
    "reformatted": (_reformat, "survivors keep their memory format"),
    "new in double": (_new_in_double, "what is new has the dtype"),
    "lost by the optimizer": (_lose, "the optimizer holds exactly what is live"),
    "held twice": (_twice, "the optimizer holds exactly what is live"),
    "another group": (_other_group, "parameters stay in their group"),
    "stale state": (_stale, "no optimizer state is stale"),
    "state of another shape": (_misfit, "optimizer state fits its parameter"),
    "shared by a copy": (_shared_copy, "a deepcopy shares nothing"),
    "nothing learns": (_standing_still, "training goes on"),
    "hook lost": (_no_hook, "tensor hooks fire as before"),
    "called twice": (_called_twice, "forward hooks fire as before"),
    "dead branch": (_dead_branch, "what is new learns"),
}


def test_a_good_edit_keeps_them_all(scene: tuple[World, Patch, laws.Before]) -> None:
    """Without a break nothing is raised: the tests below see the break alone."""
    check_all(*scene)


@pytest.mark.parametrize("name", BREAKS)
def test_each_law_can_be_broken(name: str, scene: tuple[World, Patch, laws.Before]) -> None:
    """One thing is spoiled behind an edit's back, and the law that speaks of it is named."""
    spoil, law = BREAKS[name]
    spoil(scene[0])
    with pytest.raises(BrokenLaw, match=law) as caught:
        check_all(*scene)
    assert caught.value.model == "cnn"
    assert pickle.loads(pickle.dumps(caught.value)).law == caught.value.law


def test_a_state_dict_that_leaves_something_out_is_seen(
    scene: tuple[World, Patch, laws.Before],
) -> None:
    """The model is rebuilt from its state dict: what that lacks is missing."""
    made = scene[0]
    again = copy.deepcopy(made.model)
    again.get_submodule("1").register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(BrokenLaw, match="state_dict keeps the function"):
        laws.check_copies(made, EDIT, again)


# --- edits that break their word -----------------------------------------------------------------


@dataclass(frozen=True)
class Scale(Edit):
    """Multiply a layer's weights."""

    at: str
    factor: float = 0.5
    promise: str = "exact"
    strict: bool = True

    @property
    def place(self) -> str:
        return self.at

    def check(self, axes: AxisMap) -> list[EditError]:
        if f"{self.at}.weight" in axes.tensors:
            return []
        return [EditError(self.at, seen="no weight", needed="a weight", next_step="name a layer")]

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        problems = self.check(axes)
        if problems and self.strict:
            raise problems[0]
        name = f"{self.at}.weight" if self.strict else next(iter(tensors))
        values = tensors[name].detach() * self.factor
        return Patch(self, self.promise, "scale", rewrites=(Rewrite(name, values),))


@dataclass(frozen=True)
class Meddle(Scale):
    """Writes while it plans."""

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        patch = super().plan(axes, tensors)
        tensors[patch.rewrites[0].tensor].data.mul_(2)
        return patch


def test_an_edit_that_says_what_it_does_passes() -> None:
    """Scaling promises nothing, and keeps every law there is; models without the place refuse."""
    report = check_edit(Scale("8", promise="none"))
    assert [cell.model for cell in report.kept] == ["cnn"]
    assert "no weight" in str(report.refused[0])
    assert [cell.model for cell in report.cells] == list(ROWS)


@pytest.mark.parametrize(
    ("edit", "law"),
    [
        (Scale("8"), "what is planned can be made"),
        (Scale("8", factor=1.0), "an edit changes something"),
        (Scale("8", promise="always"), "a patch makes a promise"),
        (Scale("none", promise="none", strict=False), "plan refuses what check refuses"),
        (Meddle("8", promise="none"), "check and plan write nothing"),
        (lambda axes, model: [], "every cell has an edit"),
        (Scale("nowhere"), "some model takes the edit"),
    ],
)
def test_an_edit_that_breaks_its_word_is_named(edit: Any, law: str) -> None:
    """The law, the model and the edit are in the error."""
    with pytest.raises(BrokenLaw, match=law):
        check_edit(edit, [ROWS["cnn"]])


def test_a_promise_is_checked_by_the_laws_themselves() -> None:
    """Not by the library's own verification alone: in double precision an edit is only staged."""
    row = ROWS["cnn"]
    axes = map_axes(row.build(), row.args)
    made = world(row, axes, torch.float64)
    old = laws.before(made)
    patch = Scale("8", factor=1 + 1e-9).plan(axes, named_tensors(made.model))
    with torch.no_grad():
        made.model.get_parameter("8.weight").copy_(patch.rewrites[0].values)
    with pytest.raises(BrokenLaw, match="float64"):
        laws.check_promise(made, EDIT, patch, old)
    assert laws.check_promise(made, EDIT, replace(patch, preserves="none"), old) == 0.0


@pytest.mark.parametrize("kind", [InsertConv, InsertResidual])
def test_a_class_is_tried_at_every_place(kind: type[Edit]) -> None:
    """A class whose first field is the place needs nothing else, at one place or several."""
    report = check_edit(kind, [ROWS["resnet"]], places=3)
    assert report.kept[0].reason == "exact"


def test_the_default_models_take_the_built_in_edits() -> None:
    """Wider and narrower, and compiled as one graph."""
    for row in ROWS.values():
        wider = check_cell(lambda axes, _: [Widen(name, by=1) for name in axes.widths], row)
        assert wider.kept, wider.reason
        assert max(wider.differences) < 1e-5
    narrower = check_edit(Narrow("0", by=1), [ROWS["mlp"]], compiled=True)
    assert narrower.kept


def test_a_row_is_the_same_each_time() -> None:
    """Two builds have the same weights, and the global random state stays."""
    state = torch.get_rng_state()
    row = Row("tiny", lambda: nn.Linear(2, 2), (torch.ones(2, 2),))
    first, second = row.build(), row.build(torch.float64)
    assert torch.equal(first.weight.double(), second.weight)
    assert row.inputs(torch.float64)[0][0].dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), state)


# --- names ---------------------------------------------------------------------------------------


def test_an_edit_is_known_by_its_name() -> None:
    """Registration is once per name; unknown names get near ones."""
    assert kind_named("Widen") is Widen
    assert register(Scale) is Scale
    assert registered()["Scale"] is Scale
    impostor = type("Widen", (Scale,), {})
    with pytest.raises(EditError, match="has this one"):
        register(impostor)
    with pytest.raises(EditError, match="use one of Widen"):
        kind_named("Widn")
    with pytest.raises(EditError, match="not an instance"):
        register(Scale("8"))  # type: ignore[type-var]
