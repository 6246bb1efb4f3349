"""What a layer says about the target, in bits: held-out probes, and the drop between layers.

Usable information (V-information): the entropy of the target, as far as it can be known without
the layer, less the cross-entropy of a small probe that reads the layer, both on rows that the fit
did not see. Finite, comparable between layers, never above what the network behind could use with
a readout of that kind. For `plan`: a drop from one layer to the next marks a squeeze (`Widen`);
layers over which nothing changes are worth asking `ablation` about (`RemoveLayer`); information
that only the head gains means that the body is weak.

Shapes in names: N rows, C features, K outputs of the probe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Reading, finite_matrix
from neuroexapt.measure.probe import Kind, Target, fit, log_likelihood, marginal

FOLDS = 4
CLASSES = 256
_ROWS = 64


@dataclass(frozen=True, eq=False)
class Information:
    """What a probe of a layer knows about a target.

    Attributes:
        bits: usable information per row; a lower bound on what the layer holds.
        error: its standard error: sampling, and the bias of a probe fitted on few rows.
        entropy: bits per row of the target without the layer, by the same measure (of numbers
            the differential entropy of a normal distribution; it may be negative).
        samples: independent samples (rows of one sample count once).
        gains_N: each row's part, in the order of the rows.
        groups_N: the sample of each row.
    """

    bits: float
    error: float
    entropy: float
    samples: int
    gains_N: Tensor
    groups_N: Tensor


def as_target(values: Tensor, *, kind: Kind | None = None) -> tuple[Target, Tensor]:
    """Turn a target into what a probe predicts, and say which rows take part.

    Whole numbers (N,) are classes; negative ones (the usual -100) are left out, and beyond the
    256 most frequent classes the rest is one. Whole numbers, booleans or zeros and ones (N, K)
    are marks, other numbers (N,) or (N, K) are numbers; `kind` overrides the guess.

    Raises:
        MeasureError: neither (N,) nor (N, K), values not finite, or no row left.

    Example:
        >>> target, rows = as_target(torch.tensor([3, 7, -100, 3]))
        >>> target.kind, target.outputs, target.values.tolist(), rows.tolist()
        ('labels', 2, [0, 1, 0], [0, 1, 3])
    """
    if values.dim() not in (1, 2) or not len(values):
        _refuse(f"a target of shape {tuple(values.shape)}", "shape (N,) or (N, K), N not 0")
    values = values.detach().cpu()
    kind = kind or _kind(values)
    if kind == "labels":
        rows = torch.nonzero(values >= 0)[:, 0]
        if not len(rows):
            _refuse("a target without a class of 0 or more", "classes", "check the labels")
        classes, counts = values[rows].unique(return_counts=True)
        kept = classes[counts.argsort(descending=True, stable=True)[: CLASSES - 1]].sort().values
        if len(classes) <= CLASSES:
            kept = classes
        place = torch.searchsorted(kept, values[rows].contiguous()).clamp(max=len(kept) - 1)
        place = torch.where(kept[place] == values[rows], place, len(kept))
        return Target("labels", place, int(place.max()) + 1), rows
    matrix = values.reshape(len(values), -1).double()
    if not bool(matrix.isfinite().all()):
        _refuse("NaN or infinite targets", "finite values", "check the target")
    return Target(kind, matrix, matrix.shape[1]), torch.arange(len(values))


def _kind(values: Tensor) -> Kind:
    whole = not values.is_floating_point()
    if whole and values.dim() == 1:
        return "labels"
    if whole or (values.dim() == 2 and bool(((values == 0) | (values == 1)).all())):
        return "marks"
    return "numbers"


def usable_information(
    features_NC: Tensor,
    target: Tensor,
    *,
    kind: Kind | None = None,
    groups_N: Tensor | None = None,
    probe: Literal["linear", "hidden"] = "linear",
    seed: int = 0,
) -> Information:
    """Bits about a target that a probe reads from features, on rows it was not fitted on.

    Cross-fitted: each of 4 parts of the samples is predicted by a probe fitted on the other
    three; the penalty is chosen on a quarter of the first three. The features are turned to their
    first 64 principal directions. The ``"hidden"`` probe starts as the linear one and adds a
    hidden layer of 64 units while that helps on the quarter.

    Invariant: unchanged when a feature is scaled or shifted; same numbers for same inputs, no
    global random state is drawn from.
    Bias: too low, by about (number of the probe's weights) / 2N nats for a target that is not
    nearly certain; with fewer rows than weights (many classes) it may be near 0 whatever is
    there. The error includes the bias: half of what a fit, of any penalty, promises on its own
    rows beyond what it holds on others. Beyond 64 directions, or beyond the probe, it is a lower
    bound only: of the parity of two signs the linear probe finds nothing, the hidden one all.

    Args:
        features_NC: what a layer puts out.
        target: see :func:`as_target`.
        kind: how to read the target.
        groups_N: the sample that each row belongs to; rows of one sample (tokens of a text,
            places of an image) are never on both sides. By default each row by itself.
        probe: ``"linear"``, or ``"hidden"``, which costs some ten times as much.
        seed: of the split.

    Raises:
        MeasureError: fewer than 64 rows or 8 samples, other numbers of rows, values not finite.

    Example:
        >>> x_NC = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
        >>> found = usable_information(x_NC, (x_NC[:, 0] > 0).long())
        >>> 0.9 < found.bits <= found.entropy
        True

    Xu et al. 2020; Ethayarajh, Choi and Swayamdipta 2022 for the parts of single rows.
    """
    aim, rows = as_target(target, kind=kind)
    features_NC = finite_matrix(features_NC, "usable_information", rows=1).cpu()
    groups_N = torch.arange(len(features_NC)) if groups_N is None else groups_N.cpu()
    if not len(features_NC) == len(groups_N) == len(target):
        _refuse(
            f"{len(features_NC)} rows, {len(target)} targets and {len(groups_N)} groups",
            "as many of each",
        )
    features_NC, groups_N = features_NC[rows], groups_N[rows]
    _, group_N = groups_N.unique(return_inverse=True)
    count = int(group_N.max()) + 1
    if len(rows) < _ROWS or count < 2 * FOLDS:
        _refuse(
            f"{len(rows)} rows of {count} samples", f"at least {_ROWS} rows of {2 * FOLDS} samples"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return _cross_fitted(features_NC, aim, group_N, order, probe == "hidden")


def _cross_fitted(
    features_NC: Tensor, target: Target, group_N: Tensor, order: Tensor, hidden: bool
) -> Information:
    rows = len(features_NC)
    gains_N, bare_N = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    optimism, penalty, doubt = 0.0, None, 0.0
    for part in range(FOLDS):
        held_N = (order % FOLDS == part)[group_N]
        # The samples whose place in the order says so choose the penalty.
        inner_N = (order // FOLDS % 4 == 0)[group_N][~held_N]
        if not bool(inner_N.any()) or bool(inner_N.all()):
            inner_N = torch.arange(len(inner_N)) % 4 == 0
        known, seen = target[~held_N], features_NC[~held_N]
        found = fit(seen, known, inner_N, penalty=penalty, hidden=hidden)
        penalty, doubt = found.penalty, max(doubt, found.doubt)
        out_1K, spread_K = marginal(known)
        bare_N[held_N] = _log(target[held_N], out_1K, spread_K)
        full = log_likelihood(target[held_N], found.outputs(features_NC[held_N]), found.spread_K)
        gains_N[held_N] = full - bare_N[held_N]
        own = log_likelihood(known, found.outputs(seen), found.spread_K)
        promised = float((own - _log(known, out_1K, spread_K)).mean())
        optimism += (promised - float(gains_N[held_N].mean())) / FOLDS
    bits, sampling = _mean(gains_N, group_N)
    error = math.hypot(sampling, max(optimism / 2, doubt))
    nats = math.log(2)
    return Information(
        bits / nats,
        error / nats,
        -float(bare_N.mean()) / nats,
        int(group_N.max()) + 1,
        gains_N / nats,
        group_N,
    )


def _log(target: Target, out_1K: Tensor, spread_K: Tensor) -> Tensor:
    return log_likelihood(target, out_1K.expand(len(target.values), -1), spread_K)


def _mean(parts_N: Tensor, group_N: Tensor) -> tuple[float, float]:
    """Mean over rows, and its standard error, samples being independent and their rows not."""
    mean = parts_N.mean()
    sums = parts_N.new_zeros(int(group_N.max()) + 1).index_add(0, group_N, parts_N - mean)
    count = len(sums)
    return float(mean), float((count / (count - 1) * sums.square().sum()).sqrt()) / len(parts_N)


def information_drop(before: Information, behind: Information) -> tuple[float, float]:
    """Bits that a later layer's probe knows less than an earlier one's, and the error of that.

    Paired: both are asked about the same rows, so what makes a row hard for both drops out.
    Negative where the layers between make the target easier to read. The two probes' biases are
    taken to be of one sign.

    Raises:
        MeasureError: the two were measured on other rows.

    Example:
        >>> x_NC = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> y_N = (x_NC.sum(1) > 0).long()
        >>> whole, half = usable_information(x_NC, y_N), usable_information(x_NC[:, :1], y_N)
        >>> drop, error = information_drop(whole, half)
        >>> drop > 10 * error > 0
        True
    """
    if not torch.equal(before.groups_N, behind.groups_N):
        raise MeasureError(
            "information_drop",
            seen=f"{len(before.gains_N)} rows beside {len(behind.gains_N)} of other samples",
            needed="the same rows of both layers",
            next_step="collect both in one pass",
        )
    drop, sampling = _mean(before.gains_N - behind.gains_N, before.groups_N)
    own = [
        max(0.0, one.error**2 - (_mean(one.gains_N, one.groups_N)[1]) ** 2) ** 0.5
        for one in (before, behind)
    ]
    return drop, math.hypot(sampling, own[0] - own[1])


def read_usable_information(
    features_NC: Tensor,
    target: Tensor,
    at: str,
    *,
    groups_N: Tensor | None = None,
    probe: Literal["linear", "hidden"] = "linear",
) -> Reading:
    """`usable_information` as a reading.

    Example:
        >>> read_usable_information(torch.randn(64, 2), torch.arange(64) % 2, "fc1").unit
        'bits'
    """
    found = usable_information(features_NC, target, groups_N=groups_N, probe=probe)
    return Reading("usable_information", at, found.bits, "bits", found.error, found.samples)


def _refuse(seen: str, needed: str, next_step: str = "collect more rows of both") -> None:
    raise MeasureError("usable_information", seen=seen, needed=needed, next_step=next_step)
