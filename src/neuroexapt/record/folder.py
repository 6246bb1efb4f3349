"""A checkpoint's folder: written whole or not at all, and read with nothing taken on trust.

Files are JSON and safetensors. ``manifest.json`` is written last, names all others, and has the
size and the SHA-256 of each. The folder is made under a temporary name, brought to the disk, and
renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuroexapt.edit.data import DTYPES, as_count, as_dict, as_list, as_shape, as_text
from neuroexapt.errors import CheckpointError, NoCheckpointError
from neuroexapt.guard.forms import Form, empty, form_of, is_dense

FORMAT, SCHEMA = "neuroexapt checkpoint", 1
_MANIFEST = "manifest.json"
_FILE = re.compile(r"[a-z][a-z0-9_]{0,40}\.(json|safetensors)")
_NUMBERED = re.compile(r"\d{8}")
_WRITING, _GOING = ".writing-", ".going-"
_MOST_JSON = 2**26  # bytes of a JSON file; those of a run with thousands of edits take a tenth
_COMPLEX = {torch.complex128: torch.float64, torch.complex64: torch.float32}


@dataclass
class Files:
    """What a checkpoint's folder is to hold.

    Attributes:
        data: JSON values by file name.
        tensors: tensors by file name and name.
    """

    data: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def keep(self, file: str, name: str, tensor: Tensor) -> dict[str, Any]:
        """Take a tensor, and return its form as data.

        Raises:
            CheckpointError: it holds no plain numbers.
        """
        plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not plain or type(tensor.data) is not Tensor:
            raise CheckpointError(
                name,
                seen=f"a {type(tensor.data).__name__} ({tensor.layout}, {tensor.device})",
                needed="a plain tensor with values",
                next_step="gather, densify or dequantise it before saving",
            )
        self.tensors.setdefault(file, {})[name] = tensor.detach()
        return form_data(form_of(tensor))


def form_data(form: Form) -> dict[str, Any]:
    """A form as data."""
    data = {"shape": list(form.shape), "dtype": str(form.dtype).removeprefix("torch.")}
    return {**data, **({"strides": list(form.strides)} if form.strides else {})}


def form_from(data: Any, place: str) -> Form:
    """A form that data describe.

    Raises:
        CheckpointError: they describe none.
    """
    held = as_dict(data, place)
    shape = as_shape(held.get("shape"), place)
    dtype = DTYPES.get(as_text(held.get("dtype"), place))
    if dtype is None:
        raise damaged(place, f"the dtype {held['dtype']!r}"[:100], "a dtype of torch")
    if "strides" not in held:
        return Form(shape, dtype)
    strides = tuple(as_count(step, place) for step in as_list(held["strides"], place))
    if not is_dense(shape, strides):
        raise damaged(place, f"strides {strides}"[:100], f"strides of {shape} without gaps")
    return Form(shape, dtype, strides)


def write_folder(parent: Path, files: Files, keep: int) -> Path:
    """Write the next numbered folder; remove all but the last ``keep``.

    Raises:
        CheckpointError: the disk refuses; what was there before is untouched.
    """
    draft = parent / f"{_WRITING}{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        draft.mkdir()
        _fill(draft, files)
        numbers = [int(path.name) for path in numbered(parent)]
        final = parent / f"{max(numbers, default=0) + 1:08d}"
        os.rename(draft, final)
        _sync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            str(parent),
            seen=str(error),
            needed="a folder that can be written, with room for the checkpoint",
            next_step="free some space or choose another path; earlier checkpoints are whole",
        ) from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # the new one is whole; old ones go at the next save
        for old in numbered(parent)[:-keep]:
            going = parent / f"{_GOING}{old.name}"
            os.rename(old, going)
            shutil.rmtree(going)
    return final


def numbered(parent: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in parent.iterdir() if _NUMBERED.fullmatch(path.name)]
    return sorted(path for path in found if path.is_dir())


def _sweep(parent: Path) -> None:
    """What a process left that was killed while it wrote or removed one."""
    for path in parent.iterdir():
        if path.name.startswith((_WRITING, _GOING)):
            shutil.rmtree(path, ignore_errors=True)


def _fill(folder: Path, files: Files) -> None:
    for name, tensors in files.tensors.items():
        save_file(_apart(tensors), str(folder / name))
    for name, data in files.data.items():
        _write_json(folder / name, data)
    told = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        told[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    head = {"format": FORMAT, "schema": SCHEMA, "files": told}
    made = {"neuroexapt": metadata.version("neuroexapt"), "torch": str(torch.__version__)}
    _write_json(folder / _MANIFEST, {**head, "written_by": made})
    _sync(folder / _MANIFEST)
    _sync(folder)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, of dtypes that the format knows."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        plain = torch.view_as_real(tensor) if tensor.dtype in _COMPLEX else tensor
        plain = plain.resolve_conj().resolve_neg().to("cpu").contiguous()
        storage = plain.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != plain.nbytes
        found[name] = plain.clone() if shared and plain.numel() else plain
        seen.add(found[name].untyped_storage().data_ptr())
    return found


def _write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).encode("ascii")
    if len(text) > _MOST_JSON:
        raise CheckpointError(
            str(path),
            seen=f"{len(text)} bytes",
            needed=f"at most {_MOST_JSON}",
            next_step="pass large values as tensors",
        )
    path.write_bytes(text)


def _sync(path: Path) -> None:
    folder = path.is_dir()
    if folder and os.name != "posix":
        return  # other systems bring names to the disk with the files
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


class Opened:
    """A checkpoint's folder, checked: sizes and digests are those of its manifest.

    Args:
        path: a checkpoint, or the folder in which several are; the newest is taken then.

    Raises:
        CheckpointError: there is none, or it is damaged; the message names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = _chosen(path)
        manifest = self._manifest()
        self.files = as_dict(manifest.get("files"), f"{self.path / _MANIFEST}: files")
        for name, told in self.files.items():
            self._check(name, as_dict(told, f"{self.path / _MANIFEST}: files.{name}"[:300]))

    def _manifest(self) -> dict[str, Any]:
        place = str(self.path / _MANIFEST)
        manifest = as_dict(_read_json(self.path / _MANIFEST, 2**20), place)
        if manifest.get("format") != FORMAT:
            raise damaged(place, f"format {manifest.get('format')!r}"[:100], repr(FORMAT))
        schema = as_count(manifest.get("schema"), f"{place}: schema")
        if schema > SCHEMA:
            raise CheckpointError(
                place,
                seen=f"schema {schema}",
                needed=f"schema {SCHEMA} or older",
                next_step="read it with the newer neuroexapt that wrote it",
            )
        return manifest

    def _check(self, name: str, told: Mapping[str, Any]) -> None:
        if not _FILE.fullmatch(name):
            raise damaged(
                f"{self.path / _MANIFEST}: files", f"the name {name!r}"[:100], "a file's name"
            )
        path = self.path / name
        size = _size(path)
        if size != told.get("bytes"):
            raise damaged(str(path), f"{size} bytes", f"{told.get('bytes')!r}"[:40])
        if _digest(path) != told.get("sha256"):
            raise damaged(str(path), "other content than was written", "the SHA-256 told")

    def data(self, name: str) -> dict[str, Any]:
        """A JSON file of it, an object.

        Raises:
            CheckpointError: there is none of this name, or it is damaged.
        """
        if name not in self.files:
            raise damaged(str(self.path), f"no {name}", "a checkpoint with that file")
        return as_dict(_read_json(self.path / name, _MOST_JSON), str(self.path / name))

    @contextlib.contextmanager
    def tensors(self, name: str, forms: Mapping[str, Form]) -> Iterator[Tensors]:
        """The tensors of a file, whose names and forms must be those given.

        Raises:
            CheckpointError: they are others.
        """
        place = str(self.path / name)
        if not forms and name not in self.files:
            yield Tensors(place, None, forms)
            return
        if name not in self.files:
            raise damaged(str(self.path), f"no {name}", "a checkpoint with that file")
        try:
            with safe_open(place, framework="pt") as file:
                held = Tensors(place, file, forms)
                held.check()
                yield held
        except SafetensorError as error:
            raise damaged(place, str(error)[:200], "a safetensors file") from error


@dataclass(frozen=True)
class Tensors:
    """The tensors of an open file."""

    place: str
    file: Any
    forms: Mapping[str, Form]

    def check(self) -> None:
        """Compare names, shapes and dtypes, before any memory is taken."""
        names = set(self.file.keys())
        odd = sorted(names ^ self.forms.keys())
        if odd:
            where = "in the file alone" if odd[0] in names else "not in the file"
            raise damaged(f"{self.place}: {odd[0]}"[:300], where, "the tensors told beside it")
        for name, form in self.forms.items():
            part = self.file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), _stored_dtype(part.get_dtype())
            wanted = (*form.shape, 2) if form.dtype in _COMPLEX else form.shape
            if (shape, dtype) != (wanted, _COMPLEX.get(form.dtype, form.dtype)):
                seen = f"shape {shape}, {part.get_dtype()}"
                raise damaged(f"{self.place}: {name}"[:300], seen, f"{wanted}, {form.dtype}")

    def stored(self, name: str) -> Tensor:
        """A tensor as it stands in the file: to be copied from."""
        held: Tensor = self.file.get_tensor(name)
        return torch.view_as_complex(held) if self.forms[name].dtype in _COMPLEX else held

    def fetch(self, name: str, place: str) -> Tensor:
        """A tensor of its own, in its form."""
        if name not in self.forms:
            raise damaged(place[:300], f"the tensor {name!r}"[:200], "one that the file holds")
        return empty(self.forms[name], torch.device("cpu")).copy_(self.stored(name))


_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_STORED |= {f"{kind}{size}": f"{word}{size}" for kind, word in (("I", "int"), ("U", "uint"))
            for size in (8, 16, 32, 64)}  # fmt: skip
_STORED |= {"BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_STORED |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}


def _stored_dtype(name: str) -> torch.dtype | None:
    return DTYPES.get(_STORED.get(name, ""))


def _chosen(path: Path) -> Path:
    try:
        if (path / _MANIFEST).exists():
            return path
        found = numbered(path)
    except OSError as error:
        raise _missing(path, str(error)) from error
    if not found:
        raise _missing(path, "no checkpoint in it")
    return found[-1]


def _missing(path: Path, seen: str) -> NoCheckpointError:
    return NoCheckpointError(
        str(path),
        seen=seen,
        needed="a folder that neuroexapt.save wrote",
        next_step="check the path; a checkpoint that was cut short has no number yet",
    )


def _size(path: Path) -> int:
    try:
        found = os.lstat(path)
    except (OSError, ValueError) as error:
        raise damaged(str(path), str(error), "a file") from error
    if not stat.S_ISREG(found.st_mode):
        raise damaged(str(path), "no ordinary file", "one that neuroexapt.save wrote")
    return found.st_size


def _read_json(path: Path, most: int) -> Any:
    size = _size(path)
    if size > most:
        raise damaged(str(path), f"{size} bytes", f"at most {most}")
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError, OSError) as error:
        raise damaged(str(path), str(error)[:200], "JSON") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice in one object")
    return found


def damaged(place: str, seen: str, needed: str) -> CheckpointError:
    """An error about a file that is not as it was written."""
    return CheckpointError(
        place,
        seen=seen,
        needed=needed,
        next_step="the file is damaged or foreign: load another checkpoint",
    )
