"""Whether an accelerator computes what a processor does in double precision.

Every map and every wrapper, value and gradient, in each dtype, with the platform's own
products, layouts and precision. The truth is the same function in float64, on the host.
"""

import functools as ft
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
from every import SIDE, every_map
from networks import is_stateful


DTYPES = ("float32", "bfloat16", "float16")
BOUND = 0.5
_ALONE = "Linear, alone"
_FEATURES = (640, 64)
"""Wide enough for scaled products."""


class Check(NamedTuple):
    """How far from the truth something was, relative to the norm of the truth."""

    name: str
    dtype: str
    value: float
    gradient: float
    limit: float
    same_twice: bool
    """Whether a second run gave the same bits."""

    @property
    def passed(self) -> bool:
        # A comparison with NaN is false.
        near = self.value <= self.limit and self.gradient <= self.limit
        return near and self.same_twice


class Job(NamedTuple):
    """What is to be compared."""

    name: str
    dtype: str
    limit: float
    fn: Callable[[Any, Any], tuple[Any, Any]]
    """The value and the gradient."""
    arrays: Any
    given: Any


def checks(only: str = "") -> Iterator[Check]:
    """Those whose dtype and name, as in `"float16 Box"`, a regular expression finds."""
    jobs: list[Job] = []
    for dtype in DTYPES:
        is_asked = lambda name, dtype=dtype: re.search(only, f"{dtype} {name}")
        jobs += [*_maps(dtype, is_asked), *_wrappers(dtype, is_asked)]
    # Nearly all of the time is compiling.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        free = dict.fromkeys(DTYPES, 0.0)
        for check in pool.map(_compared, jobs):
            # What is checked after a free layer is a constrained one.
            yield check._replace(limit=max(check.limit, free[check.dtype]))
            if check.name == _ALONE:
                free[check.dtype] = 4 * max(check.value, check.gradient)


def _maps(dtype: str, is_asked: Callable[[str], Any]) -> Iterator[Job]:
    keys = jax.random.split(jax.random.key(0))
    # Positive, for `Positive` has no other weights.
    weight = jnp.abs(jax.random.normal(keys[0], (SIDE, SIDE))) / SIDE**0.5
    weight = weight.astype(dtype)
    cotangent = jax.random.normal(keys[1], weight.shape).astype(dtype)
    for name, p in every_map().items():
        if not is_asked(name):
            continue
        bound, raw = p.bind(weight)
        # Away from the base of a chart, where its raw weight is zero, and from a bound
        # that is the norm that the weight has.
        raw = 1.1 * raw if np.any(np.asarray(raw)) else 0.1 * cotangent
        # Of the largest singular value, 1e-3 is promised.
        limit = 2e-3 if "lanczos" in name else 1e-4
        fn = ft.partial(_pulled_back, bound)
        yield Job(name, dtype, max(limit, _rounding(dtype)), fn, raw, cotangent)


def _rounding(dtype: str) -> float:
    """What half precision may cost."""
    return 0.0 if dtype == "float32" else 4 * float(jnp.finfo(dtype).eps)


def _pulled_back(p: Callable, raw: Any, cotangent: Any) -> tuple[Any, Any]:
    value, pull_back = jax.vjp(p, raw)
    return value, pull_back(cotangent)[0]


def _wrappers(dtype: str, is_asked: Callable[[str], Any]) -> Iterator[Job]:
    """Of each wrapper, after the layer alone: products are what they are here, and a
    constrained layer may be as far from the truth as a free one, and a little more."""
    asked = {name: wrap for name, wrap in wrappers().items() if is_asked(name)}
    if not asked:
        return
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (16, _FEATURES[0])).astype(dtype)
    cotangent = jax.random.normal(keys[1], (16, _FEATURES[1])).astype(dtype)
    for name, wrap in {_ALONE: lambda layer: layer, **asked}.items():
        linear = eqx.nn.Linear(*_FEATURES, dtype=jnp.dtype(dtype), key=keys[2])
        layer, state = eqx.nn.make_with_state(wrap)(linear)
        arrays, static = eqx.partition((layer, state), eqx.is_inexact_array)
        fn, limit = ft.partial(_through, static), max(2e-3, _rounding(dtype))
        yield Job(name, dtype, limit, fn, arrays, (x, cotangent))


def wrappers() -> dict[str, Callable[[eqx.nn.Linear], Any]]:
    """Each wrapper around a layer."""
    key = jax.random.key(2)
    unit = {"axis": "unit"}
    return {
        "MaxNormConstraint": lambda t: eqxreg.MaxNormConstraint(
            t, "weight", BOUND, **unit
        ),
        "MinMaxNormConstraint": lambda t: eqxreg.MinMaxNormConstraint(
            t, "weight", BOUND, 1.0, **unit
        ),
        "UnitNormConstraint": lambda t: eqxreg.UnitNormConstraint(t, "weight", **unit),
        "NonNegativeConstraint": lambda t: eqxreg.NonNegativeConstraint(t, "weight"),
        "BoxConstraint": lambda t: eqxreg.BoxConstraint(t, "weight", -0.02, 0.02),
        "WeightNormConstraint": eqxreg.WeightNormConstraint,
        "OrthogonalConstraint": eqxreg.OrthogonalConstraint,
        "SpectralCapConstraint": lambda t: eqxreg.SpectralCapConstraint(
            t, "weight", BOUND
        ),
        "SpectralNormConstraint": lambda t: eqxreg.SpectralNormConstraint(t, key=key),
        "SpectralScaleConstraint": lambda t: eqxreg.SpectralScaleConstraint(
            t, "weight", BOUND, key=key
        ),
        "Frozen": lambda t: eqxreg.Frozen(t, eqxreg.biases),
    }


def _through(static: Any, arrays: Any, given: Any) -> tuple[Any, Any]:
    """What a layer makes of a batch, and the gradient."""
    x, cotangent = given

    def called(arrays: Any) -> Any:
        layer, state = eqx.combine(arrays, static)
        call = (lambda x: layer(x, state)[0]) if is_stateful(layer) else layer
        return jax.vmap(call)(x)

    value, pull_back = jax.vjp(called, arrays)
    return value, pull_back(cotangent)[0]


def _compared(job: Job) -> Check:
    name, dtype, limit, fn, arrays, given = job
    compiled = jax.jit(fn)
    found, again = (jax.device_get(compiled(arrays, given)) for _ in range(2))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True)
    same = all(a.tobytes() == b.tobytes() for a, b in pairs)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = lambda x: jnp.asarray(np.asarray(x, np.float64))
        truth = jax.device_get(jax.jit(fn)(*jax.tree.map(wide, (arrays, given))))
    (value, gradient), (true_value, true_gradient) = found, truth
    return Check(
        name,
        dtype,
        _distance(value, true_value),
        _distance(gradient, true_gradient),
        limit,
        same,
    )


def _distance(found: Any, truth: Any) -> float:
    """In the Frobenius norm of all arrays, relative to that of the truth."""
    flat = lambda tree: np.concatenate(
        [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)] or [[]]
    )
    found, truth = flat(found), flat(truth)
    size = np.linalg.norm(truth)
    return float(np.linalg.norm(found - truth) / (size if size > 0 else 1))
