"""What a model does with information, and what it costs: numbers with unit, error and samples.

Read `base` first: a `Reading`, and `undisturbed`, the law that measuring changes nothing. Then
`sampling` (the one place that sees gradients and activations), and one file per signal:

- `rank`: directions in use, copies, dead units
- `redundancy`: what the other units already say
- `affine`: the affine map nearest to a module, for `RemoveLayer(into=..., matrix=..., offset=...)`
- `removal`: what removing a unit would cost, in nats
- `weights`: what single weights are worth, and what masked ones would earn
- `scores`: what each unit of a width is worth, for `Narrow(scores=...)`
- `inputs`: what the readers of a width are given, for `Narrow(means=...)`
- `growth`: what new parameters would earn, in nats
- `directions`: which incoming weights new units should start with
- `trend`: is the loss still falling; the generalisation gap
- `holdout`: the loss on held-out batches, the judge of every change
- `cost`: parameters, FLOPs, bytes
- `wiring`: which layer reads which

Signals propose and order; a measured held-out loss decides.
"""

from neuroexapt.capture.flops import flops_of
from neuroexapt.measure.affine import AffineFit, affine_fit
from neuroexapt.measure.base import (
    Batch,
    HoldoutScore,
    LossFn,
    Reading,
    batch_size_of,
    undisturbed,
)
from neuroexapt.measure.cost import (
    LayerRow,
    count_flops,
    count_parameters,
    layers,
    tensor_bytes,
)
from neuroexapt.measure.directions import growth_directions
from neuroexapt.measure.growth import growth_gain, noise_corrected_norm, slopes
from neuroexapt.measure.holdout import evaluate
from neuroexapt.measure.inputs import ReaderInputs, reader_inputs
from neuroexapt.measure.rank import (
    dead_units,
    duplicate_units,
    effective_rank,
    read_dead_units,
    read_duplicate_units,
    read_effective_rank,
)
from neuroexapt.measure.redundancy import read_redundancy, unit_redundancy
from neuroexapt.measure.removal import removal_loss
from neuroexapt.measure.sampling import activations, gradients
from neuroexapt.measure.scores import gate_slopes, unit_scores
from neuroexapt.measure.trend import (
    Trend,
    generalisation_gap,
    plateau_slope,
    read_plateau_slope,
)
from neuroexapt.measure.weights import dense_gradients, weight_scores
from neuroexapt.measure.wiring import Node, wiring

__all__ = [
    "AffineFit",
    "Batch",
    "HoldoutScore",
    "LayerRow",
    "LossFn",
    "Node",
    "ReaderInputs",
    "Reading",
    "Trend",
    "activations",
    "affine_fit",
    "batch_size_of",
    "count_flops",
    "count_parameters",
    "dead_units",
    "dense_gradients",
    "duplicate_units",
    "effective_rank",
    "evaluate",
    "flops_of",
    "gate_slopes",
    "generalisation_gap",
    "gradients",
    "growth_directions",
    "growth_gain",
    "layers",
    "noise_corrected_norm",
    "plateau_slope",
    "read_dead_units",
    "read_duplicate_units",
    "read_effective_rank",
    "read_plateau_slope",
    "read_redundancy",
    "reader_inputs",
    "removal_loss",
    "slopes",
    "tensor_bytes",
    "undisturbed",
    "unit_redundancy",
    "unit_scores",
    "weight_scores",
    "wiring",
]
