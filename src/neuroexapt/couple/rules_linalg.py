"""Linear algebra on whole matrices: every entry of the result depends on every entry."""

from __future__ import annotations

from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Dims
from neuroexapt.couple.rules_pointwise import broadcast
from neuroexapt.couple.site import Site, rule


@rule(
    "aten._linalg_det",
    "aten._linalg_eigh",
    "aten._linalg_slogdet",
    "aten._linalg_svd",
    "aten.cholesky",
    "aten.cholesky_inverse",
    "aten.cholesky_solve",
    "aten.linalg_cholesky_ex",
    "aten.linalg_eig",
    "aten.linalg_eigvals",
    "aten.linalg_householder_product",
    "aten.linalg_inv_ex",
    "aten.linalg_ldl_factor_ex",
    "aten.linalg_ldl_solve",
    "aten.linalg_lu",
    "aten.linalg_lu_factor_ex",
    "aten.linalg_lu_solve",
    "aten.linalg_matrix_exp",
    "aten.linalg_pinv",
    "aten.linalg_qr",
    "aten.triangular_solve",
)
def whole_matrices(site: Site) -> list[Dims]:
    """(batch, m, n) -> results for each matrix by itself; its rows and columns are held."""
    return _held(site)


@rule("aten._linalg_solve_ex", "aten.linalg_solve_triangular")
def linear_system(site: Site) -> list[Dims]:
    """A (batch, n, n) and B (batch, n, k): each of the k columns is a system of its own."""
    left, right = site.call.inputs[:2]
    if len(right.shape) != len(left.shape) or not site.setting("left", True):
        return _held(site)
    columns = site.axis(right, -1)
    result, *factors = _held(site, passing=columns)
    return [(*result[:-1], columns), *factors]


def _held(site: Site, passing: Axis | None = None) -> list[Dims]:
    matrix = site.call.inputs[0]
    why = f"{site.call.op.removeprefix('aten.')} works on the whole matrix"
    batch = len(matrix.shape) - 2
    if ".parametrizations." in site.call.module:
        _hold_constraint(site, why)
    for ref in site.call.inputs:
        for axis in site.dims(ref)[min(batch, len(ref.shape)) :]:
            if axis is not passing:
                site.pin(axis, why)
        for place, axis in enumerate(site.dims(ref)[:batch]):
            site.same(axis, site.axis(matrix, place))
    return [
        (
            *site.dims(matrix)[: min(batch, len(ref.shape))],
            *(site.fixed(size, why) for size in ref.shape[batch:]),
        )
        for ref in site.call.outputs
    ]


def _hold_constraint(site: Site, why: str) -> None:
    """A constraint on a whole weight (orthogonality) would not survive without a row of it."""
    for name, dims in site.draft.parameters.items():
        if name.startswith(f"{site.call.module}."):
            for axis in dims:
                site.pin(axis, why)


@rule("aten.linalg_cross")
def cross(site: Site) -> list[Dims]:
    """The vector product along one dimension of 3."""
    left, right = site.call.inputs[:2]
    dims = broadcast(site, [left, right], site.call.outputs[0].shape)
    site.pin(dims[int(site.setting("dim", -1))], "the three axes of space")
    return [dims]


@rule("aten.dist")
def dist(site: Site) -> list[Dims]:
    """The norm of a difference."""
    shape = max((ref.shape for ref in site.call.inputs), key=len)
    for axis in broadcast(site, site.call.inputs, shape):
        site.mix(axis, "norm")
    return [()]
