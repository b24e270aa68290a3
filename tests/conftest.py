"""Eight virtual devices, strict promotion everywhere, and 64-bit mode on request."""

import os


# Before JAX and NumPy are imported, by anything.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Each process decomposes small matrices, and threads that wait for work would spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict(request):
    if "examples" in request.path.parts:
        yield
        return
    promotion = jax.numpy_dtype_promotion("strict")
    with promotion, jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def standard_promotion():
    """For what calls code that is not clean under strict promotion, as Adam's is."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def x64():
    """64-bit mode, for comparison with finite differences."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def _forget():
    """What was compiled for one file is of no use to the next, and takes memory."""
    yield
    jax.clear_caches()
