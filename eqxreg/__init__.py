"""Weight constraints and regularisers for Equinox.

A constraint is a small map on a weight. It is defined once and enforced in any of
three places: the forward pass (`Constraint`, `constrain`), after the update
(`project`), or in the loss (`distance_penalty`). Selectors say which weights, alike in
all three.
"""

from ._lipschitz import (
    GroupSort as GroupSort,
    MaxMin as MaxMin,
    certified_radius as certified_radius,
    lipschitz_bound as lipschitz_bound,
    operator_norm as operator_norm,
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
    Pinned as Pinned,
    Positive as Positive,
    PositiveSemidefinite as PositiveSemidefinite,
    Projection as Projection,
    Relative as Relative,
    Simplex as Simplex,
    SkewSymmetric as SkewSymmetric,
    SpectralCap as SpectralCap,
    SpectralNorm as SpectralNorm,
    SpectralScale as SpectralScale,
    StraightThrough as StraightThrough,
    Symmetric as Symmetric,
    UnitNorm as UnitNorm,
    spectral_norm as spectral_norm,
)
from ._models import (
    Report as Report,
    bake as bake,
    cast as cast,
    constrain as constrain,
    freeze as freeze,
    metrics as metrics,
    project_params as project_params,
    report as report,
    strip as strip,
    thaw as thaw,
    unbake as unbake,
)
from ._transforms import (
    cautious_weight_decay as cautious_weight_decay,
    corrected_weight_decay as corrected_weight_decay,
    decay_towards as decay_towards,
    distance_penalty as distance_penalty,
    elastic_net_penalty as elastic_net_penalty,
    elastic_net_prox as elastic_net_prox,
    group_lasso_penalty as group_lasso_penalty,
    group_soft_threshold as group_soft_threshold,
    independent_weight_decay as independent_weight_decay,
    l1_penalty as l1_penalty,
    l2_penalty as l2_penalty,
    orthogonality_penalty as orthogonality_penalty,
    project as project,
    sign_decay as sign_decay,
    soft_threshold as soft_threshold,
    spectral_norm_penalty as spectral_norm_penalty,
    weight_decay as weight_decay,
)
from ._tree import (
    Selector as Selector,
    biases as biases,
    embeddings as embeddings,
    everything as everything,
    norm_parameters as norm_parameters,
    scale_invariant as scale_invariant,
    select as select,
    trainable as trainable,
    trainables as trainables,
    weights as weights,
)
from ._wrappers import (
    BoxConstraint as BoxConstraint,
    Constraint as Constraint,
    Frozen as Frozen,
    MaxNormConstraint as MaxNormConstraint,
    MinMaxNormConstraint as MinMaxNormConstraint,
    NonNegativeConstraint as NonNegativeConstraint,
    OrthogonalConstraint as OrthogonalConstraint,
    SpectralCapConstraint as SpectralCapConstraint,
    SpectralNormConstraint as SpectralNormConstraint,
    SpectralScaleConstraint as SpectralScaleConstraint,
    UnitNormConstraint as UnitNormConstraint,
    WeightNormConstraint as WeightNormConstraint,
)


__version__ = "0.1.0"
