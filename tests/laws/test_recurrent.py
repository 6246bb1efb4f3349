"""The laws for recurrent networks: resized, taken back, copied and trained like all others."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from neuroexapt import AxisMap, Narrow, Widen, apply, map_axes, transaction
from neuroexapt.couple import unit_of
from neuroexapt.edit import Edit
from neuroexapt.errors import EditError, GuardError, NeuroExaptError, VerifyError
from neuroexapt.guard import Transaction, Trial
from neuroexapt.testing import changes, snapshot
from tests.couple.recurrent import CASES, Case, Tagger, Translate, built, steps, texts

# Without oneDNN's support torch says so once a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# One of each kind, and the forms that hold their weights in other ways.
SOME = [
    case for case in CASES if case.name in ("LSTM", "GRU num_layers=2", "RNN bidirectional=True")
]
SOME += [case for case in CASES if case.name in ("LSTM proj_size=3", "characters, tied", "stack")]
SOME += [case for case in CASES if case.name in ("translation", "GRUCell from cell")]
by_some = pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)


@cache
def mapped(case: Case) -> AxisMap:
    """The map of a case, made once a process."""
    return map_axes(*built(case))


def calm(case: Case) -> tuple[nn.Module, tuple[Any, ...]]:
    """A case without dropout."""
    model, args = built(case)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0
    return model, args


def loss_of(model: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """A loss that does not vanish at zero."""
    return torch.as_tensor((model(*args) - 1).square().mean())


def train(
    model: nn.Module,
    args: tuple[Any, ...],
    optimizer: torch.optim.Optimizer,
    count: int,
    masks: dict[str, Tensor] | None = None,
) -> list[float]:
    """Some steps; with masks the dead entries and their gradients are held at zero."""
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of(model, args)
        loss.backward()
        for name, mask in (masks or {}).items():
            grad = model.get_parameter(name).grad
            assert grad is not None
            grad.mul_(mask)
        optimizer.step()
        hold(model, masks or {})
        losses.append(loss.item())
    return losses


def hold(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Put dead entries to zero."""
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)


def check_held(model: nn.Module) -> None:
    """Every recurrent module refers to the parameters that it has, and to nothing else."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            own = [getattr(module, name) for name in module._flat_weights_names]
            assert [id(w) for w in module._flat_weights] == [id(w) for w in own]
            assert [id(ref()) for ref in module._flat_weight_refs if ref] == [id(w) for w in own]


def check_copies(model: nn.Module, args: tuple[Any, ...]) -> None:
    """State dict, deepcopy and pickle keep the function, and the copies are copies."""
    expected = model.eval()(*args).detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.zero_()
    assert not torch.equal(twin(*args), expected)
    twin.load_state_dict(model.state_dict())
    for other in (twin, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*args), expected)
        check_held(other)


@by_case
def test_widen_is_exact_and_the_model_lives_on(case: Case) -> None:
    """Outputs agree to 1e-10 in both modes; copies, and training in which new units take part."""
    if case.mixed:
        return
    for width in mapped(case).widths.values():
        model, args = calm(case)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, args, optimizer, 1)
        expected = {mode: model.train(mode)(*args).detach() for mode in (True, False)}
        apply(model, Widen(width.name, by=2), args, optimizer=optimizer)
        for mode, before in expected.items():
            after = model.train(mode)(*args).detach()
            assert float((after - before).abs().max() / before.abs().max()) < 1e-10, width.name
        check_held(model)
        check_copies(model, args)
        assert torch.tensor(train(model.train(), args, optimizer, 4)).isfinite().all()
        assert _taking_part(model, args, width.name, width.size)


def _taking_part(model: nn.Module, args: tuple[Any, ...], name: str, size: int) -> bool:
    """Whether what reads a new unit has left zero, and what makes it gets gradient."""
    axes = map_axes(model, args)
    read, learns = 0.0, 0.0
    for place in axes.widths[name].appearances:
        new = unit_of(axes.tensors[place.tensor][place.dim], name) >= size
        where = torch.from_numpy(new).nonzero()[:, 0]
        tensor = model.get_parameter(place.tensor)
        if "consumer" in place.roles:
            read += float(tensor.detach().index_select(place.dim, where).abs().sum())
        elif "producer" in place.roles and tensor.grad is not None:
            learns += float(tensor.grad.index_select(place.dim, where).abs().sum())
    return read > 0 and learns > 0


def test_units_of_two_sides_with_a_common_maker_are_refused() -> None:
    """A dot product of states that start alike has no side that could stay silent."""
    [case] = [case for case in CASES if case.mixed]
    model, args = calm(case)
    before = snapshot(model)
    [width] = mapped(case).widths
    with pytest.raises(EditError, match="'dot' mixes"):
        apply(model, Widen(width, by=2), args)
    assert not changes(before, snapshot(model))


@by_case
def test_narrow_fits(case: Case) -> None:
    """One unit fewer everywhere; the model is copied and trains on."""
    for width in mapped(case).widths.values():
        model, args = calm(case)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        train(model, args, optimizer, 1)
        apply(model, Narrow(width.name, by=1), args, optimizer=optimizer)
        check_held(model)
        check_copies(model, args)
        assert torch.tensor(train(model.train(), args, optimizer, 2)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_other_precisions_can_be_edited(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    """Kernels of their own compute these; the promise is measured by the edit itself."""
    model, args = Tagger(kind, num_layers=2).to(dtype), tuple(t.to(dtype) for t in steps())
    for edit in (Widen("rnn", by=2), Narrow("rnn", by=3), Widen("embed", by=1)):
        apply(model, edit, args)
    check_held(model)
    assert [p.shape for p in model.rnn.parameters()][:2] == [
        (5 * {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind], n) for n in (6, 5)
    ]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_computed_weight_follows_what_it_is_made_of(kind: type[nn.RNNBase]) -> None:
    """Weight norm: the module holds a tensor that each forward computes anew."""
    model, args = Tagger(kind).double(), tuple(t.double() for t in steps())
    weight_norm(model.rnn, "weight_hh_l0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, args, optimizer, 1)
    done = apply(model, Widen("rnn", by=2), args, optimizer=optimizer)
    assert done.max_difference < 1e-12
    train(model, args, optimizer, 1)
    assert model.rnn.weight_hh_l0.shape == (8 * (4 if kind is nn.LSTM else 3), 8)
    train(model, args, optimizer, 2)
    apply(model, Narrow("rnn", by=3), args, optimizer=optimizer)
    assert torch.tensor(train(model, args, optimizer, 2)).isfinite().all()


# --- the optimizer goes along --------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD], ids=["adam", "sgd"])
@by_some
def test_narrowing_dead_units_goes_on_like_the_masked_big_model(
    case: Case, make: Callable[..., torch.optim.Optimizer]
) -> None:
    """Ten more steps give the same losses to a relative 1e-9."""
    options = {"lr": 0.01} | ({"momentum": 0.9} if make is torch.optim.SGD else {})
    for width in mapped(case).widths.values():
        model, args = calm(case)
        big = make(model.parameters(), **options)
        train(model, args, big, 3)
        dead = {0, width.size - 2}
        masks = _alive(model, mapped(case), width.name, dead)
        hold(model, masks)
        small, carried = copy.deepcopy((model, big))
        scores = [float(unit not in dead) for unit in range(width.size)]
        edit = Narrow(width.name, by=2, scores={width.name: scores})
        apply(small, edit, args, optimizer=carried)
        expected = train(model, args, big, 10, masks)
        assert train(small, args, carried, 10) == pytest.approx(expected, rel=1e-9), width.name


def _alive(model: nn.Module, axes: AxisMap, width: str, dead: set[int]) -> dict[str, Tensor]:
    masks = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for place in axes.widths[width].appearances:
        if place.tensor in masks:
            unit = unit_of(axes.tensors[place.tensor][place.dim], width)
            where = torch.tensor([p for p, u in enumerate(unit) if u in dead])
            masks[place.tensor].index_fill_(place.dim, where, 0)
    return masks


# --- whatever fails, nothing is left -------------------------------------------------------------

SITES = [
    "neuroexapt.guard.ledger.Ledger.do",
    "neuroexapt.guard.writing.recurrent_owners",
    "neuroexapt.guard.writing.check_swappable",
    "neuroexapt.guard.writing.resized",
    "neuroexapt.guard.writing.renew",
    "neuroexapt.guard.transaction.verify",
    "neuroexapt.guard.recurrent._forget",
    "neuroexapt.guard.recurrent._refer",
    "torch.utils.swap_tensors",
]


def world() -> tuple[nn.Module, tuple[Any, ...], torch.optim.Optimizer]:
    """Encoder and decoder in mid-training, with gradients and state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, args = Translate().double(), texts()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, args, optimizer, 2)
    loss_of(model, args).backward()
    return model, args, optimizer


def faults(site: str, after: bool, error: type[BaseException], edit: Edit) -> Iterator[int]:
    """Raise at the first call of a function, the second, ... until none is left."""
    model, args, optimizer = world()
    axes, before = map_axes(model, args), snapshot(model, optimizer)
    path, _, name = site.rpartition(".")
    module, _, kind = path.rpartition(".")
    owner: Any = __import__(path if kind.islower() else module, fromlist=["_"])
    owner = owner if kind.islower() else getattr(owner, kind)
    original = getattr(owner, name)
    for number in range(1, 1000):
        left = number

        def fault(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left:
                return original(*given, **named)
            if after:
                original(*given, **named)
            raise error("injected")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, fault)
            try:
                with transaction(model, optimizer) as tx:
                    tx.apply(edit, args, axes=axes)
            except (error, GuardError, VerifyError):
                pass
        if left > 0:
            return
        assert not changes(before, snapshot(model, optimizer)), (site, number)
        check_held(model)
        yield number


@pytest.mark.parametrize("edit", [Widen("*", by=1), Narrow("*", by=1)], ids=["widen", "narrow"])
@pytest.mark.parametrize("site", SITES)
def test_a_fault_anywhere_leaves_no_trace(site: str, edit: Edit) -> None:
    """Errors and interruptions, before and after each single step on the way."""
    count = sum(
        1
        for error in (RuntimeError, KeyboardInterrupt)
        for after in (False, True)
        for _ in faults(site, after, error, edit)
    )
    assert count >= 4


def test_several_edits_are_taken_back_together() -> None:
    """What a user's own error takes back is bit for bit what was."""
    model, args, optimizer = world()
    before = snapshot(model, optimizer)
    with pytest.raises(ZeroDivisionError), transaction(model, optimizer) as tx:
        _edit_and_fail(tx, args)
    assert not changes(before, snapshot(model, optimizer))
    check_held(model)


def _edit_and_fail(tx: Transaction, args: tuple[Any, ...]) -> None:
    tx.apply(Widen("decoder", by=2), args)
    tx.apply(Narrow("read", by=1), args)
    tx.apply(Widen("decoder", by=1), args)
    raise ZeroDivisionError


def test_a_trial_rolled_back_never_was() -> None:
    """After steps with wider layers the model trains on as if never tried."""
    model, args, optimizer = world()
    optimizer.zero_grad()
    twin, twins = copy.deepcopy((model, optimizer))
    trial = Trial(model, optimizer)
    trial.apply(Widen("decoder", by=2), args)
    train(model, args, optimizer, 3)
    trial.roll_back()
    check_held(model)
    assert train(model, args, optimizer, 3) == train(twin, args, twins, 3)


# --- what is refused -----------------------------------------------------------------------------


def test_a_projection_as_wide_as_the_state_is_taken_back() -> None:
    """torch tells a projection by its size; without one it reads the weights in other places."""
    model, args = Tagger(nn.LSTM, last=False, proj_size=3), steps()
    [projection] = [w.name for w in map_axes(model, args).widths.values() if w.size == 3]
    before = snapshot(model)
    with pytest.raises(VerifyError):
        apply(model, Widen(projection, to=6), args)
    assert not changes(before, snapshot(model))
    apply(model, Widen(projection, to=5), args)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_live_loss_is_refused_and_nothing_is_lost(kind: type[nn.RNNBase]) -> None:
    """The graph of this step holds the weights; the module's own references stay."""
    model, args = Tagger(kind), steps()
    loss, before = loss_of(model, args), snapshot(model)
    with pytest.raises(GuardError, match="live autograd graph"):
        apply(model, Widen("rnn", by=2), args)
    assert not changes(before, snapshot(model))
    check_held(model)
    loss.backward()
    del loss
    apply(model, Widen("rnn", by=2), args)


def test_a_weak_reference_of_another_holder_is_refused() -> None:
    """Only the module's own references are known to be made anew."""
    model, args = Tagger(nn.LSTM), steps()
    holder = weakref.ref(model.rnn.weight_hh_l0, lambda _: None)
    before = snapshot(model)
    with pytest.raises(GuardError, match="weak reference"):
        apply(model, Widen("rnn", by=2), args)
    assert not changes(before, snapshot(model))
    del holder
    apply(model, Widen("rnn", by=2), args)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_scripted_or_quantised_network_is_refused_by_name() -> None:
    """Neither keeps parameters that could follow."""
    scripted, args = Tagger(nn.LSTM), steps()
    scripted.rnn = torch.jit.script(scripted.rnn)
    with pytest.raises(GuardError, match="rnn: got a wrapped or scripted model"):
        apply(scripted, Widen("rnn", by=2), args)
    quantised = torch.ao.quantization.quantize_dynamic(Tagger(nn.LSTM), {nn.LSTM})
    with pytest.raises(NeuroExaptError, match="rnn"):
        apply(quantised, Widen("rnn", by=2), args)
