"""Damaged and hostile checkpoints and journals, made from whole ones: a corpus without end.

``python -m tests.record.hostile COUNT SEED`` reads so many and prints what they met.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuroexapt import (
    AddRegularization,
    Budget,
    Evolver,
    InsertAttention,
    InsertConv,
    InsertLayer,
    InsertResidual,
    Narrow,
    PruneWeights,
    RemoveLayer,
    Settings,
    Widen,
    apply,
    load,
    save,
)
from neuroexapt.errors import NeuroExaptError, RecordError
from neuroexapt.record import Journal, read_journal
from neuroexapt.record.folder import _digest

IMAGES = torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(0))
MEMORY = 2**30  # bytes of address space that reading may take beyond what the process has


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(batch).square().mean()
    return loss


class Block(nn.Module):
    """A residual block with a number that a config holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.rate = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x.relu())


def factory() -> dict[str, Any]:
    """A small run of everything."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Block(), Block(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    evolver = Evolver(
        model,
        optimizer,
        loss_fn=loss_fn,
        holdout=list(IMAGES.split(6)),
        budget=Budget(params=0.5),
        settings=Settings(trial_epochs=5),
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    return {"model": model, "optimizer": optimizer, "evolver": evolver, "scheduler": scheduler}


def model_alone() -> nn.Module:
    model: nn.Module = factory()["model"]
    return model


EDITS = (
    Widen("0", by=2),
    InsertConv("2"),
    InsertResidual("3", to="4"),
    InsertAttention("2"),
    InsertLayer("3", "copy"),
    PruneWeights("7.weight", share=0.5),
    AddRegularization("2", "dropout", 0.1),
    AddRegularization("7", "weight_decay", 0.1),
    RemoveLayer("4"),
    Narrow("0", by=1),
)


def whole(folder: Path) -> Path:
    """A checkpoint of a run with many edits and a trial under way."""
    torch.manual_seed(0)
    run = factory()
    for edit in EDITS:
        apply(run["model"], edit, (IMAGES[:4],), optimizer=run["optimizer"])
    for _ in range(8):
        run["optimizer"].zero_grad()
        loss_fn(run["model"], IMAGES[:6]).backward()
        run["optimizer"].step()
        run["evolver"].end_epoch()
    path = save(folder, **run, note={"best": 0.5, "at": (1, 2)})
    assert path is not None
    return path


# --------------------------------------------------------------------------------- damage by bytes


def flipped(draw: random.Random, raw: bytes) -> bytes:
    at = draw.randrange(max(1, len(raw)))
    return raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :]


def cut(draw: random.Random, raw: bytes) -> bytes:
    return raw[: draw.randrange(len(raw) + 1)]


def spliced(draw: random.Random, raw: bytes) -> bytes:
    a, b = sorted(draw.randrange(len(raw) + 1) for _ in range(2))
    return raw[:a] + raw[b:]


def repeated(draw: random.Random, raw: bytes) -> bytes:
    a, b = sorted(draw.randrange(len(raw) + 1) for _ in range(2))
    return raw[:b] + raw[a:b][:4096] + raw[b:]


def noise(draw: random.Random, raw: bytes) -> bytes:
    return draw.randbytes(draw.randrange(200))


def huge_header(draw: random.Random, raw: bytes) -> bytes:
    return draw.choice([2**63, 2**40, 10**8, 7]).to_bytes(8, "little") + raw[8:]


BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    flipped, cut, spliced, repeated, noise, huge_header
)  # fmt: skip

# -------------------------------------------------------------------------------- damage by values

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 7, 2**31, 2**62, 10**30, 0.5, 1e308, "", "x", "../../../../tmp/evil",
    "/etc/passwd", "weight", "__class__", "_modules", "forward", "training", "nx_after", "nx_pass",
    [], {}, [0], [2**40, 2**40], [1, [2, [3]]], {"$tuple": []}, {"$tensor": "x"},
    {"$kind": "Popen"}, {"$kind": "ConvSpec", "mode": "residual", "channels": 10**9, "spatial": 2},
    {"$kind": "MlpSpec", "features": 10**9, "hidden": 10**9},
    {"$kind": "CopySpec", "source": "", "silent": {"$tuple": []}, "channels": 1, "spatial": 0},
    {"$dict": [[[], 1]]}, {"$float": "12"}, {"$dtype": "load"}, "remove", "insert", "set", "mask",
    {"$counter": [["a", []]]}, "\u0000", "é" * 2000, [[]] * 50,
)  # fmt: skip


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield at
    known = isinstance(data, (dict, list))
    for key, value in data.items() if isinstance(data, dict) else enumerate(data if known else ()):
        yield from places(value, (*at, key))


def changed(draw: random.Random, data: Any) -> Any:
    """A JSON value with something else, more or less somewhere in it."""
    at = draw.choice(list(places(data)))
    if not at:
        return draw.choice(VALUES)
    holder = data
    for key in at[:-1]:
        holder = holder[key]
    key, how = at[-1], draw.randrange(5)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif how == 1:
        holder[draw.choice(["x", "$kind", "same_as", "unsaved", "strides", "../x"])] = holder[key]
    elif how == 2:
        others = list(places(data))
        holder[key] = json.loads(json.dumps(_at(data, draw.choice(others))))
    else:
        holder[key] = draw.choice(VALUES)
    return data


def _at(data: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        data = data[key]
    return data


def deep(draw: random.Random, raw: bytes) -> bytes:
    """Nesting that no reader wants."""
    count = draw.choice([100, 1000, 100_000])
    return draw.choice([b"[" * count, b'{"a":' * count + b"1" + b"}" * count])


def damaged(draw: random.Random, folder: Path) -> str:
    """Damage a checkpoint in one or a few ways; what was done."""
    done = []
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        file = draw.choice(sorted(folder.iterdir()))
        if file.is_symlink() or not file.is_file():
            continue
        raw = file.read_bytes()
        kind = draw.randrange(10)
        if file.suffix == ".json" and kind < 7:
            try:
                text = json.dumps(changed(draw, json.loads(raw))).encode()
            except (ValueError, RecursionError):
                continue
            done.append(f"values of {file.name}")
        elif file.suffix == ".json" and kind == 7:
            text = deep(draw, raw)
            done.append(f"depth of {file.name}")
        elif kind == 8:
            file.unlink()
            done.append(f"no {file.name}")
            if draw.random() < 0.5:
                file.symlink_to(draw.choice(["/etc/passwd", "/dev/zero", "/dev/stdin", "loop"]))
            continue
        else:
            way = draw.choice(BYTES)
            text = way(draw, raw)
            done.append(f"{way.__name__} {file.name}")
        file.write_bytes(text)
    if draw.random() < 0.8:
        resealed(folder)
    return ", ".join(done)


def resealed(folder: Path) -> None:
    """A manifest that tells the sizes and digests of what is there now, as an attacker would."""
    manifest = folder / "manifest.json"
    if manifest.is_symlink():
        return
    try:
        data = json.loads(manifest.read_bytes())
        for name in data["files"]:
            path = folder / name
            if path.is_file() and not path.is_symlink():
                data["files"][name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return
    manifest.write_text(json.dumps(data))


def damaged_journal(draw: random.Random, raw: bytes) -> bytes:
    lines = raw.split(b"\n")
    how = draw.randrange(4)
    if how == 0:
        return draw.choice(BYTES)(draw, raw)
    at = draw.randrange(len(lines))
    if how == 1:
        lines[at] = draw.choice(BYTES)(draw, lines[at])
    elif how == 2:
        lines.insert(at, draw.choice(lines))
    else:
        try:
            lines[at] = json.dumps(changed(draw, json.loads(lines[at]))).encode()
        except ValueError:
            lines[at] = deep(draw, b"")
    return b"\n".join(lines)


# ------------------------------------------------------------------------------------- the reading


def read_all(base: Path, count: int, seed: int) -> Counter[str]:
    """Read so many damaged checkpoints and journals; a failure of any other kind is raised."""
    draw, met = random.Random(seed), Counter[str]()
    good = whole(base / "good")
    with Journal(base / "good.jsonl") as journal:
        for number in range(6):
            journal.write("epoch", epoch=number, holdout_loss=0.5)
        journal.write("resume", back_to=3)
    raw = (base / "good.jsonl").read_bytes()
    outside = {p for p in base.parent.iterdir()}
    for number in range(count):
        if number % 4 == 3:
            (base / "bad.jsonl").write_bytes(damaged_journal(draw, raw))
            met[_outcome(lambda: read_journal(base / "bad.jsonl"), "a journal")] += 1
            continue
        bad = base / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        told = damaged(draw, bad)
        part: Any = factory if draw.random() < 0.7 else model_alone
        files = sorted(bad.iterdir())
        met[_outcome(partial(load, part, bad), told)] += 1
        assert sorted(bad.iterdir()) == files
    assert {p for p in base.parent.iterdir()} == outside
    return met


def _outcome(read: Callable[[], Any], told: str) -> str:
    try:
        read()
    except RecordError as error:
        if isinstance(error.__cause__, MemoryError) or "allocate" in str(error):
            raise AssertionError(f"{told}: memory was asked for: {error}") from error
        if len(str(error)) > 3000:
            raise AssertionError(f"{told}: a message of {len(str(error))} letters") from error
        return type(error).__name__
    except NeuroExaptError as error:
        raise AssertionError(f"{told}: {error}") from error
    except BaseException as error:
        raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error
    return "read"


def bounded() -> None:
    """Memory beyond a bound is refused by the system from here on."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        factory()
        bounded()
        print(dict(read_all(Path(name) / "corpus", int(sys.argv[1]), int(sys.argv[2]))))
