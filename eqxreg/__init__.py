"""Weight constraints and regularisers for Equinox.

A constraint is a small map on a weight. It is defined once and enforced in any of
three places: the forward pass (`Constraint`, `constrain`), after the update
(`project`), or in the loss (`distance_penalty`). Selectors say which weights, alike in
all three.
"""

from importlib.metadata import version as _version

from ._maps import (
    Box as Box,
    Chain as Chain,
    Interval as Interval,
    MaxNorm as MaxNorm,
    MinMaxNorm as MinMaxNorm,
    NonNegative as NonNegative,
    Parametrization as Parametrization,
    Positive as Positive,
    Projection as Projection,
    Simplex as Simplex,
    StraightThrough as StraightThrough,
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
    UnitNormConstraint as UnitNormConstraint,
    WeightNormConstraint as WeightNormConstraint,
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
from ._transforms import (
    project as project,
    sign_decay as sign_decay,
    weight_decay as weight_decay,
)
from ._wrappers import Constraint as Constraint


__version__ = _version("eqxreg")
