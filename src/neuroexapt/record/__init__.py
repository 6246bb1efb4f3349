"""Record what happened and show it: checkpoints, a journal of events, a report drawn from it.

Read ``journal.py`` first: its table of event kinds is the format. ``report.py`` puts the page
together from ``story.py`` (events gathered), ``charts.py``, ``cards.py`` and ``architecture.py``.
``checkpoint.py`` saves and loads: ``saving.py`` and ``loading.py`` turn a run into data and back,
``folder.py`` writes and reads the files.
"""

from neuroexapt.record.checkpoint import load, save
from neuroexapt.record.journal import SCHEMA, Journal, read_journal
from neuroexapt.record.report import write_report
from neuroexapt.record.structure import changed, difference

__all__ = [
    "SCHEMA",
    "Journal",
    "changed",
    "difference",
    "load",
    "read_journal",
    "save",
    "write_report",
]
