"""Outside of the library the evolved model computes what it computes inside."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.operations import OPERATIONS
from tests.laws.test_table import row
from tests.laws.world import NAMES, mapped
from tests.record.test_checkpoint import ScaledSpec, net, scaled, stage
from torch import Tensor, nn
from typer.testing import CliRunner

from neuroexapt import (
    InsertAttention,
    InsertConv,
    InsertLayer,
    InsertResidual,
    Narrow,
    NeuroExaptError,
    PruneWeights,
    RemoveLayer,
    Widen,
    apply,
    save,
    transaction,
)
from neuroexapt.cli import app
from neuroexapt.edit import Edit
from neuroexapt.errors import CheckpointError
from neuroexapt.record.export import (
    write_onnx,
    write_pretrained,
    write_program,
    write_python,
)
from neuroexapt.testing.world import World, world

ALL = bool(os.environ.get("NEUROEXAPT_ALL_EXPORTS"))
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
# In CI: a model and the operations that are written in unlike ways.
FEW = ("Narrow", "InsertConv", "InsertLayer copy", "InsertResidual over a span", "RemoveLayer")

# Run where neuroexapt cannot be imported: makes each model anew, and compares bit by bit.
OUTSIDE = """
import sys
sys.modules["neuroexapt"] = None
import copy, importlib.util, json, pickle, torch
from tests import zoo

for name, stem in json.load(open(sys.argv[1])):
    spec = importlib.util.spec_from_file_location("evolved", f"{stem}.py")
    evolved = importlib.util.module_from_spec(spec)
    sys.modules["evolved"] = evolved
    spec.loader.exec_module(evolved)
    model = evolved.fill(evolved.evolve(zoo.build(name)), f"{stem}.pt").eval()
    args, kwargs, wanted = torch.load(f"{stem}.io", weights_only=True)
    twins = (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    with torch.no_grad():
        gaps = [float((zoo.flat(m(*args, **kwargs)) - wanted).abs().max()) for m in twins]
    # A product with a mask may lie otherwise in memory, and take another kernel.
    assert max(gaps) <= (1e-5 if "Prune" in stem else 0), (stem, gaps)
    model.train()
    zoo.flat(model(*args, **kwargs)).square().mean().backward()
    print("equal")
"""


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


def edited(name: str, operation: str) -> tuple[Edit, World] | None:
    """A model in training with the first edit of an operation that it takes."""
    single = world(row(name), mapped(name))
    for edit in OPERATIONS[operation](single.axes, single.model):
        try:
            with transaction(single.model, single.optimizer) as tx:
                tx.apply(edit, single.args, single.kwargs, axes=single.axes)
        except NeuroExaptError:
            continue
        return edit, single
    return None


def cells(names: Any, operations: Any) -> Iterator[tuple[str, Edit, World]]:
    for name in names:
        for operation in operations:
            made = edited(name, operation)
            if made is not None:
                yield name, *made


def outputs(single: World) -> Tensor:
    from tests import zoo

    with torch.no_grad():
        return zoo.flat(single.model.eval()(*single.args, **single.kwargs))


@pytest.mark.parametrize("names", [(name,) for name in NAMES] if ALL else [("small_cnn", "lstm")])
def test_the_python_file_makes_the_same_model_without_this_library(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    """Every operation; bit for bit but for masks, copies and pickles too, and it can be trained."""
    made = []
    for number, (name, edit, single) in enumerate(cells(names, OPERATIONS)):
        stem = str(tmp_path / f"evolved{number}{type(edit).__name__}")
        write_python(single.model, f"{stem}.py")
        torch.save((single.args, dict(single.kwargs), outputs(single)), f"{stem}.io")
        made.append((name, stem))
    (tmp_path / "list.json").write_text(json.dumps(made))
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(tmp_path / "list.json")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["equal"] * len(made)
    assert len(made) >= len(OPERATIONS) // 3


@pytest.mark.parametrize("name", NAMES if ALL else ["small_cnn"])
def test_torch_export_makes_the_same_program(name: str, tmp_path: Path) -> None:
    """Saved, read back without the class, equal within 1e-5; the model is left as it was."""
    for _, _, single in cells([name], OPERATIONS if ALL else FEW):
        single.model.train()
        path = write_program(single.model, tmp_path / "evolved.pt2", single.args, single.kwargs)
        assert single.model.training
        program = torch.export.load(path).module()
        from tests import zoo

        with torch.no_grad():
            found = zoo.flat(program(*single.args, **single.kwargs))
        assert (found - outputs(single)).abs().max() <= 1e-5 * max(1.0, float(found.abs().max()))


@pytest.mark.parametrize("name", NAMES if ALL else ["small_cnn"])
def test_onnxruntime_computes_the_same(name: str, tmp_path: Path) -> None:
    """`write_onnx` compares; here it is seen that it can fail."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for _, _, single in cells([name], OPERATIONS if ALL else FEW[1:3]):
        assert write_onnx(single.model, tmp_path / "evolved.onnx", single.args, single.kwargs)


def test_a_chain_of_edits_is_one_file(tmp_path: Path) -> None:
    """Edits on edits, of what was inserted, of a part by itself."""
    from tests import zoo

    model = zoo.build("resnet_basic")
    for edit in (
        InsertConv("layer1.0.conv1"),
        InsertLayer("layer1.1", "copy"),
        Widen("conv1", by=4),
        InsertAttention("layer1.0"),
        RemoveLayer("layer2.1"),
        InsertResidual("layer1.0", to="layer1.1"),
        PruneWeights("layer1.1.*", share=0.3),
        Narrow("layer1.0.conv1", by=2),
    ):
        apply(model, edit, (IMAGES,))
    model.eval()
    write_python(model, tmp_path / "evolved.py")
    with torch.no_grad():
        torch.save(((IMAGES,), {}, zoo.flat(model(IMAGES))), tmp_path / "evolved.io")
    (tmp_path / "list.json").write_text(json.dumps([("resnet_basic", str(tmp_path / "evolved"))]))
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(tmp_path / "list.json")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.stdout.split() == ["equal"], done.stderr[-2000:]


def test_masks_are_zeros_whatever_is_stored_behind_them(tmp_path: Path) -> None:
    """An optimizer that mixes entries may fill them; the forward does not see it."""
    model = net()
    apply(model, PruneWeights("0.weight", share=0.5), (X,))
    apply(model, Widen("0", by=2), (X,))
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"].add_(1.0)
    _, weights = write_python(model, tmp_path / "evolved.py")
    held = torch.load(weights, weights_only=True)
    assert torch.equal(held["0.weight"], model[0].weight)
    assert int((held["0.weight"] == 0).sum()) == 16
    assert not any("nx_mask" in line for line in (tmp_path / "evolved.py").read_text().split())


def test_what_a_config_can_say_is_a_pretrained_folder(tmp_path: Path) -> None:
    """Layers narrowed alike are read by the class itself; one alone is refused by name."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=19, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 19, (2, 6))
    inputs = ((ids,), {"use_cache": False})
    apply(model, Narrow("*.mlp.gate_proj.out", to=16), *inputs)
    apply(model, PruneWeights("*.q_proj.weight", share=0.5), *inputs)
    folder = write_pretrained(model, tmp_path / "alike")
    again = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    assert again.config.intermediate_size == 16
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)
    alone = copy.deepcopy(model)
    apply(alone, Narrow("model.layers.0.mlp.gate_proj.out", to=8), *inputs)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp"):
        write_pretrained(alone, tmp_path / "alone")
    grown = copy.deepcopy(model)
    apply(grown, InsertLayer("model.layers.0"), *inputs)
    with pytest.raises(CheckpointError, match="nx_after"):
        write_pretrained(grown, tmp_path / "grown")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        write_pretrained(net(), tmp_path / "net")


class Choosing(nn.Module):
    """A forward that asks a value, which no exporter can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum().item() > 0 else x


def test_what_cannot_be_exported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own, a branch on data, a missing extra, outputs that differ."""
    model = net()
    stage(model, scaled("2"))
    with pytest.raises(CheckpointError, match=f"{ScaledSpec.__name__}|register"):
        write_python(model, tmp_path / "evolved.py")
    with pytest.raises(CheckpointError, match=r"torch\.export"):
        write_program(Choosing(), tmp_path / "evolved.pt2", (X,))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(CheckpointError, match=r"neuroexapt\[export\]"):
            write_onnx(net(), tmp_path / "evolved.onnx", (X,))
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T)
        program = torch.export.export(net().eval(), (X,))
    monkeypatch.setattr("neuroexapt.record.export.program_of", lambda *_: program)
    with pytest.raises(CheckpointError, match="outputs that differ"):
        write_program(net(), tmp_path / "evolved.pt2", (X,))


def test_the_command_exports_a_checkpoint(tmp_path: Path) -> None:
    """`neuroexapt export RUN`; bad input ends with a reason."""
    from tests import zoo

    model = zoo.build("small_cnn")
    apply(model, Narrow("features.0", by=2), (IMAGES,))
    save(tmp_path / "run", model)

    def export(*arguments: str) -> tuple[int, str]:
        told = ["export", str(tmp_path / "run"), "--model", "tests.zoo:SmallCNN", *arguments]
        result = CliRunner().invoke(app, told, env={"COLUMNS": "200"})
        return result.exit_code, result.output

    code, output = export("--to", "python", "--out", str(tmp_path / "evolved.py"))
    assert code == 0, output
    assert "evolved.py" in output
    assert (tmp_path / "evolved.pt").exists()
    code, output = export("--to", "program", "--out", str(tmp_path / "evolved.pt2"))
    assert code == 1
    assert "--input" in output
    shape = ("--input", "2,3,16,16")
    code, output = export("--to", "program", "--out", str(tmp_path / "evolved.pt2"), *shape)
    assert code == 0, output
    assert torch.export.load(tmp_path / "evolved.pt2").module()(IMAGES).shape == (2, 10)
    code, output = export("--to", "tf", "--out", str(tmp_path / "x"))
    assert code == 1
    assert "pretrained" in output
