"""How masks are named: the mask of ``fc.weight`` is the buffer ``fc.nx_mask_weight``."""

from __future__ import annotations

MASK = "nx_mask_"


def is_mask(name: str) -> bool:
    """Whether a tensor's name is that of a mask.

    Example:
        >>> is_mask("fc.nx_mask_weight"), is_mask("fc.weight")
        (True, False)
    """
    return name.rpartition(".")[2].startswith(MASK)


def mask_of(name: str) -> str:
    """The name of a parameter's mask.

    Example:
        >>> mask_of("fc.weight"), mask_of("weight")
        ('fc.nx_mask_weight', 'nx_mask_weight')
    """
    owner, dot, leaf = name.rpartition(".")
    return f"{owner}{dot}{MASK}{leaf}"
