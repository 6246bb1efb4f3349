"""The only room that writes on a model.

Read :mod:`neuroexapt.guard.ledger` (each write with its way back), then
:mod:`neuroexapt.guard.transaction`; :mod:`neuroexapt.guard.trial` spans training steps.
"""

from neuroexapt.guard.transaction import Applied, Transaction, apply, inner_module, transaction
from neuroexapt.guard.trial import Trial

__all__ = ["Applied", "Transaction", "Trial", "apply", "inner_module", "transaction"]
