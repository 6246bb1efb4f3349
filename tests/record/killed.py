"""A run that changes, saves itself every few steps, goes on from what it finds, and is killed.

``python -m tests.record.killed FOLDER KILLS SEED`` starts it in processes of its own, kills each
with SIGKILL after a random time (or at a random write of a checkpoint) until it has ended, and
compares all bits that training goes on from with those of a run that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuroexapt import Budget, Evolver, Settings, load, save
from neuroexapt.errors import NoCheckpointError
from neuroexapt.record import folder as folder_module
from neuroexapt.record import read_journal
from neuroexapt.testing.snapshot import bits

DATA = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
EPOCH, EVERY = 5, 3  # steps in an epoch, steps between checkpoints


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - torch.sin(batch[:, :1])).square().mean()
    return loss


def factory(folder: Path) -> dict[str, Any]:
    """The run as it begins."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    evolver = Evolver(
        model,
        optimizer,
        loss_fn=loss_fn,
        holdout=list(DATA[64:].split(8)),
        budget=Budget(params=0.5),
        settings=Settings(trial_epochs=1, significance=1.0),
        journal=folder / "journal.jsonl",
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.9)
    return {"model": model, "optimizer": optimizer, "evolver": evolver, "scheduler": scheduler}


def main(folder: Path, steps: int) -> str:
    """Train from where the newest checkpoint is to the last step; a digest of the end."""
    try:
        run = load(lambda: factory(folder), folder / "checkpoints")
    except NoCheckpointError:
        (folder / "journal.jsonl").unlink(missing_ok=True)
        run = {**factory(folder), "step": 0}
    for step in range(run["step"], steps):
        run["model"].train()
        batch = DATA[torch.tensor(random.sample(range(64), 16))] + float(np.random.rand()) * 0.01
        run["optimizer"].zero_grad()
        loss_fn(run["model"], batch).backward()
        run["optimizer"].step()
        run["scheduler"].step()
        run["evolver"].step()
        if (step + 1) % EPOCH == 0:
            run["evolver"].end_epoch()
        if (step + 1) % EVERY == 0:
            save(folder / "checkpoints", **{**run, "step": step + 1}, keep=2)
    return digest(run)


def digest(run: dict[str, Any]) -> str:
    """All bits that training goes on from, as one number."""
    names = {id(p): name for name, p in run["model"].named_parameters()}
    seen = [(name, bits(p)) for name, p in run["model"].named_parameters()]
    states = run["optimizer"].state.items()
    seen += [(names[id(p)], sorted((k, bits(v)) for k, v in s.items())) for p, s in states]
    told = repr((seen, run["scheduler"].state_dict(), run["evolver"].state, random.getstate()))
    return hashlib.sha256(told.encode() + bits(torch.get_rng_state())[-1]).hexdigest()


def dying(left: int) -> None:
    """Kill this process at one of the next writes to the disk, before or behind it."""

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            done = real(*args, **kwargs)
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return call

    for holder, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree"), (Path, "write_bytes")):
        setattr(holder, name, counted(getattr(holder, name)))
    folder_module.save_file = counted(folder_module.save_file)


def child(folder: Path, steps: int, writes: int = 0) -> int:
    """Start the run in a process of its own."""
    number = os.fork()
    if number == 0:
        try:
            random.seed(0)
            np.random.seed(0)
            if writes:
                dying(writes)
            (folder / "digest").write_text(main(folder, steps))
        except BaseException as error:
            (folder / "failure").write_text(f"{type(error).__name__}: {error}")
            os._exit(1)
        os._exit(0)
    return number


def until_done(folder: Path, steps: int, draw: random.Random, seconds: float, kills: int) -> int:
    """Kill the run again and again; how often, until it came to its end."""
    done = 0
    while True:
        by_write = draw.random() < 0.5
        number = child(folder, steps, draw.randrange(1, 160) if by_write and done < kills else 0)
        deadline = time.monotonic() + draw.uniform(0, 2 * seconds)
        while (ended := os.waitpid(number, os.WNOHANG))[0] == 0:
            if not by_write and done < kills and time.monotonic() > deadline:
                os.kill(number, signal.SIGKILL)
                ended = os.waitpid(number, 0)
                break
            time.sleep(0.002)
        if (folder / "failure").exists():
            raise SystemExit(f"after {done} kills: {(folder / 'failure').read_text()}")
        if os.WIFEXITED(ended[1]):
            return done
        done += 1


def compare(base: Path, kills: int, seed: int, steps: int = 45) -> str:
    """Runs with so many kills altogether; what was found."""
    draw = random.Random(seed)
    (base / "whole").mkdir(parents=True)
    started = time.monotonic()
    os.waitpid(child(base / "whole", steps), 0)
    seconds = time.monotonic() - started
    wanted = (base / "whole" / "digest").read_text()
    total = runs = 0
    while total < kills:
        folder = base / f"run{runs}"
        folder.mkdir()
        total += until_done(folder, steps, draw, seconds / 2, min(12, kills - total))
        runs += 1
        found = (folder / "digest").read_text()
        if found != wanted:
            return f"run {runs}: {found} where {wanted} was to be"
        events = read_journal(folder / "journal.jsonl")
        if [e["event"] for e in events].count("start") != 1:
            return f"run {runs}: a journal with {[e['event'] for e in events]}"
    return f"equal after {total} kills in {runs} runs"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(compare(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
