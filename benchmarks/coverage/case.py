"""A case is a model and an example input; this module collects them from the zoo's modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any

from torch import nn

# Modules of this package that hold cases: `CASES`, a tuple, or `cases()`, a function that
# gives one (for packages that may not be installed). One that does not exist is left out.
MODULES = (
    "plain_cnn",
    "plain_sequence",
    "plain_attention",
    "plain_other",
    "transformers_decoder",
    "transformers_encoder",
    "transformers_seq2seq",
    "transformers_vision",
    "transformers_dense",
    "transformers_other",
    "vision",
)


@dataclass(frozen=True)
class Case:
    """A model of the zoo.

    Attributes:
        name: unique; the part before the first slash is the family.
        make: builds the model with random weights; the caller seeds before.
        inputs: makes positional and keyword example inputs, small, with a batch of 2 or more;
            the caller seeds before.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]


def cases_of(module: str) -> tuple[Case, ...]:
    """The cases of one module of this package; none if it does not exist."""
    name = f"{__package__}.{module}"
    if find_spec(name) is None:
        return ()
    loaded = importlib.import_module(name)
    found = loaded.CASES if hasattr(loaded, "CASES") else loaded.cases()
    return tuple(found)


def all_cases(only: str = "*") -> tuple[Case, ...]:
    """Every case whose name matches the glob, in the order of the modules.

    Raises:
        ValueError: two cases have the same name.
    """
    found = [case for module in MODULES for case in cases_of(module)]
    names = [case.name for case in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several cases have the names {twice}")
    return tuple(_matching(found, only))


def _matching(found: list[Case], only: str) -> Iterator[Case]:
    patterns = only.split(",")
    for case in found:
        if any(fnmatchcase(case.name, pattern) for pattern in patterns):
            yield case
