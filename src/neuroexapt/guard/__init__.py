"""The only room that writes on a model.

Read :mod:`neuroexapt.guard.ledger` (each write with its way back), then
:mod:`neuroexapt.guard.transaction`; :mod:`neuroexapt.guard.trial` spans training steps.
:mod:`neuroexapt.guard.memory` says beforehand what an edit needs, :mod:`neuroexapt.guard.leaks`
afterwards what still holds the old memory. :mod:`neuroexapt.guard.lineage` remembers what was done,
and :mod:`neuroexapt.guard.redo` makes it again.
"""

from neuroexapt.guard.copies import inner_copies
from neuroexapt.guard.leaks import Leak, LeakWatch
from neuroexapt.guard.statistics import reestimate
from neuroexapt.guard.transaction import Applied, Transaction, apply, transaction
from neuroexapt.guard.trial import Trial
from neuroexapt.guard.wrapped import inner_module

__all__ = [
    "Applied",
    "Leak",
    "LeakWatch",
    "Transaction",
    "Trial",
    "apply",
    "inner_copies",
    "inner_module",
    "reestimate",
    "transaction",
]
