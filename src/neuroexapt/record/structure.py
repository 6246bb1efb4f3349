"""How a list of layers changes: written as differences, put together again for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Layer = Mapping[str, Any]


def difference(before: Sequence[Layer], after: Sequence[Layer]) -> dict[str, Any]:
    """What turns one list of layers into another; empty if they agree.

    Law: ``changed(before, difference(before, after)) == after``.

    Args:
        before: layers as mappings with a ``name`` of their own each.
        after: the same later.

    Returns:
        ``{"removed": [names], "changed": [layers], "added": [layers]}`` without empty parts; each
        added layer has the name of the one before it as ``after`` (null: it is the first). Where
        layers changed places it is ``{"all": after}``.

    Example:
        >>> difference([{"name": "a", "shape": "4"}], [{"name": "a", "shape": "8"}])
        {'changed': [{'name': 'a', 'shape': '8'}]}
    """
    old = {layer["name"]: layer for layer in before}
    new = {layer["name"]: layer for layer in after}
    added = [
        {**layer, "after": after[place - 1]["name"] if place else None}
        for place, layer in enumerate(after)
        if layer["name"] not in old
    ]
    parts = {
        "removed": [name for name in old if name not in new],
        "changed": [dict(new[name]) for name in old if name in new and new[name] != old[name]],
        "added": added,
    }
    found = {name: part for name, part in parts.items() if part}
    whole: dict[str, Any] = {"all": [dict(layer) for layer in after]}
    return found if changed(before, found) == list(after) else whole


def changed(before: Sequence[Layer], found: Mapping[str, Any]) -> list[Layer]:
    """The list of layers after a difference. Parts that make no sense are passed over.

    Example:
        >>> changed([{"name": "a"}], {"added": [{"name": "b", "after": "a"}]})
        [{'name': 'a'}, {'name': 'b'}]
    """
    if isinstance(found.get("all"), list):
        return _layers(found["all"])
    gone = set(map(str, _list(found.get("removed"))))
    new = {layer["name"]: layer for layer in _layers(found.get("changed"))}
    result = [new.get(layer["name"], layer) for layer in before if layer["name"] not in gone]
    for layer in _layers(found.get("added")):
        names = [one["name"] for one in result]
        place = names.index(layer["after"]) + 1 if layer.get("after") in names else 0
        result.insert(place, {name: value for name, value in layer.items() if name != "after"})
    return result


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _layers(value: object) -> list[Layer]:
    return [x for x in _list(value) if isinstance(x, Mapping) and isinstance(x.get("name"), str)]
