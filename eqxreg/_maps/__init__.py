"""The maps: small pure functions of a weight, one file for each family."""

from ._base import Parametrization as Parametrization, Projection as Projection
from ._charts import Cayley as Cayley, MatrixExp as MatrixExp
from ._combine import Chain as Chain, StraightThrough as StraightThrough
from ._elementwise import (
    Box as Box,
    Interval as Interval,
    NonNegative as NonNegative,
    Positive as Positive,
)
from ._masked import Masked as Masked, Pinned as Pinned
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
from ._relative import Relative as Relative
from ._simplex import Simplex as Simplex
from ._spectral import (
    SpectralCap as SpectralCap,
    SpectralNorm as SpectralNorm,
    SpectralScale as SpectralScale,
)
from ._structure import (
    LowRank as LowRank,
    PositiveSemidefinite as PositiveSemidefinite,
    SkewSymmetric as SkewSymmetric,
    Symmetric as Symmetric,
)
