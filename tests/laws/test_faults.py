"""An error at any write of any operation leaves the world as it was, to the bit.

Every write of a change goes through the ledger: an error is raised before the first, behind it,
before the second, and so on, in each cell of the table of laws. The number is printed.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import Patch
from neuroexapt.errors import NeuroExaptError
from neuroexapt.guard import transaction
from neuroexapt.guard.ledger import Ledger
from neuroexapt.testing import changes, snapshot
from neuroexapt.testing.world import World, world
from tests.laws.operations import OPERATIONS
from tests.laws.test_table import row
from tests.laws.world import NAMES, mapped

# `make nightly` takes all of them.
SOME = ("small_cnn", "moe", "lstm")
MODELS = NAMES if os.environ.get("NEUROEXAPT_ALL_FAULTS") else SOME
ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt)


class Failing(Ledger):
    """A ledger that fails at one of its writes: before it is made, or behind it."""

    def __init__(self, at: int, error: type[BaseException], *, behind: bool) -> None:
        super().__init__()
        self.left, self.error, self.behind = at, error, behind

    def do(self, write: Any, undo: Any) -> None:
        self.left -= 1
        if not self.left and not self.behind:
            super().do(lambda: self._fail(), undo)
        super().do(write, undo)
        if not self.left:
            self._fail()

    def _fail(self) -> None:
        raise self.error("a fault on purpose")


def patches(single: World, operation: str) -> list[Patch]:
    """The first edit of an operation that this model takes, planned."""
    for edit in OPERATIONS[operation](single.axes, single.model):
        try:
            return [edit.plan(single.axes, named_tensors(single.model))]
        except NeuroExaptError:
            continue
    return []


def faults(single: World, patch: Patch) -> int:
    """Fail at every write in turn; how many there were."""
    old = snapshot(single.model, single.optimizer)
    tx = transaction(single.model, single.optimizer)
    tx.stage(patch)
    writes = len(tx.ledger)
    tx.roll_back()
    count = 0
    for at in range(1, writes + 1):
        for behind in (False, True):
            error = ERRORS[count % len(ERRORS)]
            tx.ledger = Failing(at, error, behind=behind)
            with pytest.raises(error, match="on purpose"):
                tx.stage(patch)
            left = changes(old, snapshot(single.model, single.optimizer))
            assert not left, (type(patch.edit).__name__, at, behind, error.__name__, left[:5])
            count += 1
    return count


@pytest.mark.parametrize("name", MODELS)
def test_a_fault_at_any_write_leaves_no_trace(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every operation that the model takes."""
    counts = {}
    for operation in OPERATIONS:
        single = world(row(name), mapped(name))
        counts[operation] = sum(faults(single, patch) for patch in patches(single, operation))
    with capsys.disabled():
        print(f"\n{name}: {sum(counts.values())} faults at writes", end=" ")
    assert sum(count > 0 for count in counts.values()) >= len(OPERATIONS) // 3
