"""The architecture at every moment of a run: what the drawing with the slider is made from.

Pure: events in, plain values out. A node that is not there at a moment has no version then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neuroexapt.record.story import Event, mapping, mappings
from neuroexapt.record.structure import changed
from neuroexapt.record.wording import count, number, text


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The architecture from one event on.

    Attributes:
        label: what happened, in a few words.
        step: the optimizer step, if recorded.
        decision: place of the decision among all, if one made the change.
        layers: names to layers, in order.
        flow: names to nodes ``{"type", "from"}`` in the order of the first call.
    """

    label: str
    step: float | None
    decision: int | None
    layers: Mapping[str, Event]
    flow: Mapping[str, Event]

    @property
    def parameters(self) -> float | None:
        """The sum over all layers, or ``None`` where one is not recorded."""
        sizes = [number(layer.get("parameters")) for layer in self.layers.values()]
        known = [size for size in sizes if size is not None]
        return sum(known) if known and len(known) == len(sizes) else None


@dataclass(kw_only=True)
class _Reader:
    """Walks over the events; ``moments`` grows where the architecture differs."""

    moments: list[Moment] = field(default_factory=list)
    layers: list[Event] = field(default_factory=list)
    flow: list[Event] = field(default_factory=list)
    step: float | None = None
    kinds: dict[object, tuple[int, str]] = field(default_factory=dict)
    proposals: int = 0

    def take(self, event: Event) -> None:
        kind = event.get("event")
        found = number(event.get("step"))
        self.step = self.step if found is None else found
        decision, label = None, text(kind)
        if kind == "proposal":
            at = text(event.get("at"), "")
            words = f"#{text(event.get('id'), '?')} {text(event.get('kind'), 'Mutation')}"
            key = text(event.get("id"))
            self.kinds[key] = (self.proposals, f"{words} at {at}" if at else words)
            self.proposals += 1
        elif kind in ("applied", "verdict"):
            decision, label = self.kinds.get(text(event.get("id")), (None, "Mutation"))
            label += " applied" if kind == "applied" else " taken back"
        elif kind == "epoch":
            label = f"changed outside the evolver, before epoch {count(event.get('epoch'), '?')}"
        self._architecture(event, str(kind), label, decision)

    def _architecture(self, event: Event, kind: str, label: str, decision: int | None) -> None:
        model = mapping(event.get("model"))
        before = self.layers
        if mapping(event.get("layers")):
            self.layers = list(changed(self.layers, mapping(event["layers"])))
        if kind in ("start", "end") and mappings(model.get("layers")):
            # The model itself is the better witness.
            self.layers = _named(model.get("layers"))
            label = ("start", "resumed")[bool(self.moments)] if kind == "start" else "end"
        flow = _named(model.get("flow") if kind == "start" else event.get("flow"))
        self.flow = flow or self.flow
        if self.layers and (self.layers != before or flow or not self.moments):
            moment = Moment(
                label=label,
                step=0.0 if kind == "start" and not self.moments else self.step,
                decision=decision,
                layers={layer["name"]: layer for layer in self.layers},
                flow={node["name"]: node for node in self.flow},
            )
            if not self.moments or not _same(self.moments[-1], moment):
                self.moments.append(moment)


def read_moments(events: Iterable[Event]) -> list[Moment]:
    """Every architecture of a run, oldest first; none where no event holds layers.

    Example:
        >>> model = {"layers": [{"name": "fc", "type": "Linear", "shape": "4x8"}]}
        >>> wider = {"changed": [{"name": "fc", "type": "Linear", "shape": "6x8"}]}
        >>> moments = read_moments([
        ...     {"event": "start", "model": model},
        ...     {"event": "proposal", "id": 1, "kind": "Widen", "at": "fc", "step": 10},
        ...     {"event": "applied", "id": 1, "layers": wider},
        ... ])
        >>> [(moment.label, moment.step) for moment in moments]
        [('start', 0.0), ('#1 Widen at fc applied', 10.0)]
    """
    reader = _Reader()
    for event in events:
        reader.take(event)
    return reader.moments


def drawing(moments: Sequence[Moment]) -> dict[str, Any]:
    """The moments as the page's script reads them: each node once, with its versions.

    Returns:
        ``moments``: [{label, step, decision, parameters}]; ``nodes``: [{name, joint, versions:
        [[moment, type, shape, parameters] or [moment]], reads: [[moment, [places in nodes]]]}].
        A version holds until the next one; one without a type says that the node is not there.

    Example:
        >>> one = Moment(label="start", step=0, decision=None, flow={},
        ...              layers={"fc": {"type": "Linear", "shape": "4x8", "parameters": 36}})
        >>> drawing([one])["nodes"][0]["versions"]
        [[0, 'Linear', '4x8', 36.0]]
    """
    names: list[str] = []
    for moment in moments:
        rest = [name for name in moment.layers if name not in moment.flow]
        order = [*moment.flow, *rest]
        if set(order) - set(names):
            names = merged(names, order)
    places = {name: place for place, name in enumerate(names)}
    nodes: list[dict[str, Any]] = [
        {"name": name, "joint": True, "versions": [], "reads": []} for name in names
    ]
    for at, moment in enumerate(moments):
        for name, node in zip(names, nodes, strict=True):
            _note(node["versions"], at, _version(moment, name), [])
            _note(node["reads"], at, [_reads(moment, name, places)], [[]])
            node["joint"] = node["joint"] and name not in moment.layers
    heads = [
        {"label": m.label, "step": m.step, "decision": m.decision, "parameters": m.parameters}
        for m in moments
    ]
    return {"moments": heads, "nodes": nodes}


def merged(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Every name once, in the order of ``after``, with removed names where they stood.

    Example:
        >>> merged(["a", "b", "c"], ["a", "new", "c"])
        ['a', 'new', 'b', 'c']
    """
    kept, old = set(after), set(before)
    rest, names = list(before), []
    taken: set[str] = set()
    at = 0
    for name in after:
        while name in old and name not in taken:
            head = rest[at]
            at += 1
            taken.add(head)
            if head not in kept:
                names.append(head)
        names.append(name)
    return names + [name for name in rest[at:] if name not in kept]


def _version(moment: Moment, name: str) -> list[Any]:
    layer = moment.layers.get(name)
    if layer is not None:
        shape, size = text(layer.get("shape"), ""), number(layer.get("parameters"))
        return [text(layer.get("type"), "not recorded"), shape, size]
    node = moment.flow.get(name)
    return [] if node is None else [text(node.get("type"), "not recorded"), "", None]


def _reads(moment: Moment, name: str, places: Mapping[str, int]) -> list[int]:
    reads = mapping(moment.flow.get(name)).get("from")
    items = reads if isinstance(reads, list) else []
    return [places[item] for item in items if isinstance(item, str) and item in places]


def _note(versions: list[list[Any]], at: int, found: list[Any], absent: list[Any]) -> None:
    last = versions[-1][1:] if versions else absent
    if found != last:
        versions.append([at, *found])


def _named(value: object) -> list[Event]:
    return [x for x in mappings(value) if isinstance(x.get("name"), str)]


def _same(one: Moment, other: Moment) -> bool:
    return dict(one.layers) == dict(other.layers) and dict(one.flow) == dict(other.flow)
