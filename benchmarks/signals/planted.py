"""Data of which the answer is known in closed form: what each signal is judged by.

A case draws data from a seed, takes the reading, and knows the truth. Over many seeds follow the
bias, and how often the truth lies within two of the stated errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuroexapt.measure import (
    HoldoutScore,
    Reading,
    evaluate,
    generalisation_gap,
    read_adam_gain,
    read_branch_ratio,
    read_effective_rank,
    read_gradient_snr,
    read_linear_cka,
    read_neighbour_information,
    read_noise_scale,
    read_participation_ratio,
    read_plateau_slope,
    read_redundancy,
    read_saturation,
    read_total_correlation,
    read_unit_entropy,
    read_usable_information,
)


@dataclass(frozen=True)
class Case:
    """One planted truth.

    Attributes:
        name: what is planted.
        read: from a generator to the reading.
        truth: in the reading's unit.
        bias: the most that the mean over seeds may be away, as stated in the docstrings.
        covered: the least share of seeds with the truth within two errors; None where the
            error knows nothing of the bias (copies without noise), which the bias then says.
    """

    name: str
    read: Callable[[torch.Generator], Reading]
    truth: float
    bias: float
    covered: float | None = 0.85


def normal(g: torch.Generator, *shape: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def alike(g: torch.Generator, rows: int, units: int, rho: float) -> Tensor:
    """Units of variance 1 whose correlations are all rho."""
    return math.sqrt(rho) * normal(g, rows, 1) + math.sqrt(1 - rho) * normal(g, rows, units)


def bits_of_alike(units: int, rho: float) -> float:
    """Total correlation of :func:`alike`, in bits."""
    logdet = math.log(1 + (units - 1) * rho) + (units - 1) * math.log(1 - rho)
    return -0.5 * logdet / math.log(2)


def copies(g: torch.Generator, rows: int, *, noise: float = 0.0, loud: bool = False) -> Tensor:
    """32 units: 4 signals of 8 copies each, noise of that variance; some units x30, some x0.01."""
    units = normal(g, rows, 4).repeat(1, 8)
    units = units + math.sqrt(noise) * normal(g, rows, 32)
    scale = torch.ones(32, dtype=torch.float64)
    if loud:
        scale[::5], scale[1::5] = 30.0, 0.01
    return units * scale


SNR = 0.1  # variance of the noise on copies: snr 10
NOISY = 1 / (1 + SNR)


def _spectrum_of_copies() -> tuple[float, float]:
    """Effective rank and participation ratio of noisy copies."""
    values = [1 + 7 * NOISY] * 4 + [1 - NOISY] * 28
    rank = math.exp(-sum(v / 32 * math.log(v / 32) for v in values))
    return rank, 32**2 / sum(v * v for v in values)


RANK, RATIO = _spectrum_of_copies()


def _total(make: Callable[[torch.Generator], Tensor]) -> Callable[[torch.Generator], Reading]:
    return lambda g: read_total_correlation(make(g), "planted")


def _pair(g: torch.Generator, rows: int, dims: int, rho: float) -> tuple[Tensor, Tensor]:
    x = normal(g, rows, dims)
    return x, rho * x + math.sqrt(1 - rho**2) * normal(g, rows, dims)


def binary_entropy(p: float) -> float:
    """In bits."""
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p) if 0 < p < 1 else 0.0


def symmetric_channel(
    g: torch.Generator, rows: int, symbols: int, flip: float
) -> tuple[Tensor, Tensor]:
    """One-hot symbols, and what arrives: with probability flip another symbol."""
    sent = torch.randint(0, symbols, (rows,), generator=g)
    lost = torch.rand(rows, generator=g) < flip
    shift = torch.randint(1, symbols, (rows,), generator=g)
    arrived = torch.where(lost, (sent + shift) % symbols, sent)
    return torch.nn.functional.one_hot(sent, symbols).double(), arrived


def channel_bits(symbols: int, flip: float) -> float:
    """Capacity of :func:`symmetric_channel`."""
    return math.log2(symbols) - binary_entropy(flip) - flip * math.log2(max(1, symbols - 1))


def _channel(symbols: int, flip: float) -> Callable[[torch.Generator], Reading]:
    return lambda g: read_usable_information(*symmetric_channel(g, 1000, symbols, flip), "planted")


def _regression(outputs: int, features: int) -> Callable[[torch.Generator], Reading]:
    """Numbers that correlate by 0.8 with as many of the features, these mixed at random."""

    def read(g: torch.Generator) -> Reading:
        x, y = _pair(g, 1000, outputs, 0.8)
        x = torch.cat([x, normal(g, 1000, features - outputs)], 1)
        return read_usable_information(x @ normal(g, features, features), y, "planted")

    return read


def two_bumps(distance: float) -> float:
    """Bits that a normal value says about which of two equally likely means it has."""
    at = torch.linspace(-12, 12 + distance, 100_001, dtype=torch.float64)
    one, two = ((-((at - mean) ** 2) / 2).exp() / math.sqrt(2 * math.pi) for mean in (0, distance))
    both = (one + two) / 2
    parts = sum(torch.special.xlogy(p, p / both) for p in (one, two)) / 2 / math.log(2)
    return float(torch.trapezoid(torch.as_tensor(parts).nan_to_num(), at))


def _bumps(dims: int) -> Callable[[torch.Generator], Reading]:
    def read(g: torch.Generator) -> Reading:
        labels = torch.randint(0, 2, (1000,), generator=g)
        x = normal(g, 1000, dims)
        x[:, 0] += 2.0 * labels
        return read_neighbour_information(x, labels, "planted")

    return read


def _neighbours(dims: int, rho: float) -> Callable[[torch.Generator], Reading]:
    return lambda g: read_neighbour_information(*_pair(g, 1000, dims, rho), "planted")


def _gradient(g: torch.Generator, batches: int = 32) -> Tensor:
    """50 entries of true slope 0.2 and, per sample, noise of variance 1; batches of 8."""
    return 0.2 + normal(g, batches, 50) / math.sqrt(8)


def _gap(g: torch.Generator) -> Reading:
    """Losses of normal samples, mean 1.0 in training and 1.3 held out, through `evaluate`."""

    def score(mean: float) -> HoldoutScore:
        batches = list((mean + normal(g, 16 * 32)).split(32))
        return evaluate(nn.Identity(), lambda model, x: model(x).mean(), batches)

    return generalisation_gap(score(1.0), score(1.3))


def _cka_of(g: torch.Generator) -> Reading:
    """y = x + noise of variance 1, in 16 units: cross-covariance I, covariances I and 2 I."""
    x = normal(g, 1000, 16)
    return read_linear_cka(x, x + normal(g, 1000, 16), "planted")


def _normal_entropy(resolution: float = 0.25) -> float:
    """Entropy in bits of a standard normal value in steps of the resolution, 0 mid-step."""
    edges = (torch.arange(-200, 201, dtype=torch.float64) - 0.5) * resolution
    shares = torch.special.ndtr(edges).diff()
    return float(torch.special.entr(shares).sum()) / math.log(2)


TOTAL = [
    Case(f"{units} normal units, correlation {rho}, {rows:,} rows",
         _total(lambda g, u=units, r=rho, n=rows: alike(g, n, u, r)),  # type: ignore[misc]
         bits_of_alike(units, rho) / units, bias)
    for units, rho, rows, bias in (
        (2, 0.9, 1024, 0.02),
        (8, 0.0, 64, 0.01),
        (8, 0.9, 1024, 0.02),
        (64, 0.0, 384, 0.002),
        (64, 0.9, 384, 0.04),
    )
] + [
    Case("32 units = 4 signals x 8 copies, noise at snr 10",
         _total(lambda g: copies(g, 1000, noise=SNR)), bits_of_alike(8, NOISY) / 8, 0.02),
    Case("the same, scaled by 30 and 0.01",
         _total(lambda g: copies(g, 1000, noise=SNR, loud=True)),
         bits_of_alike(8, NOISY) / 8, 0.02),
    Case("4 signals x 8 copies without noise (shrinkage 1e-4 sets the value)",
         _total(lambda g: copies(g, 1000)), bits_of_alike(8, 1 - 1e-4) / 8, 0.02, None),
    Case("32 independent units", _total(lambda g: normal(g, 1000, 32)), 0.0, 0.001),
]  # fmt: skip

INFORMATION = [
    Case("binary symmetric channel, 25 % flipped", _channel(2, 0.25), channel_bits(2, 0.25), 0.01),
    Case("binary symmetric channel, 5 % flipped", _channel(2, 0.05), channel_bits(2, 0.05), 0.02),
    Case("channel that says nothing", _channel(2, 0.5), 0.0, 0.005),
    Case("10 symbols, 30 % lost", _channel(10, 0.3), channel_bits(10, 0.3), 0.08),
    Case("1 number of 1 feature", _regression(1, 1), -0.5 * math.log2(1 - 0.64), 0.01),
    Case("1 number of 32 mixed features", _regression(1, 32), -0.5 * math.log2(1 - 0.64), 0.06),
    Case("4 numbers of 64 mixed features", _regression(4, 64), -2 * math.log2(1 - 0.64), 0.4),
]

NEIGHBOURS = [
    Case("1 + 1 normal dimensions, correlation 0.9", _neighbours(1, 0.9),
         -0.5 * math.log2(1 - 0.81), 0.03, 0.75),
    Case("2 + 2 independent dimensions", _neighbours(2, 0.0), 0.0, 0.02, 0.75),
    Case("2 + 2 dimensions, correlation 0.5", _neighbours(2, 0.5),
         -math.log2(1 - 0.25), 0.03, 0.75),
    Case("2 labels, 1 dimension", _bumps(1), two_bumps(2.0), 0.02, 0.75),
    Case("2 labels, 4 dimensions", _bumps(4), two_bumps(2.0), 0.03, 0.75),
]  # fmt: skip

UNITS = [
    Case("saturation of noisy copies", lambda g: read_saturation(copies(g, 1000, noise=SNR), ""),
         RANK / 32, 0.003),
    Case("saturation of scaled copies",
         lambda g: read_saturation(copies(g, 1000, noise=SNR, loud=True), ""), RANK / 32, 0.003),
    Case("saturation of 32 independent units",
         lambda g: read_saturation(normal(g, 1000, 32), ""), 1.0, 0.005, 0.7),
    Case("effective rank of 32 independent units (bias C^2 / 2N stated)",
         lambda g: read_effective_rank(normal(g, 1000, 32), ""), 32.0, 0.6, None),
    Case("participation ratio of noisy copies",
         lambda g: read_participation_ratio(copies(g, 1000, noise=SNR), ""), RATIO / 32, 0.003),
    Case("R^2 of noisy copies", lambda g: read_redundancy(copies(g, 1000, noise=SNR), ""),
         1 - (1 - NOISY) * (1 + 7 * NOISY) / (1 + 6 * NOISY), 0.003, 0.7),
    Case("entropy of a normal unit", lambda g: read_unit_entropy(normal(g, 1000, 4), ""),
         _normal_entropy(), 0.01, 0.7),
    Case("CKA of x and x + noise", _cka_of, 16 / math.sqrt(16 * 64), 0.01, 0.8),
    Case("branch of a quarter of the stream's variance",
         lambda g: read_branch_ratio(0.5 * normal(g, 1000, 8), normal(g, 1000, 8), ""),
         0.25, 0.003),
]  # fmt: skip

GRADIENTS = [
    Case("gradient noise scale: 50 entries of noise 1 and slope 0.2",
         lambda g: read_noise_scale(_gradient(g), 8), 25.0, 1.0, 0.8),
    Case("signal to noise of the same", lambda g: read_gradient_snr(_gradient(g), ""),
         0.04 * 8 * 32, 0.8, 0.8),
    Case("Adam gain of a certain slope with noise",
         lambda g: read_adam_gain(_gradient(g, 64), "", rate=0.01),
         50 * 0.01 * 0.04 / math.sqrt(0.04 + 1 / 8), 0.003, 0.8),
    Case("slope of 20 losses that fall by 0.01 a point, scatter 0.1",
         lambda g: read_plateau_slope((0.1 * normal(g, 20) - 0.01 * torch.arange(20)).tolist()),
         -0.01, 0.003),
    Case("generalisation gap of 0.3, 16 batches of losses each", _gap, 0.3, 0.05),
]  # fmt: skip

CASES = {
    "total_correlation": TOTAL,
    "usable_information": INFORMATION,
    "neighbour_information": NEIGHBOURS,
    "units and layers": UNITS,
    "gradients and training": GRADIENTS,
}


@dataclass(frozen=True)
class Outcome:
    """A case over seeds: mean less truth, spread, mean stated error, shares within 1 and 2 errors.

    Shares are NaN where a reading had no error.
    """

    bias: float
    spread: float
    error: float
    within_one: float
    within_two: float


def outcome(case: Case, seeds: int) -> Outcome:
    """Run a case on as many seeds."""
    readings = [case.read(torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    values = torch.tensor([r.value for r in readings], dtype=torch.float64)
    errors = torch.tensor(
        [math.nan if r.error is None else r.error for r in readings], dtype=torch.float64
    )
    away = (values - case.truth).abs()
    shares = [
        float((away <= n * errors).double().mean()) if not bool(errors.isnan().any()) else math.nan
        for n in (1, 2)
    ]
    bias = float(values.mean()) - case.truth
    return Outcome(bias, float(values.std()), float(errors.mean()), *shares)
