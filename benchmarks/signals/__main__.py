"""Write ``docs/signals.md``: ``python -m benchmarks.signals [--seeds N] [--out FILE]``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from benchmarks.signals.cost import BATCHES, Cost, costs
from benchmarks.signals.planted import CASES, outcome

from neuroexapt.measure import signals


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value + 0.0:.4f}".replace("-0.0000", "0.0000")


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.0f} %"


def planted(seeds: int) -> str:
    """The tables of cases with a known answer."""
    lines = []
    for group, cases in CASES.items():
        lines += [
            f"\n### {group}\n",
            "| planted | truth | bias | spread | stated error | within 1 | within 2 |",
            "|---|---|---|---|---|---|---|",
        ]
        for case in cases:
            o = outcome(case, seeds)
            figures = (case.truth, o.bias, o.spread, o.error)
            cells = [case.name.replace("|", "\\|"), *map(_number, figures)]
            lines.append(
                f"| {' | '.join([*cells, _percent(o.within_one), _percent(o.within_two)])} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def table() -> str:
    """What each signal says."""
    lines = [
        "| signal | unit | says | formula | from | not good for |",
        "|---|---|---|---|---|---|",
    ]
    for s in signals().values():
        name = f"`{s.name}`" + ("" if s.default else " (by name)")
        cells = (name, s.unit, s.says, s.formula, s.paper, s.beware)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def costing() -> str:
    """What each costs, on two networks."""
    by_task = {task: costs(task) for task in ("small", "reference")}
    lines = ["| | small CNN, batch 16 | reference CNN, batch 128 |", "|---|---|---|"]
    for part, head in ((0, "**shared by all that need it**"), (1, "**on top of that**")):
        lines.append(f"| {head} | | |")
        columns: list[list[Cost]] = [found[part] for found in by_task.values()]
        for row in zip(*columns, strict=True):
            lines.append(f"| {row[0].name} | " + " | ".join(f"{c.steps:.2f}" for c in row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.signals", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("docs/signals.md"))
    options = parser.parse_args()
    command = f"python -m benchmarks.signals --seeds {options.seeds}"
    words = {part: Path(__file__).with_name(f"{part}.md").read_text() for part in ("head", "tail")}
    text = words["head"].replace("TABLE", table()).replace("COSTS", costing())
    text = text.replace("COMMAND", command).replace("BATCHES", str(BATCHES))
    text += planted(options.seeds) + words["tail"]
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
