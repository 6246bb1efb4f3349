"""nn.MultiheadAttention: what its forward demands of the sizes it was built with.

It reads the size of its inner axis off its query, so heads times head size is the stream it
works on: removing a head takes its positions out of that stream, in every layer on it.
"""

from __future__ import annotations

from torch import nn

from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis, Mismatch
from neuroexapt.couple.marks import Bind
from neuroexapt.couple.site import Draft


def tie_attention(model: nn.Module, draft: Draft) -> None:
    """Make the stream and the heads of every nn.MultiheadAttention one axis; bind its numbers."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Transformer):
            _bind_width(path, draft)
        if isinstance(module, nn.MultiheadAttention):
            prefix = f"{path}." if path else ""
            try:
                _tie(path, prefix, module, draft)
            except Mismatch as mismatch:
                for name, _ in module.named_parameters(prefix=path):
                    for axis in draft.parameters[name]:
                        algebra.pin(axis, f"nn.MultiheadAttention cannot follow: {mismatch}")


def _bind_width(path: str, draft: Draft) -> None:
    """nn.Transformer compares its inputs with the size it was built with."""
    first = f"{path}.encoder.layers.0.linear1.weight".lstrip(".")
    if first in draft.parameters:
        draft.binds.append(Bind(path, "d_model", draft.parameters[first][1:2]))


def _tie(path: str, prefix: str, module: nn.MultiheadAttention, draft: Draft) -> None:
    stream = _stream(prefix, module, draft)
    algebra.unify(draft.parameters[f"{prefix}out_proj.weight"][1], stream)
    for name in ("bias_k", "bias_v"):
        if getattr(module, name) is not None:
            algebra.unify(draft.parameters[f"{prefix}{name}"][2], stream)
    heads, size = algebra.split(stream, module.num_heads)
    numbers = {"embed_dim": stream, "num_heads": heads, "head_dim": size}
    if module._qkv_same_embed_dim:
        numbers |= {"kdim": stream, "vdim": stream}
    else:
        numbers["kdim"] = draft.parameters[f"{prefix}k_proj_weight"][1]
        numbers["vdim"] = draft.parameters[f"{prefix}v_proj_weight"][1]
    draft.binds += [Bind(path, name, (axis,)) for name, axis in numbers.items()]


def _stream(prefix: str, module: nn.MultiheadAttention, draft: Draft) -> Axis:
    if module._qkv_same_embed_dim:
        rows, columns = draft.parameters[f"{prefix}in_proj_weight"]
        parts, inner = algebra.split(rows, 3)
        algebra.pin(parts, "query, key and value in one weight")
        algebra.unify(inner, columns)
        return columns
    rows, columns = draft.parameters[f"{prefix}q_proj_weight"]
    algebra.unify(rows, columns)
    for name in ("k_proj_weight", "v_proj_weight"):
        algebra.unify(draft.parameters[f"{prefix}{name}"][0], columns)
    return columns
