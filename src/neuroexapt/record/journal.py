"""The journal: what changed, when, why, what was predicted and what happened.

A journal is a file of JSON Lines: one event a line, in the order of writing. It answers for a
run after the process is gone, and feeds the report. One process writes it (rank 0).

Every event carries ``schema`` (the version of this table), ``seq`` (0, 1, 2, ... without gaps over
all processes that appended), ``event`` (its kind) and ``time`` (Unix seconds). The kinds:

============  ==================================================================================
kind          fields
============  ==================================================================================
start         run, model {class, parameters, flops, layers: [{name, type, shape, parameters}],
              flow: [{name, type, from: [names]}]},
              budget {params, flops, memory} (null: no limit), settings {...},
              environment {python, torch, platform, device, neuroexapt},
              plan {state, settings, limits}: what a replay begins with
epoch         epoch, step, holdout_loss, holdout_error (standard error of the loss),
              holdout_accuracy (0 to 1, or null), parameters, flops, memory_bytes
              (tensors of model and optimizer), memory_in_use {resident, resident_peak,
              accelerator, accelerator_peak} (bytes of the process and its accelerator, now and
              at most; null where there is none)
survey        epoch, step, readings [{signal, at, value, unit, error, samples}]
proposal      id, epoch, step, kind ("Widen", ...), at, edit {...}, reason (a sentence),
              predicted {loss (change, nats), parameters (change), flops (change)},
              readings [{signal, at, value, unit, error, samples}], runner_up (or null)
applied       id, parameters_before, parameters_after, max_difference (largest output
              difference the edit made), seconds
verdict       id, epoch, step, verdict ("kept", "rolled_back" or "refused"), why (a sentence),
              realised {loss (change, nats), parameters (change)} or null
baseline      name, points [{epoch, step, holdout_loss, holdout_accuracy}], parameters, flops,
              layers
result        rows [{name, test_accuracy, parameters, flops, seconds, proposed, kept,
              rolled_back}]; the last three are null for a model that does not evolve
plan          epoch, step, calls [{call, given {...}, outcome}]: the decisions of one epoch as
              calls of pure functions
resume        back_to: events from this ``seq`` on, up to here, do not count any more; plan
end           epoch, step, model {class, parameters, flops, layers}, seconds,
              overhead_seconds (the part of seconds spent on measuring and editing)
============  ==================================================================================

An ``applied``, ``verdict``, ``epoch`` or ``end`` before which the architecture changed also has
``layers``: the difference, and ``flow``, whole, if layers came or went.

A value that could not be measured is null. NaN and infinity are written as null too, because JSON
has no such numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from neuroexapt.errors import RecordError
from neuroexapt.record.parts import full_parts, put_aside

SCHEMA = 1
SYNCED = frozenset({"applied", "verdict", "start", "end", "resume"})
_RESERVED = ("schema", "seq", "event", "time")
_DEEPEST = 32


class Journal:
    """Appends events to one file, or keeps them in memory when the path is ``None``.

    Invariant: after any crash the file holds every event whose ``write`` returned, followed by at
    most one torn line. Events in ``SYNCED`` also outlive a power loss, the others only the
    death of the process. Opening an existing journal removes its torn last line and continues
    ``seq``.

    Args:
        path: the file; missing parent folders are made. ``None``: memory only.
        part: bytes after which a file is full: it gets a number (``run.jsonl.000001``) and a new
            one is begun. Readers take all of them together. By default 64 MiB.

    Raises:
        RecordError: the file cannot be opened, is not a journal, or is damaged before its last
            line; the file is then left as it was.

    Example:
        >>> with Journal(None) as journal:
        ...     event = journal.write("verdict", id=3, verdict="kept", why="the loss fell")
        >>> event["seq"], event["event"], event["id"]
        (0, 'verdict', 3)
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, part: int = 2**26) -> None:
        self.path = None if path is None else Path(path)
        self._part = part
        self._events: list[dict[str, Any]] = []
        self._seq = 0
        self._closed = False
        self._file: BinaryIO | None = None
        if self.path is not None:
            self._file, self._seq = _open_for_append(self.path)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events written through this object, oldest first, as they stand in the file."""
        return list(self._events)

    @property
    def seq(self) -> int:
        """The number that the next event will have."""
        return self._seq

    def go_back(self, seq: int, events: list[dict[str, Any]], **fields: object) -> None:
        """Go on from an earlier moment, by an event ``resume`` that says so.

        Nothing is erased: :func:`read_journal` passes over what came between.

        Args:
            seq: the first number that does not count any more.
            events: the events before it, if they are in no file.
            fields: further fields of the event.
        """
        last = events if self.path is None else read_journal(self.path)
        self._events = [event for event in last if event["seq"] < seq]
        if self.path is None:
            self._seq = seq
        self.write("resume", back_to=seq, **fields)

    def write(self, event: str, /, **fields: object) -> dict[str, Any]:
        """Appends one event and returns it as it was written.

        Fields may be JSON values, tuples, mappings with text keys, dataclasses, and scalars with an
        ``item()`` method (numpy, torch). NaN and infinity become null.

        Raises:
            RecordError: a field cannot be written as JSON (the message names it), a field has a
                reserved name, the journal is closed, or the disk refuses. Nothing is appended.

        Example:
            >>> Journal(None).write("epoch", step=4, holdout_loss=float("nan"))["holdout_loss"]
        """
        if self._closed:
            raise self._refusal("a write after close()", "an open journal", "open it again")
        for name in _RESERVED:
            if name in fields:
                needed = "a name other than " + ", ".join(_RESERVED)
                raise self._refusal(f"the field {name!r}", needed, f"rename {name!r}")
        head = {"schema": SCHEMA, "seq": self._seq, "event": event, "time": time.time()}
        entry: dict[str, Any] = dict(head)
        entry.update((name, _plain(value, name)) for name, value in fields.items())
        if self._file is not None:
            self._turn_over()
            self._append(_line(entry), sync=event in SYNCED)
        self._seq += 1
        self._events.append(entry)
        return entry

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._closed = True
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _turn_over(self) -> None:
        """Begin a new file where the present one is full."""
        assert self._file is not None
        assert self.path is not None
        try:
            if os.fstat(self._file.fileno()).st_size < self._part:
                return
            os.fsync(self._file.fileno())
            put_aside(self.path)
            self._file.close()
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            needed = "a folder that can be written"
            raise self._refusal(str(error), needed, "free some space, then write again") from error

    def _append(self, line: bytes, *, sync: bool) -> None:
        assert self._file is not None
        size = os.fstat(self._file.fileno()).st_size
        try:
            _write_all(self._file, line)
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            # A half-written line must not end up in the middle once a later write succeeds.
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            needed = "a disk that can be written"
            raise self._refusal(str(error), needed, "free some space, then write again") from error

    def _refusal(self, seen: str, needed: str, next_step: str) -> RecordError:
        place = "journal in memory" if self.path is None else str(self.path)
        return RecordError(place, seen=seen, needed=needed, next_step=next_step)


def read_journal(path: str | os.PathLike[str], *, whole: bool = False) -> list[dict[str, Any]]:
    """Reads the events of a journal, oldest first, and changes nothing.

    A torn last line (what a killed process leaves) is passed over. So is, unless the ``whole`` is
    asked for, what a run wrote behind the checkpoint from which it later went on.

    Raises:
        RecordError: the file is missing or unreadable, a line before the last is damaged (the
            message gives file:line), or an event was written by a newer schema.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Journal(f"{folder}/run.jsonl") as journal:
        ...         _ = journal.write("start", run="demo")
        ...     [event["run"] for event in read_journal(f"{folder}/run.jsonl")]
        ['demo']
    """
    path = Path(path)
    files = full_parts(path)
    if path.exists() or not files:  # a process may have died between two files
        files.append(path)
    events = [event for file in files for event in _parse(_read_bytes(file), str(file))[0]]
    return events if whole else _that_count(events)


def _that_count(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "resume" and type(event.get("back_to")) is int:
            found = [earlier for earlier in found if earlier["seq"] < event["back_to"]]
        found.append(event)
    return found


def _open_for_append(path: Path) -> tuple[BinaryIO, int]:
    """The file opened at the end of its last whole event, and the next sequence number."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = _read_bytes(path) if path.exists() else b""
        events, whole = _parse(raw, str(path))
        # Unbuffered: an event that write() returned is with the system, not in this process.
        file = open(path, "ab", buffering=0)  # noqa: SIM115
        file.truncate(whole)
        if whole and raw[whole - 1 : whole] != b"\n":
            _write_all(file, b"\n")
    except OSError as error:
        raise RecordError(
            str(path),
            seen=str(error),
            needed="a file that can be written",
            next_step="choose another path or fix its permissions",
        ) from error
    for full in reversed(full_parts(path)):
        if events:
            break
        events = _parse(_read_bytes(full), str(full))[0]
    return file, max((event["seq"] for event in events), default=-1) + 1


def _write_all(file: Any, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        # A raw file may take only part, for example when the disk is nearly full.
        rest = rest[file.write(rest) :]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordError(
            str(path),
            seen=str(error),
            needed="a journal that can be read",
            next_step="check the path; a journal is the .jsonl file that Journal(path) writes",
        ) from error


def _parse(raw: bytes, place: str) -> tuple[list[dict[str, Any]], int]:
    """All whole events, and the number of bytes they take."""
    events: list[dict[str, Any]] = []
    lines = raw.split(b"\n")
    whole = 0
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        if last and not line:
            break
        event = _event(line)
        if event is None and last and _may_be_torn(line):
            break
        if event is None:
            raise RecordError(
                f"{place}:{number}",
                seen=repr(line[:60]),
                needed="one event of a neuroexapt journal as a JSON object",
                next_step="repair or delete that line; a torn line is only allowed at the end",
            )
        if event["schema"] > SCHEMA:
            raise RecordError(
                f"{place}:{number}",
                seen=f"schema {event['schema']}",
                needed=f"schema {SCHEMA} or older",
                next_step="read it with the newer neuroexapt that wrote it",
            )
        events.append(event)
        whole += len(line) + (not last)
    return events, whole


def _may_be_torn(tail: bytes) -> bool:
    # A power loss can leave zeros where data was promised. Anything else that does not begin
    # like an event is some other file, which must not be cut.
    return tail.strip(b"\0")[:1] in (b"", b"{")


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    if any(type(event.get(name)) is not int for name in ("schema", "seq")):
        return None
    return event


def _line(entry: Mapping[str, Any]) -> bytes:
    # ASCII only, so that a torn line never ends inside a character.
    return json.dumps(entry, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _plain(value: object, field: str, depth: int = 0) -> Any:
    """The value as exact JSON types; ``field`` is the path shown when that is impossible."""
    if value is None or isinstance(value, str | int | float):
        return _scalar(value)
    if depth >= _DEEPEST:
        raise _not_json(field, f"nesting deeper than {_DEEPEST}")
    if is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclass_fields(value)]
        return {n: _plain(getattr(value, n), f"{field}.{n}", depth + 1) for n in names}
    if isinstance(value, Mapping):
        return {_key(k, field): _plain(v, f"{field}.{k}", depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{field}[{i}]", depth + 1) for i, v in enumerate(value)]
    return _item(value, field)


def _scalar(value: str | int | float | None) -> str | int | float | None:
    if value is None or isinstance(value, bool):
        return value
    # Subclasses (text enums, numpy.float64) would read back as another type.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _item(value: object, field: str) -> str | int | float | None:
    take = getattr(value, "item", None)
    if not callable(take) or isinstance(value, type):
        raise _not_json(field, f"a value of type {type(value).__name__}")
    try:
        found = take()
    except (TypeError, ValueError, RuntimeError) as error:
        seen = f"a {type(value).__name__} that is not one number"
        raise _not_json(field, seen) from error
    if found is not None and not isinstance(found, str | int | float):
        raise _not_json(field, f"a {type(value).__name__} holding {type(found).__name__}")
    return _scalar(found)


def _key(key: object, field: str) -> str:
    if not isinstance(key, str):
        raise _not_json(field, f"the key {key!r} of type {type(key).__name__}")
    return str.__str__(key)


def _not_json(field: str, seen: str) -> RecordError:
    return RecordError(
        f"field {field!r}",
        seen=seen,
        needed="numbers, text, booleans, None, or lists, mappings and dataclasses of them",
        next_step="convert it before writing the event",
    )
