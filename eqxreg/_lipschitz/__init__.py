"""Lipschitz bounds, and what they certify.

`_bound` walks the containers of a network; `_layers` has the rules for its layers,
`_slopes` those for functions. `_operator_norm` is the norm of one layer, found and not
only bounded. `_certificates` makes radii of bounds. `_activations` are the activations
that networks with a bound like best.
"""

from ._activations import (
    GroupSort as GroupSort,
    MaxMin as MaxMin,
)
from ._bound import (
    lipschitz_bound as lipschitz_bound,
)
from ._certificates import (
    certified_radius as certified_radius,
)
from ._operator_norm import (
    operator_norm as operator_norm,
)
