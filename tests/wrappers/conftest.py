"""A layer to wrap."""

import equinox as eqx
import pytest


@pytest.fixture
def linear(key):
    return eqx.nn.Linear(4, 3, key=key)
