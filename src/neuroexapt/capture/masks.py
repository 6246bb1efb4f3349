"""How masks are named: the mask of ``fc.weight`` is the buffer ``fc.nx_mask_weight``."""

from __future__ import annotations

from collections.abc import Collection

MASK = "nx_mask_"


def is_mask(name: str) -> bool:
    """Whether a tensor's name is that of a mask.

    Example:
        >>> is_mask("fc.nx_mask_weight"), is_mask("fc.weight")
        (True, False)
    """
    return name.rpartition(".")[2].startswith(MASK)


def masks_among(names: Collection[str]) -> frozenset[str]:
    """The names of masks: ours, and torch.nn.utils.prune's, which stand beside what they mask.

    Example:
        >>> sorted(masks_among({"a.weight_orig", "a.weight_mask", "b.pad_mask", "c.nx_mask_w"}))
        ['a.weight_mask', 'c.nx_mask_w']
    """
    beside = {f"{name.removesuffix('_orig')}_mask" for name in names if name.endswith("_orig")}
    return frozenset(name for name in names if is_mask(name) or name in beside)


def mask_of(name: str) -> str:
    """The name of a parameter's mask.

    Example:
        >>> mask_of("fc.weight"), mask_of("weight")
        ('fc.nx_mask_weight', 'nx_mask_weight')
    """
    owner, dot, leaf = name.rpartition(".")
    return f"{owner}{dot}{MASK}{leaf}"
