"""The demo keeps its word: no lower test accuracy, fewer parameters, by its own decisions."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch
from rich.console import Console

from neuroexapt import demo
from neuroexapt.errors import SettingsError
from neuroexapt.record import read_journal


def test_the_evolved_network_is_smaller_and_no_worse_over_three_seeds(tmp_path: Path) -> None:
    """Same splits, batches and steps for both; the journal holds every decision."""
    state = torch.get_rng_state()
    pairs = demo.run(out=tmp_path, console=Console(quiet=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pairs) == 3
    assert fmean(e.accuracy for _, e in pairs) >= fmean(f.accuracy for f, _ in pairs)
    for seed, (fixed, evolved) in enumerate(pairs):
        assert evolved.parameters < 0.5 * fixed.parameters
        events = read_journal(tmp_path / f"seed{seed}" / "journal.jsonl")
        kept = {e["id"] for e in events if e["event"] == "verdict" and e["verdict"] == "kept"}
        changes = [e for e in events if e["event"] == "proposal" and e["id"] in kept]
        assert {"Widen", "Narrow"} <= {change["kind"] for change in changes}
        report = (tmp_path / f"seed{seed}" / "report.html").read_text()
        assert all(change["at"] in report for change in changes)


@pytest.mark.parametrize(("middle", "squeezed"), [(2, True), (32, False)])
def test_only_a_squeezed_layer_is_widened(middle: int, squeezed: bool, tmp_path: Path) -> None:
    """Nothing is scripted: with 32 channels in the middle nobody asks for more there."""
    journal = tmp_path / "journal.jsonl"
    demo.train(demo.Digits.load(0), 0, 7, journal, lambda *_: None, lambda: demo.DigitsNet(middle))
    first = next(
        event
        for event in read_journal(journal)
        if event["event"] == "proposal" and event["kind"] != "AddRegularization"
    )
    assert ((first["kind"], first["at"]) == ("Widen", "features.3.out")) is squeezed


def test_splits_are_disjoint_and_cover_all_images() -> None:
    """1,797 images, each in one part."""
    digits = demo.Digits.load(0)
    parts = [digits.train, digits.holdout, digits.test]
    assert sum(len(labels) for _, labels in parts) == 1797
    other = demo.Digits.load(1)
    assert not torch.equal(digits.test[1], other.test[1])


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"epochs": 0}])
def test_numbers_below_one_are_refused(wrong: dict[str, int], tmp_path: Path) -> None:
    """With the option's name."""
    with pytest.raises(SettingsError):
        demo.run(out=tmp_path, console=Console(quiet=True), **wrong)
