"""What the documentation says is run and looked up: code, its output, commands, links, paths.

In README and docs every ```python block of a file runs in order, all in one namespace. A ```text
block right behind one is what it prints, to the letter.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from neuroexapt.couple.site import RULES
from neuroexapt.measure.registry import _SIGNALS
from neuroexapt.record.journal import SCHEMA

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md"]

BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:src|tests|docs|examples)/[^`\s]*)`")


class Block(NamedTuple):
    """One piece of code, the line it starts at, and what it must print (None: anything)."""

    line: int
    code: str
    output: str | None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start(1)), found[1], found[2])
        for found in BLOCK.finditer(text)
    ]


def prose(page: Path) -> str:
    """The text without fenced blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
every_linked = pytest.mark.parametrize("page", LINKED, ids=name_of)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_code_runs_and_prints_what_is_said(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks run in order in one namespace; files they write go to a folder of the test."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": page.stem}
    # A page may register an operator rule or a signal; the next one must not see it.
    tables = mock.patch.dict(RULES), mock.patch.dict(_SIGNALS)
    with torch.random.fork_rng(devices=[]), tables[0], tables[1]:
        torch.default_generator.manual_seed(0)
        for block in blocks(page):
            # Empty lines before the code give its errors the line number in the page.
            code = compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, space)
            if block.output is not None:
                place = f"{name_of(page)}:{block.line}"
                assert printed.getvalue() == block.output, place


def test_no_page_loses_its_code() -> None:
    """Every block that opens as Python is found by the test above."""
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("```python") == len(blocks(page)), page


@every_linked
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file or folder of the repository."""
    targets = [target.partition("#")[0] for target in LINK.findall(prose(page))]
    relative = [target for target in targets if target and "://" not in target]
    assert [target for target in relative if not (page.parent / target).exists()] == []


@every_linked
def test_paths_exist(page: Path) -> None:
    """A path in backticks under src, tests, docs or examples exists; a pattern has a match."""
    assert [path for path in PATH.findall(prose(page)) if not any(ROOT.glob(path))] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_the_demo_block_is_marked_once() -> None:
    """The figures are pasted between two marks, and say where they come from."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    between = re.findall(r"<!-- demo -->\n(.*?)<!-- /demo -->", text, re.DOTALL)
    assert len(between) == 1
    assert "`make demo`" in between[0]


def test_make_targets_that_are_named_exist() -> None:
    """`make WORD` in any page or behind a shell prompt is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in LINKED:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`make ([a-z]+)`|^make ([a-z]+)", text, re.MULTILINE)
        assert {one or other for one, other in named} <= targets, page


def test_the_inspect_command_shows_the_excerpt() -> None:
    """The command in README prints the lines that README shows, tables apart."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(
        r"^\S*neuroexapt (inspect .*)\n```\n\n```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE
    )
    assert found is not None
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", "from neuroexapt.cli import app; app()", *found[1].split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1", "COLUMNS": "110"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    printed = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in found[2].splitlines():
        wanted = " ".join(line.split())
        assert any(row.startswith(wanted) for row in printed), f"{line}\n{done.stdout}"


def test_the_journal_page_has_the_kinds_and_fields_of_the_code() -> None:
    """The page's table and the table in the module's docstring name the same things."""
    from neuroexapt.record import journal

    table = (journal.__doc__ or "").split("=" * 20)[2:]
    words = set(re.findall(r"[a-z_]{4,}", " ".join(table).split("A value that")[0]))
    page = (ROOT / "docs" / "journal.md").read_text(encoding="utf-8")
    assert [word for word in sorted(words) if word not in page] == []
    assert f"now {SCHEMA})" in page
