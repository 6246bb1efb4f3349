"""Edits as values: what to change, decided before anything is written.

Read :mod:`neuroexapt.edit.base` (the contract), :mod:`neuroexapt.edit.patch` (what an edit
decides) and one edit, :mod:`neuroexapt.edit.narrow`. Nothing in this room writes on a model.
"""

from neuroexapt.edit.attend import AttentionSpec, InsertAttention
from neuroexapt.edit.base import Edit
from neuroexapt.edit.bottleneck import ExpandBottleneck, Squeeze
from neuroexapt.edit.branches import BranchSpec, Gate, Spec, build
from neuroexapt.edit.capacity import IncreaseCapacity
from neuroexapt.edit.copies import CopySpec
from neuroexapt.edit.data import Reader, Writer
from neuroexapt.edit.graft import (
    fitting_class,
    free_name,
    grafted_class,
    is_branch,
    original_class,
)
from neuroexapt.edit.hold import HoldSpec, JoinSpec
from neuroexapt.edit.importance import unit_norms
from neuroexapt.edit.insert import ConvSpec, InsertConv
from neuroexapt.edit.layer import InsertLayer, MlpSpec
from neuroexapt.edit.narrow import Narrow
from neuroexapt.edit.passage import PassSpec
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
from neuroexapt.edit.pool import InsertPool, PoolSpec
from neuroexapt.edit.prune import MakePermanent, PruneWeights
from neuroexapt.edit.registry import kind_named, register, registered, registered_specs
from neuroexapt.edit.regrow import RegrowWeights
from neuroexapt.edit.regularize import AddRegularization, ChanceSpec, StochasticDepth
from neuroexapt.edit.remove import RemoveLayer
from neuroexapt.edit.residual import InsertResidual
from neuroexapt.edit.resize import folded, resized
from neuroexapt.edit.sparsity import drop_fraction, sparsity_at
from neuroexapt.edit.widen import Widen

__all__ = [
    "AddRegularization",
    "AttributeEdit",
    "BranchSpec",
    "Decay",
    "DimEdit",
    "Edit",
    "ExpandBottleneck",
    "Gate",
    "IncreaseCapacity",
    "InsertAttention",
    "InsertConv",
    "InsertLayer",
    "InsertPool",
    "InsertResidual",
    "Insertion",
    "MakePermanent",
    "Masking",
    "Narrow",
    "Patch",
    "PruneWeights",
    "Reader",
    "Refold",
    "RegrowWeights",
    "Removal",
    "RemoveLayer",
    "Rewrite",
    "Scaling",
    "Spec",
    "Squeeze",
    "StochasticDepth",
    "Widen",
    "WidthStep",
    "Writer",
    "build",
    "drop_fraction",
    "fitting_class",
    "folded",
    "free_name",
    "grafted_class",
    "is_branch",
    "kind_named",
    "original_class",
    "register",
    "registered",
    "registered_specs",
    "resized",
    "sparsity_at",
    "unit_norms",
]

for _kind in [k for k in list(globals().values()) if isinstance(k, type) and issubclass(k, Edit)]:
    if _kind is not Edit:
        register(_kind)
_SPECS: tuple[type[Spec], ...] = (AttentionSpec, BranchSpec, ChanceSpec, ConvSpec, CopySpec)
_SPECS += (HoldSpec, JoinSpec, MlpSpec, PassSpec, PoolSpec)
for _spec in _SPECS:
    register(_spec)
