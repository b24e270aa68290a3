"""Eight virtual devices, strict promotion everywhere, and 64-bit mode on request."""

import atexit
import os
import shutil
import tempfile

from flags import flags


# Before JAX and NumPy are imported, by anything.
os.environ.setdefault("XLA_FLAGS", flags(devices=8))
# Each process decomposes small matrices, and threads that wait for work would spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of the time goes into compiling. What one file, worker or child process has
# compiled, the others read; after the run it is gone.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="eqxreg-tests-")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import equinox as eqx
import jax
import jaxtyping
import pytest
import quick


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


@pytest.fixture
def unchecked():
    """Without the checks of annotations, so that what is tested is our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests of programs and to tolerances, and what they do one by one; see
    `quick.py`."""
    with quick.compilation():
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget():
    """What was compiled for one file is of no use to the next, and takes memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def linear(key):
    return eqx.nn.Linear(4, 3, key=key)


@pytest.fixture
def mlp(key):
    return eqx.nn.MLP(4, 2, 8, depth=2, key=key)
