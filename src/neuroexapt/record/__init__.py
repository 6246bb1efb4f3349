"""Record what happened and show it: a journal of events, and a report drawn from it.

Read ``journal.py`` first: its table of event kinds is the format. ``report.py`` puts the page
together from ``story.py`` (events gathered), ``charts.py``, ``cards.py`` and ``architecture.py``.
"""

from neuroexapt.record.journal import SCHEMA, Journal, read_journal
from neuroexapt.record.report import write_report
from neuroexapt.record.structure import changed, difference

__all__ = ["SCHEMA", "Journal", "changed", "difference", "read_journal", "write_report"]
