"""Compare: ``python -m benchmarks.operations [--only GLOB] [--seeds N] [--out FILE]``."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from benchmarks import operations
from benchmarks.operations.page import page, rewritten
from benchmarks.operations.run import Outcome, outcomes
from benchmarks.operations.task import Section

KEPT = "benchmarks/operations/outcomes.json"  # of the page in docs/, for runs of a part of it
Key = tuple[str, str, str, int]


def sections() -> dict[str, Section]:
    """Every file of this folder that has one, by its name."""
    found = {}
    for module in pkgutil.iter_modules(operations.__path__):
        if module.name != "__main__":
            made = importlib.import_module(f"{operations.__name__}.{module.name}")
            if hasattr(made, "section"):
                found[module.name] = made.section()
    return found


def main() -> None:
    """Run what was asked for, and write the page of all that is known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operations", description=__doc__)
    parser.add_argument("--only", default="*", help="glob over the names of the files")
    parser.add_argument("--setting", default="*", help="glob over the names of the settings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds cifar10/")
    parser.add_argument("--out", type=Path, help="write the page here, say docs/operations.md")
    parser.add_argument("--json", type=Path, help="keep all outcomes here, with those of before")
    options = parser.parse_args()
    everything, found = sections(), _stored(options.json)
    folder = options.data / "cifar10"
    for name, section in everything.items():
        for setting in section.settings if fnmatch(name, options.only) else ():
            if not fnmatch(setting.name, options.setting):
                continue
            if setting.task.data == "cifar10" and not folder.exists():
                print(f"{setting.name}: left out, no {folder} (see --data)")
                continue
            for seed in range(options.seeds):
                for outcome in outcomes(name, setting, seed, folder):
                    print(_line(outcome), flush=True)
                    found[_key(outcome)] = outcome
                if options.json:
                    rows = [asdict(outcome) for outcome in found.values()]
                    options.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    command = f"python -m benchmarks.operations --seeds {options.seeds} --json {KEPT}"
    text = page(everything, list(found.values()), f"{command} --out docs/operations.md")
    if options.out:
        old = options.out.read_text() if options.out.exists() else ""
        options.out.write_text(rewritten(old, text))
    else:
        print(text)


def _key(outcome: Outcome) -> Key:
    return outcome.section, outcome.setting, outcome.arm, outcome.seed


def _stored(file: Path | None) -> dict[Key, Outcome]:
    """Outcomes of an earlier run: what is not run now stays in the page."""
    if file is None or not file.exists():
        return {}
    rows = [Outcome(**row) for row in json.loads(file.read_text())]
    return {_key(outcome): outcome for outcome in rows}


def _line(outcome: Outcome) -> str:
    return (
        f"{outcome.setting:32} {outcome.arm:24} seed {outcome.seed}  "
        f"loss {outcome.at_once:.4f} -> {outcome.loss:.4f}  {outcome.accuracy:.1f} %"
    )


if __name__ == "__main__":
    main()
