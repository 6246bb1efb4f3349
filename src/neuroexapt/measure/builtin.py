"""The built-in signals: one row each, from what was seen to readings.

`at` is the name of a width, the path of a module, the name of a parameter, or ``model``. A width
of more than 128 units is seen through 128 of them; counts are scaled to all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neuroexapt.capture.flops import flops_of
from neuroexapt.errors import MeasureError
from neuroexapt.measure.ablation import ablation_losses, skips
from neuroexapt.measure.base import Reading, finite_matrix, undisturbed
from neuroexapt.measure.cost import count_parameters
from neuroexapt.measure.dependence import ROWS_A_UNIT, read_total_correlation
from neuroexapt.measure.evidence import Evidence
from neuroexapt.measure.information import Information, information_drop
from neuroexapt.measure.jackknife import spread_left_out
from neuroexapt.measure.noise import read_gradient_snr, read_noise_scale
from neuroexapt.measure.paired import information_of
from neuroexapt.measure.rank import (
    read_dead_units,
    read_duplicate_units,
    read_participation_ratio,
    read_saturation,
)
from neuroexapt.measure.redundancy import read_redundancy
from neuroexapt.measure.registry import Signal, register_signal
from neuroexapt.measure.removal import removal_loss
from neuroexapt.measure.similarity import read_branch_ratio, read_linear_cka
from neuroexapt.measure.timing import latency, read_activation_memory, read_latency
from neuroexapt.measure.trend import generalisation_gap, read_plateau_slope
from neuroexapt.measure.units import read_stuck_units, read_unit_entropy

# --- of the rows of a width ----------------------------------------------------------------------


def _of_rows(
    read: Callable[[Tensor, str], Reading], *, count: bool = False, enough: bool = False
) -> Callable[[Evidence], Iterator[Reading]]:
    """A signal that looks at each width by itself.

    Args:
        read: from the activations and the width's name.
        count: its value is a number of units, to be scaled where units were sampled.
        enough: it needs 5 rows a unit; of a wider one as many units as that allows are taken.
    """

    def readings(seen: Evidence) -> Iterator[Reading]:
        for name, rows in seen.rows.items():
            values_NC = rows.values_NC
            if enough:
                # Two rows a unit more than needed, as 1 row in 8 is left out for the error.
                values_NC = _fewer(values_NC, len(values_NC) // (ROWS_A_UNIT + 2))
            for reading in seen.tried(lambda v=values_NC, n=name: read(v, n)):  # type: ignore[misc]
                yield _scaled(reading, rows.scale) if count else reading

    return readings


def _fewer(values_NC: Tensor, most: int) -> Tensor:
    """At most so many units, evenly spaced."""
    units = values_NC.shape[1]
    if units <= most:
        return values_NC
    return values_NC[:, torch.arange(max(1, most)) * units // max(1, most)]


def _scaled(reading: Reading, factor: float) -> Reading:
    error = None if reading.error is None else reading.error * factor
    return replace(reading, value=reading.value * factor, error=error)


# --- of targets ----------------------------------------------------------------------------------


def _usable(seen: Evidence) -> Iterator[Reading]:
    yield from _summed("usable_information", information_of(seen))


def _usable_hidden(seen: Evidence) -> Iterator[Reading]:
    yield from _summed("hidden_information", information_of(seen, probe="hidden"))


def _summed(signal: str, found: dict[str, dict[str, Information]]) -> Iterator[Reading]:
    for name, by_target in found.items():
        parts = list(by_target.values())
        error = math.hypot(*(part.error for part in parts))
        samples = min(part.samples for part in parts)
        yield Reading(signal, name, sum(p.bits for p in parts), "bits", error, samples)


def _drop(seen: Evidence) -> Iterator[Reading]:
    found = list(information_of(seen).items())
    for (_, before), (name, behind) in itertools.pairwise(found):
        both = [(before[t], behind[t]) for t in before if t in behind]
        paired = [(a, b) for a, b in both if torch.equal(a.groups_N, b.groups_N)]
        if not paired:
            continue
        drops = [information_drop(a, b) for a, b in paired]
        error = math.hypot(*(error for _, error in drops))
        samples = min(b.samples for _, b in paired)
        value = sum(drop for drop, _ in drops)
        yield Reading("information_drop", name, value, "bits", error, samples)


# --- of blocks -----------------------------------------------------------------------------------


def _cka(seen: Evidence) -> Iterator[Reading]:
    for path, (entering, leaving) in seen.blocks.items():
        yield from seen.tried(
            lambda a=entering, b=leaving, p=path: read_linear_cka(a.values_NC, b.values_NC, p)  # type: ignore[misc]
        )


def _ratio(seen: Evidence) -> Iterator[Reading]:
    for path, (entering, leaving) in seen.blocks.items():
        stream_NC, added_NC = entering.values_NC, leaving.values_NC - entering.values_NC
        yield from seen.tried(lambda a=added_NC, s=stream_NC, p=path: read_branch_ratio(a, s, p))  # type: ignore[misc]


# --- of gradients --------------------------------------------------------------------------------


def _whole_gradient(seen: Evidence) -> Tensor:
    """(M, P): the kept entries of all parameters, weighed so that squares add up to the whole."""
    parts = [
        rows_MP * math.sqrt(seen.sizes.get(name, rows_MP.shape[1]) / rows_MP.shape[1])
        for name, rows_MP in seen.gradients.items()
        if rows_MP.shape[1]
    ]
    if not parts:
        raise MeasureError(
            "gradients",
            seen="no gradients",
            needed="gradients of some micro-batches",
            next_step='gather(..., needs=["gradients"]), or watch a few steps',
        )
    return torch.cat(parts, 1)


def _noise_scale(seen: Evidence) -> Iterator[Reading]:
    yield from seen.tried(lambda: read_noise_scale(_whole_gradient(seen), seen.batch_size))


def _snr(seen: Evidence) -> Iterator[Reading]:
    for name, rows_MP in seen.gradients.items():
        if rows_MP.shape[1]:
            yield from seen.tried(lambda r=rows_MP, n=name: read_gradient_snr(r, n))  # type: ignore[misc]


def _taylor(sums_MU: Tensor, _batch_size: int) -> Tensor:
    return sums_MU.mean(0).abs().mean()


def _fisher(sums_MU: Tensor, batch_size: int) -> Tensor:
    """Without bias: a mean over a batch varies by 1 / batch_size of what single samples do."""
    variance_U = sums_MU.var(0)
    parts_U = batch_size * variance_U + sums_MU.mean(0).square() - variance_U / len(sums_MU)
    return parts_U.mean()


def _of_gates(
    signal: str, unit: str, value: Callable[[Tensor, int], Tensor]
) -> Callable[[Evidence], Iterator[Reading]]:
    """A mean over the units of a width, its error by jackknife over micro-batches."""

    def read(sums_MU: Tensor, size: int, at: str) -> Reading:
        sums_MU = finite_matrix(sums_MU, signal, rows=4)
        kept = [[m for m in range(len(sums_MU)) if m != skip] for skip in range(len(sums_MU))]
        error = spread_left_out([float(value(sums_MU[rows], size)) for rows in kept])
        return Reading(signal, at, float(value(sums_MU, size)), unit, error, len(sums_MU))

    def readings(seen: Evidence) -> Iterator[Reading]:
        for name, sums_MU in seen.gates.items():
            yield from seen.tried(lambda s=sums_MU, n=name: read(s, seen.batch_size, n))  # type: ignore[misc]

    return readings


def _removal(seen: Evidence) -> Iterator[Reading]:
    """The mean over units of what removing one would cost."""
    for name, sums_MU in seen.gates.items():
        yield from seen.tried(lambda s=sums_MU, n=name: _mean_removal(s, seen.batch_size, n))  # type: ignore[misc]


def _mean_removal(sums_MU: Tensor, batch_size: int, at: str) -> Reading:
    value_U, error_U = removal_loss(sums_MU, batch_size)
    # Units share their batches, so their errors may all point one way.
    return Reading(
        "removal_loss", at, float(value_U.mean()), "nats", float(error_U.mean()), len(sums_MU)
    )


# --- of training and cost ------------------------------------------------------------------------


def _gap(seen: Evidence) -> Iterator[Reading]:
    if seen.train is not None and seen.holdout is not None:
        yield generalisation_gap(seen.train, seen.holdout)


def _plateau(seen: Evidence) -> Iterator[Reading]:
    if seen.losses:
        yield from seen.tried(lambda: read_plateau_slope(seen.losses))


def _ablation(seen: Evidence) -> Iterator[Reading]:
    if seen.loss_fn is not None and seen.batches and skips(seen.axes):
        yield from ablation_losses(seen.model, seen.loss_fn, seen.batches, seen.axes).values()


def _parameters(seen: Evidence) -> Iterator[Reading]:
    count = float(count_parameters(seen.model))
    yield Reading("parameters", "model", count, "numbers", 0.0, 1)


def _flops(seen: Evidence) -> Iterator[Reading]:
    value = float(flops_of(seen.axes.traces[0]))
    yield Reading("flops", "model", value, "operations per sample", 0.0, 1)


def _latency(seen: Evidence) -> Iterator[Reading]:
    """Of the forward that the loss function makes of the first batch."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    if seen.loss_fn is None or not seen.batches:
        return
    hook = seen.model.register_forward_pre_hook(
        lambda _model, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    try:
        with undisturbed(seen.model), torch.no_grad():
            seen.loss_fn(seen.model, seen.batches[0])
    finally:
        hook.remove()
    for args, kwargs in given[:1]:
        yield read_latency(latency(seen.model, args, kwargs))


def _activation_memory(seen: Evidence) -> Iterator[Reading]:
    if seen.loss_fn is not None and seen.batches:
        yield read_activation_memory(seen.model, seen.loss_fn, seen.batches[0])


ROWS_SIGNALS = (
    Signal(
        "saturation", "share of width", "1: every unit adds a direction, the width is full",
        ("rows",), _of_rows(read_saturation),
        "exp(entropy of the eigenvalues of the correlations) / width", "Roy and Vetterli 2007",
        "noise on copies counts as directions (6 of 32 where 4 signals have 8 noisy copies each)",
    ),
    Signal(
        "participation_ratio", "share of width", "as saturation, with less weight on quiet "
        "directions", ("rows",), _of_rows(read_participation_ratio),
        "(tr R)^2 / tr(R^2) / width", "Gao et al. 2017",
        "a few strong correlations outweigh many free directions",
    ),
    Signal(
        "total_correlation", "bits per unit", "0: units are independent; large: they are copies",
        ("rows",), _of_rows(read_total_correlation, enough=True),
        "-1/2 log2 det(R of normal scores) / units", "Watanabe 1960; Ma and Sun 2011",
        "dependence that is not monotone; exact copies are as many bits as the shrinkage says",
    ),
    Signal(
        "redundancy", "share of variance", "1: the other units predict each unit",
        ("rows",), _of_rows(read_redundancy, enough=True),
        "mean of 1 - 1 / diag(inverse of R)", "Theil 1961",
        "what a unit is worth to the loss",
    ),
    Signal(
        "duplicate_units", "units", "units that correlate above 0.95 with another",
        ("rows",), _of_rows(read_duplicate_units, count=True),
        "greedy count of |r| > 0.95", "", "copies that are spread over several units",
    ),
    Signal(
        "dead_units", "units", "units with one value in every row", ("rows",),
        _of_rows(read_dead_units, count=True), "max = min", "",
        "a unit that is silent on these batches alone",
    ),
    Signal(
        "stuck_units", "units", "units at an end of their range in 95 % of rows", ("rows",),
        _of_rows(read_stuck_units, count=True), "share within 2 % of the range of an end", "",
        "units that are meant to be rare (sparse codes, gates)",
    ),
    Signal(
        "unit_entropy", "bits per unit", "how much a unit's value varies, at a quarter of its "
        "standard deviation", ("rows",), _of_rows(read_unit_entropy),
        "entropy of floor(4 x / std + 1/2)", "Miller 1955",
        "copies (each has full entropy), and information about the target",
    ),
)  # fmt: skip

OTHER_SIGNALS = (
    Signal(
        "usable_information", "bits", "what a linear probe can read about the target",
        ("rows", "targets"), _usable, "H(Y) - held-out cross-entropy of a probe",
        "Xu et al. 2020", "what only a deeper readout could use: a lower bound",
    ),
    Signal(
        "information_drop", "bits", "bits about the target that are gone since the width before",
        ("rows", "targets"), _drop, "usable information before - behind, paired by row",
        "Xu et al. 2020", "layers beside each other: `before` is the width that runs before",
    ),
    Signal(
        "hidden_information", "bits", "as usable_information, by a probe with a hidden layer",
        ("rows", "targets"), _usable_hidden, "H(Y) - held-out cross-entropy of a probe",
        "Xu et al. 2020", "a quick look: it costs several times the linear one", default=False,
    ),
    Signal(
        "linear_cka", "alikeness", "1: a block's output is its input, turned and scaled",
        ("blocks",), _cka, "unbiased HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y))",
        "Kornblith et al. 2019; Song et al. 2012", "judging removals: a block with 0.99 may be "
        "needed", default=False,
    ),
    Signal(
        "branch_ratio", "share of the stream", "how much a block changes its input",
        ("blocks",), _ratio, "E|f(x) - x|^2 / E|x|^2", "Men et al. 2024",
        "judging removals, as CKA", default=False,
    ),
    Signal(
        "removal_loss", "nats", "what removing one unit of a width costs, on average",
        ("gates",), _removal, "|E s| + 1/2 E s^2, s the slope by a gate on the unit",
        "Molchanov et al. 2019; LeCun et al. 1990", "several units at once: copies cost more "
        "than their sum",
    ),
    Signal(
        "taylor", "nats", "first-order change of the loss by one unit of a width, on average",
        ("gates",), _of_gates("taylor", "nats", _taylor), "mean of |E s|", "Molchanov et al. 2019",
        "a trained model, where the first order vanishes; noise adds to it", default=False,
    ),
    Signal(
        "fisher", "nats", "second-order change of the loss by one unit of a width, on average",
        ("gates",), _of_gates("fisher", "nats", _fisher), "mean of E s^2 over samples",
        "Theis et al. 2018", "a model far from a minimum", default=False,
    ),
    Signal(
        "noise_scale", "samples", "the batch size at which gradient and noise weigh the same",
        ("gradients",), _noise_scale, "tr Cov(g of a sample) / |E g|^2", "McCandlish et al. 2018",
        "ill-conditioned losses, where directions differ",
    ),
    Signal(
        "gradient_snr", "signal to noise", "below 1: a parameter sees no systematic signal",
        ("gradients",), _snr, "|E g|^2 / (tr Cov(g) / M)", "McCandlish et al. 2018",
        "telling converged from dead", default=False,
    ),
    Signal(
        "generalisation_gap", "nats", "above 0: what was learnt does not carry over", (), _gap,
        "held-out loss - training loss", "", "a model that is still far from fitting",
    ),
    Signal(
        "plateau_slope", "nats per point", "near 0: training has stopped to fall", (), _plateau,
        "least-squares slope of the last 20 losses", "", "smoothed losses: the error is too small",
    ),
    Signal(
        "ablation_loss", "nats", "rise of the loss when a layer is skipped", (), _ablation,
        "L(layer skipped) - L, by batch", "Gromov et al. 2024",
        "several layers at once; nothing is repaired", default=False,
    ),
    Signal(
        "parameters", "numbers", "size of the model", (), _parameters, "shared ones once", "",
        "time and memory",
    ),
    Signal(
        "flops", "operations per sample", "work of one forward", (), _flops,
        "2 a multiply-add of products, convolutions, attention, recurrences", "",
        "time: equal FLOPs are not equal seconds",
    ),
    Signal(
        "latency", "seconds", "time of the forward of one batch", (), _latency,
        "median of 20 calls", "", "other machines, other batch sizes", default=False,
    ),
    Signal(
        "activation_memory", "bytes per sample", "what a step keeps for its backward", (),
        _activation_memory, "storages saved by autograd", "", "the peak, which is above it",
    ),
)  # fmt: skip

for _signal in (*ROWS_SIGNALS, *OTHER_SIGNALS):
    register_signal(_signal)
