"""Costs against counts done by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.capture import capture
from neuroexapt.errors import MeasureError
from neuroexapt.measure import count_flops, count_parameters, flops_of, layers, tensor_bytes


class Counted(NamedTuple):
    name: str
    model: nn.Module
    args: tuple[Any, ...]
    parameters: int
    macs: int


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        mixed: Tensor = self.attention(inputs, inputs, inputs, need_weights=False)[0]
        return mixed


# Attention on 5 positions of width 8: four projections, scores and mixing.
ATTENTION_MACS = 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8

TABLE = [
    Counted("linear", nn.Linear(3, 2), (torch.ones(7, 3),), 8, 6),
    Counted("linear, positions", nn.Linear(3, 2), (torch.ones(7, 4, 3),), 8, 4 * 6),
    Counted("conv", nn.Conv2d(3, 5, 3, padding=1), (torch.ones(2, 3, 6, 6),), 140, 36 * 5 * 27),
    Counted(
        "grouped, strided conv",
        nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False),
        (torch.ones(2, 4, 7, 7),),
        144,
        9 * 8 * 2 * 9,
    ),
    Counted(
        "norm, activation and pooling count 0",
        nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)),
        (torch.ones(2, 3, 4, 4),),
        6,
        0,
    ),
    Counted("attention", SelfAttention(), (torch.ones(2, 5, 8),), 288, ATTENTION_MACS),
    Counted(
        "encoder layer",
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (torch.ones(2, 5, 8),),
        600,
        ATTENTION_MACS + 2 * 5 * 8 * 16,
    ),
    Counted("lstm", nn.LSTM(4, 6, batch_first=True), (torch.ones(2, 5, 4),), 288, 5 * 24 * 10),
    Counted("gru", nn.GRU(4, 6, batch_first=True), (torch.ones(2, 5, 4),), 216, 5 * 18 * 10),
    Counted("gru cell", nn.GRUCell(4, 6), (torch.ones(2, 4),), 216, 18 * 10),
    Counted(
        "two-layer lstm, both ways",
        nn.LSTM(4, 6, num_layers=2, bidirectional=True),
        (torch.ones(5, 1, 4),),
        1536,
        # Time comes first here, so the first dimension holds the 5 steps, not samples.
        2 * 24 * (4 + 6) + 2 * 24 * (12 + 6),
    ),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("training", [True, False])
def test_a_multiply_add_counts_two_per_sample(row: Counted, training: bool) -> None:
    """FLOPs are twice the multiply-adds done by hand, in either mode, whatever the batch size."""
    row.model.train(training)
    assert count_flops(row.model, row.args) == 2 * row.macs


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_recorded_run_counts_the_same(row: Counted) -> None:
    """From the shapes of its operators alone."""
    assert flops_of(capture(row.model, row.args)) == 2 * row.macs


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_parameters_are_counted_and_rows_sum_to_them(row: Counted) -> None:
    """The total is the one done by hand, and so is the sum over `layers`."""
    assert count_parameters(row.model) == row.parameters
    assert sum(line["parameters"] for line in layers(row.model)) == row.parameters


def test_inputs_may_come_by_keyword() -> None:
    """The batch size is read from the keyword inputs when there are no others."""
    assert count_flops(nn.Linear(3, 2), (), {"input": torch.ones(7, 3)}) == 12


def test_one_sample_is_enough_in_train_mode() -> None:
    """Batch normalisation refuses a batch of one while training; counting does not."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    assert count_flops(model, torch.ones(1, 3)) == 12


def test_no_batch_to_count_on_is_refused() -> None:
    """Without a tensor, or without a sample, there is no count per sample."""
    for inputs in ((), (torch.ones(0, 3),)):
        with pytest.raises(MeasureError):
            count_flops(nn.Linear(3, 2), inputs)


class Tied(nn.Module):
    """Shared weight, class token, leaf, and a child that owns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.embed = nn.Embedding(10, 4)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embed.weight


def test_layers_lists_every_owner_once() -> None:
    """Leaves and directly held parameters have rows; a tied weight counts where it comes first."""
    assert layers(Tied()) == [
        {"name": "token", "type": "Parameter", "shape": "1x1x4", "parameters": 4},
        {"name": "scale", "type": "Parameter", "shape": "scalar", "parameters": 1},
        {"name": "embed", "type": "Embedding", "shape": "10x4", "parameters": 40},
        {"name": "head", "type": "Linear", "shape": "10x4", "parameters": 10},
    ]
    assert count_parameters(Tied()) == 55


def test_nested_names_are_full_paths() -> None:
    """A row can be given to get_submodule or get_parameter."""
    model = nn.Sequential(SelfAttention())
    assert [row["name"] for row in layers(model)] == [
        "0.attention.in_proj_weight",
        "0.attention.in_proj_bias",
        "0.attention.out_proj",
    ]


def test_lazy_parameters_are_refused() -> None:
    """A parameter without a shape has no count; the error names it."""
    model = nn.Sequential(nn.LazyLinear(3))
    for count in (count_parameters, layers):
        with pytest.raises(MeasureError, match=r"0\.weight"):
            count(model)


def test_bytes_are_those_of_what_is_held() -> None:
    """Parameters, buffers, gradients and Adam's state, tied weights once."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    weights, buffers = (8 + 4) * 8, 4 * 8 + 8
    assert tensor_bytes(model) == weights + buffers
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4, 3).double()).sum().backward()
    assert tensor_bytes(model, optimizer) == 2 * weights + buffers
    optimizer.step()
    steps = 4 * torch.tensor(0.0).nbytes
    assert tensor_bytes(model, optimizer) == 4 * weights + buffers + steps
    assert tensor_bytes(Tied()) == 55 * 4


def test_a_view_holds_the_tensor_it_looks_at() -> None:
    """A narrowed parameter that still points into the old storage is charged for all of it."""
    model = nn.Linear(3, 2, bias=False)
    model.weight = nn.Parameter(torch.zeros(100, 3)[:2])
    assert tensor_bytes(model) == 1200


def test_tensors_without_memory_cost_nothing() -> None:
    """The meta device holds shapes only; sparse gradients hold their entries."""
    assert tensor_bytes(nn.Linear(3, 2, device="meta")) == 0
    model = nn.Embedding(1000, 4, sparse=True)
    model(torch.tensor([3])).sum().backward()
    assert tensor_bytes(model) == 1000 * 4 * 4 + 1 * 8 + 4 * 4
