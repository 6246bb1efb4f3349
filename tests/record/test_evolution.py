"""The drawing holds every architecture of a run, whatever sequence of changes led there."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from neuroexapt.record import difference
from neuroexapt.record.evolution import drawing, merged, read_moments

LAYERS = st.lists(
    st.builds(
        lambda name, size: {"name": name, "type": "L", "shape": f"{size}", "parameters": size},
        st.sampled_from("abcdef"),
        st.integers(1, 3),
    ),
    unique_by=lambda layer: layer["name"],
    min_size=1,
)


def version(versions: list[list[Any]], moment: int) -> list[Any]:
    found = [entry[1:] for entry in versions if entry[0] <= moment]
    return found[-1] if found else []


def wires(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ["(input)", *(layer["name"] for layer in layers)]
    nodes = zip(names[1:], names, strict=False)
    rest = [{"name": name, "type": "L", "from": [before]} for name, before in nodes]
    return [{"name": "(input)", "type": "input", "from": []}, *rest]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LAYERS, st.lists(LAYERS, max_size=5))
def test_every_moment_can_be_drawn_again(first: list[Any], later: list[list[Any]]) -> None:
    """At each moment the nodes with a version are the layers, in order, and read what they read."""
    events: list[dict[str, Any]] = [
        {"event": "start", "model": {"layers": first, "flow": wires(first)}}
    ]
    before, states = first, [first]
    for number, layers in enumerate(later):
        events.append({"event": "proposal", "id": number, "kind": "K", "at": "a", "step": number})
        more = {"layers": difference(before, layers), "flow": wires(layers)}
        events.append({"event": "applied", "id": number, **more})
        states += [layers] if layers != before else []
        before = layers
    moments = read_moments(events)
    told = drawing(moments)
    assert [list(moment.layers.values()) for moment in moments] == states
    assert len(told["moments"]) == len(states)
    names = [node["name"] for node in told["nodes"]]
    assert len(set(names)) == len(names)
    for at, layers in enumerate(states):
        shown = {n["name"]: version(n["versions"], at) for n in told["nodes"]}
        want = {x["name"]: [x["type"], x["shape"], x["parameters"]] for x in layers}
        assert {name: found for name, found in shown.items() if found} == {
            "(input)": ["input", "", None],
            **want,
        }
        reads = {n["name"]: version(n["reads"], at) for n in told["nodes"]}
        for node in wires(layers)[1:]:
            assert reads[node["name"]] == [[names.index(name) for name in node["from"]]]
    # The last architecture stands in its own order.
    last = [layer["name"] for layer in states[-1]]
    if all(set(x["name"] for x in state) <= set(last) for state in states):
        assert [name for name in merged(names, ["(input)", *last])] == ["(input)", *last]


def test_what_changed_it_is_said() -> None:
    """By a decision, by its roll-back, by hand, by a resumed run; the step is the event's."""
    layers = [{"name": "fc", "shape": "4"}]
    wide = {"changed": [{"name": "fc", "shape": "8"}]}
    back = {"changed": layers}
    moments = read_moments(
        [
            {"event": "start", "model": {"layers": layers}},
            {"event": "proposal", "id": 7, "kind": "Widen", "at": "fc", "step": 30},
            {"event": "applied", "id": 7, "layers": wide},
            {"event": "verdict", "id": 7, "verdict": "rolled_back", "step": 60, "layers": back},
            {"event": "epoch", "epoch": 4, "step": 90, "layers": wide},
            {"event": "start", "model": {"layers": [{"name": "fc", "shape": "2"}]}},
            {"event": "end", "step": 99, "model": {"layers": [{"name": "fc", "shape": "2"}]}},
        ]
    )
    assert [(moment.label, moment.step, moment.decision) for moment in moments] == [
        ("start", 0.0, None),
        ("#7 Widen at fc applied", 30.0, 0),
        ("#7 Widen at fc taken back", 60.0, 0),
        ("changed outside the evolver, before epoch 4", 90.0, None),
        ("resumed", 90.0, None),
    ]


def test_a_journal_without_differences_has_its_first_and_last_model() -> None:
    """As older ones are; one without any layers has no moment."""
    model, after = {"layers": [{"name": "a"}]}, {"layers": [{"name": "b"}]}
    events = [{"event": "start", "model": model}, {"event": "end", "model": after}]
    assert [moment.label for moment in read_moments(events)] == ["start", "end"]
    assert read_moments([{"event": "start", "model": {"layers": 3}}, {"event": "epoch"}]) == []
