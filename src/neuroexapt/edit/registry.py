"""Edits and specs by name, so that what is written down about one finds its class again."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import MappingProxyType
from typing import TypeVar

from neuroexapt.capture.trace import Opaque
from neuroexapt.edit.base import Edit
from neuroexapt.edit.branches import Spec
from neuroexapt.edit.passage import Given, Nothing
from neuroexapt.errors import EditError

Kind = TypeVar("Kind", bound=type)
_KINDS: dict[str, type[Edit]] = {}
# What a spec may hold besides plain values: the words in which a passage answers.
_SPECS: dict[str, type] = {"Given": Given, "Nothing": Nothing, "Opaque": Opaque}


def register(kind: Kind) -> Kind:
    """Make an edit, or a spec of what edits insert, known by the name of its class.

    Usable as a decorator. Without it an edit works; a registered spec besides is saved in
    checkpoints, by its fields.

    Invariant: one name means one class. A class defined again under its own module and name (in
    a notebook, by a reload) takes the place of the one before.

    Args:
        kind: a subclass of :class:`Edit`, or of :class:`Spec` that is a frozen dataclass.

    Raises:
        EditError: it is neither, or another class has this name.

    Example:
        >>> from neuroexapt.edit import Narrow, kind_named
        >>> register(Narrow) is Narrow is kind_named("Narrow")
        True
    """
    is_spec = isinstance(kind, type) and issubclass(kind, Spec) and is_dataclass(kind)
    if not (is_spec or (isinstance(kind, type) and issubclass(kind, Edit))):
        raise EditError(
            repr(kind),
            seen=f"a {type(kind).__name__}",
            needed="a subclass of neuroexapt.edit.Edit, or a dataclass that is a Spec",
            next_step="register the class itself, not an instance",
        )
    known = _KINDS.get(kind.__name__) or _SPECS.get(kind.__name__) or kind
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise EditError(
            kind.__name__,
            seen=f"{kind.__module__}.{kind.__qualname__}",
            needed=f"another name: {known.__module__}.{known.__qualname__} has this one",
            next_step="rename the class",
        )
    (_SPECS if is_spec else _KINDS)[kind.__name__] = kind
    return kind


def registered() -> Mapping[str, type[Edit]]:
    """All edits known by name; a view that follows later registrations."""
    return MappingProxyType(_KINDS)


def registered_specs() -> Mapping[str, type]:
    """All specs known by name, and what they are made of; a view likewise."""
    return MappingProxyType(_SPECS)


def kind_named(name: str) -> type[Edit]:
    """The edit of a name.

    Raises:
        EditError: no edit has it; near names are suggested.
    """
    if name in _KINDS:
        return _KINDS[name]
    near = difflib.get_close_matches(name, _KINDS, n=3, cutoff=0.4) or sorted(_KINDS)
    raise EditError(
        name,
        seen="no edit of this name",
        needed="the name of a registered edit",
        next_step=f"import the module that registers it, or use one of {', '.join(near)}",
    )
