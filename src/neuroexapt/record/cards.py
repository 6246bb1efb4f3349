"""One card for each decision: why it was made, what was expected and what happened."""

from __future__ import annotations

from neuroexapt.record.charts import badge
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
    percent,
    text,
    with_error,
)

_EFFECTS = (("loss", "loss (nats)"), ("parameters", "parameters"), ("flops", "FLOPs"))


def card(decision: Decision) -> Html:
    """The card of one decision; every part that no event holds says so.

    Example:
        >>> html = card(Decision(proposal={"id": 1, "kind": "Widen", "at": "fc1"}))
        >>> "#1 Widen at fc1" in html, "no verdict yet" in html
        (True, True)
    """
    proposal, verdict = decision.proposal, decision.verdict
    parts = [
        f"<header><h3>{escape(decision.label)}</h3>{badge(decision.outcome)}</header>",
        f'<p class="soft">{_when(proposal or verdict)}</p>',
        f"<p>{escape(text(proposal.get('reason'), 'No reason was recorded.'))}</p>",
        facts(_edit(proposal)),
        _readings(proposal),
        _effects(decision),
        facts(_outcome(decision)),
    ]
    return Html(f'<article class="card {decision.outcome}">{"".join(parts)}</article>')


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


def _readings(proposal: Event) -> Html:
    readings = mappings(proposal.get("readings"))
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
    return Html(f"<h4>Readings</h4>{table('Readings', heads, rows, texts=2)}")


def _measured(reading: Event) -> str:
    value = with_error(reading.get("value"), reading.get("error"))
    unit = reading.get("unit")
    return value if value == MISSING or not unit else f"{value} {text(unit)}"


def _effects(decision: Decision) -> Html:
    predicted = mapping(decision.proposal.get("predicted"))
    realised = mapping(decision.verdict.get("realised"))
    rows = [
        Row(cells=[label, change(predicted.get(name)), change(realised.get(name))])
        for name, label in _EFFECTS
    ]
    heads = ["change in", "predicted", "realised"]
    return Html(f"<h4>Effect</h4>{table('Predicted and realised effect', heads, rows)}")


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


def comparison(rows: list[Event]) -> Html:
    """The models of the ``result`` event beside each other, measured on the test set.

    Example:
        >>> "97.00%" in comparison([{"name": "evolved", "test_accuracy": 0.97}])
        True
    """
    heads = ["model", "test accuracy", "parameters", "FLOPs", "time"]
    heads += ["proposed", "kept", "rolled back"]
    lines = []
    for row in rows:
        cells = [text(row.get("name"), "no name"), percent(row.get("test_accuracy"))]
        cells += [count(row.get("parameters")), count(row.get("flops"))]
        cells.append(duration(row.get("seconds")))
        # A null count means that this model does not evolve at all; see the journal's table.
        names = ("proposed", "kept", "rolled_back")
        cells += [count(row.get(n), "n/a" if n in row else "not recorded") for n in names]
        lines.append(Row(cells=cells))
    return table("Models compared", heads, lines)
