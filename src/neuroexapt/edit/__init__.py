"""Edits as values: what to change, decided before anything is written.

Read :mod:`neuroexapt.edit.base` (the contract), :mod:`neuroexapt.edit.patch` (what an edit
decides) and one edit, :mod:`neuroexapt.edit.narrow`. Nothing in this room writes on a model.
"""

from neuroexapt.edit.attend import InsertAttention
from neuroexapt.edit.base import Edit
from neuroexapt.edit.branches import BranchSpec, Gate, Spec, build
from neuroexapt.edit.graft import (
    MASK,
    fitting_class,
    free_name,
    grafted_class,
    is_branch,
    original_class,
)
from neuroexapt.edit.insert import InsertConv
from neuroexapt.edit.narrow import Narrow, group_norm
from neuroexapt.edit.patch import (
    AttributeEdit,
    Decay,
    DimEdit,
    Insertion,
    Masking,
    Patch,
    Refold,
    Removal,
    Rewrite,
    Scaling,
    WidthStep,
)
from neuroexapt.edit.registry import kind_named, register, registered
from neuroexapt.edit.regularize import AddRegularization, StochasticDepth
from neuroexapt.edit.remove import RemoveLayer
from neuroexapt.edit.residual import InsertResidual
from neuroexapt.edit.resize import folded, resized, unit_sums
from neuroexapt.edit.widen import Widen

__all__ = [
    "MASK",
    "AddRegularization",
    "AttributeEdit",
    "BranchSpec",
    "Decay",
    "DimEdit",
    "Edit",
    "Gate",
    "InsertAttention",
    "InsertConv",
    "InsertResidual",
    "Insertion",
    "Masking",
    "Narrow",
    "Patch",
    "Refold",
    "Removal",
    "RemoveLayer",
    "Rewrite",
    "Scaling",
    "Spec",
    "StochasticDepth",
    "Widen",
    "WidthStep",
    "build",
    "fitting_class",
    "folded",
    "free_name",
    "grafted_class",
    "group_norm",
    "is_branch",
    "kind_named",
    "original_class",
    "register",
    "registered",
    "resized",
    "unit_sums",
]

for _kind in (AddRegularization, InsertConv, InsertResidual, Narrow, RemoveLayer, Widen):
    register(_kind)
