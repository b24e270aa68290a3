"""Makes the modules beside the trainers importable, as running a trainer does."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, str]]:
    """Keeps compiled programs for the session: most runs here share theirs.

    Yields what a child process needs in its environment to use it too.
    """
    directory = str(tmp_path_factory.mktemp("compiled"))
    options = {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in options.items()}
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def child_environment(compilation_cache: dict[str, str]) -> dict[str, str]:
    """The environment of a script that shares the compiled programs."""
    return {**os.environ, **compilation_cache}
