"""The wrappers, which enforce a map in the forward pass.

`_wrapper` says what all of them are and how they are evaluated, `_foreign` how those of
others are. `_constraint` is the wrapper around any map, `_named` the ones that are
called after their map. `_stateful` remembers singular vectors, by `_memory`. `_frozen`
wraps what is not trained.
"""

from ._constraint import (
    Constraint as Constraint,
    located as located,
    on_stack as on_stack,
    written as written,
)
from ._frozen import (
    Frozen as Frozen,
    outside_frozen as outside_frozen,
    trainable_ones as trainable_ones,
    with_frozen as with_frozen,
)
from ._named import (
    BoxConstraint as BoxConstraint,
    MaxNormConstraint as MaxNormConstraint,
    MinMaxNormConstraint as MinMaxNormConstraint,
    NonNegativeConstraint as NonNegativeConstraint,
    OrthogonalConstraint as OrthogonalConstraint,
    SpectralCapConstraint as SpectralCapConstraint,
    UnitNormConstraint as UnitNormConstraint,
    WeightNormConstraint as WeightNormConstraint,
)
from ._stateful import (
    SpectralConstraint as SpectralConstraint,
    SpectralNormConstraint as SpectralNormConstraint,
    SpectralScaleConstraint as SpectralScaleConstraint,
)
from ._wrapper import (
    evaluate as evaluate,
    needs_foreign_state as needs_foreign_state,
    needs_state as needs_state,
)
