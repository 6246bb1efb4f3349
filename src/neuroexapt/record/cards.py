"""One card for each decision: why it was made, what was expected and what happened."""

from __future__ import annotations

from collections.abc import Sequence

from neuroexapt.record.page import Cell, Html, Row, facts, note, table
from neuroexapt.record.story import Decision, Event, mapping, mappings
from neuroexapt.record.wording import (
    MISSING,
    change,
    count,
    duration,
    escape,
    figure,
    number,
    text,
    with_error,
)

# An outcome is told by word and shape as well as by colour. The charts' marks have the same shapes.
OUTCOMES = {
    "kept": ("kept", "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z"),
    "rolled_back": ("rolled back", "M-4.5-4.5H4.5V4.5H-4.5Z"),
    "refused": ("refused", "M0-5.5L5.5 4.5H-5.5Z"),
    "pending": ("no verdict yet", "M0-6L6 0L0 6L-6 0Z"),
}
DASHES = ("", "7 4", "2 4", "9 3 2 3")
_COLOURS = 4
_EFFECTS = (("loss", "loss (nats)"), ("parameters", "parameters"), ("flops", "FLOPs"))


def badge(outcome: str) -> str:
    """The shape and the word of an outcome, as they stand in the charts."""
    word, shape = OUTCOMES[outcome]
    drawn = f'<path class="shape {outcome}" transform="translate(8 8)" d="{shape}"/>'
    return f'<span class="badge {outcome}">{_swatch(drawn, 16)}{escape(word)}</span>'


def legend(names: Sequence[str], outcomes: Sequence[str]) -> Html:
    """One list that explains the lines (in order of rank) and the marks of all charts.

    Example:
        >>> legend(["evolved"], ["kept"]).count("<li>")
        2
    """
    items = []
    for rank, name in enumerate(names):
        dash = DASHES[rank % len(DASHES)]
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        stroke = f'<path class="line l{rank % _COLOURS}" d="M2 8H38"{dashed}/>'
        items.append(f"<li>{_swatch(stroke, 40)}{escape(name)}</li>")
    items += [f"<li>{badge(outcome)}</li>" for outcome in outcomes]
    return Html(f'<ul class="legend">{"".join(items)}</ul>')


def _swatch(drawn: str, width: int) -> str:
    box = f'viewBox="0 0 {width} 16" width="{width}" height="16"'
    return f'<svg {box} aria-hidden="true" class="swatch">{drawn}</svg>'


def card(decision: Decision, place: int = 0, *, closed: bool = False) -> Html:
    """The card of one decision; every part that no event holds says so.

    Args:
        decision: the decision.
        place: its place among all, which the page's links go by.
        closed: show only its heading until it is opened.

    Example:
        >>> html = card(Decision(proposal={"id": 1, "kind": "Widen", "at": "fc1"}))
        >>> "#1 Widen at fc1" in html, "no verdict yet" in html
        (True, True)
    """
    proposal, verdict = decision.proposal, decision.verdict
    parts = [
        f'<p class="soft">{_when(proposal or verdict)}</p>',
        f"<p>{escape(text(proposal.get('reason'), 'No reason was recorded.'))}</p>",
        facts(_edit(proposal)),
        _readings(decision),
        _effects(decision),
        facts(_outcome(decision)),
    ]
    head = f"<h3>{escape(decision.label)}</h3>{_brief(decision)}{badge(decision.outcome)}"
    shown = "" if closed else " open"
    return Html(
        f'<details class="card {decision.outcome}" id="decision-{place}"{shown}>'
        f"<summary>{head}</summary>{''.join(parts)}</details>"
    )


def _brief(decision: Decision) -> str:
    """What it came to, for a closed card."""
    realised = decision.realised
    told = [
        f"{label} {change(realised.get(name))}"
        for name, label in _EFFECTS
        if number(realised.get(name)) is not None
    ]
    return f'<span class="brief">{escape(", ".join(told))}</span>' if told else ""


def _when(event: Event) -> str:
    found = [f"{name} {count(event[name])}" for name in ("epoch", "step") if name in event]
    return escape(", ".join(found) or "time not recorded")


def _edit(proposal: Event) -> list[tuple[str, Cell]]:
    edit = mapping(proposal.get("edit"))
    asked = ", ".join(f"{name} = {text(value, 'none')}" for name, value in edit.items())
    pairs: list[tuple[str, Cell]] = [("edit", asked)] if asked else []
    if proposal.get("runner_up"):
        pairs.append(("runner-up", text(proposal["runner_up"])))
    return pairs


def _readings(decision: Decision) -> Html:
    readings = mappings(decision.proposal.get("readings"))
    if not readings:
        return note("No readings were recorded for this decision.")
    rows = [
        Row(
            cells=[
                text(reading.get("signal")),
                text(reading.get("at")),
                _measured(reading),
                count(reading.get("samples")),
            ]
        )
        for reading in readings
    ]
    heads = ["signal", "at", "value ± error", "samples"]
    return Html(f"<h4>Readings</h4>{table(f'Readings for {decision.label}', heads, rows, texts=2)}")


def _measured(reading: Event) -> str:
    value = with_error(reading.get("value"), reading.get("error"))
    unit = reading.get("unit")
    return value if value == MISSING or not unit else f"{value} {text(unit)}"


def _effects(decision: Decision) -> Html:
    predicted = mapping(decision.proposal.get("predicted"))
    realised = decision.realised
    rows = [
        Row(cells=[label, change(predicted.get(name)), change(realised.get(name))])
        for name, label in _EFFECTS
    ]
    heads = ["change in", "predicted", "realised"]
    return Html(f"<h4>Effect</h4>{table(f'Effect of {decision.label}', heads, rows)}")


def _outcome(decision: Decision) -> list[tuple[str, Cell]]:
    applied, verdict = decision.applied, decision.verdict
    pairs: list[tuple[str, Cell]] = []
    if applied:
        sizes = [count(applied.get(f"parameters_{when}")) for when in ("before", "after")]
        pairs += [
            ("parameters", " → ".join(sizes)),
            ("output moved by", f"at most {figure(applied.get('max_difference'))}"),
            ("edit took", duration(applied.get("seconds"))),
        ]
    said = verdict.get("verdict")
    if decision.outcome == "pending" and said is not None:
        pairs.append(("verdict", f"{text(said)} (not a known verdict)"))
    if verdict:
        when = _when(verdict) if number(verdict.get("step")) is not None else ""
        pairs.append(("decided", Html(when) if when else "time not recorded"))
        pairs.append(("why", text(verdict.get("why"), "not recorded")))
    return pairs
