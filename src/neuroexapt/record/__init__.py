"""Record what happened and show it: checkpoints, a journal of events, a report drawn from it.

Read ``journal.py`` first: its table of event kinds is the format. ``report.py`` puts the page
together from ``story.py`` (events gathered), ``evolution.py`` (the architecture at every moment),
``cards.py``, ``compare.py`` and ``payload.py`` (what its scripts in ``assets/`` are given).
``checkpoint.py`` saves and loads: ``saving.py`` and ``loading.py`` turn a run into data and back,
``folder.py`` writes and reads the files. ``watch.py`` hands events to whoever shows them meanwhile:
``live.py`` in the terminal, ``trackers/`` elsewhere.
"""

from neuroexapt.record.checkpoint import load, save
from neuroexapt.record.journal import SCHEMA, Journal, read_journal
from neuroexapt.record.live import LiveView
from neuroexapt.record.report import write_report
from neuroexapt.record.runs import find_journal, read_runs
from neuroexapt.record.structure import changed, difference
from neuroexapt.record.trackers import MLflow, TensorBoard, WandB
from neuroexapt.record.watch import Audience, Watcher

__all__ = [
    "SCHEMA",
    "Audience",
    "Journal",
    "LiveView",
    "MLflow",
    "TensorBoard",
    "WandB",
    "Watcher",
    "changed",
    "difference",
    "find_journal",
    "load",
    "read_journal",
    "read_runs",
    "save",
    "write_report",
]
