"""The maps: small pure functions of a weight, one file for each family.

`_base` has the two bases; `_checks` and `_kept` what a weight and a map have to be;
`_held` what a wrapper keeps of its maps. Maps of norms are written by `_rescale`, and
`_factored` has their weights as products. Maps of matrices take a weight apart by
`_matrix`; those of a largest singular value share `_scale_norm`. What they compute with
is in `_linalg`.
"""

from ._base import (
    Parametrization as Parametrization,
    Projection as Projection,
    check_projection as check_projection,
    composed_degree as composed_degree,
    factored as factored,
)
from ._charts import (
    Cayley as Cayley,
    MatrixExp as MatrixExp,
)
from ._checks import (
    check_dtype as check_dtype,
)
from ._combine import (
    Chain as Chain,
    StraightThrough as StraightThrough,
)
from ._elementwise import (
    Box as Box,
    Interval as Interval,
    NonNegative as NonNegative,
    Positive as Positive,
)
from ._held import (
    HeldMaps as HeldMaps,
)
from ._kept import (
    bound_to as bound_to,
    check_weight as check_weight,
)
from ._masked import (
    Masked as Masked,
    Pinned as Pinned,
)
from ._matrix import (
    RowAxes as RowAxes,
    automatically_measured as automatically_measured,
    check_blocks as check_blocks,
    check_matrix as check_matrix,
    over_blocks as over_blocks,
    to_matrices as to_matrices,
)
from ._norm import (
    MaxNorm as MaxNorm,
    MinMaxNorm as MinMaxNorm,
    UnitNorm as UnitNorm,
    WeightNorm as WeightNorm,
)
from ._orthogonal import (
    AlmostOrthogonal as AlmostOrthogonal,
    Orthogonal as Orthogonal,
)
from ._relative import (
    Relative as Relative,
)
from ._scale_norm import (
    Measure as Measure,
    cold as cold,
    from_start as from_start,
    scale_norm as scale_norm,
    sure as sure,
    warm as warm,
)
from ._simplex import (
    Simplex as Simplex,
)
from ._spectral import (
    SpectralNorm as SpectralNorm,
    SpectralScale as SpectralScale,
    spectral_norm as spectral_norm,
)
from ._spectral_cap import (
    SpectralCap as SpectralCap,
)
from ._structure import (
    LowRank as LowRank,
    PositiveSemidefinite as PositiveSemidefinite,
    SkewSymmetric as SkewSymmetric,
    Symmetric as Symmetric,
)
