"""Makes the modules beside the trainers importable, as running a trainer does."""

import os
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="session")
def compilation_cache() -> dict[str, str]:
    """What a child process needs in its environment to share the compiled programs."""
    prefixes = ("JAX_COMPILATION_CACHE_", "JAX_PERSISTENT_CACHE_")
    return {k: v for k, v in os.environ.items() if k.startswith(prefixes)}


@pytest.fixture
def child_environment(compilation_cache: dict[str, str]) -> dict[str, str]:
    """The environment of a script that shares the compiled programs."""
    return {**os.environ, **compilation_cache}
