"""The report in a real browser: it runs clean, reacts, fits, prints, and is open to everyone.

Needs Chromium (``/usr/bin/chromium`` or one on the path) and the packages playwright and
axe-playwright-python; skipped without them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.record.test_report import HOSTILE, full_run
from torch import nn

from neuroexapt import demo
from neuroexapt.capture import capture
from neuroexapt.edit import Widen
from neuroexapt.guard import Applied
from neuroexapt.measure import HoldoutScore, Reading, count_parameters
from neuroexapt.plan import Candidate, Decision, Limits, Settings, State
from neuroexapt.record import Journal, read_journal, write_report
from neuroexapt.train.chronicle import Chronicle

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
AXE = pytest.importorskip("axe_playwright_python", reason="needs axe-playwright-python").__file__
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
DIMS = "#net li:not(.joint) .dims"
PHONE = {"width": 380, "height": 800}
DESK = {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, report: Path, **options: Any) -> Iterator[Any]:
    """The report in a page; in the end: not a word on the console, no error, no request."""
    context = browser.new_context(**{"viewport": DESK, **options})
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: said.append(request.url))
    page.goto(report.as_uri())
    yield page
    context.close()
    assert said == [report.as_uri()]


def report_of(events: list[dict[str, Any]], folder: Path, **options: Any) -> Path:
    return write_report(events, folder / "report.html", **options)


def complaints(page: Any) -> list[str]:
    """What axe finds that is serious or worse."""
    page.evaluate((Path(AXE).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    return [
        f"{rule['id']}: {node['html'][:120]}"
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


def overflow(page: Any) -> int:
    width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert isinstance(width, int)
    return width


def spot(page: Any, chart: int, decision: int) -> tuple[float, float]:
    """Where in the window the mark of a decision is."""
    found = page.evaluate(
        """([chart, decision]) => {
            const box = document.getElementById("plot-" + chart);
            box.scrollIntoView({ block: "center", behavior: "instant" });
            const plot = echarts.getInstanceByDom(box);
            const marks = plot.getOption().series.find((series) => series.id === "marks");
            const mark = marks.data.find((mark) => mark.decision === decision);
            const at = plot.convertToPixel({ xAxisIndex: 0, yAxisIndex: 1 }, mark.value);
            const corner = box.getBoundingClientRect();
            return [corner.left + at[0], corner.top + at[1]];
        }""",
        [chart, decision],
    )
    return found[0], found[1]


def evolving() -> list[dict[str, Any]]:
    """The full run, told with its layers after every change."""
    events = full_run()
    layers = events[0]["model"]["layers"]
    names = ["(input)", *(layer["name"] for layer in layers), "(output)"]
    events[0]["model"]["flow"] = [
        {"name": name, "type": "Layer", "from": names[max(0, at - 1) : at]}
        for at, name in enumerate(names)
    ]
    # The first layer is read by the last one too: a line of its own in the drawing.
    events[0]["model"]["flow"][4]["from"].append(names[1])
    applied = [event for event in events if event["event"] == "applied"]
    for width, event in enumerate(applied):
        layer = {**layers[0], "shape": f"{20 + width}x1x3x3"}
        event["layers"] = {"changed": [layer]}
    readings = [
        {"signal": signal, "at": layer["name"], "value": 0.5 * k, "unit": "bits", "error": 0.1}
        for k, layer in enumerate(layers)
        for signal in ("information", "rank")
    ]
    surveys = [
        {"event": "survey", "epoch": epoch, "step": 100 * epoch, "readings": readings}
        for epoch in (2, 5)
    ]
    return [*events, *surveys]


def test_the_report_of_a_demo_run(browser: Any, tmp_path: Path) -> None:
    """Real data, both colours, desk and phone: nothing on the console, nothing outside, no axe."""
    journal = tmp_path / "journal.jsonl"
    demo.train(demo.Digits.load(0), 0, 6, journal, lambda *_: None)
    report = report_of(read_journal(journal), tmp_path, title="Digits")
    for colours in ("light", "dark"):
        for size in (DESK, PHONE):
            with opened(browser, report, color_scheme=colours, viewport=size) as page:
                assert overflow(page) <= 0
                assert page.locator(".plot svg").count() == 5
                assert page.locator("#net li.changed").count() >= 3
                assert page.locator("#net svg path").count() >= 10
                if (size is DESK) == (colours == "dark"):
                    assert complaints(page) == []


def test_marks_lead_to_cards(browser: Any, tmp_path: Path) -> None:
    """A click on a mark opens the decision's card, in whatever state, and moves the slider."""
    report = report_of(evolving(), tmp_path)
    with opened(browser, report) as page:
        page.locator("#decision-1 summary").click()
        assert not page.locator("#decision-1").evaluate("card => card.open")
        page.locator('#filter input[value="rolled_back"]').uncheck()
        assert not page.locator("#decision-1").is_visible()
        page.mouse.click(*spot(page, 0, 1))
        assert page.locator("#decision-1").evaluate("card => card.open")
        assert page.locator("#decision-1").is_visible()
        assert page.evaluate("document.activeElement.closest('details').id") == "decision-1"
        assert "#1 Widen at features.4" in page.locator("#told").inner_text()
        page.mouse.move(*spot(page, 0, 2))
        assert "#2 Insert at features.5: refused" in page.locator(".tip").first.inner_text()


def test_the_slider_goes_through_the_run(browser: Any, tmp_path: Path) -> None:
    """By arrow keys: the drawing, the words, the marked changes and the line in every chart."""
    with opened(browser, report_of(evolving(), tmp_path)) as page:
        slider = page.locator("#moment")

        def line() -> float:
            boxes = page.locator(".plot .cursor").all()
            (left,) = {box.bounding_box()["x"] for box in boxes[1::2]}  # one below the other
            return float(left)

        moments = int(slider.get_attribute("max") or "") + 1
        assert moments == 5  # the start, three edits, the end
        assert page.locator("#later").is_disabled()
        slider.focus()
        seen, lines = [], []
        for _ in range(moments):
            seen.append(page.locator(DIMS).first.inner_text())
            lines.append(line())
            page.keyboard.press("ArrowLeft")
        assert seen[1:] == [
            "16→22 \N{MULTIPLICATION SIGN} 1 \N{MULTIPLICATION SIGN} 3 \N{MULTIPLICATION SIGN} 3",
            "16→21 \N{MULTIPLICATION SIGN} 1 \N{MULTIPLICATION SIGN} 3 \N{MULTIPLICATION SIGN} 3",
            "16→20 \N{MULTIPLICATION SIGN} 1 \N{MULTIPLICATION SIGN} 3 \N{MULTIPLICATION SIGN} 3",
            "16 \N{MULTIPLICATION SIGN} 1 \N{MULTIPLICATION SIGN} 3 \N{MULTIPLICATION SIGN} 3",
        ]
        assert lines == sorted(lines, reverse=True)
        assert len(set(lines)) == moments
        assert page.locator("#earlier").is_disabled()
        assert "No" not in page.locator("#told").inner_text()
        assert slider.get_attribute("aria-valuetext").startswith("1 of 5: start")
        page.locator("#later").click()
        page.locator("#later").click()
        page.locator("#base").select_option("before")
        assert (
            page.locator(DIMS).first.inner_text()
            == "20→21 \N{MULTIPLICATION SIGN} 1 \N{MULTIPLICATION SIGN} 3 \N{MULTIPLICATION SIGN} 3"
        )
        assert page.locator("#net li.unchanged").count() > 2
        page.locator("#only").check()
        assert page.locator("#net li").count() == 1
        page.locator("#told a").click()
        assert page.evaluate("document.activeElement.closest('details').id") == "decision-1"


def test_readings_by_layer(browser: Any, tmp_path: Path) -> None:
    """The table of the chosen signal, its unit and errors, the higher the stronger the colour."""
    with opened(browser, report_of(evolving(), tmp_path)) as page:
        assert page.locator("#signal option").all_inner_texts() == ["information", "rank"]
        page.locator("#signal").select_option(label="rank")
        assert "rank (bits)" in page.locator("#grid thead").inner_text()
        assert page.locator("#grid tbody th").count() == 4
        cells = page.locator("#grid td")
        assert cells.all_inner_texts() == ["0", "0", "0.5", "0.5", "1", "1", "1.5", "1.5"]
        assert cells.last.get_attribute("title") == "1.5 ± 0.1"
        part = "cell => parseFloat(cell.style.getPropertyValue('--part'))"
        strength = [cells.nth(k).evaluate(part) for k in range(0, 8, 2)]
        assert strength == sorted(strength)
        assert strength[0] < strength[-1]


def test_colours_can_be_changed(browser: Any, tmp_path: Path) -> None:
    """The button turns page and charts; on paper it is light whatever it was."""
    with opened(browser, report_of(evolving(), tmp_path), color_scheme="dark") as page:
        paper = "getComputedStyle(document.body).backgroundColor"
        chart = "document.querySelector('#plot-0 svg').outerHTML"
        dark, drawn = page.evaluate(paper), page.evaluate(chart)
        page.get_by_role("button", name="Light colours").click()
        assert page.evaluate(paper) == "rgb(255, 255, 255)" != dark
        assert page.evaluate(chart) != drawn
        assert complaints(page) == []
        page.get_by_role("button", name="Dark colours").click()
        assert page.evaluate(chart) == drawn
        page.emulate_media(media="print")
        assert page.evaluate(paper) == "rgb(255, 255, 255)"
        assert not page.locator(".controls").first.is_visible()


def test_every_card_is_printed(browser: Any, tmp_path: Path) -> None:
    """Closed ones too, and closed again afterwards; charts fit the sheet."""
    with opened(browser, report_of(evolving(), tmp_path)) as page:
        page.locator("#decision-0 summary").click()
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 700, "height": 900})
        assert page.locator("#decision-0 table").first.is_visible()
        assert overflow(page) <= 0
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert not page.locator("#decision-0").evaluate("card => card.open")
        assert len(page.pdf(format="A4")) > 20_000


def test_without_scripts_the_numbers_are_there(browser: Any, tmp_path: Path) -> None:
    """Tables, cards and words; what needs scripts says so."""
    report = report_of(evolving(), tmp_path)
    with opened(browser, report, java_script_enabled=False) as page:
        assert not page.locator(".plot").first.is_visible()
        assert page.get_by_text("Charts need scripts").first.is_visible()
        assert page.get_by_text("The drawing needs scripts").is_visible()
        page.get_by_text("First and last architecture as a table").click()
        assert page.get_by_text("≠ changed").first.is_visible()
        assert page.locator("#decision-3 table").first.is_visible()
        assert not page.locator("#filter").is_visible()


def test_hostile_names_stay_text(browser: Any, tmp_path: Path) -> None:
    """In cards, charts, tooltips, the drawing and the readings: shown, never run."""

    def poison(value: Any, key: str = "") -> Any:
        if key in ("event", "verdict") or not isinstance(value, str | list | dict):
            return value
        if isinstance(value, str):
            return value if key in ("from", "name", "at", "shape") else HOSTILE
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        return {name: poison(item, name) for name, item in value.items()}

    events = [poison(event) for event in evolving()]
    for event in events:
        if event["event"] == "proposal":
            event["at"] = HOSTILE
    report = report_of(events, tmp_path, title=HOSTILE, name=HOSTILE, against={HOSTILE * 2: events})
    with opened(browser, report, viewport=PHONE) as page:
        assert page.locator("h1").inner_text().startswith("<script>")
        page.mouse.move(*spot(page, 0, 1))
        assert "<script>" in page.locator(".tip").first.inner_text()
        page.locator("#earlier").click()
        assert "<script>" in page.locator("#told").inner_text()
        assert "<script>" in page.locator("#grid th").first.inner_text()
        assert page.locator("img").count() == 0
        assert overflow(page) <= 0


@pytest.mark.parametrize("value", [0.0, -3.0, 1e99, 1e308, 1e-320])
def test_extreme_runs_are_drawn(value: float, browser: Any, tmp_path: Path) -> None:
    """One epoch, a constant, a diverged value beside others; steps far apart."""
    events: list[dict[str, Any]] = [
        {"event": "epoch", "step": step, "holdout_loss": loss, "parameters": abs(value)}
        for step, loss in ((1, value), (10**12, 1.0), (10**12 + 1, None))
    ]
    events.append({"event": "proposal", "id": 1, "step": 5, "kind": "K"})
    for count in (1, 4):
        with opened(browser, report_of(events[:count], tmp_path)) as page:
            assert overflow(page) <= 0


def test_nothing_yet(browser: Any, tmp_path: Path) -> None:
    """An empty journal, and a run that has only begun."""
    for events in ([], full_run()[:1]):
        with opened(browser, report_of(events, tmp_path)) as page:
            assert complaints(page) == []


def long_run(mutations: int) -> list[dict[str, Any]]:
    """A run of a model of 60 layers, through the recorder of real runs."""
    sizes = [32] * 61
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    chronicle = Chronicle(
        None, model, lambda: capture(model, (torch.zeros(1, model[0].in_features),))
    )
    state = State(count_parameters(model), 1000)
    chronicle.start(1000, Limits(10**6, None), Settings(epochs=mutations), state)
    chosen = torch.Generator().manual_seed(0)
    for epoch in range(1, mutations + 1):
        chronicle.epoch_number, chronicle.step = epoch, 100 * epoch
        loss = 2.0 / epoch**0.3
        readings = [
            Reading(signal, f"{k}.out", loss * k, "bits", 0.01, 512)
            for k in range(60)
            for signal in ("effective_rank", "growth_gain")
        ]
        if epoch % 10 == 0:
            chronicle.survey(readings)
        place = int(torch.randint(0, 59, (1,), generator=chosen))
        name = f"{place}.out"
        candidate = Candidate(
            Widen(name, by=1), 0.01 / epoch, 0.01, 65, 130, tuple(readings[:4]), "idle"
        )  # fmt: skip
        why = f"'{name}' uses 98% of its directions and its least needed unit is worth 1.02 nats"
        number = chronicle.proposal(Decision(candidate, why), candidate)
        before = count_parameters(model)
        outcome = ("kept", "rolled_back", "kept", "refused")[epoch % 4]
        old = model[place], model[place + 1]
        if outcome != "refused":
            width = old[0].out_features + 1
            model[place] = nn.Linear(old[0].in_features, width)
            model[place + 1] = nn.Linear(width, old[1].out_features)
            after = count_parameters(model)
            chronicle.applied(number, Applied(candidate.edit, "widen", before, after, 1e-7, 0.01))
        chronicle.step += 50
        if outcome == "rolled_back":
            model[place], model[place + 1] = old
        chronicle.verdict(number, outcome, "held-out loss 0.05 where 0.09 was expected")
        score = HoldoutScore(loss, 0.01, 400, ())
        chronicle.epoch(score, 1 - loss / 3, count_parameters(model), 2000, 10**6 + before)
    chronicle.end(2000, 60.0, 3.0)
    return chronicle.journal.events


def test_a_run_of_500_mutations_stays_small_and_opens(browser: Any, tmp_path: Path) -> None:
    """Below 6 MB; cards closed; every mark and moment there; usable and open to all."""
    report = report_of(long_run(500), tmp_path)
    assert os.path.getsize(report) < 6_000_000
    with opened(browser, report) as page:
        assert page.locator("details.card").count() == 500
        assert page.locator("details.card[open]").count() == 0
        assert page.locator("#moment").get_attribute("max") == "500"
        page.mouse.click(*spot(page, 0, 250))
        assert page.locator("#decision-250").evaluate("card => card.open")
        assert overflow(page) <= 0


def test_a_run_under_way_can_be_read(browser: Any, tmp_path: Path) -> None:
    """Its last line is torn; the page says that the run goes on."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for event in evolving()[:12]:
            keep = {k: v for k, v in event.items() if k not in ("schema", "seq", "event", "time")}
            journal.write(event["event"], **keep)
    path.write_bytes(path.read_bytes() + b'{"schema":1,"seq":')
    with opened(browser, report_of(read_journal(path), tmp_path)) as page:
        assert page.get_by_text("Unfinished").is_visible()
