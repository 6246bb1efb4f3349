"""A disk that refuses costs a checkpoint, never the one before it, and the run only if it wants."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neuroexapt import load, save
from neuroexapt.errors import CheckpointError, NoCheckpointError
from neuroexapt.record import folder


def net() -> nn.Linear:
    return nn.Linear(64, 64)


def kept(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 8 kB: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, request: Any) -> None:
    """A clear error; with `required=False` a warning, and training goes on."""
    model = net()
    save(tmp_path, model)
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    request.getfixturevalue("small_files")
    with pytest.raises(CheckpointError, match="room for the checkpoint"):
        save(tmp_path, model)
    with pytest.warns(UserWarning, match="no checkpoint was written"):
        assert save(tmp_path, model, required=False) is None
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before
    assert torch.equal(load(net, tmp_path).weight, model.weight)


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "save_file", "write_bytes"])
def test_an_error_at_any_write_leaves_what_was_there(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, the second, ... until a save goes through."""
    model = net()
    save(tmp_path, model)
    holder: Any = {"fsync": os, "rename": os, "save_file": folder}.get(call, Path)
    real, left = getattr(holder, call), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(holder, call, failing)
    for number in range(1, 20):
        left[0] = number
        with contextlib.suppress(CheckpointError):
            save(tmp_path, model)
        for name in kept(tmp_path):
            assert torch.equal(load(net, tmp_path / name).weight, model.weight)
        if left[0] > 0:
            break
    assert 1 < number < 20


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A read-only folder, or a file in its place."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="file"):
        save(tmp_path / "file", net())
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from neuroexapt.record.folder import Files, write_folder\n"
        "if os.getuid() == 0: os.setuid(65534)\n"  # nothing is read-only to root
        "try: write_folder(Path('.'), Files(), 1)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "locked",
        env={**os.environ, "PYTHONPATH": str(Path(folder.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    (tmp_path / "locked").chmod(0o755)
    assert "CheckpointError" in done.stdout, done.stdout + done.stderr
    assert "Permission denied" in done.stdout
    assert kept(tmp_path / "locked") == []


def test_what_a_killed_process_left_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    """Drafts have no number."""
    (tmp_path / ".writing-77").mkdir()
    (tmp_path / ".writing-77" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".going-00000001").mkdir()
    with pytest.raises(NoCheckpointError, match="no checkpoint in it"):
        load(net, tmp_path)
    save(tmp_path, net())
    assert kept(tmp_path) == ["00000001"]


def test_where_there_is_none_the_factory_is_not_called(tmp_path: Path) -> None:
    """It may open files, a journal for one."""
    with pytest.raises(NoCheckpointError):
        load(lambda: pytest.fail("called"), tmp_path / "nothing")
    assert kept(tmp_path) == []
