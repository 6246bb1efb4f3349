"""Run the zoo: ``python -m benchmarks.coverage [--only GLOB] [--out FILE] [--jobs N]``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.coverage import rivals
from benchmarks.coverage.case import all_cases
from benchmarks.coverage.page import headline, line, page
from benchmarks.coverage.result import Result, from_row
from benchmarks.coverage.runner import results


def main() -> None:
    """Run the cases asked for and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--only", default="*", help="globs over case names, comma between")
    parser.add_argument("--out", type=Path, help="write the page here, say docs/coverage.md")
    parser.add_argument("--json", type=Path, help="keep all results here, with those of before")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--limit", type=float, default=120, help="seconds a stage may take")
    parser.add_argument("--timings", type=int, default=3, help="maps made for the time alone")
    parser.add_argument("--list", action="store_true", help="list the cases and leave")
    options = parser.parse_args()
    cases = all_cases(options.only)
    if options.list or not cases:
        print("\n".join(case.name for case in cases) or f"no case matches {options.only}")
        return
    found = _stored(options.json)
    runs = results(cases, jobs=options.jobs, limit=options.limit, timings=options.timings)
    for result in runs:
        print(line(result), flush=True)
        found[result.name] = result
        if options.json:
            rows = [asdict(result) for result in found.values()]
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    in_order = [found[case.name] for case in all_cases() if case.name in found]
    print(headline(in_order))
    if options.out:
        options.out.write_text(page(in_order, list(rivals.installed())))


def _stored(file: Path | None) -> dict[str, Result]:
    """Results of an earlier run: cases that are not run now stay in the page."""
    if file is None or not file.exists():
        return {}
    return {row["name"]: from_row(row) for row in json.loads(file.read_text())}


if __name__ == "__main__":
    main()
