"""A model to measure."""

import equinox as eqx
import pytest


@pytest.fixture
def mlp(key):
    return eqx.nn.MLP(4, 4, 4, depth=2, key=key)
