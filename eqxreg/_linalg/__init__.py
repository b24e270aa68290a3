"""Arrays only: nothing here knows what a constraint is.

From the ground up: `_axes`, `_precision`, `_batching` and `_norms` are what every map
that measures a weight goes through. `_products` and `_linear_map` say what matrices and
linear maps are, and `_lapack` decomposes. `_estimators` finds the largest singular
value of one, `_certified` finds it from a vector that may have been good once, and
`_estimator_derivatives` differentiates what they find, as often as asked. What acts on
all singular values is in `_polar`, `_cap` and `_nearest`; they share the iteration in
`_newton_schulz` and the derivatives in `_spectral_derivatives`. `_excess` only measures
how far they are above a bound. `_exponential` is that of matrices, and
`_convolution_norm` bounds a convolution as an operator.
"""

from ._axes import (
    Axis as Axis,
    AxisLike as AxisLike,
    check_axis as check_axis,
    resolve_axes as resolve_axes,
)
from ._batching import (
    anywhere as anywhere,
    per_layer as per_layer,
)
from ._cap import (
    cap as cap,
)
from ._certified import (
    settled as settled,
)
from ._convolution_norm import (
    Convolution as Convolution,
    lattice_norm as lattice_norm,
    or_fault as or_fault,
    torus_map as torus_map,
    torus_size as torus_size,
)
from ._estimator_derivatives import (
    attained as attained,
    moving as moving,
)
from ._estimators import (
    gram as gram,
    lanczos as lanczos,
    power_iteration as power_iteration,
    search as search,
    svd as svd,
)
from ._excess import (
    excess as excess,
)
from ._exponential import (
    exponential as exponential,
)
from ._lapack import (
    cholesky as cholesky,
    over as over,
    over_triangle as over_triangle,
    upper_triangle as upper_triangle,
)
from ._linear_map import (
    LinearIn as LinearIn,
    LinearMap as LinearMap,
    Top as Top,
    fixed_vector as fixed_vector,
    of_matrix as of_matrix,
    unit as unit,
)
from ._nearest import (
    mean_with as mean_with,
    minus_adjoint as minus_adjoint,
    nearest_of_rank as nearest_of_rank,
    nearest_semidefinite as nearest_semidefinite,
)
from ._newton_schulz import (
    Way as Way,
    by_platform as by_platform,
    orthogonality_error as orthogonality_error,
    polished as polished,
)
from ._norms import (
    all_finite as all_finite,
    frobenius_norm as frobenius_norm,
    scaled_norm as scaled_norm,
    squared_magnitude as squared_magnitude,
)
from ._platforms import (
    on_tpu as on_tpu,
)
from ._polar import (
    polar as polar,
)
from ._precision import (
    holds as holds,
    holds_range as holds_range,
    is_half as is_half,
    margin as margin,
    narrow as narrow,
    real_dtype as real_dtype,
    tolerance as tolerance,
    wide_dtype as wide_dtype,
    widen as widen,
    with_derivative_of as with_derivative_of,
)
from ._products import (
    Matrices as Matrices,
    adjoint as adjoint,
    as_tall as as_tall,
    eye_like as eye_like,
    gram_of as gram_of,
    matmul as matmul,
)
