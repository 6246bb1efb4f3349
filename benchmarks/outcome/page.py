"""The page of results."""

from __future__ import annotations

from pathlib import Path


def page(results: Path) -> str:
    """Markdown."""
    return results.read_text()
