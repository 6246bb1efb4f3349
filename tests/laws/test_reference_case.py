"""The case the documentation quotes: a residual around the features of a 2.2 M parameter CNN."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from neuroexapt import InsertResidual, Narrow, Widen, apply
from neuroexapt.edit import Edit
from neuroexapt.guard import Transaction, Trial, transaction
from tests import zoo
from tests.laws.world import difference, mapped, outputs, train

NAME = "reference_cnn"
ARGS = zoo.example(NAME)


def with_residual() -> nn.Module:
    """The reference network after ``InsertResidual("features")``."""
    model = zoo.build(NAME)
    apply(model, InsertResidual("features"), ARGS)
    return model


def test_the_projection_and_the_count_are_as_documented() -> None:
    """A 1x1 convolution with bias and stride 4, a batch norm with scale 0; 768 parameters."""
    model = zoo.build(NAME)
    done = apply(model, InsertResidual("features"), ARGS)
    convolution, norm = model.get_submodule("features.nx_skip").children()
    assert isinstance(convolution, nn.Conv2d)
    assert (convolution.in_channels, convolution.out_channels) == (3, 128)
    assert (convolution.kernel_size, convolution.stride) == ((1, 1), (4, 4))
    assert convolution.bias is not None
    assert isinstance(norm, nn.BatchNorm2d)
    assert not norm.weight.any()
    assert (done.parameters_before, done.parameters_after) == (2_193_674, 2_194_442)
    assert sum(p.numel() for p in model.parameters()) == 2_194_442
    assert done.max_difference == 0


@pytest.mark.parametrize("training", [False, True])
def test_the_output_is_the_same_at_insertion(training: bool) -> None:
    """In both modes; dropout draws the same mask, as the skip draws nothing."""
    assert (
        difference(
            outputs(zoo.build(NAME), ARGS, training), outputs(with_residual(), ARGS, training)
        )
        == 0
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_any_batch_gives_ten_classes(batch: int) -> None:
    """The stride and the count do not depend on the batch of the example input."""
    assert outputs(with_residual(), zoo.example(NAME, batch=batch)).shape == (batch, 10)


def test_it_learns_and_the_branch_takes_part() -> None:
    """The loss falls; the gate moves first, then the projection behind it."""
    model, first = with_residual(), dict[str, bool]()

    def look() -> None:
        for name, parameter in model.named_parameters():
            if "nx_skip" in name and name not in first:
                assert parameter.grad is not None
                first[name] = bool(parameter.grad.any())

    losses = train(model, ARGS, torch.optim.Adam(model.parameters(), lr=1e-4), 8, look)
    assert losses[-1] < 0.8 * losses[0]
    prefix = "features.nx_skip"
    assert first[f"{prefix}.1.weight"]
    assert not first[f"{prefix}.0.weight"]
    moved = model.get_submodule(prefix).get_parameter("0.weight").grad
    assert moved is not None
    assert moved.any()
    trained = outputs(model, ARGS)
    model.get_submodule(prefix).get_parameter("1.weight").data.zero_()
    model.get_submodule(prefix).get_parameter("1.bias").data.zero_()
    assert difference(trained, outputs(model, ARGS)) > 1e-4


# --- memory ------------------------------------------------------------------------------------


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def alive() -> int:
    """Bytes of all storages that any live tensor of the process holds."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return storage_bytes(t for t in tensors if not isinstance(t, FakeTensor))


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the model, its gradients and its optimizer need for themselves."""
    own = [*model.parameters(), *model.buffers()]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return storage_bytes([*own, *grads, *states])


MEMORY_EDITS: list[Edit] = [
    InsertResidual("features"),
    Widen("features.4", by=8),
    Narrow("classifier.1", by=0.5),
    Widen("*", by=2),
]


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The reference network with gradients and optimizer state."""
    mapped(NAME)  # not during a count
    model = zoo.build(NAME)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    train(model, ARGS, optimizer, 1)
    return model, optimizer


@pytest.mark.parametrize(
    "edit", MEMORY_EDITS, ids=lambda edit: f"{type(edit).__name__}-{edit.place}"
)
def test_after_commit_only_the_new_model_is_alive(edit: Edit) -> None:
    """The process holds exactly what the new model, gradients and optimizer need."""
    model, optimizer = trained()
    rest = alive() - held(model, optimizer)
    with transaction(model, optimizer) as tx:
        tx.apply(edit, ARGS, axes=mapped(NAME))
        if not isinstance(edit, InsertResidual):
            assert alive() > rest + held(model, optimizer)  # until now the old tensors are kept
    assert alive() == rest + held(model, optimizer)
    twin = copy.deepcopy(model)
    assert storage_bytes([*twin.parameters(), *twin.buffers()]) == storage_bytes(
        [*model.parameters(), *model.buffers()]
    )


@pytest.mark.parametrize(
    "edit", MEMORY_EDITS, ids=lambda edit: f"{type(edit).__name__}-{edit.place}"
)
def test_after_roll_back_nothing_new_is_alive(edit: Edit) -> None:
    """The process holds exactly what it held before."""
    model, optimizer = trained()
    before = alive()
    with pytest.raises(KeyboardInterrupt), transaction(model, optimizer) as tx:
        _apply_and_fail(tx, edit)
    assert alive() == before


def _apply_and_fail(tx: Transaction, edit: Edit) -> None:
    tx.apply(edit, ARGS, axes=mapped(NAME))
    raise KeyboardInterrupt


@pytest.mark.parametrize("keep", [True, False])
def test_after_a_trial_the_snapshot_is_gone(keep: bool) -> None:
    """Kept or rolled back, the trial holds no tensor, though the object lives on."""
    model, optimizer = trained()
    optimizer.zero_grad()
    rest = alive() - held(model, optimizer)
    trial = Trial(model, optimizer)
    trial.apply(Widen("features.4", by=8), ARGS, axes=mapped(NAME))
    assert alive() > rest + held(model, optimizer)
    if keep:
        trial.keep()
    else:
        trial.roll_back()
    assert alive() == rest + held(model, optimizer)


def test_many_edits_leave_flat_memory() -> None:
    """Growing and shrinking ten times ends where it began."""
    model = zoo.build("mlp")
    args, optimizer = zoo.example("mlp"), torch.optim.Adam(model.parameters())
    train(model, args, optimizer, 1)
    counts = []
    for number in range(10):
        apply(model, Widen("net.0", by=4), args, optimizer=optimizer)
        apply(model, Narrow("net.0", by=4), args, optimizer=optimizer)
        if number in (1, 9):
            counts.append(alive())
    assert counts[0] == counts[1]
