"""Run the model once on tensors without data and write down every operator call.

Start with :mod:`neuroexapt.capture.trace` (the frozen records), then
:mod:`neuroexapt.capture.run` (how the records are made). Nothing here changes the model.
"""

from neuroexapt.capture.run import RunFailure, capture
from neuroexapt.capture.trace import Call, ModuleRun, Source, TensorRef, Trace, refs_in

__all__ = ["Call", "ModuleRun", "RunFailure", "Source", "TensorRef", "Trace", "capture", "refs_in"]
