"""What `import neuroexapt` gives: a short list of documented names, and no other framework."""

from __future__ import annotations
import __future__

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import neuroexapt

# Twenty, and `save` and `load`: every run that changes a model needs them, since a plain state_dict
# fits no model that is built anew.
MAX_NAMES = 22
FRAMEWORKS = (
    "lightning",
    "transformers",
    "ray",
    "sklearn",
    "matplotlib",
    "mlflow",
    "tensorboard",
    "wandb",
)
NAMES = [name for name in neuroexapt.__all__ if name != "__version__"]


def visible(module: ModuleType) -> list[str]:
    """Public names that are neither submodules nor what `from __future__` leaves behind."""
    hidden = (ModuleType, type(__future__.annotations))
    names = {*dir(module), *NAMES}  # a name that is loaded on first use is not in dir() yet
    return sorted(
        name
        for name in names
        if not name.startswith("_") and not isinstance(getattr(module, name), hidden)
    )


def test_every_public_name_is_listed() -> None:
    assert sorted(NAMES) == visible(neuroexapt)


def test_the_list_of_public_names_is_short() -> None:
    assert len(NAMES) <= MAX_NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_docstring_of_its_own(name: str) -> None:
    thing = getattr(neuroexapt, name)
    text = (thing.__doc__ or "").strip()
    assert text, f"{name} has no docstring"
    # A dataclass without one is given its signature, an instance shows its class's.
    assert not text.startswith(f"{name}("), f"{name} has only the docstring dataclass made up"
    if not inspect.isclass(thing) and not inspect.isroutine(thing):
        assert text != (type(thing).__doc__ or "").strip() or type(thing).__module__.startswith(
            neuroexapt.__name__
        ), f"{name} has only the docstring of {type(thing).__name__}"


def test_importing_neuroexapt_loads_no_other_framework() -> None:
    source = Path(neuroexapt.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    code = f"import sys, neuroexapt; print(*[n for n in {FRAMEWORKS} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split() == [], f"import neuroexapt loads {done.stdout}"
