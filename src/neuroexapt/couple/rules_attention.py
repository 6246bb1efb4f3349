"""Fused attention: scores by a product over the head size, a softmax over the keys."""

from __future__ import annotations

from neuroexapt.capture import TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.marks import Dims, Label
from neuroexapt.couple.site import Site, place_of, rule


@rule(
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "aten._scaled_dot_product_attention_math",
    "aten._scaled_dot_product_attention_math_for_mps",
    "aten.scaled_dot_product_attention",
)
def attention(site: Site) -> list[Dims]:
    """q (B, H, T, d), k (B, H, S, d), v (B, H, S, e) -> (B, H, T, e); scores sum over d.

    With grouped queries k and v have fewer heads: query head h reads head h // (H / H_kv).
    """
    query, key, value, *bias = site.call.inputs
    for place in range(len(query.shape) - 2):
        for other in (key, value):
            _pair(site, query, other, place)
    tokens, keys = site.axis(query, -2), site.same(site.axis(key, -2), site.axis(value, -2))
    inner = site.same(site.axis(query, -1), site.axis(key, -1))
    if "flash" in site.call.op and query.shape[-1] == value.shape[-1]:
        site.same(inner, site.axis(value, -1))  # else this kernel could not be used any more
    scale = "free" if site.setting("scale") is not None else "inverse_sqrt"
    site.mix(inner, "dot", left=site.labels(query)[-1], right=site.labels(key)[-1], scale=scale)
    site.mix(keys, "softmax")
    if site.setting("is_causal", False):
        for axis in (tokens, keys):
            site.pin(axis, "a causal mask by position")
    for ref in bias:
        _bias(site, ref, (*site.dims(query)[:-1], keys))
    out, *rest = site.call.outputs
    lead = [
        place_of(site.labels(ref)[place] for ref in (query, key, value))
        for place in range(len(out.shape) - 2)
    ]
    site.set_labels(out, (*lead, site.labels(query)[-2], site.labels(value)[-1]))
    known = (*site.dims(query)[:-1], keys)
    return [
        (*site.dims(query)[:-1], site.axis(value, -1)),
        *(_statistic(site, r, known) for r in rest),
    ]


def _pair(site: Site, query: TensorRef, other: TensorRef, place: int) -> None:
    """Batch and heads are common axes; several query heads may share a head of the others."""
    mine, theirs = site.axis(query, place), site.axis(other, place)
    if mine.size == theirs.size or theirs.size == 0 or mine.size % theirs.size:
        site.same(mine, theirs)
    elif place == len(query.shape) - 3:
        site.same(mine, algebra.product([theirs, site.free(mine.size // theirs.size)]))
    else:
        site.pin(theirs, "a single position broadcast over many")


def _bias(site: Site, bias: TensorRef, dims: Dims) -> None:
    """A mask or bias on the scores broadcasts from the right."""
    for place in range(-len(bias.shape), 0):
        if bias.shape[place] == dims[place].size:
            site.same(site.axis(bias, place), dims[place])
            site.role(bias, place, "elementwise", "zero")
        else:
            site.pin(site.axis(bias, place), "a single position broadcast over many")


def _statistic(site: Site, ref: TensorRef, known: Dims) -> Dims:
    """The logarithms of the softmax sums, or the weights; a kernel's other outputs meet nobody."""
    for dims in (known, known[:-1]):
        if tuple(axis.size for axis in dims) == ref.shape:
            return dims
    return tuple(site.free(size) for size in ref.shape)


@rule("aten.embedding")
def embedding(site: Site) -> list[Dims]:
    """Table (V, d), indices (...) -> (..., d); the rows are named by number."""
    table, indices = site.call.inputs[:2]
    site.pin(site.axis(table, 0), "rows taken by number (embedding table)")
    site.role(table, 1, "producer")
    nowhere: frozenset[Label] = frozenset()
    site.set_labels(site.call.outputs[0], (*[nowhere] * len(indices.shape), site.labels(table)[1]))
    return [(*site.dims(indices), site.axis(table, 1))]


@rule("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(site: Site) -> list[Dims]:
    """Table (V, d) and bags of indices -> (bags, d): rows are added up, feature by feature."""
    table, *others = site.call.inputs
    site.pin(site.axis(table, 0), "rows taken by number (embedding table)")
    for ref in others:
        for axis in site.dims(ref):
            site.pin(axis, "bags by position")
    site.role(table, 1, "producer")
    out, *rest = site.call.outputs
    bags = site.fixed(out.shape[0], "a number of bags")
    site.set_labels(out, (frozenset(), site.labels(table)[1]))
    dims = (bags, site.axis(table, 1))
    return [dims, *(_like_bags(site, ref, dims) for ref in rest)]


def _like_bags(site: Site, ref: TensorRef, dims: Dims) -> Dims:
    """Which row was the largest has the shape of the output; the rest goes by bag or index."""
    if tuple(axis.size for axis in dims) == ref.shape:
        return dims
    return tuple(site.fixed(size, "a number of bags") for size in ref.shape)


@rule("aten.embedding_renorm_")
def embedding_renorm(site: Site) -> list[Dims]:
    """The rows met are scaled down to a norm over their features."""
    table, indices = site.call.inputs[:2]
    site.pin(site.axis(table, 0), "rows taken by number (embedding table)")
    for axis in site.dims(indices):
        site.mix(axis, "choice")
    site.mix(site.axis(table, 1), "renorm")
    return [site.dims(table)]
