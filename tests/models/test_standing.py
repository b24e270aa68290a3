"""Where large weights are relative to `SpectralCap`, which is found without capping
them: the distance and the share of active units, against numpy."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqxreg._linalg import wide_dtype
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from quick import filter_jit, jit
from spectra import singular_values, with_spectrum
from tables import exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = 130
CAP = 1.0
ABOVE = np.r_[3.0, 1.5, np.linspace(0.9, 0.0, SIZE - 2)]


def spectral(values, rows=SIZE, dtype="float32"):
    return jnp.asarray(with_spectrum(values, rows), dtype)


@jit
def standing(weight):
    return eqxreg.SpectralCap(CAP)._standing(weight)


def excess(weight, cap=CAP):
    return np.linalg.norm(np.maximum(singular_values(weight) - cap, 0))


@pytest.fixture
def without_capping(monkeypatch):
    """The cap itself gives NaN."""

    def capped(self, weight):
        return (jnp.full((), jnp.nan, wide_dtype(weight.dtype)),) * 2

    monkeypatch.setattr(eqxreg.SpectralCap, "_by_capping", capped)
    jax.clear_caches()
    yield
    jax.clear_caches()


WEIGHTS = {
    "square": spectral(ABOVE),
    "tall": spectral(ABOVE, 190),
    "wide": spectral(ABOVE, 190).T,
    "kernel": spectral(ABOVE, 4 * SIZE).T.reshape(SIZE, SIZE, 2, 2),
    "complex": sample("complex64", 0.1, (SIZE, SIZE)),
    "ties": spectral([2.0] * 30 + [0.5] * (SIZE - 30)),
    "orthogonal": spectral([2.0] * SIZE),
    "low rank": spectral([3.0, 2.0] + [0.0] * (SIZE - 2)),
    "far above": spectral(np.r_[15.0, [1.5] * 9, np.linspace(0.9, 0, SIZE - 10)]),
    "well below": spectral(ABOVE / 4),
    "just below": spectral(0.32 * ABOVE),
}


@pytest.mark.usefixtures("without_capping")
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_distance_is_that_of_the_singular_values_without_a_cap(name):
    weight = WEIGHTS[name]
    distance, active = standing(weight)
    np.testing.assert_allclose(distance, excess(weight), rtol=1e-5)
    assert active == float(excess(weight) > 0)


@pytest.mark.usefixtures("without_capping")
def test_half_precision_is_measured_without_a_cap():
    weight = spectral(ABOVE, dtype="bfloat16")
    distance, active = standing(weight)
    assert distance.dtype == jnp.float32
    np.testing.assert_allclose(distance, excess(weight), rtol=1e-5)
    assert active == 1


@pytest.mark.usefixtures("without_capping", "x64")
def test_double_precision_is_measured_without_a_cap():
    weight = spectral(ABOVE, dtype="float64")
    distance, active = standing(weight)
    assert distance.dtype == jnp.float64
    np.testing.assert_allclose(distance, excess(weight), rtol=1e-13)
    assert active == 1


@pytest.mark.parametrize("name", ["square", "tall", "wide", "complex", "ties"])
def test_what_was_capped_is_on_the_boundary(name):
    distance, active = standing(eqxreg.SpectralCap(CAP)(WEIGHTS[name]))
    assert (distance, active) == (0, 1)


@pytest.mark.parametrize(
    "spectrum, expected",
    [
        # Thousands of times the bound, where roundings of the largest would count.
        (np.r_[3000.0, ABOVE[1:]], 1.0),
        ([1e-3] * SIZE, 0.0),
    ],
    ids=["far", "inside"],
)
def test_any_size_is_measured(spectrum, expected):
    weight = spectral(spectrum)
    distance, active = standing(weight)
    np.testing.assert_allclose(distance, excess(weight), rtol=1e-5)
    assert active == expected


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_the_distance_neither_overflows_nor_underflows(scale):
    weight = spectral(ABOVE) * scale
    found, _ = jit(eqxreg.SpectralCap(scale)._standing)(weight)
    np.testing.assert_allclose(found / scale, excess(spectral(ABOVE)), rtol=1e-5)


def test_units_that_are_zero_are_not_active():
    weight = spectral(ABOVE, 200).at[::4].set(0)
    assert standing(weight)[1] == np.float32(3 / 4)


def test_parts_that_are_inside_are_not_active():
    """Of two blocks that know nothing of each other, one is outside."""
    outside, inside = spectral(ABOVE / 2), spectral(0.2 * ABOVE)
    zero = jnp.zeros_like(inside)
    weight = jnp.block([[outside, zero], [zero, inside]])
    distance, active = standing(weight)
    np.testing.assert_allclose(distance, excess(outside), rtol=1e-4)
    assert active == 0.5


def test_each_block_is_measured_by_itself():
    parts = [spectral(ABOVE), spectral(0.2 * ABOVE), spectral(2 * ABOVE)]
    p = eqxreg.SpectralCap(CAP, blocks=3)
    distance, active = jit(p._standing)(jnp.concatenate(parts))
    expected = np.linalg.norm([excess(part) for part in parts])
    np.testing.assert_allclose(distance, expected, rtol=1e-5)
    np.testing.assert_allclose(active, 2 / 3, rtol=1e-6)


def test_nans_stay_visible():
    weight = spectral(ABOVE).at[0, 0].set(jnp.nan)
    assert np.isnan(standing(weight)[0])


def test_a_bound_may_be_traced():
    @jit
    def distance(weight, cap):
        return eqxreg.SpectralCap(cap)._standing(weight)[0]

    weight = spectral(ABOVE)
    for cap in (0.5, 2.0):
        found = distance(weight, jnp.float32(cap))
        np.testing.assert_allclose(found, excess(weight, cap), rtol=1e-5)


class Halved(eqxreg.SpectralCap):
    def __call__(self, raw):
        return super().__call__(raw) / 2


def test_a_subclass_with_a_map_of_its_own_is_measured_by_it():
    weight = spectral(ABOVE)
    values = singular_values(weight)
    expected = np.linalg.norm(values - np.minimum(values, CAP) / 2)
    np.testing.assert_allclose(Halved(CAP)._standing(weight)[0], expected, rtol=1e-5)


def tree_of(count):
    return {f"weight_{i}": (1.0 + i) * spectral(ABOVE / 3) for i in range(count)}


def test_each_of_several_weights_has_its_own_numbers():
    tree = tree_of(3) | {"weight_tall": spectral(ABOVE, 190)}
    measure = lambda tree: eqxreg.metrics(tree, projection=eqxreg.SpectralCap(CAP))
    found = filter_jit(measure)(tree)
    stacked = {"weight": jnp.stack(list(tree_of(3).values()))}
    ensemble = filter_jit(eqx.filter_vmap(measure))(stacked)
    for i, (name, weight) in enumerate(tree.items()):
        distances = [found[f"['{name}']/distance"]]
        if i < 3:
            distances.append(ensemble["['weight']/distance"][i])
        for distance in distances:
            np.testing.assert_allclose(distance, excess(weight), rtol=1e-5)


def test_a_wrapped_weight_has_the_same_numbers():
    linear = eqx.nn.Linear(SIZE, SIZE, key=jax.random.key(0))
    linear = eqx.tree_at(lambda x: x.weight, linear, spectral(ABOVE))
    p = eqxreg.SpectralCap(CAP)
    found = filter_jit(eqxreg.metrics)(eqxreg.Constraint(linear, "weight", p))
    np.testing.assert_allclose(
        found[".layer.weight/distance"], excess(exact(linear.weight)), rtol=1e-4
    )
    assert found[".layer.weight/active"] == 1


def test_weights_of_one_shape_share_a_program():
    def loops(count):
        p = eqxreg.SpectralCap(CAP)
        measure = lambda tree: eqxreg.metrics(tree, projection=p)
        text = str(jax.make_jaxpr(measure)(tree_of(count)))
        return text.count("eigh["), text.count("tridiagonal[")

    assert loops(1) == loops(4)
    assert loops(1)[1] > 0


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_sharded_weight_has_the_same_numbers(kind):
    weight = spectral(ABOVE[:128], 136)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(getattr(AxisType, kind),))
    placed = jax.device_put(weight, NamedSharding(mesh, PartitionSpec("x")))
    p = eqxreg.SpectralCap(CAP)
    measure = jit(lambda tree: eqxreg.metrics(tree, projection=p))
    found = measure({"weight_0": placed, "weight_1": placed})
    for i in range(2):
        distance = found[f"['weight_{i}']/distance"]
        np.testing.assert_allclose(distance, excess(weight), rtol=1e-5)
        assert found[f"['weight_{i}']/active"] == 1
