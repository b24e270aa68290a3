"""That a map keeps the shape and the dtype of a weight, as all that wraps layers, steps
and reports relies on. Maps of this library do; others are looked at without computing.
"""

from typing import Any

import jax

from ._base import Parametrization
from ._checks import check_kept


def bound_to(p: Parametrization, weight: Any) -> tuple[Any, Any]:
    """`p.bind(weight)`, after checking that the raw weight is as this one."""
    bound, raw = p.bind(weight)
    return bound, check_kept(p, weight, raw, ".inverse" if bound is p else ".bind")


def check_weight(p: Parametrization, weight: Any) -> None:
    """Raises if this map cannot be applied to such a weight, or changes its shape or
    dtype. Nothing is computed."""
    p.check(weight)
    if _is_own(p):
        return
    try:
        result = jax.eval_shape(p, weight)
    except _NEEDS_VALUES:
        # It cannot be traced, and what it does is not known before it is called.
        return
    check_kept(p, weight, result)


_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def _is_own(p: Parametrization) -> bool:
    """Whether this map, and all that it is made of, computes as one of eqxreg does."""
    cls = next(c for c in type(p).__mro__ if "__call__" in vars(c))
    is_part = lambda x: isinstance(x, Parametrization) and x is not p
    parts = filter(is_part, jax.tree.leaves(p, is_leaf=is_part))
    return cls.__module__.startswith("eqxreg.") and all(map(_is_own, parts))
