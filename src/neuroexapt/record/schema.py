"""What each kind of event must hold: the journal's table, in a form that can be checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NUMBER, _WHOLE, _TEXT, _LIST, _OBJECT = (int, float), (int,), (str,), (list,), (dict,)
_NONE = (type(None),)

# Fields that the library always writes; events by hand may leave some out, which is told.
FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "start": {
        "run": _TEXT,
        "model": _OBJECT,
        "budget": _OBJECT,
        "settings": _OBJECT,
        "environment": _OBJECT,
    },
    "epoch": {
        "epoch": _WHOLE,
        "step": _WHOLE,
        "holdout_loss": (*_NUMBER, *_NONE),
        "holdout_error": (*_NUMBER, *_NONE),
        "holdout_accuracy": (*_NUMBER, *_NONE),
        "parameters": _WHOLE,
        "flops": _WHOLE,
        "memory_bytes": _WHOLE,
    },
    "survey": {"epoch": _WHOLE, "step": _WHOLE, "readings": _LIST},
    "plan": {"epoch": _WHOLE, "step": _WHOLE, "calls": _LIST},
    "proposal": {
        "id": _WHOLE,
        "epoch": _WHOLE,
        "step": _WHOLE,
        "kind": _TEXT,
        "at": _TEXT,
        "edit": _OBJECT,
        "reason": _TEXT,
        "predicted": _OBJECT,
        "readings": _LIST,
        "runner_up": (*_TEXT, *_NONE),
    },
    "applied": {
        "id": _WHOLE,
        "parameters_before": _WHOLE,
        "parameters_after": _WHOLE,
        "max_difference": (*_NUMBER, *_NONE),
        "seconds": _NUMBER,
    },
    "verdict": {
        "id": _WHOLE,
        "epoch": _WHOLE,
        "step": _WHOLE,
        "verdict": _TEXT,
        "why": _TEXT,
        "realised": (*_OBJECT, *_NONE),
    },
    "resume": {"back_to": _WHOLE},
    "end": {
        "epoch": _WHOLE,
        "step": _WHOLE,
        "model": _OBJECT,
        "seconds": _NUMBER,
        "overhead_seconds": _NUMBER,
    },
}


def problems(events: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is not as the table says, a sentence each; kinds it does not know are left alone.

    Example:
        >>> list(problems([{"event": "resume", "seq": 4, "back_to": "2"}]))
        ["event 4 (resume): back_to is '2', needed int"]
    """
    last = -1
    for event in events:
        place = f"event {event.get('seq')} ({event.get('event')})"
        seq = event.get("seq")
        if type(seq) is int:
            if seq <= last:
                yield f"{place}: numbered {seq} behind {last}"
            last = seq
        for name, kinds in FIELDS.get(str(event.get("event")), {}).items():
            if name not in event:
                yield f"{place}: no {name}"
            elif type(event[name]) not in kinds:
                needed = " or ".join(kind.__name__ for kind in kinds)
                yield f"{place}: {name} is {event[name]!r:.60}, needed {needed}"
