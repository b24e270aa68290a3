r"""The one derivative of every map that acts on singular values.

A map $F(W) = U f(\Sigma) V^H$ differs from another in its $f$ alone, and so does its
derivative: in the factors below, which each map has in a closed form that is finite
where singular values meet or vanish.
"""

from jaxtyping import Array, Float, Inexact

from ._singular import adjoint, matmul


def singular_derivative(
    u: Inexact[Array, "*batch m n"],
    s: Float[Array, "*batch n"],
    v: Inexact[Array, "*batch n n"],
    plus: Float[Array, "*batch n n"],
    minus: Float[Array, "*batch n n"],
    ratio: Float[Array, "*batch n"],
    tangent: Inexact[Array, "*batch m n"],
) -> Inexact[Array, "*batch m n"]:
    r"""The derivative of $F(W) = U f(\Sigma) V^H$ at a tall $W = U \Sigma V^H$, in the
    direction $H$: with $A = U^H H V$,

    $$\mathrm{D}F[H] = U \left(\Gamma^+ \circ \mathrm{sym} A
    + \Gamma^- \circ \mathrm{skew} A\right) V^H
    + (H V - U A)\, \mathrm{diag}(\rho)\, V^H,$$

    $$\Gamma^+_{ij} = \frac{f(\sigma_i) - f(\sigma_j)}{\sigma_i - \sigma_j}, \quad
    \Gamma^-_{ij} = \frac{f(\sigma_i) + f(\sigma_j)}{\sigma_i + \sigma_j}, \quad
    \rho_i = \frac{f(\sigma_i)}{\sigma_i},$$

    where $\mathrm{sym} A = (A + A^H)/2$ and $\mathrm{skew} A = (A - A^H)/2$. It is
    linear in $H$ and, as all factors are symmetric, its own transpose. The derivative
    for a wide matrix is that for its adjoint.

    **Arguments:**

    - `u`, `s`, `v`: the thin singular value decomposition $W = U \Sigma V^H$, with
        $V$ itself, not its adjoint. `s` is there to make them complete: what matters
        of it is in the factors.
    - `plus`, `minus`: the symmetric matrices $\Gamma^+$ and $\Gamma^-$.
    - `ratio`: the vector $\rho$.
    - `tangent`: the direction $H$.

    **Returns:**

    $\mathrm{D}F[H]$, of the shape of `tangent`.
    """
    del s
    dtype = tangent.dtype
    image = matmul(tangent, v)
    inner = matmul(adjoint(u), image)
    sym = (inner + adjoint(inner)) / 2
    skew = (inner - adjoint(inner)) / 2
    within = plus.astype(dtype) * sym + minus.astype(dtype) * skew
    # What leaves the column space of U. A square U has none to leave.
    beyond = (image - matmul(u, inner)) * ratio[..., None, :].astype(dtype)
    return matmul(matmul(u, within) + beyond, adjoint(v))
