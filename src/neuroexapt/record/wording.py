"""Values as text. A missing value is said to be missing, never replaced.

Functions take ``object`` because events come from a file: a value of another type than the schema
promises counts as missing where a number is needed. All results are plain text; ``escape`` makes
them safe for HTML.
"""

from __future__ import annotations

import html
import json
import math

MISSING = "not measured"
_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def escape(value: object) -> str:
    """Text that a browser shows and never interprets, also inside quoted attributes.

    Example:
        >>> escape("<b>")
        '&lt;b&gt;'
    """
    return html.escape(str(value), quote=True)


def number(value: object) -> float | None:
    """The finite number, or ``None`` for anything else (booleans, NaN and text included).

    Example:
        >>> number(3), number(float("nan")), number("3")
        (3.0, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def text(value: object, missing: str = MISSING) -> str:
    """The value in words; lists and mappings as JSON.

    Example:
        >>> text(None), text(True), text({"by": 4})
        ('not measured', 'true', '{"by": 4}')
    """
    if value is None or value == "":
        return missing
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def count(value: object, missing: str = MISSING) -> str:
    """A whole number with thousands marked.

    Example:
        >>> count(1234567)
        '1,234,567'
    """
    found = number(value)
    return missing if found is None else f"{found:,.0f}"


def figure(value: object, digits: int = 4) -> str:
    """A measured number with ``digits`` significant digits; whole numbers stay whole.

    Example:
        >>> figure(0.123456), figure(25600), figure(None)
        ('0.1235', '25,600', 'not measured')
    """
    found = number(value)
    if found is None:
        return MISSING
    if found == int(found) and abs(found) < 1e15:
        return f"{found:,.0f}"
    return f"{found:,.{digits}g}" if abs(found) < 10**digits else f"{found:,.0f}"


def with_error(value: object, error: object) -> str:
    """A number and its standard error, where that is known.

    Example:
        >>> with_error(0.51234, 0.01), with_error(0.51234, None)
        ('0.5123 ± 0.01', '0.5123')
    """
    if number(value) is None or number(error) is None:
        return figure(value)
    return f"{figure(value)} ± {figure(error, 2)}"


def change(value: object) -> str:
    """A difference with its sign.

    Example:
        >>> change(1200), change(-0.0213)
        ('+1,200', '-0.0213')
    """
    found = number(value)
    if found is None:
        return MISSING
    return f"+{figure(found)}" if found > 0 else figure(found)


def share(before: object, after: object) -> str | None:
    """The relative change in percent, or ``None`` where it is not defined.

    Example:
        >>> share(200, 250), share(0, 5)
        ('+25.0%', None)
    """
    old, new = number(before), number(after)
    if old is None or new is None or old == 0:
        return None
    return f"{100 * (new - old) / abs(old):+.1f}%"


def percent(value: object) -> str:
    """A fraction from 0 to 1 in percent; a number outside is shown as it is.

    Example:
        >>> percent(0.9712), percent(97)
        ('97.12%', '97')
    """
    found = number(value)
    if found is None or not 0 <= found <= 1:
        return figure(value)
    return f"{100 * found:.2f}%"


def short(value: float) -> str:
    """A number for a chart axis: at most four digits and a decimal prefix.

    Example:
        >>> short(12500), short(0.25), short(3e9)
        ('12.5k', '0.25', '3G')
    """
    for size, prefix in _STEPS:
        if abs(value) >= size:
            return f"{value / size:.4g}{prefix}"
    return f"{value:.4g}"


def short_percent(value: float) -> str:
    """A fraction for a chart axis, in percent.

    Example:
        >>> short_percent(0.955)
        '95.5%'
    """
    return f"{100 * value:.4g}%"


def size(value: object) -> str:
    """Bytes in binary units.

    Example:
        >>> size(1536), size(0)
        ('1.5 KiB', '0 B')
    """
    found = number(value)
    if found is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(found) < 1024:
            return f"{found:.4g} {unit}"
        found /= 1024
    return f"{found:.4g} TiB"


def duration(value: object) -> str:
    """Seconds as a time that is easy to read.

    Example:
        >>> duration(0.0042), duration(75), duration(7260)
        ('4.2 ms', '1 min 15 s', '2 h 01 min')
    """
    found = number(value)
    if found is None:
        return MISSING
    if abs(found) < 1:
        return f"{1000 * found:.3g} ms"
    if found < 60:
        return f"{found:.3g} s"
    minutes, seconds = divmod(round(found), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
