"""Events as trackers take them: numbers over steps, settings, sentences."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from neuroexapt.errors import SettingsError
from neuroexapt.record.story import Event, mapping, mappings
from neuroexapt.record.wording import number, text

_EPOCH = (
    "holdout_loss", "holdout_error", "holdout_accuracy", "parameters", "flops", "memory_bytes"
)  # fmt: skip
_END = ("seconds", "overhead_seconds")


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event by name; those of a survey are called ``signal/place``.

    Example:
        >>> scalars({"event": "epoch", "holdout_loss": 0.5, "holdout_accuracy": None})
        {'holdout_loss': 0.5}
        >>> reading = {"signal": "effective_rank", "at": "0.out", "value": 3.5}
        >>> scalars({"event": "survey", "readings": [reading]})
        {'effective_rank/0.out': 3.5}
    """
    kind = event.get("event")
    if kind == "survey":
        found: dict[str, object] = {
            f"{text(reading.get('signal'))}/{text(reading.get('at'), '(model)')}": reading["value"]
            for reading in mappings(event.get("readings"))
            if "value" in reading
        }
    elif kind in ("proposal", "verdict"):
        name = "predicted" if kind == "proposal" else "realised"
        found = {f"{name}_loss": mapping(event.get(name)).get("loss")}
    else:
        names = {"epoch": _EPOCH, "end": _END}.get(str(kind), ())
        found = {name: event.get(name) for name in names}
    known = {name: number(value) for name, value in found.items()}
    return {name: value for name, value in known.items() if value is not None}


def sentence(event: Event) -> str:
    """What a decision says, in a sentence; empty for any other event.

    Example:
        >>> sentence({"event": "verdict", "id": 2, "verdict": "rolled_back", "why": "it rose"})
        '#2 rolled back: it rose'
    """
    name = f"#{text(event.get('id'), '?')}"
    if event.get("event") == "proposal":
        kind, at = text(event.get("kind"), "Mutation"), text(event.get("at"), "the model")
        return f"{name} {kind} at {at}: {text(event.get('reason'), 'no reason recorded')}"
    if event.get("event") == "verdict":
        verdict = text(event.get("verdict"), "no verdict").replace("_", " ")
        return f"{name} {verdict}: {text(event.get('why'), 'no reason recorded')}"
    return ""


def settings(event: Event) -> dict[str, str]:
    """Run, environment, settings and budget of a ``start``, flat; empty for any other event.

    Example:
        >>> settings({"event": "start", "run": "Net", "budget": {"params": 5, "flops": None}})
        {'run': 'Net', 'budget.params': '5'}
    """
    if event.get("event") != "start":
        return {}
    found = {"run": event.get("run")}
    for group in ("environment", "settings", "budget"):
        found |= {f"{group}.{name}": value for name, value in mapping(event.get(group)).items()}
    return {name: text(value) for name, value in found.items() if value is not None}


def step_of(event: Event, last: int) -> int:
    """The optimizer step of an event, or the last one known."""
    found = number(event.get("step"))
    return last if found is None else int(found)


def needed(module: str, extra: str) -> Any:
    """A module of an optional package.

    Raises:
        SettingsError: it is not installed.

    Example:
        >>> needed("json", "json").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            extra,
            seen=str(error),
            needed=f"the package of the extra {extra!r}",
            next_step=f"pip install 'neuroexapt[{extra}]'",
        ) from error


def prefixed(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The same under longer names.

    Example:
        >>> prefixed({"a": 1}, "run/")
        {'run/a': 1}
    """
    return {f"{prefix}{name}": value for name, value in values.items()}
