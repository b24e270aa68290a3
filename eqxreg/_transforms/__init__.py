"""The Optax transforms, one file for each family.

All of them need `params`, accept models, filtered with `eqx.is_inexact_array` or not,
and resolve their mask anew on the tree that they are given, so that they work within
`optax.masked` and `optax.partition` too. Arrays of different trees are paired by path.
Decay adds to a gradient or to a direction; proximal steps and projections come last,
for they say where a weight is to arrive.
"""

from ._decay import (
    cautious_weight_decay as cautious_weight_decay,
    corrected_weight_decay as corrected_weight_decay,
    decay_towards as decay_towards,
    independent_weight_decay as independent_weight_decay,
    sign_decay as sign_decay,
    weight_decay as weight_decay,
)
from ._project import project as project
from ._proximal import (
    elastic_net_prox as elastic_net_prox,
    group_soft_threshold as group_soft_threshold,
    soft_threshold as soft_threshold,
)
