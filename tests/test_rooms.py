"""The house rules: which room may import which, how big things may get, what is never written.

Rooms are the folders of `src/neuroexapt`. Their alphabetical order is the order in which data
flows and the only direction in which imports go; imports inside functions and under
`TYPE_CHECKING` count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

PACKAGE = "neuroexapt"
SRC = Path(__file__).resolve().parents[1] / "src" / PACKAGE

ROOMS = ("capture", "couple", "edit", "guard", "measure", "plan", "record", "train")
ROOT = "__init__"
FREE = frozenset({ROOT, "__main__", "cli", "demo", "testing"})  # may import every room
REFUSED = frozenset(
    {("measure", "edit"), ("edit", "measure"), ("measure", "guard"), ("plan", "guard")}
)

MAX_FILE_LINES = 400
MAX_BODY_LINES = 60
MAX_PARAMETERS = 7

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
BROAD = frozenset({"Exception", "BaseException"})


class Import(NamedTuple):
    """One import of ours: where it stands, and the room on either side."""

    where: str
    source: str
    target: str


# --- imports ---------------------------------------------------------------------------------


def room_of(module: str) -> str:
    """The room of a dotted module name: `neuroexapt.edit.widen` is in `edit`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ROOT


def module_of(path: str) -> str:
    """The dotted name of a file, its path given from inside the package."""
    parts = [PACKAGE, *PurePosixPath(path).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of_ours(path: str, source: str) -> list[Import]:
    """Every import of this package in one file, wherever in the file it stands."""
    module = module_of(path)
    is_package = PurePosixPath(path).name == "__init__.py"
    return [
        Import(f"{path}:{line}", room_of(module), room_of(target))
        for line, target in _imported(ast.parse(source), module, is_package)
        if target.split(".")[0] == PACKAGE
    ]


def _imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            # Only from the package itself does the imported name tell the room.
            tells = base == PACKAGE
            for alias in node.names:
                name = alias.name
                known = name in ROOMS or name == "errors" or name in FREE
                yield node.lineno, f"{base}.{name}" if tells and known else base
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """`from ..edit import x` in `neuroexapt.guard.verify` is from `neuroexapt.edit`."""
    if not node.level:
        return node.module or ""
    drop = node.level - 1 if is_package else node.level
    parts = module.split(".")
    return ".".join([*parts[: len(parts) - drop], *([node.module] if node.module else [])])


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def refusal(source: str, target: str) -> str | None:
    """Why a module of room `source` may not import from room `target`; None when it may."""
    if source == "errors":
        return "errors imports nothing"
    if source in FREE or source == target or target == "errors":
        return None
    if source not in ROOMS:
        return f"{source} is no room: put the file into one of {', '.join(ROOMS)}"
    if target not in ROOMS:
        return f"a room imports itself, errors and rooms before it, not {target}"
    if (source, target) in REFUSED:
        return "this pair is refused, values travel through plan"
    if ROOMS.index(target) > ROOMS.index(source):
        return f"{target} stands after {source}"
    return None


def refused_imports(path: str, source: str) -> list[str]:
    """One line for each import that breaks the house rule: file:line, the pair, the reason."""
    return [
        f"{found.where}: {found.source} -> {found.target} ({why})"
        for found in dict.fromkeys(imports_of_ours(path, source))
        if (why := refusal(found.source, found.target))
    ]


# --- budgets and habits ----------------------------------------------------------------------


def over_budget(path: str, source: str) -> list[str]:
    """One line for each file, function body or parameter list that is too long."""
    found = []
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        found.append(f"{path}: {lines} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, FunctionNode):
            continue
        at = f"{path}:{node.lineno}: {node.name}"
        if (lines := body_lines(node)) > MAX_BODY_LINES:
            found.append(f"{at}: body of {lines} lines, at most {MAX_BODY_LINES}")
        if (count := parameter_count(node)) > MAX_PARAMETERS:
            found.append(f"{at}: {count} parameters, at most {MAX_PARAMETERS}")
    return found


def body_lines(node: FunctionNode) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def parameter_count(node: FunctionNode) -> int:
    """Named parameters; `self`, `cls`, `*args` and `**kwargs` do not count."""
    positional = [*node.args.posonlyargs, *node.args.args]
    bound = bool(positional) and positional[0].arg in {"self", "cls"}
    return len(positional) - bound + len(node.args.kwonlyargs)


def swallowed_errors(path: str, source: str) -> list[str]:
    """One line for each bare or broad `except`, or `suppress`, that can hide an error."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            if _is_broad(node.type) and not _ends_in_raise(node.body):
                found.append(f"{path}:{node.lineno}: broad except that does not end in raise")
        elif (
            isinstance(node, ast.Call)
            and _called(node) == "suppress"
            and any(_is_broad(argument) for argument in node.args)
        ):
            found.append(f"{path}:{node.lineno}: broad suppress")
    return found


def _is_broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(_is_broad(one) for one in kind.elts)
    return kind is None or getattr(kind, "attr", getattr(kind, "id", "")) in BROAD


def _ends_in_raise(body: list[ast.stmt]) -> bool:
    last = body[-1] if body else None
    if isinstance(last, ast.If):
        return _ends_in_raise(last.body) and _ends_in_raise(last.orelse)
    if isinstance(last, ast.With):
        return _ends_in_raise(last.body)
    if isinstance(last, ast.Try):
        return _ends_in_raise(last.finalbody) or (
            _ends_in_raise(last.orelse or last.body)
            and all(_ends_in_raise(handler.body) for handler in last.handlers)
        )
    return isinstance(last, ast.Raise)


# --- the tests -------------------------------------------------------------------------------


def findings(check: Callable[[str, str], list[str]]) -> str:
    """What a check says of all our source files, a line each."""
    files = sorted(SRC.rglob("*.py"))
    assert files, f"no source files under {SRC}"
    return "\n".join(
        line
        for file in files
        for line in check(file.relative_to(SRC).as_posix(), file.read_text(encoding="utf-8"))
    )


def test_a_room_imports_only_rooms_listed_before_it() -> None:
    found = findings(refused_imports)
    assert not found, f"imports against the house rule:\n{found}"


def test_every_folder_is_a_room_and_the_rooms_are_in_alphabetical_order() -> None:
    folders = {file.relative_to(SRC).parts[0] for file in SRC.rglob("*.py")}
    assert {name for name in folders if not name.endswith(".py")} <= {*ROOMS, "testing"}
    assert list(ROOMS) == sorted(ROOMS)


def test_every_loose_file_is_known() -> None:
    assert {file.stem for file in SRC.glob("*.py")} <= FREE | {"errors"}


def test_errors_needs_nothing_but_the_standard_library() -> None:
    source = (SRC / "errors.py").read_text(encoding="utf-8")
    names = {name for _, name in _imported(ast.parse(source), f"{PACKAGE}.errors", False)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_files_functions_and_parameter_lists_stay_within_budget() -> None:
    found = findings(over_budget)
    assert not found, f"over budget:\n{found}"


def test_no_error_is_swallowed() -> None:
    found = findings(swallowed_errors)
    assert not found, f"name the exception, or re-raise:\n{found}"


def test_there_is_no_drawer_called_utils() -> None:
    assert not [file for file in SRC.rglob("*.py") if file.stem.strip("_") in {"util", "utils"}]


# --- the checkers can fail -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source", "pair"),
    [
        ("edit/prune.py", "from neuroexapt.train.loop import Evolver", "edit -> train"),
        ("edit/prune.py", "import neuroexapt.train.loop", "edit -> train"),
        ("edit/prune.py", "import os, neuroexapt.train.loop as loop", "edit -> train"),
        ("edit/prune.py", "from neuroexapt import train", "edit -> train"),
        ("edit/prune.py", "from .. import train", "edit -> train"),
        ("edit/prune.py", "from ..train import loop", "edit -> train"),
        ("edit/prune.py", "from ..train.loop import Evolver, Budget", "edit -> train"),
        ("edit/__init__.py", "from ..train import loop", "edit -> train"),
        ("edit/deep/er.py", "from ...train import loop", "edit -> train"),
        ("edit/prune.py", "def f():\n    from neuroexapt.guard import apply", "edit -> guard"),
        ("edit/prune.py", "if TYPE_CHECKING:\n    from ..guard import apply", "edit -> guard"),
        ("edit/prune.py", "try:\n    import neuroexapt.cli\nfinally:\n    pass", "edit -> cli"),
        ("edit/prune.py", "import_module('neuroexapt.guard')", "edit -> guard"),
        ("edit/prune.py", "importlib.import_module('neuroexapt.guard.x')", "edit -> guard"),
        ("edit/prune.py", "import neuroexapt", "edit -> __init__"),
        ("edit/prune.py", "from neuroexapt import Widen", "edit -> __init__"),
        ("edit/prune.py", "from .. import Widen, errors", "edit -> __init__"),
        ("edit/prune.py", "from neuroexapt import *", "edit -> __init__"),
        ("edit/prune.py", "from neuroexapt.demo import run", "edit -> demo"),
        ("edit/prune.py", "from neuroexapt.measure import Reading", "edit -> measure"),
        ("measure/cost.py", "from neuroexapt.edit import Patch", "measure -> edit"),
        ("measure/cost.py", "from ..guard import transaction", "measure -> guard"),
        ("plan/propose.py", "import neuroexapt.guard", "plan -> guard"),
        ("record/journal.py", "from neuroexapt.train import Evolver", "record -> train"),
        ("train/loop.py", "from neuroexapt.cli import app", "train -> cli"),
        ("errors.py", "from neuroexapt.capture import Trace", "errors -> capture"),
        ("stray.py", "from neuroexapt.capture import Trace", "stray -> capture"),
    ],
)
def test_the_room_check_refuses(path: str, source: str, pair: str) -> None:
    (line,) = refused_imports(path, source)
    number = next(n for n, text in enumerate(source.splitlines(), 1) if "import" in text)
    assert line.startswith(f"{path}:{number}: {pair} (")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("capture/trace.py", "import torch\nfrom torch.nn import Module"),
        ("capture/trace.py", "from neuroexapt.errors import CaptureError"),
        ("capture/trace.py", "from .. import errors"),
        ("capture/trace.py", "from neuroexapt import errors"),
        ("capture/__init__.py", "from .trace import trace\nfrom . import graph"),
        ("couple/rules_shape.py", "from ..capture import Trace\nfrom . import axes"),
        ("edit/widen.py", "from neuroexapt.edit.base import Edit\nimport neuroexapt.couple"),
        ("measure/cost.py", "def f():\n    from ..couple import AxisMap"),
        ("plan/propose.py", "from ..edit import Widen\nfrom ..measure import Reading"),
        ("train/loop.py", "from ..guard import apply\nfrom ..record import Journal"),
        ("train/loop.py", "import_module(name)\nimport neuroexapt_plugins"),
        ("__init__.py", "from .train import Evolver\nfrom neuroexapt.guard import apply"),
        ("cli.py", "from . import demo\nimport neuroexapt"),
        ("demo.py", "from neuroexapt import Evolver\nfrom .measure import cost"),
        ("testing.py", "from .guard import apply"),
    ],
)
def test_the_room_check_allows(path: str, source: str) -> None:
    assert refused_imports(path, source) == []


def function(body: int = 1, parameters: int = 0, *, first: str = "") -> str:
    names = [first] * bool(first) + [f"p{n}" for n in range(parameters)]
    docstring = '    """One.\n\n    Two.\n    """\n'
    return f"def f({', '.join(names)}):\n{docstring}" + "    x = 1\n" * body


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        (function(MAX_BODY_LINES + 1), "body of 61 lines"),
        (function(parameters=MAX_PARAMETERS + 1), "8 parameters"),
        ("def f(a, /, b, *, c, d, e, f, g, h): ...", "8 parameters"),
        ("x = 1\n" * (MAX_FILE_LINES + 1), "401 lines"),
    ],
)
def test_the_budget_check_refuses(source: str, finding: str) -> None:
    (line,) = over_budget("edit/widen.py", source)
    assert finding in line


@pytest.mark.parametrize(
    "source",
    [
        function(MAX_BODY_LINES),
        function(parameters=MAX_PARAMETERS, first="self"),
        "def f(a, b, c, d, e, f, g, *args, **kwargs): ...",
        'def f():\n    """Only a docstring."""',
        "x = 1\n" * MAX_FILE_LINES,
    ],
)
def test_the_budget_check_allows(source: str) -> None:
    assert over_budget("edit/widen.py", source) == []


@pytest.mark.parametrize(
    "handler",
    [
        "except:\n    pass",
        "except Exception:\n    x = 1",
        "except BaseException as error:\n    print(error)",
        "except (ValueError, Exception):\n    pass",
        "except builtins.Exception:\n    pass",
        "except Exception:\n    if x:\n        raise\n    y = 1",
        "except Exception:\n    if x:\n        raise",
        "except Exception:\n    def f():\n        raise",
    ],
)
def test_the_except_check_refuses(handler: str) -> None:
    assert swallowed_errors("edit/widen.py", f"try:\n    pass\n{handler}") == [
        "edit/widen.py:3: broad except that does not end in raise"
    ]


def test_the_except_check_refuses_a_broad_suppress() -> None:
    source = "with contextlib.suppress(Exception):\n    pass"
    assert swallowed_errors("edit/widen.py", source) == ["edit/widen.py:1: broad suppress"]


@pytest.mark.parametrize(
    "handler",
    [
        "except ValueError:\n    pass",
        "except (KeyError, ValueError):\n    pass",
        "except BaseException:\n    undo()\n    raise",
        "except Exception as error:\n    raise VerifyError(x) from error",
        "except Exception:\n    if x:\n        raise\n    else:\n        raise KeyError",
        "except Exception:\n    try:\n        undo()\n    finally:\n        raise",
    ],
)
def test_the_except_check_allows(handler: str) -> None:
    assert swallowed_errors("edit/widen.py", f"try:\n    pass\n{handler}") == []
