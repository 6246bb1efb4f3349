"""Gradients and activations against the plain way of getting them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.errors import MeasureError
from neuroexapt.measure import activations, gradients


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4 * 4, 2))


IMAGES = [torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(s)) for s in range(3)]


def test_gradients_equal_those_of_backward() -> None:
    """Each item is what loss.backward() leaves in .grad for that batch."""
    model, oracle = convolutions(), convolutions()
    for batch, row in zip(IMAGES, gradients(model, loss_fn, IMAGES), strict=True):
        oracle.zero_grad()
        loss_fn(oracle, batch).backward()
        assert list(row) == [name for name, _ in oracle.named_parameters()]
        for name, parameter in oracle.named_parameters():
            torch.testing.assert_close(row[name], parameter.grad)
            assert not row[name].requires_grad


def test_unused_parameters_have_zeros_and_frozen_ones_no_entry() -> None:
    """What the loss does not reach is 0; what the user froze is not measured."""
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    model.get_parameter("used.bias").requires_grad_(False)
    [row] = gradients(
        model, lambda held, x: held.get_submodule("used")(x).mean(), [torch.ones(4, 2)]
    )
    assert list(row) == ["used.weight", "idle.weight", "idle.bias"]
    assert row["idle.weight"].tolist() == [[0.0, 0.0]]
    assert row["used.weight"].tolist() == [[1.0, 1.0]]


def test_sparse_gradients_come_dense() -> None:
    """An embedding with sparse gradients gives the same matrix as one without."""
    rows: list[dict[str, Tensor]] = []
    for sparse in (False, True):
        torch.manual_seed(0)
        rows += gradients(nn.Embedding(5, 2, sparse=sparse), loss_fn, [torch.tensor([1, 3, 3])])
    torch.testing.assert_close(rows[1]["weight"], rows[0]["weight"])


def test_gradients_of_chosen_parameters() -> None:
    """`only` restricts the dict; an unknown name is refused with the near ones."""
    [row] = gradients(convolutions(), loss_fn, IMAGES[:1], only=["3.weight"])
    assert list(row) == ["3.weight"]
    with pytest.raises(MeasureError, match=r"3\.weight"):
        next(gradients(convolutions(), loss_fn, IMAGES, only=["3.weigth"]))


def test_each_batch_draws_its_own_dropout_mask() -> None:
    """Restoring the user's generator must not give every micro-batch the same mask."""
    model = nn.Sequential(nn.Linear(64, 1, bias=False), nn.Dropout(0.5))
    wide = [torch.ones(32, 64)] * 4
    rows = [row["0.weight"] for row in gradients(model, lambda m, x: m(x).mean(), wide)]
    assert len({round(row[0, 0].item(), 6) for row in rows}) > 1


def test_gradients_work_inside_no_grad() -> None:
    """A caller that has switched gradients off gets them all the same."""
    with torch.no_grad():
        [row] = gradients(convolutions(), loss_fn, IMAGES[:1])
        assert not torch.is_grad_enabled()
    assert row["0.weight"].abs().sum() > 0


@pytest.mark.parametrize(
    "bad", [lambda m, x: m(x), lambda m, x: m(x).mean().detach(), lambda m, x: 1.0]
)
def test_a_loss_that_cannot_be_differentiated_is_refused(bad: object) -> None:
    """Not a scalar, without a graph, or no tensor: each is named as the loss function's fault."""
    with pytest.raises(MeasureError, match="loss_fn"):
        next(gradients(convolutions(), bad, IMAGES))  # type: ignore[arg-type]


def test_a_model_without_trainable_parameters_is_refused() -> None:
    """Nothing to differentiate is an error, not an empty answer."""
    with pytest.raises(MeasureError, match="no trainable parameter"):
        next(gradients(nn.ReLU(), loss_fn, IMAGES))


def test_rows_of_activations_are_samples_times_positions() -> None:
    """Channels of a convolution become columns, images and pixels rows, in order."""
    model = convolutions()
    found = activations(model, loss_fn, IMAGES, ["0", "3"], channel_dim={"0": 1})
    plain = torch.cat([model[0](images).permute(0, 2, 3, 1).reshape(-1, 5) for images in IMAGES])
    torch.testing.assert_close(found["0"], plain.detach())
    torch.testing.assert_close(found["3"], torch.cat([model(x) for x in IMAGES]).detach())
    assert (found["0"].dtype, found["0"].requires_grad) == (torch.float32, False)


def test_the_sample_of_rows_is_uniform_over_all_batches() -> None:
    """Early and late batches have the same chance; no row is taken twice; order is kept."""
    stream = [torch.arange(start, start + 500.0).unsqueeze(1) for start in range(0, 10_000, 500)]
    found = activations(nn.Identity(), loss_fn, stream, [""], channel_dim={"": 1}, limit=2000)[""]
    values = found.squeeze(1)
    assert len(values.unique()) == 2000
    assert bool((values.diff() > 0).all())
    # A chi-square with 9 degrees of freedom is above 33 once in 10,000 times.
    counts = torch.histc(values, bins=10, min=0, max=10_000)
    assert ((counts - 200).square() / 200).sum() < 33


def test_modules_with_equally_many_rows_keep_the_same_ones() -> None:
    """Row k of one module and row k of the next belong to the same position."""
    model = nn.Sequential(nn.Identity(), nn.Identity())
    batches = [torch.randn(100, 4) for _ in range(5)]
    found = activations(model, loss_fn, batches, ["0", "1"], channel_dim={}, limit=50)
    assert torch.equal(found["0"], found["1"])


def test_the_first_tensor_of_a_nested_output_is_taken() -> None:
    """A recurrent layer puts out a tuple; its sequence is what is measured."""
    model = nn.LSTM(3, 4, batch_first=True)
    found = activations(
        model, lambda m, x: m(x)[0].mean(), [torch.randn(2, 5, 3)], [""], channel_dim={"": 2}
    )
    assert found[""].shape == (10, 4)


def test_children_of_fused_attention_are_seen() -> None:
    """In eval mode the fused path would skip the children of an encoder layer."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = activations(
        layer, loss_fn, [torch.randn(2, 5, 8)], ["linear1"], channel_dim={"linear1": 2}
    )
    assert found["linear1"].shape == (10, 16)


def test_a_module_that_never_ran_is_absent() -> None:
    """No activation is not an activation of 0."""
    model = nn.ModuleDict({"used": nn.Linear(2, 3), "idle": nn.Linear(2, 3)})
    found = activations(
        model,
        lambda m, x: m.get_submodule("used")(x).sum(),
        [torch.ones(4, 2)],
        ["used", "idle"],
        channel_dim={},
    )
    assert list(found) == ["used"]


@pytest.mark.parametrize(
    ("path", "dims"),
    [("1.conv", {}), ("0", {}), ("0", {"0": 4}), ("0", {"0": 0})],
    ids=["unknown path", "no dimension", "out of range", "changing"],
)
def test_activations_that_cannot_be_arranged_are_refused(path: str, dims: dict[str, int]) -> None:
    """An unknown module, or a dimension of units that is unknown or changes, is never guessed."""
    with pytest.raises(MeasureError):
        activations(convolutions(), loss_fn, [IMAGES[0], IMAGES[0][:1]], [path], channel_dim=dims)


def test_an_output_without_floats_is_refused() -> None:
    """Token numbers are no activations."""
    with pytest.raises(MeasureError, match="int64"):
        activations(
            nn.Identity(), lambda m, x: m(x).sum(), [torch.ones(2, 2).long()], [""], channel_dim={}
        )
