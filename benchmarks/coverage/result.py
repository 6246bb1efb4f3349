"""What is found about a case, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STAGES = ("map", "alone", "narrow", "widen", "permutation", "silent")
# Narrowing must take at least this share of the parameters to count.
GONE = 0.1


@dataclass(frozen=True)
class Stage:
    """How a stage ended.

    Attributes:
        status: ``"ok"``, ``"refused"`` (in advance, with a reason, the model untouched),
            ``"taken back"`` (made, found wrong by the library's own check, the model untouched),
            ``"little"`` (narrowed, but too few parameters gone), ``"wrong"``, ``"crash"``,
            ``"hang"``, ``"skipped"``.
        reason: why it is not ok; or what is worth saying.
        seconds: wall time.
    """

    status: str
    reason: str = ""
    seconds: float = 0.0


@dataclass
class Result:
    """What was found about a case; all numbers, ready for JSON.

    Attributes:
        name: of the case.
        stages: by name, see ``STAGES``; ``"build"`` if the model cannot be made.
        facts: numbers: parameters, widths, share of parameters that can change, parameters
            after narrowing, widened widths, processor seconds for a map.
        unknown: operators without a rule.
        pins: reasons of pins and how many dimensions have them.
    """

    name: str
    stages: dict[str, Stage] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    pins: dict[str, int] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """Everything asked for came true."""
        return all(name in self.stages and self.stages[name].status == "ok" for name in STAGES)

    @property
    def safe(self) -> bool:
        """Each stage came true, or was refused or taken back with a reason, the model untouched."""
        good = ("ok", "refused", "taken back", "little", "skipped")
        own = [self.stages[name].status for name in STAGES if name in self.stages]
        return len(own) == len(STAGES) and all(status in good for status in own)


def from_row(row: Mapping[str, Any]) -> Result:
    """A result as :func:`dataclasses.asdict` wrote it."""
    stages = {name: Stage(**stage) for name, stage in row["stages"].items()}
    return Result(**{**row, "stages": stages})
