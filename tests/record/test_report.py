"""The report tells everything the journal holds, invents nothing, and is safe to open."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from neuroexapt.errors import RecordError
from neuroexapt.record import Journal, read_journal, write_report
from neuroexapt.record import page as page_module
from neuroexapt.record.evolution import merged
from neuroexapt.record.page import SCRIPTS
from neuroexapt.record.story import read_story

HOSTILE = "<script>alert('x')</script>\"><img onerror=x>"
VOID = {"meta", "br", "img", "link", "input", "hr"}
OURS = len(SCRIPTS)
# echarts 6.1.0, dist/echarts.common.min.js
ECHARTS = "61f13280aba3161f77fc801bf5f9c786f55f10432153a0683fc5cc0700b013d5"


class Page(HTMLParser):
    """Checks that tags balance, and collects tags, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def data(self) -> dict[str, Any]:
        """What the page's scripts are given."""
        found = json.loads(self.scripts[0], parse_constant=lambda word: pytest.fail(word))
        assert isinstance(found, dict)
        return found


def layer(name: str, kind: str, shape: str, parameters: int) -> dict[str, object]:
    return {"name": name, "type": kind, "shape": shape, "parameters": parameters}


def model(width: int, *more: dict[str, object]) -> dict[str, Any]:
    layers = [
        layer("features.0", "Conv2d", f"{width}x1x3x3", 10 * width),
        layer("features.1", "BatchNorm2d", f"{width}", 2 * width),
        layer("features.4", "Conv2d", f"32x{width}x3x3", 288 * width + 32),
        layer("classifier", "Linear", "10x32", 330),
        *more,
    ]
    parameters = sum(int(str(item["parameters"])) for item in layers)
    return {
        "class": "SmallNet", "parameters": parameters, "flops": 784 * parameters, "layers": layers
    }  # fmt: skip


def propose(journal: Journal, number: int, kind: str, at: str, step: int) -> None:
    reading = {"signal": "effective rank", "at": at, "value": 14.62, "unit": "channels"}
    journal.write(
        "proposal",
        id=number,
        epoch=step // 100,
        step=step,
        kind=kind,
        at=at,
        edit={"axis": at, "by": 8},
        reason=f"Reason {number}: nearly all channels of {at} carry different signals.",
        predicted={"loss": -0.021, "parameters": 2384, "flops": 1869056},
        readings=[
            {**reading, "error": 0.31, "samples": 4096},
            {"signal": "gradient gain", "at": at, "value": -0.0213, "unit": "nats/step"},
        ],
        runner_up="Widen features.4 by 8" if number % 2 else None,
    )


def decide(journal: Journal, number: int, step: int, verdict: str) -> None:
    if verdict != "refused":
        before = 5162 if number == 0 else 7546
        sizes = {"parameters_before": before, "parameters_after": before + 2384}
        journal.write("applied", id=number, max_difference=2.4e-7, seconds=0.0134, **sizes)
    realised = None if verdict == "refused" else {"loss": -0.034, "parameters": 2384}
    journal.write(
        "verdict", id=number, epoch=step // 100, step=step, verdict=verdict,
        why=f"Why {number}: compared with a copy that was not edited.", realised=realised,
    )  # fmt: skip


DECISIONS = [
    ("Widen", "features.0", 300, "kept"),
    ("Widen", "features.4", 520, "rolled_back"),
    ("Insert", "features.5", 560, "refused"),
    ("Insert", "classifier", 900, "kept"),
]


def full_run(path: Path | None = None) -> list[dict[str, Any]]:
    """The events of a finished run with every kind in it."""
    with Journal(path) as journal:
        journal.write(
            "start", run="digits-7", model=model(16), budget={"params": 20000, "flops": None},
            settings={"seed": 7, "signals": ["rank", "gain"], "cool_down": {"steps": 200}},
            environment={"python": "3.11.7", "torch": "2.5.1", "platform": "Linux",
                         "device": "cpu", "neuroexapt": "0.1.0"},
        )  # fmt: skip
        # Epoch 6 falls between an edit and its roll-back.
        sizes = [5162] * 4 + [7546] * 2 + [9930] + [7546] * 3 + [9930] * 3
        for epoch in range(1, 13):
            journal.write(
                "epoch", epoch=epoch, step=100 * epoch, holdout_loss=2.2 / epoch**0.9,
                holdout_error=0.06 / epoch**0.5, holdout_accuracy=1 - 0.55 / epoch,
                parameters=sizes[epoch], flops=784 * sizes[epoch],
                memory_bytes=1.5e6 + 1e5 * epoch,
            )  # fmt: skip
            for number, (kind, at, step, verdict) in enumerate(DECISIONS):
                if step // 100 == epoch:
                    propose(journal, number, kind, at, step)
                    decide(journal, number, step + 150, verdict)
        points = [
            {"step": 100 * e, "holdout_loss": 2.3 / e**0.8, "holdout_accuracy": 1 - 0.6 / e}
            for e in range(1, 13)
        ]
        journal.write("baseline", name="static", points=points, parameters=7800, flops=6.1e6)
        evolved = {"name": "evolved", "test_accuracy": 0.9517, "parameters": 9930, "flops": 7.8e6}
        static = {"name": "static", "test_accuracy": 0.9433, "parameters": 7800, "flops": 6.1e6}
        journal.write("result", rows=[
            {**evolved, "seconds": 61.2, "proposed": 4, "kept": 2, "rolled_back": 1},
            {**static, "seconds": 55.9, "proposed": None, "kept": None, "rolled_back": None},
        ])  # fmt: skip
        after = model(24, layer("features.5", "Conv2d", "32x32x1x1", 1056))
        after["layers"] = [item for item in after["layers"] if item["name"] != "features.1"]
        after["parameters"] = sum(item["parameters"] for item in after["layers"])
        journal.write("end", epoch=12, step=1200, model=after, seconds=61.2, overhead_seconds=4.1)
        return journal.events


def render(events: list[dict[str, Any]], folder: Path, **options: str) -> tuple[str, Page]:
    source = write_report(events, folder / "report.html", **options).read_text(encoding="utf-8")
    return source, Page(source)


def test_a_full_run_is_told_in_full(tmp_path: Path) -> None:
    """Headline, comparison, every decision, architecture, environment."""
    events = full_run(tmp_path / "run.jsonl")
    assert read_journal(tmp_path / "run.jsonl") == events
    _, page = render(events, tmp_path, title="Digits")
    for word in ("Digits", "digits-7", "Finished", "4 proposed", "2 kept", "1 rolled back"):
        assert word in page.text
    for number, (kind, at, _, _) in enumerate(DECISIONS):
        assert f"#{number} {kind} at {at}" in page.text
        assert f"Reason {number}:" in page.text
        assert f"Why {number}:" in page.text
    for word in ("95.17%", "94.33%", "14.62 ± 0.31", "4,096", "-0.021", "-0.034", "+2,384"):
        assert word in page.text
    for word in ("≠ changed", "+ added", "\N{MINUS SIGN} removed", "= unchanged", "2.5.1"):
        assert word in page.text
    assert page.text.count("effective rank") == 4


def test_changed_sizes_are_marked(tmp_path: Path) -> None:
    """In a changed shape only the sizes that differ stand out."""
    source, _ = render(full_run(), tmp_path)
    assert "<mark>24</mark>&times;1&times;3&times;3" in source
    assert "32&times;<mark>24</mark>&times;3&times;3" in source
    assert source.count("<mark>") == 2


def test_charts_get_lines_marks_and_words(tmp_path: Path) -> None:
    """Five charts, each with a label in words; each mutation with its step and its verdict."""
    _, page = render(full_run(), tmp_path)
    labels = [value or "" for name, value in page.attributes if name == "aria-label"]
    charts = [label for label in labels if "over optimizer steps" in label]
    assert len(charts) == len(page.data["charts"]) == 5
    assert ("role", "img") in page.attributes
    assert charts[0].startswith("Holdout loss")
    assert "static: from" in charts[0]
    assert "mutations marked: 4" in charts[0]
    told = [(d["step"], d["label"], d["outcome"]) for d in page.data["decisions"]]
    assert told[1] == (520, "#1 Widen at features.4", "rolled_back")
    loss, static = page.data["charts"][0]["lines"]
    assert loss["points"][1][:2] == pytest.approx([200, 2.2 / 2**0.9])
    assert loss["points"][1][2] == pytest.approx(0.06 / 2**0.5)
    assert (static["name"], len(static["points"])) == ("static", 12)
    # A baseline's size holds over all its steps; the run's jumps where an edit was made.
    sizes, level = page.data["charts"][2]["lines"]
    assert level["points"] == [[100, 7800], [1200, 7800]]
    assert [300, 5162] in sizes["points"]
    assert [300, 7546] in sizes["points"]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """No string from a journal becomes markup, wherever it stands."""

    def poison(value: Any, key: str = "") -> Any:
        if key in ("event", "verdict"):
            return value
        if isinstance(value, str):
            return HOSTILE
        if isinstance(value, Mapping):
            return {k if k in known else k + HOSTILE: poison(v, k) for k, v in value.items()}
        return [poison(v) for v in value] if isinstance(value, list) else value

    events = full_run()
    known = {k for e in events for k in e} | set(re.findall(r"'(\w+)':", str(events)))
    events[0]["settings"][HOSTILE] = {HOSTILE: HOSTILE}
    source, page = render([poison(event) for event in events], tmp_path, title=HOSTILE)
    assert "img" not in page.tags
    assert page.tags.count("script") == len(page.scripts) == 1 + OURS
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<" not in page.scripts[0]
    assert page.data["decisions"][0]["label"] == f"#0 {HOSTILE} at {HOSTILE}"
    assert "alert('x')" in page.text
    assert "<script>alert" not in source


def test_the_page_is_alone(tmp_path: Path) -> None:
    """Nothing refers outside the file, and the page forbids itself to load or run anything else."""
    source, page = render(full_run(), tmp_path)
    plain = re.sub(r"<script.*?</script>", "", source, flags=re.DOTALL)
    for word in ("http://", "https://", "src=", "href=", "url(", "@import"):
        assert word not in plain
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', source)
    assert policy.startswith("default-src 'none'; ")
    allowed = re.findall(r"'sha256-([^']*)'", policy)
    hashes = [hashlib.sha256(script.encode()).digest() for script in page.scripts[1:]]
    assert allowed == [base64.b64encode(found).decode() for found in hashes]
    assert "unsafe" not in policy.partition("script-src")[2]


def test_the_plotting_library_is_as_it_was_published() -> None:
    """Version and digest of the file in the package on npm; its licences lie beside it."""
    folder = Path(page_module.__file__).parent / "assets" / "echarts"
    script = (folder / "echarts.common.min.js").read_bytes()
    assert hashlib.sha256(script).hexdigest() == ECHARTS
    assert b'version="6.1.0"' in script
    assert {"LICENSE", "LICENSE-d3", "NOTICE"} < {path.name for path in folder.iterdir()}


def test_structure_serves_everyone(tmp_path: Path) -> None:
    """Language, viewport, dark mode, print, one main heading, tables that scroll by themselves."""
    source, page = render(full_run(), tmp_path)
    assert '<html lang="en">' in source
    assert 'name="viewport"' in source
    assert "prefers-color-scheme:dark" in source
    assert "@media print" in source
    assert page.tags.count("h1") == 1
    tables, regions = page.tags.count("table"), source.count('class="scroll"')
    assert tables == regions - 1  # the drawing scrolls too


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    """No events, no numbers."""
    _, page = render([], tmp_path)
    assert "no events of a run yet" in page.text
    assert "svg" not in page.tags


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    """Without ``end`` the model after is not recorded, and a decision may wait."""
    events = [e for e in full_run() if e["event"] not in ("end", "result", "baseline")]
    events = [e for e in events if not (e["event"] == "verdict" and e["id"] == 3)]
    source, page = render(events, tmp_path)
    for word in (
        "Unfinished",
        "last measured step is 1,200",
        "no verdict yet",
        "1 without verdict",
    ):
        assert word in page.text
    assert "5,162 → 9,930 so far" in page.text
    assert "The layers after were not recorded" in page.text
    assert "The test set was not measured" in page.text
    assert [m["label"] for m in page.data["drawing"]["moments"]] == ["start"]
    assert 'class="removed"' not in source


@pytest.mark.parametrize("kind", ["start", "epoch", "proposal", "applied", "verdict", "baseline"])
def test_any_kind_of_event_may_be_missing(tmp_path: Path, kind: str) -> None:
    """A journal that lost a kind of event still gives a whole page."""
    events = [event for event in full_run() if event["event"] != kind]
    _, page = render(events, tmp_path)
    assert "Decisions" in page.text


def test_bare_events_give_no_invented_values(tmp_path: Path) -> None:
    """Events without fields, or with fields of another type, count as not measured."""
    kinds = ("start", "epoch", "proposal", "applied", "verdict", "baseline", "result", "end", "odd")
    bare = [{"event": kind} for kind in kinds]
    wrong: list[dict[str, Any]] = [
        {"event": kind, "id": [1], "step": step, "model": 3, "readings": {"a": 1}, "points": [None],
         "rows": [{}], "predicted": "x", "holdout_loss": "low", "verdict": {"a": 1},
         "parameters": True, "layers": 4, "settings": [], "edit": 5, "at": 1, "kind": None}
        for kind in kinds for step in ("ten", 10)
    ]  # fmt: skip
    for events in (bare, wrong):
        _, page = render(events, tmp_path)
        assert "not measured" in page.text
        assert not re.search(r"\d%", page.text)


@pytest.mark.parametrize("value", [0.0, 1e308, -1e308, 1e-320, 5.0, float("nan"), float("inf")])
def test_charts_stand_any_single_value(tmp_path: Path, value: float) -> None:
    """One epoch, or a constant, or a diverged run does not break the axes."""
    for epochs in (1, 3):
        events = [
            {"event": "epoch", "epoch": e, "step": e, "holdout_loss": value, "parameters": value}
            for e in range(epochs)
        ]
        events += [{"event": "proposal", "id": 0, "step": 0, "kind": "Widen"}]
        _, page = render(events, tmp_path)
        lines = page.data["charts"][0]["lines"] if page.data["charts"] else []
        drawable = abs(value) <= 1e100
        assert [len(line["points"]) for line in lines] == ([epochs] if drawable else [])


def test_a_gap_is_not_bridged(tmp_path: Path) -> None:
    """An epoch without a value stays one: the line is broken there."""
    losses = [3.0, 2.0, None, 1.0, 0.5]
    events = [{"event": "epoch", "step": n, "holdout_loss": x} for n, x in enumerate(losses)]
    _, page = render(events, tmp_path)
    (line,) = page.data["charts"][0]["lines"]
    assert line["points"] == [[0, 3.0], [1, 2.0], [2, None], [3, 1.0], [4, 0.5]]


def test_a_resumed_run_is_one_story(tmp_path: Path) -> None:
    """The first start describes the model before, and an end before the last start is void."""
    events = full_run()
    resumed = [*events, {**events[0], "model": model(64)}]
    _, page = render(resumed, tmp_path)
    assert "started 2 times" in page.text
    assert "Unfinished" in page.text
    assert f"{model(16)['parameters']:,} →" in page.text


def test_a_run_resumed_from_a_checkpoint_says_so(tmp_path: Path) -> None:
    """A ``resume`` after an ``end`` means that the run goes on."""
    _, page = render([*full_run(), {"event": "resume", "back_to": 9}], tmp_path)
    assert "Unfinished, started 2 times (resumed)" in page.text


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    """Thousands of epochs and hundreds of mutations give a page of a few megabytes."""
    with Journal(None) as journal:
        for step in range(5000):
            journal.write("epoch", epoch=step, step=step, holdout_loss=1.0, parameters=5)
        for number in range(300):
            propose(journal, number, "Widen", "fc", number * 15)
    source, _ = render(journal.events, tmp_path)
    assert len(source) < 4_000_000


def test_the_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    """Only the report remains in the folder; a refused write leaves the old report."""
    path = tmp_path / "deep" / "report.html"
    write_report([], path)
    assert write_report(full_run(), path) == path
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RecordError, match="file"):
        write_report([], tmp_path / "file" / "report.html")


def test_half_a_surrogate_pair_is_written(tmp_path: Path) -> None:
    """JSON can carry text that UTF-8 cannot; the report is written all the same."""
    _, page = render([{"event": "start", "run": "a\ud800b"}], tmp_path)
    assert "a?b" in page.text


def test_merged_layers_keep_both_orders() -> None:
    """Every layer once, also where layers moved or repeat."""
    assert merged(["a", "b", "c"], ["a", "n", "c"]) == ["a", "n", "b", "c"]
    assert merged(["a", "b"], ["b", "a"]) == ["b", "a"]
    assert merged([], ["x"]) == ["x"]
    assert merged(["x", "y"], []) == ["x", "y"]


@pytest.mark.parametrize(
    ("between", "told"),
    [
        ([{"event": "verdict", "id": 1, "verdict": "kept"}], "+30"),
        ([], "+30"),
        ([{"event": "verdict", "id": 1, "verdict": "rolled_back"}], None),
        ([{"event": "verdict", "id": 1, "verdict": "kept", "realised": {"flops": 7}}], "+7"),
    ],
)
def test_realised_flops_are_read_off_the_epochs(
    between: list[dict[str, Any]], told: str | None
) -> None:
    """Between the last epoch without a change and the first with it, if nothing else changed."""
    events = [
        {"event": "epoch", "step": 1, "flops": 100},
        {"event": "proposal", "id": 1, "kind": "Widen"},
        {"event": "applied", "id": 1},
        *between,
        {"event": "epoch", "step": 2, "flops": 130},
        {"event": "epoch", "step": 3, "flops": 500},
    ]
    found = read_story(events).decisions[0].realised.get("flops")
    assert found == (None if told is None else float(told))
    by_hand = [{**e, "layers": {"removed": ["x"]}} if e.get("step") == 2 else e for e in events]
    changed_too = read_story(by_hand).decisions[0].realised.get("flops")
    assert changed_too == (7 if told == "+7" else None)
