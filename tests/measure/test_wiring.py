"""What reads what, against models whose wiring is known."""

from __future__ import annotations

import pytest
import torch
from tests.zoo import ZOO, Entry, build, example
from torch import Tensor, nn

from neuroexapt import InsertConv, RemoveLayer, apply
from neuroexapt.capture import capture
from neuroexapt.measure import Node, layers, wiring


def reads(nodes: list[Node]) -> dict[str, tuple[str, list[str]]]:
    return {str(node["name"]): (str(node["type"]), list(node["from"])) for node in nodes}


def wired(model: nn.Module, *args: Tensor) -> list[Node]:
    return wiring(model, capture(model, args))


class Everything(nn.Module):
    """A class token, shared layers, a recurrence, attention by hand, dropout, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.embed, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.shared, self.drop, self.act = nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU()
        self.unused, self.head = nn.Linear(8, 8), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        y = self.norm(x)
        weight = self.query(y) @ self.key(y).transpose(1, 2) / 8**0.5
        x = x + self.drop(weight.softmax(-1) @ self.value(y))
        for _ in range(2):
            x = self.act(self.shared(x))
        return self.head(torch.cat([x.mean(1), y.amax(1)], dim=-1))


def test_every_kind_of_connection_is_found() -> None:
    """By hand: joins, parameters of their own, repeated calls, modules that do nothing now."""
    model = Everything().eval()
    assert reads(wired(model, torch.randn(3, 5, 4))) == {
        "(input)": ("input", []),
        "embed": ("Linear", ["(input)"]),
        "token": ("Parameter", ["embed"]),
        "norm": ("LayerNorm", ["token"]),
        "query": ("Linear", ["norm"]),
        "key": ("Linear", ["norm"]),
        "value": ("Linear", ["norm"]),
        ":0": ("attention", ["query", "key", "value"]),
        "drop": ("Dropout", [":0"]),
        ":1": ("+", ["token", "drop"]),
        "shared": ("Linear", [":1", "act"]),
        "act": ("ReLU", ["shared"]),
        "act#2": ("ReLU", ["shared"]),
        ":2": ("concat", ["act#2", "norm"]),
        "head": ("Linear", [":2"]),
        "(output)": ("output", ["head"]),
    }


def test_a_branch_is_seen_and_its_host_keeps_its_name() -> None:
    """An inserted convolution meets the stream in a sum; the layer it stands at is as before."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    rows = layers(model)
    apply(model, InsertConv("0"), args=(x,))
    assert [row for row in layers(model) if "nx_" not in row["name"]] == rows
    found = reads(wired(model, x))
    assert found["0"] == ("Conv2d", ["(input)"])
    assert found["0:0"] == ("+", ["0", "0.nx_after.3"])
    assert found["1"] == ("BatchNorm2d", ["0:0"])


def test_a_removed_layer_is_gone() -> None:
    """Its reader reads what it read."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    apply(model, RemoveLayer("1"), args=(x,))
    assert [row["name"] for row in layers(model)] == ["0", "3"]
    assert reads(wired(model, x))["2"] == ("ReLU", ["0"])


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_every_layer_has_its_place(entry: Entry) -> None:
    """All layers of a model are there, and all but the input read something that is there."""
    model = build(entry.name)
    nodes = wired(model, *example(entry.name))
    names = [node["name"] for node in nodes]
    assert len(set(names)) == len(names)
    assert {row["name"] for row in layers(model)} <= set(names)
    assert all(set(node["from"]) <= set(names) for node in nodes)
    assert all(node["from"] for node in nodes if node["name"] != "(input)")
