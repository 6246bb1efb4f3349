"""Infer which tensor dimensions must change together.

Read :mod:`neuroexapt.couple.axis` (the algebra), then :mod:`neuroexapt.couple.site` (what a
rule sees and says) and one ``rules_*.py`` family; :mod:`neuroexapt.couple.mapping` ties them
together and :mod:`neuroexapt.couple.axismap` is the result.
"""

from neuroexapt.couple.axismap import (
    Appearance,
    Attribute,
    AxisMap,
    Mixer,
    ModuleAxes,
    Pinned,
    Side,
    Width,
)
from neuroexapt.couple.index import (
    Expr,
    Leaf,
    Positions,
    Product,
    Sum,
    leaves,
    resize_expr,
    size_of,
    source_index,
    unit_of,
    unit_sums,
)
from neuroexapt.couple.mapping import map_axes
from neuroexapt.couple.readers import Reader, Reading, find_readers, first_names, passed_on, reading
from neuroexapt.couple.site import rule

__all__ = [
    "Appearance",
    "Attribute",
    "AxisMap",
    "Expr",
    "Leaf",
    "Mixer",
    "ModuleAxes",
    "Pinned",
    "Positions",
    "Product",
    "Reader",
    "Reading",
    "Side",
    "Sum",
    "Width",
    "find_readers",
    "first_names",
    "leaves",
    "map_axes",
    "passed_on",
    "reading",
    "resize_expr",
    "rule",
    "size_of",
    "source_index",
    "unit_of",
    "unit_sums",
]
