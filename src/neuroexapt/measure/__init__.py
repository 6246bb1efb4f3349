"""What a model does with information, and what it costs: numbers with unit, error and samples.

Read `base` first: a `Reading`, and `undisturbed`, the law that measuring changes nothing. Then
`sampling` (the one place that sees gradients and activations), and one file per signal:

- `information`: what a layer says about the target, in bits, by held-out probes (`probe`)
- `dependence`: what units say together and not alone, by the Gaussian copula
- `neighbours`: mutual information by nearest neighbours, up to 4 dimensions
- `rank`: directions in use, copies, dead units
- `redundancy`: what the other units already say
- `units`: entropy of single units, units stuck at an end of their range
- `similarity`: how alike a block's input and output are, how much a branch adds
- `affine`: the affine map nearest to a module, for `RemoveLayer(into=..., matrix=..., offset=...)`
- `removal`: what removing a unit would cost, in nats
- `weights`: what single weights are worth, and what masked ones would earn
- `scores`: what each unit of a width is worth, for `Narrow(scores=...)`
- `inputs`: what the readers of a width are given, for `Narrow(means=...)`
- `growth`: what new parameters would earn, in nats; `adam`: in steps of Adam
- `noise`: how much of a gradient is signal; the gradient noise scale
- `directions`: which incoming weights new units should start with
- `ablation`: the rise of the loss when a layer is skipped
- `trend`: is the loss still falling; the generalisation gap
- `chance`: what dropout adds to the loss in training
- `holdout`: the loss on held-out batches, the judge of every change
- `cost`: parameters, FLOPs, bytes; `timing`: seconds, and bytes kept for the backward

What is collected once for all of them is `evidence` (by passes of its own) or `watch` (during
training steps); `registry` is the table of signals, `builtin` its built-in rows.
- `wiring`: which layer reads which

Signals propose and order; a measured held-out loss decides.
"""

from neuroexapt.capture.flops import flops_of
from neuroexapt.measure import builtin as builtin
from neuroexapt.measure.ablation import ablation_losses, skips
from neuroexapt.measure.adam import adam_gain, read_adam_gain
from neuroexapt.measure.affine import AffineFit, affine_fit
from neuroexapt.measure.base import (
    Batch,
    HoldoutScore,
    LossFn,
    Reading,
    batch_size_of,
    undisturbed,
)
from neuroexapt.measure.chance import chance_modules, read_chance
from neuroexapt.measure.cost import (
    LayerRow,
    count_flops,
    count_parameters,
    layers,
    tensor_bytes,
)
from neuroexapt.measure.dependence import (
    normal_scores,
    read_total_correlation,
    shared_information,
    total_correlation,
)
from neuroexapt.measure.directions import growth_directions
from neuroexapt.measure.evidence import Evidence, gather
from neuroexapt.measure.growth import growth_gain, noise_corrected_norm, slopes
from neuroexapt.measure.holdout import evaluate
from neuroexapt.measure.information import (
    Information,
    as_target,
    information_drop,
    read_usable_information,
    usable_information,
)
from neuroexapt.measure.inputs import ReaderInputs, reader_inputs
from neuroexapt.measure.mode import measuring
from neuroexapt.measure.neighbours import (
    label_information,
    neighbour_information,
    read_neighbour_information,
)
from neuroexapt.measure.noise import (
    gradient_snr,
    noise_scale,
    read_gradient_snr,
    read_noise_scale,
)
from neuroexapt.measure.paired import information_of
from neuroexapt.measure.rank import (
    dead_units,
    duplicate_units,
    effective_rank,
    participation_ratio,
    read_dead_units,
    read_duplicate_units,
    read_effective_rank,
    read_participation_ratio,
    read_saturation,
)
from neuroexapt.measure.redundancy import read_redundancy, unit_redundancy
from neuroexapt.measure.registry import (
    Signal,
    chosen_signals,
    measure,
    read_signals,
    register_signal,
    signals,
)
from neuroexapt.measure.removal import removal_loss
from neuroexapt.measure.sampling import Probe, activations, gradients
from neuroexapt.measure.scores import gate_slopes, unit_scores
from neuroexapt.measure.similarity import (
    branch_ratio,
    linear_cka,
    read_branch_ratio,
    read_linear_cka,
)
from neuroexapt.measure.timing import (
    Latency,
    activation_memory,
    latency,
    read_activation_memory,
    read_latency,
)
from neuroexapt.measure.trend import (
    Trend,
    generalisation_gap,
    plateau_slope,
    read_plateau_slope,
)
from neuroexapt.measure.units import (
    read_stuck_units,
    read_unit_entropy,
    stuck_units,
    unit_entropy,
)
from neuroexapt.measure.watch import Watch
from neuroexapt.measure.weights import dense_gradients, weight_scores
from neuroexapt.measure.wiring import Node, wiring

__all__ = [
    "AffineFit",
    "Batch",
    "Evidence",
    "HoldoutScore",
    "Information",
    "Latency",
    "LayerRow",
    "LossFn",
    "Node",
    "Probe",
    "ReaderInputs",
    "Reading",
    "Signal",
    "Trend",
    "Watch",
    "ablation_losses",
    "activation_memory",
    "activations",
    "adam_gain",
    "affine_fit",
    "as_target",
    "batch_size_of",
    "branch_ratio",
    "chance_modules",
    "chosen_signals",
    "count_flops",
    "count_parameters",
    "dead_units",
    "dense_gradients",
    "duplicate_units",
    "effective_rank",
    "evaluate",
    "flops_of",
    "gate_slopes",
    "gather",
    "generalisation_gap",
    "gradient_snr",
    "gradients",
    "growth_directions",
    "growth_gain",
    "information_drop",
    "information_of",
    "label_information",
    "latency",
    "layers",
    "linear_cka",
    "measure",
    "measuring",
    "neighbour_information",
    "noise_corrected_norm",
    "noise_scale",
    "normal_scores",
    "participation_ratio",
    "plateau_slope",
    "read_activation_memory",
    "read_adam_gain",
    "read_branch_ratio",
    "read_chance",
    "read_dead_units",
    "read_duplicate_units",
    "read_effective_rank",
    "read_gradient_snr",
    "read_latency",
    "read_linear_cka",
    "read_neighbour_information",
    "read_noise_scale",
    "read_participation_ratio",
    "read_plateau_slope",
    "read_redundancy",
    "read_saturation",
    "read_signals",
    "read_stuck_units",
    "read_total_correlation",
    "read_unit_entropy",
    "read_usable_information",
    "reader_inputs",
    "register_signal",
    "removal_loss",
    "shared_information",
    "signals",
    "skips",
    "slopes",
    "stuck_units",
    "tensor_bytes",
    "total_correlation",
    "undisturbed",
    "unit_entropy",
    "unit_redundancy",
    "unit_scores",
    "usable_information",
    "weight_scores",
    "wiring",
]
