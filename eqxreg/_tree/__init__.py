"""What is known of models: modules, their arrays, and which of these are meant.

`_modules`, `_roles`, `_ranks` (with `_annotations`) and `_multiplying` say what is
known of one module and its arrays; `_linear_part` and `_convolutions` what is known of
layers as operators.
`_paths` names arrays within a layer. `_walk` meets each array of a model with the layer
that owns it; on it stand `_selectors`, and `_chosen`, which lists what they select.
"""

from ._chosen import (
    check_sites as check_sites,
    chosen_leaves as chosen_leaves,
    part as part,
    require_selection as require_selection,
    require_sites as require_sites,
    trainables as trainables,
)
from ._convolutions import (
    CONVOLUTIONS as CONVOLUTIONS,
    convolution_of as convolution_of,
    repeats as repeats,
)
from ._linear_part import (
    InputShape as InputShape,
    InputShapeLike as InputShapeLike,
    Operator as Operator,
    check_fits as check_fits,
    check_input_shape as check_input_shape,
    linear_part as linear_part,
    operator_of as operator_of,
)
from ._modules import (
    has_methods as has_methods,
    is_tied as is_tied,
    is_wrapper as is_wrapper,
)
from ._multiplying import (
    only_calls as only_calls,
    only_multiplies as only_multiplies,
)
from ._paths import (
    Path as Path,
    check_names as check_names,
    child as child,
    find_array as find_array,
    key_of as key_of,
    names_of as names_of,
    nodes_along as nodes_along,
    parse as parse,
    rank_of as rank_of,
    stored_name as stored_name,
    unwrapped as unwrapped,
    with_child as with_child,
)
from ._selectors import (
    Selector as Selector,
    biases as biases,
    embeddings as embeddings,
    everything as everything,
    norm_parameters as norm_parameters,
    scale_invariant as scale_invariant,
    select as select,
    trainable as trainable,
    weights as weights,
)
from ._walk import (
    Site as Site,
    map_children as map_children,
    sites as sites,
)
