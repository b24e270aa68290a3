"""Compiling quickly, for tests of programs and to tolerances.

Tests of bits and of costs compile with `jax.jit` and `eqx.filter_jit`, as users do, and
so do those of large convolutions, which such programs do ten times as slowly.
"""

import contextlib
import functools as ft
from collections.abc import Iterator

import equinox as eqx
import jax
from jax.test_util import check_jvp, check_vjp


# Making the machine code takes most of the time of most tests, more than running it.
_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

jit = ft.partial(jax.jit, compiler_options=_OPTIONS)
filter_jit = ft.partial(eqx.filter_jit, compiler_options=_OPTIONS)


@contextlib.contextmanager
def compilation() -> Iterator[None]:
    """All that is compiled meanwhile, operations one by one too."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def check_derivatives(function, arguments, eps=1e-4):
    """`jax.test_util.check_grads` of the first order, with a program for each mode.

    JAX differentiates no function that has compiler options.
    """
    compiled = jit(function)
    forward = jit(lambda *of: jax.jvp(function, *of))
    pull_back = jit(lambda at, cotangents: jax.vjp(function, *at)[1](cotangents))
    check_jvp(compiled, forward, arguments, eps=eps)
    backward = lambda *at: (compiled(*at), ft.partial(pull_back, at))
    check_vjp(compiled, backward, arguments, eps=eps)
