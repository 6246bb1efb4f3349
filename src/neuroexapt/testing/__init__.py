"""Laws for edits of your own: :func:`check_edit` runs all of them on a table of models.

Read :mod:`neuroexapt.testing.check` (what is run on what), then
:mod:`neuroexapt.testing.laws` (each law a function). Needs no test framework.
"""

from neuroexapt.testing.check import Cell, Report, check_cell, check_edit
from neuroexapt.testing.laws import BrokenLaw
from neuroexapt.testing.models import Row, default_models
from neuroexapt.testing.snapshot import Snapshot, bits, changes, snapshot

__all__ = [
    "BrokenLaw",
    "Cell",
    "Report",
    "Row",
    "Snapshot",
    "bits",
    "changes",
    "check_cell",
    "check_edit",
    "default_models",
    "snapshot",
]
