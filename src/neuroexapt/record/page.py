"""The pieces a report page is built from. Cells are HTML already; names and texts are escaped here.

A ``Html`` value is safe to place on the page; a plain ``str`` is text and is escaped. The type
makes the difference, so that a name from a journal cannot become markup by accident.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from neuroexapt.record.wording import escape

SCRIPTS = ("echarts/echarts.common.min.js", "charts.js", "drawing.js", "page.js")


class Html(str):
    """Markup that is already safe."""

    __slots__ = ()


Cell = str | Html


@dataclass(frozen=True, kw_only=True)
class Row:
    """One table row; the first cell names it. ``kind`` is a class of the style sheet."""

    cells: Sequence[Cell]
    kind: str = ""


def safe(cell: Cell) -> str:
    """The cell as markup.

    Example:
        >>> safe("<i>"), safe(Html("<i>x</i>"))
        ('&lt;i&gt;', '<i>x</i>')
    """
    return cell if isinstance(cell, Html) else escape(cell)


def table(label: str, heads: Sequence[str], rows: Iterable[Row], *, texts: int = 1) -> Html:
    """A table in a container of its own that scrolls sideways when the screen is narrow.

    Args:
        label: what the table holds, for those who hear the page.
        heads: the column names.
        rows: as many cells each as there are heads.
        texts: how many columns from the left hold text; the others hold numbers.

    Example:
        >>> "<td class=" in table("Effect", ["", "real"], [Row(cells=["loss", "1"])])
        True
    """
    kinds = ["" if column < texts else ' class="num"' for column in range(len(heads))]
    top = "".join(f'<th scope="col"{k}>{escape(h)}</th>' for h, k in zip(heads, kinds, strict=True))
    body = "".join(_row(row, kinds) for row in rows)
    return scroll(label, f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>")


def scroll(label: str, inner: str) -> Html:
    """A region that scrolls sideways, also by keyboard, and keeps the page from overflowing."""
    name = f'role="region" aria-label="{escape(label)}" tabindex="0"'
    return Html(f'<div class="scroll" {name}>{inner}</div>')


def facts(pairs: Iterable[tuple[str, Cell]]) -> Html:
    """A list of names with their values.

    Example:
        >>> facts([("device", "cpu")])
        '<dl class="facts"><dt>device</dt><dd>cpu</dd></dl>'
    """
    items = "".join(f"<dt>{escape(name)}</dt><dd>{safe(value)}</dd>" for name, value in pairs)
    return Html(f'<dl class="facts">{items}</dl>') if items else Html("")


def section(title: str, *parts: Cell) -> Html:
    """A titled part of the page."""
    return Html(f"<section><h2>{escape(title)}</h2>{''.join(map(safe, parts))}</section>")


def note(sentence: str) -> Html:
    """A quiet remark, for example that something was not measured."""
    return Html(f'<p class="soft">{escape(sentence)}</p>')


@functools.cache
def asset(name: str) -> str:
    """A file of the package's ``assets`` folder as text.

    Example:
        >>> asset("report.css").startswith("/*")
        True
    """
    return (resources.files("neuroexapt.record") / "assets" / name).read_text("utf-8")


def document(title: str, head: Html, body: Html, data: str | None = None) -> str:
    """The whole page.

    Its policy lets the browser load nothing, and run nothing but our own scripts, which it
    knows by their hashes: no text of a journal can become code, whatever it is.

    Args:
        title: of the window.
        head: what stands above.
        body: everything else.
        data: JSON for the scripts, without ``<``; without it the page has no script at all.
    """
    scripts = [] if data is None else [asset(name) for name in SCRIPTS]
    allowed = " ".join(f"'sha256-{_hash(script)}'" for script in scripts) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"
    policy += "; base-uri 'none'; form-action 'none'"
    code = "".join(f"<script>{script}</script>\n" for script in scripts)
    if data is not None:
        code = f'<script type="application/json" id="data">{data}</script>\n{code}'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{asset('report.css')}</style></head>\n"
        f"<body><header>{head}</header>\n<main>{body}</main>\n"
        "<footer><p>Written by neuroexapt from the journal of this run. A value that the journal "
        f"does not hold is shown as not measured.</p></footer>\n{code}</body></html>\n"
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _row(row: Row, kinds: Sequence[str]) -> str:
    first, *rest = row.cells
    cells = "".join(f"<td{k}>{safe(c)}</td>" for c, k in zip(rest, kinds[1:], strict=True))
    kind = f' class="{escape(row.kind)}"' if row.kind else ""
    return f'<tr{kind}><th scope="row">{safe(first)}</th>{cells}</tr>'
