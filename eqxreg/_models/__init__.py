"""Whole models: wrap their layers, evaluate and unwrap them, and look at them.

`_constrain` and `_freeze` put wrappers on; `_bake` evaluates them or takes them off;
`_unbake` is the way back. `_project_params` projects weights once. `_metrics` measures,
and `_report` makes a table of that.
"""

from ._bake import (
    bake as bake,
    bake_with as bake_with,
    strip as strip,
)
from ._constrain import (
    constrain as constrain,
)
from ._freeze import (
    cast as cast,
    freeze as freeze,
    thaw as thaw,
)
from ._metrics import (
    metrics as metrics,
)
from ._project_params import (
    project_params as project_params,
)
from ._report import (
    Report as Report,
    report as report,
)
from ._unbake import (
    unbake as unbake,
)
