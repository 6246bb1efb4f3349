"""The command line, as a user types it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from neuroexapt.cli import app

RUNNER = CliRunner()


def inspect(*arguments: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, ["inspect", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_inspect_shows_widths_ties_and_reasons() -> None:
    """The reference CNN: four widths, and the input pinned."""
    code, output = inspect("tests.zoo:ReferenceCNN", "--input", "2,3,32,32")
    assert code == 0
    for text in ("features.0.out", "classifier.1.out", "features.4.weight[1]", "contract"):
        assert text in output


def test_inspect_prints_json_for_programs() -> None:
    """The same as data."""
    code, output = inspect("tests.zoo:ReferenceCNN", "--input", "2,3,32,32", "--json")
    assert code == 0
    data = json.loads(output)
    assert data["widths"]["features.8.out"]["size"] == 128
    assert {"tensor": "classifier.1.weight", "dim": 1, "roles": ["consumer"]} in data["widths"][
        "features.8.out"
    ]["appearances"]
    assert "contract" in data["pinned"]["features.0.in"]["reason"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nowhere:Net", "--input", "1"), "importable"),
        (("tests.zoo:Nothing", "--input", "1"), "importable"),
        (("tests.zoo", "--input", "1"), "package.module:factory"),
        (("collections:OrderedDict", "--input", "1"), "torch.nn.Module"),
        (("tests.zoo:ReferenceCNN", "--input", "three"), "--input 1,3,32,32"),
        (("tests.zoo:ReferenceCNN", "--input", "half:1"), "int:"),
        (("tests.zoo:ReferenceCNN", "--input", "1,0,8,8"), "1 or more"),
        (("torch.nn:Linear", "--input", "1,8"), "without arguments"),
        (("tests.zoo:ReferenceCNN", "--input", "2,4,32,32"), "features.0"),
    ],
)
def test_bad_input_ends_with_a_reason_and_exit_code_1(
    arguments: tuple[str, ...], text: str
) -> None:
    """No traceback: place, value seen, value needed, next step."""
    code, output = inspect(*arguments)
    assert code == 1
    assert text in output
    assert "Next step" in output
