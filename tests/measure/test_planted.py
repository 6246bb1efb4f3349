"""Signals on data with a known answer: the stated bias, and error bars that can be believed.

`make nightly` takes 100 seeds a case, as the figures in docs/signals.md do; here a few of each.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from benchmarks.signals.planted import CASES, Case, outcome

from neuroexapt.errors import MeasureError
from neuroexapt.measure import (
    as_target,
    information_drop,
    label_information,
    linear_cka,
    neighbour_information,
    noise_scale,
    read_neighbour_information,
    read_noise_scale,
    read_total_correlation,
    shared_information,
    stuck_units,
    total_correlation,
    unit_entropy,
    usable_information,
)

SEEDS = int(os.environ.get("NEUROEXAPT_SEEDS", "12"))
ALL = [case for cases in CASES.values() for case in cases]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_bias_and_error_bars_are_as_stated(case: Case) -> None:
    """The mean over seeds lies within the bias, the truth within two errors as often as said."""
    found = outcome(case, SEEDS)
    sampling = 2 * found.spread / math.sqrt(SEEDS)
    assert abs(found.bias) <= case.bias + sampling, found
    if case.covered is None:
        return
    assert found.within_two >= case.covered - 1 / math.sqrt(SEEDS), found
    # Nor are they so wide that they say nothing.
    assert found.error <= 3 * math.hypot(found.spread, found.bias), found


@pytest.mark.parametrize(("resolution", "expected"), [(0.25, 3.79), (0.5, 2.79), (1.0, 2.075)])
def test_entropy_of_a_uniform_unit_is_the_log_of_its_steps(
    resolution: float, expected: float
) -> None:
    """sqrt(12) standard deviations wide: log2(sqrt(12) / resolution) bits, ends apart."""
    uniform = torch.linspace(0, 1, 20_000, dtype=torch.float64)[:, None]
    found = float(unit_entropy(uniform, resolution=resolution)[0])
    assert found == pytest.approx(expected, abs=0.1)


def test_entropy_of_a_discrete_unit_is_that_of_its_values() -> None:
    """Two values of a quarter and three quarters: 0.811 bits; a ReLU's zeros are one value."""
    values = torch.tensor([0.0, 7.0, 7.0, 7.0]).repeat(5000)
    gated = normal(20_000).relu()
    bits = unit_entropy(torch.stack([values, gated], 1))
    assert float(bits[0]) == pytest.approx(0.811278, abs=1e-3)
    # Half of the rows are one value; the other half a half-normal one, at the unit's resolution.
    step = 0.25 * float(gated.std(correction=0))
    half = 0.5 * math.log2(math.pi * math.e / 2) - math.log2(step)
    assert float(bits[1]) == pytest.approx(1 + 0.5 * half, abs=0.15)


def test_stuck_units_are_those_at_an_end() -> None:
    """A saturated tanh, either end; a ReLU that opens in 1 row of 100; no constant, no normal."""
    x = normal(2000)
    rare = torch.where(torch.arange(2000) % 100 == 0, x.abs() + 1, 0.0)
    units = torch.stack([x, (100 * x).tanh(), rare, torch.ones(2000), x.tanh(), -rare], 1)
    assert stuck_units(units) == (1, 2, 5)


def test_total_correlation_ignores_monotone_maps() -> None:
    """Exponentials, cubes, scales and signs of units change nothing at all."""
    mixed = normal(500, 1) + normal(500, 4, seed=1)
    moved = torch.stack(
        [mixed[:, 0].exp(), mixed[:, 1] ** 3, -30 * mixed[:, 2], 0.01 * mixed[:, 3] + 5], 1
    )
    assert total_correlation(moved) == pytest.approx(total_correlation(mixed), abs=1e-9)


def test_shared_information_of_blocks_is_the_gaussian_one() -> None:
    """Three pairs of correlation 0.8: three times -1/2 log2(1 - 0.64); a third block adds none."""
    x = normal(4000, 3)
    y = 0.8 * x + 0.6 * normal(4000, 3, seed=1)
    assert shared_information(x, y) == pytest.approx(-1.5 * math.log2(0.36), abs=0.1)
    assert shared_information(x, normal(4000, 3, seed=2)) == pytest.approx(0.0, abs=0.02)


def test_dead_units_take_no_part_in_the_total_correlation() -> None:
    """Constants, and units that are all zeros but one row, break nothing."""
    units = torch.cat([normal(400, 3), torch.zeros(400, 3, dtype=torch.float64)], 1)
    units[7, 4] = 1.0
    assert total_correlation(units) == pytest.approx(total_correlation(units[:, :3]), abs=0.2)
    assert read_total_correlation(torch.zeros(64, 3), "x").value == 0.0


def test_a_hidden_layer_sees_what_a_linear_probe_cannot() -> None:
    """The parity of two signs: nothing for a line, one bit for a hidden layer."""
    sign = normal(1000, 2).sign()
    features = sign + 0.1 * normal(1000, 2, seed=1)
    labels = (sign.prod(1) > 0).long()
    linear = usable_information(features, labels)
    hidden = usable_information(features, labels, probe="hidden")
    assert linear.bits < 0.02
    assert 0.95 < hidden.bits <= hidden.entropy < 1.01


def test_information_of_marks_adds_up_over_marks() -> None:
    """Two independent yes-no targets, each flipped in a quarter of the rows: twice the channel."""
    sent = (normal(2000, 2) > 0).double()
    flipped = torch.rand(2000, 2, generator=torch.Generator().manual_seed(3)) < 0.25
    found = usable_information(sent, (sent - flipped.double()).abs())
    assert found.bits == pytest.approx(2 * 0.18872, abs=3 * found.error)


def test_rows_of_one_sample_are_never_on_both_sides() -> None:
    """A feature that names the sample, labels by sample: nothing can be learnt that generalises."""
    group = torch.arange(40).repeat_interleave(20)
    labels = torch.randint(2, (40,), generator=torch.Generator().manual_seed(0))[group]
    named = torch.nn.functional.one_hot(group, 40).double()
    apart = usable_information(named, labels, groups_N=group)
    leaking = usable_information(named, labels)
    assert apart.bits < 0.1
    assert leaking.bits > 0.5  # without groups this test would see it
    assert (apart.samples, leaking.samples) == (40, 800)


def test_information_is_the_same_every_time_and_draws_no_random_numbers() -> None:
    """Same input, same bits; the global generator is untouched."""
    x, y = normal(300, 5), (normal(300, seed=1) > 0).long()
    before = torch.get_rng_state()
    first, second = (usable_information(x, y, probe="hidden").bits for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


def test_the_drop_is_paired() -> None:
    """Through a noisy copy less is known; the paired error is below that of independent ones."""
    y = (normal(2000) > 0).long()
    clear = normal(2000, 1, seed=1) + 2 * y[:, None]
    blurred = clear + normal(2000, 1, seed=2)
    one, two = usable_information(clear, y), usable_information(blurred, y)
    drop, error = information_drop(one, two)
    assert drop == pytest.approx(one.bits - two.bits)
    assert 0 < error < math.hypot(one.error, two.error)
    assert drop > 4 * error


def test_ignored_and_rare_classes() -> None:
    """Negative labels take no part; beyond 256 classes the rarest are one."""
    labels = torch.cat([torch.arange(300), torch.arange(255), torch.tensor([-100, -1])])
    target, rows = as_target(labels)
    assert (target.outputs, len(rows)) == (256, 555)
    assert target.values[:255].tolist() == list(range(255))
    assert target.values[255:300].tolist() == [255] * 45


def test_cka_of_unrelated_sides_is_zero_where_the_plain_one_is_not() -> None:
    """200 rows of 100 unrelated units: the biased estimate says a third, the unbiased nothing."""
    x, y = normal(200, 100), normal(200, 100, seed=1)
    x_c, y_c = x - x.mean(0), y - y.mean(0)
    plain = (x_c.T @ y_c).square().sum() / ((x_c.T @ x_c).norm() * (y_c.T @ y_c).norm())
    assert plain > 0.3
    assert abs(linear_cka(x, y)) < 0.03


def test_cka_equals_its_definition_by_kernels() -> None:
    """The estimate from sums equals Song's formula on N by N kernels without their diagonals."""
    x, y = normal(20, 3), normal(20, 2, seed=1)

    def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
        k, q, n = a @ a.T, b @ b.T, len(a)
        k, q = k - k.diag().diag(), q - q.diag().diag()
        total = (k @ q).trace() + k.sum() * q.sum() / ((n - 1) * (n - 2))
        return float(total - 2 / (n - 2) * (k @ q).sum()) / (n * (n - 3))

    expected = hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    assert linear_cka(x, y) == pytest.approx(expected)


def test_the_noise_scale_does_not_depend_on_the_micro_batch() -> None:
    """The same samples in micro-batches of 4 and of 16 give the same batch size."""
    samples = 0.3 + normal(8192, 20)
    small, large = (read_noise_scale(samples.reshape(-1, n, 20).mean(1), n) for n in (4, 16))
    assert small.value == pytest.approx(1 / 0.09, rel=0.1)
    assert large.value == pytest.approx(small.value, rel=0.1)
    assert (small.samples, large.samples) == (8192, 8192)


def test_without_a_gradient_the_noise_scale_is_infinite_and_without_error() -> None:
    """Where nothing can be told from noise no number is made up."""
    noise = normal(8, 50)
    balanced = torch.cat([noise, -noise])
    assert noise_scale(balanced, 4) == math.inf
    assert read_noise_scale(balanced, 4).error is None


REFUSED = {
    "five dimensions": lambda: neighbour_information(normal(99, 3), normal(99, 2)),
    "five dimensions and labels": lambda: label_information(normal(99, 5), torch.arange(99)),
    "real labels": lambda: label_information(normal(99, 1), normal(99)),
    "other rows": lambda: neighbour_information(normal(99, 1), normal(98, 1)),
    "too many rows": lambda: read_neighbour_information(normal(5000, 1), normal(5000, 1), "x"),
    "no neighbour": lambda: neighbour_information(normal(9, 1), normal(9, 1), neighbours=0),
    "4 rows a unit": lambda: total_correlation(normal(40, 10)),
    "no shrinkage": lambda: total_correlation(normal(40, 2), shrinkage=0.0),
    "few rows": lambda: usable_information(normal(40, 2), torch.arange(40)),
    "few samples": lambda: usable_information(
        normal(99, 2), torch.arange(99), groups_N=torch.arange(99) // 20
    ),
    "targets of other rows": lambda: usable_information(normal(99, 2), torch.arange(98)),
    "no label left": lambda: usable_information(normal(99, 2), -torch.ones(99).long()),
    "an image as target": lambda: usable_information(normal(99, 2), normal(99, 3, 3)),
    "drop over other rows": lambda: information_drop(
        usable_information(normal(99, 2), normal(99)), usable_information(normal(98, 2), normal(98))
    ),
    "CKA of a constant": lambda: linear_cka(torch.ones(9, 2), normal(9, 2)),
    "CKA of other rows": lambda: linear_cka(normal(9, 2), normal(8, 2)),
    "noise at batch size 0": lambda: noise_scale(normal(9, 2), 0),
    "entropy at no resolution": lambda: unit_entropy(normal(9, 2), resolution=0.0),
    "stuck at half of the range": lambda: stuck_units(normal(9, 2), within=0.5),
}


@pytest.mark.parametrize("ask", REFUSED.values(), ids=REFUSED.keys())
def test_what_an_estimator_cannot_do_it_refuses(ask: object) -> None:
    """With what was seen, what is needed, and what to do."""
    assert callable(ask)
    with pytest.raises(MeasureError, match=r"got .+; needed .+ Next step: .+"):
        ask()
