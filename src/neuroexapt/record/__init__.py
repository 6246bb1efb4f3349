"""Record what happened and show it: checkpoints, a journal of events, a report drawn from it.

Read ``journal.py`` first: its table of event kinds is the format. ``report.py`` puts the page
together from ``story.py`` (events gathered), ``evolution.py`` (the architecture at every moment),
``cards.py``, ``compare.py`` and ``payload.py`` (what its scripts in ``assets/`` are given).
``checkpoint.py`` saves and loads: ``saving.py`` and ``loading.py`` turn a run into data and back,
``folder.py`` writes and reads the files.
"""

from neuroexapt.record.checkpoint import load, save
from neuroexapt.record.journal import SCHEMA, Journal, read_journal
from neuroexapt.record.report import write_report
from neuroexapt.record.runs import find_journal, read_runs
from neuroexapt.record.structure import changed, difference

__all__ = [
    "SCHEMA",
    "Journal",
    "changed",
    "difference",
    "find_journal",
    "load",
    "read_journal",
    "read_runs",
    "save",
    "write_report",
]
