"""Every map under JAX's transformations, on a mesh, and exported."""

import math
import re

import eqxreg
import jax
import jax.numpy as jnp
import pytest
from eqxreg._maps import WeightNorm
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from quick import jit
from tables import assert_close, each_kind, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


MAPS = each_kind()
each_map = pytest.mark.parametrize("name", list(MAPS))


def total(p):
    # Not the sum of squares, whose gradient is nothing but rounding on a sphere.
    return lambda weight: jnp.sum(p(weight) ** 3)


@each_map
def test_vmap_is_a_loop(name):
    p = MAPS[name]
    stack = jnp.stack([sample("float32", s, seed=i) for i, s in enumerate((1, 1e25))])
    if name in ("positive-exp", "cayley"):
        stack = jnp.clip(stack, -9, 9)
    # The second weight takes the careful way; the first must not notice.
    one = jit(lambda weight: p(weight))
    looped = jnp.stack([one(weight) for weight in stack])
    assert_close(list(jit(jax.vmap(p))(stack)), list(looped))
    last = jit(jax.vmap(p, in_axes=-1, out_axes=-1))
    mapped = jnp.moveaxis(last(jnp.moveaxis(stack, 0, -1)), -1, 0)
    assert_close(list(mapped), list(looped))


@each_map
def test_transformations_of_the_gradient_agree(name):
    p, stack = MAPS[name], jnp.stack([sample("float32", seed=i) for i in range(2)])
    gradient = jax.grad(total(p))
    one = jit(gradient)
    looped = jnp.stack([one(weight) for weight in stack])

    def body(carry, weight):
        return carry, jax.grad(jax.checkpoint(total(p)))(weight)

    def summed(stack):
        return jnp.sum(jax.vmap(total(p))(stack))

    assert_close(jit(jax.vmap(gradient))(stack), looped)
    assert_close(jit(jax.grad(summed))(stack), looped)
    scanned = jit(lambda stack: jax.lax.scan(body, None, stack)[1])
    assert_close(scanned(stack), looped)


@each_map
def test_no_nans_arise_and_no_tracer_leaks(name):
    p, weight = MAPS[name], sample("float32").at[0].set(0.0)
    with jax.debug_nans(True), jax.checking_leaks():
        jit(jax.value_and_grad(total(p)))(weight)


@pytest.mark.usefixtures("x64")
@each_map
def test_64_bit_mode_changes_no_dtype(name):
    for dtype in ("float32", "float64"):
        assert jax.eval_shape(MAPS[name], sample(dtype)).dtype == dtype


@each_map
def test_the_gradient_exports_to_every_platform(name):
    platforms = ("cpu", "cuda", "rocm", "tpu")
    gradient = jax.jit(jax.grad(total(MAPS[name])))
    weight = jax.ShapeDtypeStruct((6, 5, 4), jnp.float32)
    exported = export.export(gradient, platforms=platforms)(weight)
    assert exported.platforms == platforms


def test_vmap_does_not_pay_for_the_careful_norm():
    p = eqxreg.MaxNorm(1.0, axis="unit")
    stack = jax.ShapeDtypeStruct((3, 6, 5), jnp.float32)
    text = jit(jax.vmap(p)).lower(stack).compile().as_text()
    assert "conditional" in text


NORMS = {
    "max_norm": eqxreg.MaxNorm(0.7, axis="unit"),
    "max_norm-whole": eqxreg.MaxNorm(0.7),
    "unit_norm": eqxreg.UnitNorm(0.7, axis="unit"),
    "min_max": eqxreg.MinMaxNorm(0.3, 0.7),
    "box": eqxreg.Box(-0.3, 0.7),
    "simplex": eqxreg.Simplex(0.7),
    "l1": eqxreg.MaxNorm(0.7, ord=1),
    "weight_norm": WeightNorm("unit", jnp.ones((16, 1))),
    "spectral_norm": eqxreg.SpectralNorm(0.7),
    "spectral_scale": eqxreg.SpectralScale(0.7),
}


def reduced_sizes(text: str) -> list[int]:
    """The numbers of entries that each all-reduce of a compiled program is over."""
    shapes = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    dims = [d for shape in shapes for d in re.findall(r"\[([\d,]*)\]", shape)]
    return [math.prod(int(n) for n in d.split(",") if n) for d in dims]


@pytest.mark.parametrize(
    "dtype, spec",
    [
        ("float32", ("a", None)),
        ("float32", (None, "b")),
        ("bfloat16", ("a", "b")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", list(NORMS))
def test_a_sharded_weight_is_never_gathered(name, dtype, spec):
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    weight = sample(dtype, shape=(16, 32))
    sharded = jax.device_put(weight, sharding)
    gradient = jax.grad(total(NORMS[name]))
    compiled = jit(gradient, out_shardings=sharding).lower(sharded).compile()
    text = compiled.as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    # Norms, or one flag; for singular values vectors and their inner products. All in
    # at least single precision.
    largest = 16 * 16 if name.startswith("spectral") else 16
    assert all(size <= largest for size in reduced_sizes(text))
    assert not re.search(r"bf16\[[^=]* all-reduce", text)
    assert_close(compiled(sharded), jit(gradient)(weight), tolerance)


def test_counting_of_all_reduces_sees_them():
    mesh = jax.make_mesh((8,), ("a",))
    sharding = NamedSharding(mesh, PartitionSpec("a"))
    weight = jax.device_put(sample("float32", shape=(16, 32)), sharding)
    text = jit(lambda w: jnp.sum(w, axis=0)).lower(weight).compile().as_text()
    assert reduced_sizes(text) == [32]
