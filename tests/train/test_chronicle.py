"""The journal tells the architecture at every moment, whoever changed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import Budget, Evolver, InsertConv, Settings, Widen, apply
from neuroexapt.capture import capture
from neuroexapt.measure import layers, wiring
from neuroexapt.record import changed


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def told(events: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Layers and wiring as the events up to the last one tell them."""
    rows, flow = events[0]["model"]["layers"], events[0]["model"]["flow"]
    for event in events[1:]:
        rows = changed(rows, event.get("layers", {}))
        flow = event.get("flow", flow)
    return rows, flow


@pytest.fixture
def evolver() -> Evolver:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3),
            nn.ReLU(), nn.Flatten(), nn.Linear(32, 3),
        )  # fmt: skip
        images = torch.randn(48, 1, 6, 6)
        labels = images.mean((1, 2, 3)).mul(8).round().clamp(-1, 1).long() + 1
    holdout = list(zip(images.split(8), labels.split(8), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings = Settings(epochs=8)
    return Evolver(
        model, optimizer, loss_fn=loss_fn, holdout=holdout, budget=Budget(params=0.7),
        settings=settings,
    )  # fmt: skip


def test_layers_and_wiring_follow_every_change(evolver: Evolver) -> None:
    """By the evolver, by hand, taken back: after each epoch the events tell the model."""
    model, optimizer = evolver.model, evolver.optimizer
    events = evolver.journal.events
    for epoch in range(8):
        for batch in list(evolver.judge.holdout)[:4]:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            evolver.step()
        evolver.end_epoch()
        rows, flow = told(evolver.journal.events)
        assert rows == layers(model)
        assert flow == wiring(model, capture(model, (torch.zeros(8, 1, 6, 6),)))
        if epoch == 0:
            evolver.optimizer.zero_grad()
            apply(model, InsertConv("2"), args=(torch.zeros(2, 1, 6, 6),), optimizer=optimizer)
            apply(model, Widen("0", by=3), args=(torch.zeros(2, 1, 6, 6),), optimizer=optimizer)
    evolver.close()
    events = evolver.journal.events
    assert told(events)[0] == events[-1]["model"]["layers"] == layers(model)
    by_kind = [event["event"] for event in events if "layers" in event]
    assert "epoch" in by_kind
    assert "applied" in by_kind
    applied = sum(event["event"] == "applied" for event in events)
    assert sum("flow" in event for event in events) <= 1 + applied


def test_a_survey_is_written_when_a_change_is_considered(evolver: Evolver) -> None:
    """Every width's readings, before the proposal."""
    while not (kinds := [event["event"] for event in evolver.journal.events]).count("proposal"):
        assert len(kinds) < 20
        evolver.end_epoch()
    survey = evolver.journal.events[kinds.index("survey")]
    assert kinds.index("survey") < kinds.index("proposal")
    assert {"effective_rank", "growth_gain"} <= {r["signal"] for r in survey["readings"]}
    assert {"0.out", "3.out"} <= {r["at"] for r in survey["readings"]}
