"""Run the arms, keep every result, write the page.

Usage: ``python -m benchmarks.outcome --data FOLDER --tasks cifar10 --seeds 5``
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from benchmarks.outcome.arms import arms, told
from benchmarks.outcome.page import page
from benchmarks.outcome.tasks import TASKS
from benchmarks.outcome.train import Run

RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path("docs/outcome.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None, help="folder with cifar10/ and texts")
    parser.add_argument("--tasks", nargs="*", default=sorted(TASKS), choices=sorted(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.first, options.first + options.seeds):
        for name in options.tasks:
            task = TASKS[name](options.data)
            runs: dict[str, Run] = {}
            for arm, run in arms(task, task.load(seed), seed):
                runs[arm] = run
                with options.results.open("a") as file:
                    file.write(json.dumps({"task": name, "seed": seed, "arm": arm, **row(run)}))
                    file.write("\n")
            print(f"{name}, seed {seed}: {told(runs)}", flush=True)
    options.out.write_text(page(options.results))


def row(run: Run) -> dict[str, Any]:
    """What is kept of a run: everything but the network."""
    return {f.name: getattr(run, f.name) for f in fields(run) if f.name != "model"}


if __name__ == "__main__":
    main()
