"""The evolved model without this library: a Python file, a program, ONNX, a pretrained folder.

======================== ================================================= ======================
writer                   makes                                             needs afterwards
======================== ================================================= ======================
:func:`write_python`     a file that edits the user's own model, weights   torch, the user's class
:func:`write_program`    a ``torch.export`` program                        torch
:func:`write_onnx`       an ONNX file, checked by onnxruntime              any ONNX runtime
:func:`write_pretrained` config and weights as ``save_pretrained`` does    transformers
======================== ================================================= ======================
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture.masks import is_mask, mask_of
from neuroexapt.capture.run import opened
from neuroexapt.edit import is_branch, original_class
from neuroexapt.errors import CheckpointError
from neuroexapt.guard import inner_module
from neuroexapt.guard.contents import contents
from neuroexapt.record.standalone import source_of

TOLERANCE = 1e-5  # largest difference of an output, relative to the largest entry


def write_python(model: nn.Module, path: str | Path) -> tuple[Path, Path]:
    """Write a Python file that turns the user's freshly built model into this one.

    It needs torch alone. Beside it the values are written, as a file of tensors that
    ``torch.load(..., weights_only=True)`` reads.

    Args:
        model: the evolved model.
        path: the file, such as ``evolved.py``.

    Returns:
        The file, and that of the weights.

    Raises:
        CheckpointError: an edit added a module of a class that is not this library's, or the disk
            refuses.

    Example:
        >>> import tempfile
        >>> from neuroexapt import Narrow, apply
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> done = apply(net, Narrow("0", to=2), (torch.ones(4, 2),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     code, weights = write_python(net, f"{folder}/evolved.py")
        ...     print("_set(model, '0', 'out_features', 2)" in code.read_text())
        True
    """
    inner, path = inner_module(model), Path(path)
    held, weights = contents(inner), path.with_suffix(".pt")
    text = source_of(held, original_class(inner), weights.name)
    values = {name: t.detach().cpu() for name, t in unmasked(held.tensors).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(values, weights)
        path.write_text(text, encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise _refused(path, error) from error
    return path, weights


def program_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> torch.export.ExportedProgram:
    """The program of a model in evaluation mode; the model is left as it was.

    Raises:
        CheckpointError: torch cannot export it; torch's reason is given.
    """
    with _evaluating(inner_module(model)) as inner, _quiet():
        try:
            return torch.export.export(inner, args, dict(kwargs or {}), strict=False)
        except Exception as error:  # torch raises many kinds, and so may the forward
            raise _unable("torch.export", error) from error


def write_program(
    model: nn.Module,
    path: str | Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Write a ``torch.export`` program, which needs neither this library nor the user's class.

    Args:
        model: the evolved model; it is exported in evaluation mode.
        path: the file, such as ``evolved.pt2``.
        args: an example input; the program takes inputs of its shapes.
        kwargs: keyword example input.

    Raises:
        CheckpointError: torch cannot export it, what it exports computes something else, or the
            disk refuses.
    """
    path, program = Path(path), program_of(model, args, kwargs)
    with _evaluating(inner_module(model)) as inner, torch.no_grad():
        wanted = _tensors(inner(*args, **dict(kwargs or {})))
        found = _tensors(program.module()(*args, **dict(kwargs or {})))
    _check_same("torch.export", wanted, found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _quiet():
            torch.export.save(program, path)
    except (OSError, RuntimeError) as error:
        raise _refused(path, error) from error
    return path


def write_onnx(
    model: nn.Module,
    path: str | Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Write an ONNX file and compare what onnxruntime makes of it with the model.

    Args:
        model: the evolved model; it is exported in evaluation mode.
        path: the file, such as ``evolved.onnx``.
        args: an example input; the file takes inputs of its shapes.
        kwargs: keyword example input.

    Raises:
        CheckpointError: torch cannot export it, the outputs differ, the disk refuses, or the extra
            ``neuroexapt[export]`` is not installed.
    """
    runtime = _needed("onnxruntime", "onnxscript", "onnx")
    path, program = Path(path), program_of(model, args, kwargs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _quiet():
            made = torch.onnx.export(
                program, args, kwargs=dict(kwargs or {}), dynamo=True, verbose=False
            )
            assert made is not None
            made.save(str(path))
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except OSError as error:
        raise _refused(path, error) from error
    except Exception as error:  # the exporters' errors have no common class
        raise _unable("torch.onnx.export", error) from error
    inputs = [value for value in _tensors((args, dict(kwargs or {})))]
    names = [one.name for one in session.get_inputs()]
    fed = {name: value.detach().cpu().numpy() for name, value in zip(names, inputs, strict=False)}
    with _evaluating(inner_module(model)) as inner, torch.no_grad():
        wanted = _tensors(inner(*args, **dict(kwargs or {})))
    found = [torch.from_numpy(one) for one in session.run(None, fed)]
    _check_same("onnxruntime", wanted, found)
    return path


def write_pretrained(model: nn.Module, folder: str | Path) -> Path:
    """Write config and weights as ``save_pretrained``, where the config says all that edits did.

    The folder is read by ``from_pretrained`` of the model's own class, without this library.

    Args:
        model: a model of ``transformers``.
        folder: where to write.

    Raises:
        CheckpointError: the model has no ``save_pretrained``, or its config cannot express what
            edits did; the message names the first tensor that a model built from it does not have
            or has in another shape.
    """
    inner, folder = inner_module(model), Path(folder)
    write, config = getattr(inner, "save_pretrained", None), getattr(inner, "config", None)
    if not callable(write) or config is None:
        raise CheckpointError(
            type(inner).__name__,
            seen="a model without save_pretrained",
            needed="a model of transformers",
            next_step="export Python, a program or ONNX instead",
        )
    kind: Any = original_class(inner)
    with torch.device("meta"):
        plain = kind(copy.deepcopy(config))
    own = unmasked(inner.state_dict())
    odd = _first_odd(own, plain.state_dict())
    inserted = [path for path, _ in inner.named_modules() if is_branch(path.rpartition(".")[2])]
    if odd or inserted:
        raise CheckpointError(
            odd or inserted[0],
            seen=f"another tensor than a {kind.__name__} built from this config has"
            if odd
            else "a module that an edit added, which no config builds",
            needed="a config that expresses every edit",
            next_step="edit all layers alike, or export Python, a program or ONNX instead",
        )
    try:
        # The class that edits gave the model is not one that from_pretrained could find.
        twin = plain.to_empty(device="cpu")
        twin.load_state_dict(own, strict=True)
        _fill_transient(twin, inner)
        twin.save_pretrained(folder)
    except (OSError, RuntimeError) as error:
        raise _refused(folder, error) from error
    return folder


def unmasked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as the forward reads them: zero where a mask says so, and no masks.

    An optimizer that mixes entries may have filled what is stored behind a mask.
    """
    found = {}
    for name, tensor in tensors.items():
        mask = tensors.get(mask_of(name))
        if not is_mask(name):
            found[name] = tensor if mask is None else tensor.detach() * mask
    return found


def _fill_transient(twin: nn.Module, model: nn.Module) -> None:
    """Buffers that no state dict holds: the folder does not either, but they are not left empty."""
    held = dict(model.named_buffers())
    with torch.no_grad():
        for name, buffer in twin.named_buffers():
            if name in held and held[name].shape == buffer.shape:
                buffer.copy_(held[name])


def _first_odd(own: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> str | None:
    names = sorted(own.keys() ^ plain.keys())
    odd = [n for n, t in own.items() if n in plain and t.shape != plain[n].shape]
    return next(iter([*names, *odd]), None)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[nn.Module]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of what they themselves do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in opened(value) if isinstance(leaf, Tensor)]


def _check_same(what: str, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    if len(wanted) != len(found):
        raise _unable(what, ValueError(f"{len(found)} outputs, {len(wanted)} of the model"))
    for one, other in zip(wanted, found, strict=True):
        if one.shape != other.shape:
            raise _unable(what, ValueError(f"an output of shape {tuple(other.shape)}"))
        gap = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
        scale = max(1.0, one.double().abs().max().item()) if one.numel() else 1.0
        if not gap <= TOLERANCE * scale:
            raise _unable(what, ValueError(f"outputs that differ by {gap:.3g}"))


def _needed(*names: str) -> Any:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            "ONNX",
            seen=f"no {missing[0]}",
            needed="the extra for exports",
            next_step="pip install 'neuroexapt[export]'",
        )
    return importlib.import_module(names[0])


def _unable(what: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [""]
    return CheckpointError(
        what,
        seen=f"{type(error).__name__}: {lines[0][:300]}",
        needed="a model that it can export",
        next_step="export Python instead, or make the forward one that torch can follow",
    )


def _refused(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        str(path),
        seen=str(error)[:300],
        needed="a path that can be written",
        next_step="choose another path, or free some space",
    )
