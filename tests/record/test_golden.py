"""Checkpoints written by earlier versions load for ever.

``python -m tests.record.test_golden NAME`` writes the folders of a new version; those that are
there are never written again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import (
    AddRegularization,
    InsertAttention,
    InsertConv,
    InsertLayer,
    InsertPool,
    InsertResidual,
    Narrow,
    PruneWeights,
    RemoveLayer,
    Widen,
    apply,
    load,
    save,
)
from neuroexapt.edit import Edit

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path for path in GOLDEN.glob("*/*") if path.is_dir())


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.relu())


class Images(nn.Module):
    """Convolutions; as it was when the first golden checkpoint was written."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.max_pool2d(self.blocks(self.stem(x)), 2).flatten(1))


class Words(nn.Module):
    """A recurrent layer, tied embeddings, a number that repeats a width, a transient buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.mix = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 6))
        self.norm = nn.LayerNorm(6)
        self.width = 6
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("shift", torch.linspace(0, 1, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x).view(*x.shape, self.width) + self.shift
        return self.out(self.norm(hidden + self.mix(self.lstm(hidden)[0])))


def inputs(name: str) -> Tensor:
    if name == "words":
        return torch.arange(10).reshape(2, 5) % 7
    return torch.linspace(-1, 1, 3 * 2 * 64).reshape(3, 2, 8, 8)


def factory(name: str) -> dict[str, Any]:
    """A run as it was built when the checkpoint was written."""
    model = Words() if name == "words" else Images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6])
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


EDITS: dict[str, tuple[Edit, ...]] = {
    "images": (
        Widen("stem.0", by=2),
        InsertConv("stem", seed=3),
        InsertLayer("blocks.1", "copy"),
        InsertResidual("blocks.0", to="blocks.1"),
        InsertAttention("blocks.0", "self", heads=2, causal=False),
        InsertAttention("stem"),
        InsertPool("stem", "avg"),
        RemoveLayer("blocks.2"),
        AddRegularization("stem", "dropout", 0.2),
        AddRegularization("head", "weight_decay", 0.1),
        PruneWeights("blocks.0.conv.weight", share=0.5),
        Narrow("stem.0", by=1),
    ),
    "words": (
        Widen("embed", by=2),
        Narrow("lstm.hidden_size", by=1),
        InsertLayer("norm", hidden=4),
        Widen("mix.0", by=3),
        PruneWeights("mix.2.weight", share=0.25),
        InsertResidual("mix"),
    ),
}


def steps(run: dict[str, Any], name: str, count: int = 2) -> None:
    for _ in range(count):
        run["optimizer"].zero_grad()
        run["model"](inputs(name)).square().mean().backward()
        run["optimizer"].step()
        run["scheduler"].step()


def write(version: str) -> None:
    for name, edits in EDITS.items():
        torch.manual_seed(0)
        run = factory(name)
        for edit in edits:
            steps(run, name)
            apply(run["model"], edit, (inputs(name),), optimizer=run["optimizer"])
        steps(run, name)
        path = save(GOLDEN / version / name, **run, best={"loss": 0.25})
        assert path is not None
        with torch.no_grad():
            said = run["model"].eval()(inputs(name)).flatten().tolist()
        (GOLDEN / version / name / "outputs.json").write_text(json.dumps(said) + "\n")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_a_golden_checkpoint_loads_and_goes_on(folder: Path) -> None:
    """Same outputs, the optimizer where it was, and a step can be made."""
    run = load(lambda: factory(folder.name), folder)
    assert run["best"] == {"loss": 0.25}
    assert run["scheduler"].last_epoch == 2 * len(EDITS[folder.name]) + 2
    with torch.no_grad():
        found = run["model"].eval()(inputs(folder.name)).flatten()
    wanted = torch.tensor(json.loads((folder / "outputs.json").read_text()))
    assert torch.allclose(found, wanted, atol=1e-4)
    trained = {id(p) for p in run["model"].parameters()}
    assert {id(p) for group in run["optimizer"].param_groups for p in group["params"]} == trained
    assert all(float(state["step"]) >= 2 for state in run["optimizer"].state.values())
    run["model"].train()
    steps(run, folder.name)


def test_there_are_some_and_they_are_small() -> None:
    """They travel with the repository."""
    assert {folder.name for folder in FOLDERS} == set(EDITS)
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) < 400_000


if __name__ == "__main__":
    write(sys.argv[1])
