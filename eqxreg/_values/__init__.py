"""Numbers and arrays that are held and not trained.

`_hidden` is how a frozen array hides from what trains a model: as integers of the same
bits. `_bounds` says what a bound of a map may be, and keeps it so; `_rates` what a rate
of decay, of a penalty or of a proximal step may be.
"""

from ._bounds import (
    Bound as Bound,
    Number as Number,
    Schedule as Schedule,
    Shaped as Shaped,
    StoredBound as StoredBound,
    bound_shape as bound_shape,
    bound_value as bound_value,
    check_bound as check_bound,
    check_broadcasts as check_broadcasts,
    check_order as check_order,
    has_schedule as has_schedule,
    in_order as in_order,
    is_schedule as is_schedule,
    stretched as stretched,
)
from ._hidden import (
    Constant as Constant,
    FrozenArray as FrozenArray,
    HiddenArray as HiddenArray,
    frozen_as as frozen_as,
    has_frozen as has_frozen,
    is_constant as is_constant,
    is_frozen as is_frozen,
    opened as opened,
    thawed as thawed,
    value_of as value_of,
)
from ._rates import (
    check_rate as check_rate,
    product as product,
    rate_at as rate_at,
)
