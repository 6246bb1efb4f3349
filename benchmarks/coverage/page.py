"""The results as a page: summary, table per model, what failed and why."""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

from benchmarks.coverage.result import GONE, STAGES, Result

_HEAD = f"""# Coverage

What `map_axes`, `Narrow("*", by=0.25)` and `Widen("*", by=0.25)` do to models that were not written
for them, as built, with random weights (scales and shifts of norms too). Made by

```sh
python -m benchmarks.coverage --out docs/coverage.md
```

**full**: the map is made, of a model that never ran, and the model runs after it; a quarter of
every width goes in one edit of a model in training, the outputs keep their shapes, forward,
backward and an optimizer step work in training mode, and at least {GONE:.0%} of the parameters are
gone; widening keeps the outputs to 1e-5 wherever it is not refused in advance; and both numerical
oracles agree with the map. *Permutation*: the units of every width change places in all tensors
that the map names, in double precision, and the outputs stay. *Silent units*: a quarter of the
units of every width that no operator mixes over is made silent, taken out by plain indexing, and
the outputs stay. **safe**: each step came true, or was refused in advance or taken back by the
library's own check with a reason, and the model was untouched bit for bit. **share**: parameters in
tensors with at least one resizable width. **left**: parameters left after narrowing. **map**:
processor seconds for a map (median of 3, one thread). Each model runs in a process of its own.
"""


def page(results: Sequence[Result], rivals: Sequence[str]) -> str:
    """The whole page as Markdown."""
    parts = [
        _HEAD,
        _environment(rivals),
        "## Summary\n",
        _summary(results, rivals),
        "## Models\n",
        _models(results, rivals),
        "## What is not full\n",
        _failures(results),
        "## Operators without a rule\n",
        _unknown(results),
    ]
    return "\n".join(parts)


def headline(results: Sequence[Result]) -> str:
    """The figures that count, in one line."""
    full, safe = sum(r.full for r in results), sum(r.safe for r in results)
    return (
        f"{len(results)} models: {full} full ({full / len(results):.1%}), {safe} safe "
        f"({safe / len(results):.1%}), map {_median_seconds(results)} s in the median"
    )


def line(result: Result) -> str:
    """One result for a terminal."""
    mark = "full" if result.full else "safe" if result.safe else "FAIL"
    not_ok = [
        f"{name} {stage.status}: {stage.reason[:160]}"
        for name, stage in result.stages.items()
        if stage.status != "ok" and name in ("build", *STAGES)
    ]
    return "  ".join([mark, result.name, *not_ok])


def _environment(rivals: Sequence[str]) -> str:
    packages = ("torch", "transformers", "torchvision", "timm", *rivals)
    found = [f"{name} {_version(name)}" for name in packages if _version(name)]
    return f"Python {platform.python_version()}, {', '.join(found)}; {platform.machine()}.\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _median_seconds(results: Iterable[Result]) -> str:
    seconds = [r.facts["map_seconds"] for r in results if "map_seconds" in r.facts]
    return f"{statistics.median(seconds):.2f}" if seconds else "-"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _families(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    names = dict.fromkeys(r.name.partition("/")[0] for r in results)
    return [(name, [r for r in results if r.name.startswith(f"{name}/")]) for name in names]


def _summary(results: Sequence[Result], rivals: Sequence[str]) -> str:
    header = ["family", "models", "full", "safe", "share", "left", "map (s)", *rivals]
    groups = [*_families(results), ("all", list(results))]
    rows = [
        [
            name,
            len(group),
            sum(r.full for r in group),
            sum(r.safe for r in group),
            _mean([r.facts["share"] for r in group if "share" in r.facts]),
            _mean([_left(r) for r in group if "narrowed" in r.facts]),
            _median_seconds(group),
            *(sum(_status(r, rival) == "ok" for r in group) for rival in rivals),
        ]
        for name, group in groups
    ]
    note = (
        f"A rival's number counts the models of which it removed {GONE:.0%} or more of the "
        "parameters, with the outputs' shapes kept and a training step; whether it tied the right "
        "channels is not tested.\n"
    )
    return _table(header, rows) + (f"\n{note}" if rivals else "")


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.0%}" if values else "-"


def _left(result: Result) -> float:
    return result.facts["narrowed"] / max(1.0, result.facts["parameters"])


def _status(result: Result, stage: str) -> str:
    return result.stages[stage].status if stage in result.stages else "-"


def _models(results: Sequence[Result], rivals: Sequence[str]) -> str:
    header = ["model", "parameters", "full", "widths", "share", "left", "widened", "map (s)"]
    stages = ["narrow", "widen", "permutation", "silent"]
    return _table([*header, *stages, *rivals], (_row(r, [*stages, *rivals]) for r in results))


def _row(result: Result, stages: Sequence[str]) -> list[object]:
    facts = result.facts
    return [
        result.name,
        int(facts.get("parameters", 0)),
        "yes" if result.full else "no",
        int(facts.get("widths", 0)),
        f"{facts['share']:.0%}" if "share" in facts else "-",
        f"{_left(result):.0%}" if "narrowed" in facts else "-",
        int(facts["widened"]) if "widened" in facts else "-",
        f"{facts['map_seconds']:.2f}" if "map_seconds" in facts else "-",
        *(_status(result, stage) for stage in stages),
    ]


def _failures(results: Sequence[Result]) -> str:
    rows = [
        f"- **{r.name}**, {name}, {stage.status}: {_plain(stage.reason)}"
        for r in results
        for name, stage in r.stages.items()
        if not r.full and stage.status != "ok" and name in ("build", *STAGES)
    ]
    return "\n".join(rows or ["None."]) + "\n"


def _plain(reason: str) -> str:
    return " ".join(reason.split()).replace("|", "\\|").replace("*", "\\*")[:300]


def _unknown(results: Sequence[Result]) -> str:
    counts = Counter(name for r in results for name in r.unknown)
    if not counts:
        return "None.\n"
    return _table(["operator", "models"], counts.most_common())
