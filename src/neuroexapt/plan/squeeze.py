"""Several widths at once: the units that are least worth what they cost, wherever they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from neuroexapt.plan.survey import WidthSurvey

SHARES = (0.1, 0.2, 0.35, 0.5)
_LEAST_SHARE = 2  # no width loses more than half of its units in one go
_ROUND = 8  # large widths stay multiples of this, which hardware likes


def squeezed(
    widths: Sequence[WidthSurvey], costs: Mapping[str, float], share: float
) -> dict[str, int]:
    """New sizes of widths, so that units which hold a share of the cost are gone.

    Units go in the order of their expected removal loss over their cost, as in DepGraph's global
    pruning, but with the loss in nats; no width loses more than half at a time.

    Args:
        widths: what each unit of each width is worth.
        costs: by width, what one unit of it costs (any unit that is the same for all).
        share: of the cost of all units, in (0, 1).

    Returns:
        Sizes of the widths that change.

    Example:
        >>> wide = WidthSurvey("wide", 8, tuple([0.0] * 8), tuple([0.0] * 8), (), ())
        >>> busy = WidthSurvey("busy", 8, tuple([1.0] * 8), tuple([0.0] * 8), (), ())
        >>> squeezed([wide, busy], {"wide": 1.0, "busy": 1.0}, 0.25)
        {'wide': 4}
    """
    target = share * sum(costs[width.name] * width.size for width in widths)
    sizes = {width.name: width.size for width in widths}
    least = {width.name: max(width.least, -(-width.size // _LEAST_SHARE)) for width in widths}
    for _, name in sorted(_units(widths, costs)):
        if target <= 0:
            break
        if sizes[name] > least[name]:
            sizes[name] -= 1
            target -= costs[name]
    by_name = {width.name: width for width in widths}
    rounded = {name: _rounded(by_name[name], size) for name, size in sizes.items()}
    return {name: size for name, size in rounded.items() if size < by_name[name].size}


def _units(
    widths: Sequence[WidthSurvey], costs: Mapping[str, float]
) -> Iterator[tuple[float, str]]:
    for width in widths:
        if costs[width.name] > 0:
            for value in sorted(width.removal):
                yield value / costs[width.name], width.name


def _rounded(width: WidthSurvey, size: int) -> int:
    unit = width.unit if width.size < 4 * _ROUND or width.unit > 1 else _ROUND
    return min(width.size, -(-size // unit) * unit)
