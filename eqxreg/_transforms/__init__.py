"""The Optax transforms, one file for each family, and the penalties.

All but the penalties pair trees by `_params`. Decay is added to an update by `_adding`
as `_decay` says; proximal steps and projections end a chain. A penalty is a scalar for
the loss, whose gradient is a decay.
"""

from ._decay import (
    cautious_weight_decay as cautious_weight_decay,
    corrected_weight_decay as corrected_weight_decay,
    decay_towards as decay_towards,
    independent_weight_decay as independent_weight_decay,
    sign_decay as sign_decay,
    weight_decay as weight_decay,
)
from ._penalties import (
    distance_penalty as distance_penalty,
    elastic_net_penalty as elastic_net_penalty,
    group_lasso_penalty as group_lasso_penalty,
    l1_penalty as l1_penalty,
    l2_penalty as l2_penalty,
    orthogonality_penalty as orthogonality_penalty,
    spectral_norm_penalty as spectral_norm_penalty,
)
from ._project import (
    project as project,
)
from ._proximal import (
    elastic_net_prox as elastic_net_prox,
    group_soft_threshold as group_soft_threshold,
    soft_threshold as soft_threshold,
)
