"""A model to train."""

import equinox as eqx
import pytest


@pytest.fixture
def mlp(key):
    return eqx.nn.MLP(4, 2, 8, depth=2, key=key)
