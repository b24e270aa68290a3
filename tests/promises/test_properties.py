"""The promises of projections, for whatever weights hypothesis comes up with."""

import eqxreg
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from tables import exact, norm_over


ROWS = (4, 3)
# A norm is rounded before it is compared with its bound.
ROUNDING = 1 + float(jnp.finfo(jnp.float32).eps)

finite = strategies.floats(
    width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False
)
weights = hnp.arrays(np.float32, ROWS, elements=finite)
always = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def row_norms(weight: np.ndarray, ord: float) -> np.ndarray:
    return norm_over((1, 2), ord)(weight[:, :, None])


CASES = {
    "max_norm": (eqxreg.MaxNorm(1.0, axis="unit"), 2, None, 1.0),
    "l1": (eqxreg.MaxNorm(1.0, axis="unit", ord=1), 1, None, 1.0),
    "min_max": (eqxreg.MinMaxNorm(0.5, 1.0, axis="unit"), 2, 0.5, 1.0),
    "unit_norm": (eqxreg.UnitNorm(axis="unit"), 2, 1.0, 1.0),
    "simplex": (eqxreg.Simplex(), 1, 1.0, 1.0),
}
RUN = {
    name: jax.jit(lambda w, p=p: (p(w), p(p(w)), jax.vjp(p, w)[1](jnp.ones(ROWS))))
    for name, (p, *_) in CASES.items()
}


@pytest.mark.parametrize("name", list(CASES))
def test_projections_keep_their_promises(name):
    _, ord, low, high = CASES[name]

    @given(weights)
    @always
    def check(weight):
        once, twice, [gradient] = RUN[name](jnp.asarray(weight))
        assert jnp.array_equal(once, twice)
        norms = row_norms(exact(once), ord)
        assert np.all(norms <= high * ROUNDING)
        if low is not None:
            zero = np.all(weight == 0, axis=1)
            zero = zero & (name != "simplex")
            assert np.all((norms >= low * (1 - 1e-5)) | zero)
        large = np.abs(exact(weight)).max(axis=1) > 1e-30
        assert np.all(np.isfinite(gradient[large]))

    check()
