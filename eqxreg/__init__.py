"""Weight constraints and regularisers for Equinox.

A constraint is a small map on a weight. It is defined once and enforced in any of
three places: the forward pass (`Constraint`, `constrain`), after the update
(`project`), or in the loss (`distance_penalty`). Selectors say which weights, alike in
all three.
"""

from importlib.metadata import version as _version

from ._activations import GroupSort as GroupSort, MaxMin as MaxMin
from ._lipschitz import (
    certified_radius as certified_radius,
    lipschitz_bound as lipschitz_bound,
)
from ._maps import (
    AlmostOrthogonal as AlmostOrthogonal,
    Box as Box,
    Cayley as Cayley,
    Chain as Chain,
    Interval as Interval,
    LowRank as LowRank,
    Masked as Masked,
    MatrixExp as MatrixExp,
    MaxNorm as MaxNorm,
    MinMaxNorm as MinMaxNorm,
    NonNegative as NonNegative,
    Orthogonal as Orthogonal,
    Parametrization as Parametrization,
    Positive as Positive,
    PositiveSemidefinite as PositiveSemidefinite,
    Projection as Projection,
    Simplex as Simplex,
    SkewSymmetric as SkewSymmetric,
    SpectralCap as SpectralCap,
    SpectralNorm as SpectralNorm,
    SpectralScale as SpectralScale,
    StraightThrough as StraightThrough,
    Symmetric as Symmetric,
    UnitNorm as UnitNorm,
)
from ._model import (
    bake as bake,
    constrain as constrain,
    project_params as project_params,
)
from ._named_wrappers import (
    BoxConstraint as BoxConstraint,
    MaxNormConstraint as MaxNormConstraint,
    MinMaxNormConstraint as MinMaxNormConstraint,
    NonNegativeConstraint as NonNegativeConstraint,
    OrthogonalConstraint as OrthogonalConstraint,
    SpectralCapConstraint as SpectralCapConstraint,
    UnitNormConstraint as UnitNormConstraint,
    WeightNormConstraint as WeightNormConstraint,
)
from ._operator_norm import (
    operator_norm as operator_norm,
    spectral_norm as spectral_norm,
)
from ._penalties import (
    distance_penalty as distance_penalty,
    elastic_net_penalty as elastic_net_penalty,
    l1_penalty as l1_penalty,
    l2_penalty as l2_penalty,
)
from ._select import (
    Selector as Selector,
    biases as biases,
    embeddings as embeddings,
    everything as everything,
    norm_parameters as norm_parameters,
    select as select,
    trainable as trainable,
    trainables as trainables,
    weights as weights,
)
from ._stateful_wrappers import SpectralNormConstraint as SpectralNormConstraint
from ._transforms import (
    project as project,
    sign_decay as sign_decay,
    weight_decay as weight_decay,
)
from ._wrappers import Constraint as Constraint


__version__ = _version("eqxreg")
