"""`input_shape="any"`: bounds of convolutions for images of every size, measured on
dense matrices that numpy makes of the kernel, in float64."""

import math

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import check_derivatives, filter_jit
from tables import assert_close, exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")

nn = eqx.nn
KEY = jax.random.key(0)


def built(layer_type, *args, **kwargs):
    """A layer with Gaussian weights, and no bias."""
    layer = layer_type(*args, **kwargs, use_bias=False, key=KEY)
    weight = sample("float32", shape=layer.weight.shape, seed=len(args))
    return eqx.tree_at(lambda n: n.weight, layer, weight)


def wrap(layer, *args, build=eqxreg.SpectralNormConstraint, **kwargs):
    make = eqx.nn.make_with_state(build)
    return make(layer, "weight", *args, input_shape="any", key=KEY, **kwargs)


def taps_along(layer, axis, size):
    """Which entry of an image the tap of a kernel meets for an entry of the output:
    zeros and ones of shape `(out, taps, in)`."""
    taps, stride = layer.kernel_size[axis], layer.stride[axis]
    dilation = layer.dilation[axis]
    low, high = layer.padding[axis]
    reach = dilation * (taps - 1)
    if isinstance(layer, nn.ConvTranspose):
        count = (size - 1) * stride + 1 + reach - low - high
        count += layer.output_padding[axis]
        o, k, i = np.ogrid[:count, :taps, :size]
        return (o + k * dilation - (reach - low) == i * stride).astype(float)
    count = max((size + low + high - reach - 1) // stride + 1, 0)
    o, k, i = np.ogrid[:count, :taps, :size]
    place = o * stride + k * dilation - low
    if layer.padding_mode == "CIRCULAR":
        place = place % size
    return (place == i).astype(float)


def dense(layer, sizes):
    """The matrices of the groups of a convolution."""
    along = [taps_along(layer, axis, size) for axis, size in enumerate(sizes)]
    outs = [a.shape[0] for a in along]
    for kernel in np.split(exact(layer.weight), layer.groups):
        rows, columns, *taps = kernel.shape
        matrix = np.zeros((rows, *outs, columns, *sizes), kernel.dtype)
        for r, c, *tap in np.ndindex(rows, columns, *taps):
            places = [np.nonzero(a[:, k]) for a, k in zip(along, tap, strict=True)]
            to, of = (np.ix_(*(place[side] for place in places)) for side in (0, 1))
            matrix[r, *to, c, *of] += kernel[r, c, *tap]
        yield matrix.reshape(rows * math.prod(outs), columns * math.prod(sizes))


def dense_norm(layer, sizes):
    """The largest singular value, from the smaller one of the Gram matrices."""
    largest = 0.0
    for matrix in dense(layer, sizes):
        short = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
        if short.size:
            largest = max(largest, np.linalg.eigvalsh(short @ short.conj().T)[-1])
    return math.sqrt(largest)


# The layer, and how short of the bound the norm may be on the largest image.
_CIRCULAR = {"padding_mode": "CIRCULAR"}
LAYERS = {
    "1d": ((nn.Conv1d, 3, 4, 3), {"padding": 1}, 0.002),
    "1d-stride": ((nn.Conv1d, 3, 4, 5), {"stride": 2}, 0.002),
    "1d-stride-over": ((nn.Conv1d, 3, 4, 2), {"stride": 3}, 1e-4),
    "1d-common": ((nn.Conv1d, 2, 3, 5), {"stride": 4, "dilation": 6}, 0.02),
    "1d-circular": ((nn.Conv1d, 3, 4, 3), {"padding": 1, **_CIRCULAR}, 0.002),
    "2d": ((nn.Conv2d, 1, 2, 3), {"padding": 1}, 0.02),
    "2d-wide": ((nn.Conv2d, 1, 1, 5), {"padding": 4}, 0.03),
    "2d-stride": ((nn.Conv2d, 1, 4, 3), {"stride": 2, "padding": 1}, 0.02),
    "2d-groups": (
        (nn.Conv2d, 4, 2, 3),
        {"groups": 2, "padding": 1, "stride": 3},
        1e-4,
    ),
    "2d-mixed": (
        (nn.Conv2d, 1, 2, (3, 2)),
        {"stride": (1, 2), "dilation": (2, 1), "padding": ((2, 1), (0, 3))},
        0.01,
    ),
    "2d-circular": ((nn.Conv2d, 1, 2, 3), {"padding": 1, **_CIRCULAR}, 0.01),
    "3d": ((nn.Conv3d, 1, 2, 2), {"padding": 1}, 0.05),
    "transposed-1d": (
        (nn.ConvTranspose1d, 3, 2, 5),
        {"stride": 2, "padding": 2, "output_padding": 1},
        0.002,
    ),
    "transposed-2d": (
        (nn.ConvTranspose2d, 2, 4, 3),
        {"stride": (2, 1), "dilation": (1, 2), "groups": 2, "padding": 1},
        0.03,
    ),
}
SIZES = {1: (3, 5, 8, 16, 33, 128), 2: (3, 5, 8, 16, 33), 3: (3, 5, 8)}


@pytest.mark.parametrize("case", LAYERS)
def test_no_image_is_stretched_by_more_than_the_bound(case):
    (build, *args), options, short = LAYERS[case]
    layer, state = wrap(built(build, *args, **options), 0.7)
    plain = filter_jit(eqxreg.bake)(layer, state)
    sizes = SIZES[plain.num_spatial_dims]
    norms = [dense_norm(plain, (n,) * plain.num_spatial_dims) for n in sizes]
    assert max(norms) <= 0.7 * (1 + 1e-3)
    assert max(norms) >= 0.7 * (1 - short)
    bound = float(eqxreg.operator_norm(plain, input_shape="any"))
    assert max(norms) <= bound and bound == pytest.approx(0.7, rel=1e-3)


@pytest.mark.parametrize("case", LAYERS)
def test_the_dense_matrix_is_that_of_the_layer(case):
    (build, *args), options, _ = LAYERS[case]
    layer = built(build, *args, **options)
    sizes = (
        (30,) if layer.num_spatial_dims == 1 else (7, 9, 4)[: layer.num_spatial_dims]
    )
    x = sample("float32", shape=(layer.in_channels, *sizes))
    images = np.split(exact(x), layer.groups)
    pairs = zip(dense(layer, sizes), images, strict=True)
    expected = np.concatenate([matrix @ image.ravel() for matrix, image in pairs])
    np.testing.assert_allclose(exact(filter_jit(layer)(x)).ravel(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
def test_other_dtypes_are_bounded_too(dtype):
    conv = built(nn.Conv1d, 2, 3, 3, padding=1)
    weight = sample(dtype, shape=conv.weight.shape)
    layer, state = wrap(eqx.tree_at(lambda n: n.weight, conv, weight), 0.7)
    out, state = filter_jit(layer)(jnp.ones((2, 8), dtype), state)
    plain = filter_jit(eqxreg.bake)(layer, state)
    assert plain.weight.dtype == dtype == out.dtype
    assert 0.99 * 0.7 <= dense_norm(plain, (200,)) <= 0.7 * (1 + 1e-3)


def test_layers_of_a_stack_are_bounded_one_by_one():
    keys = jax.random.split(KEY, 3)
    make = lambda k: nn.Conv1d(2, 2, 3, padding=1, use_bias=False, key=k)
    layers, state = wrap(eqx.filter_vmap(make)(keys), 0.7)
    plain = filter_jit(eqxreg.bake)(layers, state)
    for weight in plain.weight:
        one = eqx.tree_at(lambda n: n.weight, make(KEY), weight)
        assert dense_norm(one, (64,)) == pytest.approx(0.7, rel=5e-3)


@pytest.mark.parametrize("build", [nn.Conv2d, nn.ConvTranspose2d])
def test_an_empty_weight_stays(build):
    conv = build(2, 0, 3, key=KEY)
    layer, state = wrap(conv)
    out, state = filter_jit(layer)(jnp.ones((2, 5, 5)), state)
    assert out.shape[0] == 0
    plain = eqxreg.bake(layer, state)
    assert plain.weight.shape == conv.weight.shape
    assert eqxreg.operator_norm(plain, "any") == 0


@pytest.mark.parametrize("build", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_zero_weight_stays_zero_with_the_gradient_of_the_identity(build):
    conv = build(2, 2, 3, key=KEY)
    conv = eqx.tree_at(lambda n: n.weight, conv, jnp.zeros_like(conv.weight))
    layer, state = wrap(conv)
    x = sample("float32", shape=(2, 5, 5))

    def loss(layer):
        return jnp.sum(layer(x, jax.tree.map(lambda x: x, state))[0] ** 3 + 1)

    value, gradient = filter_jit(eqx.filter_value_and_grad(loss))(layer)
    plain = lambda conv: jnp.sum(conv(x) ** 3 + 1)
    expected, slope = filter_jit(eqx.filter_value_and_grad(plain))(conv)
    assert_close((value, gradient.weight), (expected, slope.weight))


def test_a_linear_layer_is_bounded_as_a_matrix():
    linear = nn.Linear(5, 4, key=KEY)
    layer, state = wrap(linear, 0.7)
    weight = exact(eqxreg.bake(layer, state).weight)
    assert np.linalg.norm(weight, 2) == pytest.approx(0.7, rel=1e-3)
    norm = np.linalg.norm(exact(linear.weight), 2)
    assert float(eqxreg.operator_norm(linear, "any")) == pytest.approx(norm, rel=1e-3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("build", [nn.Conv1d, nn.ConvTranspose1d])
def test_the_gradient_of_the_norm_is_that_of_finite_differences(build):
    layer = build(2, 3, 3, 2, key=KEY)
    weight = sample("float64", shape=layer.weight.shape)

    def norm(weight):
        return eqxreg.operator_norm(
            eqx.tree_at(lambda n: n.weight, layer, weight), input_shape="any"
        )

    check_derivatives(norm, (weight,))


@pytest.mark.usefixtures("x64")
def test_the_gradient_of_a_call_is_that_of_finite_differences():
    conv = nn.Conv1d(2, 2, 2, padding=1, use_bias=False, key=KEY, dtype=jnp.float64)
    model, state = wrap(conv, 0.7)
    x, y = sample("float64", shape=(2, 4)), sample("float64", shape=(2, 5), seed=1)

    @jax.jit
    def loss(weight):
        own = eqx.tree_at(lambda m: m.layer.weight, model, weight)
        return jnp.sum(y * own(x, jax.tree.map(lambda x: x, state))[0])

    gradient = filter_jit(jax.grad(loss))(conv.weight)

    # With the norm from the grid, which has no vectors to start from.
    def expected(weight):
        own = eqx.tree_at(lambda c: c.weight, conv, weight)
        bound = eqxreg.operator_norm(own, "any")
        return float(jnp.sum(y * own(x)) * 0.7 / bound)

    direction = sample("float64", shape=conv.weight.shape, seed=2)
    step = 1e-5 * direction
    difference = expected(conv.weight + step) - expected(conv.weight - step)
    slope = float(jnp.sum(gradient * direction))
    assert slope == pytest.approx(difference / 2e-5, rel=1e-2)


class Doubled(nn.Conv1d):
    def __call__(self, x, *, key=None):
        return 2 * super().__call__(x)


def padded(mode, **options):
    return nn.Conv1d(2, 3, 3, padding=1, padding_mode=mode, key=KEY, **options)


REFUSED = {
    "reflect": (padded("REFLECT"), "'REFLECT'` entries of the image are repeated"),
    "replicate": (padded("REPLICATE"), "Give the full shape of an input"),
    "circular-stride": (padded("CIRCULAR", stride=2), "or pad with zeros"),
    "own call": (Doubled(2, 3, 3, key=KEY), "got `weight` of a Doubled"),
    "norm": (nn.LayerNorm((2, 3)), "leave `input_shape` out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_bound_for_all_sizes_is_an_error(case):
    layer, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        wrap(layer)
    if case in ("reflect", "replicate", "circular-stride"):
        with pytest.raises(ValueError, match=message):
            eqxreg.operator_norm(layer, "any")


def test_padding_of_nothing_repeats_nothing():
    conv = nn.Conv1d(2, 3, 3, padding_mode="REFLECT", key=KEY)
    assert eqxreg.operator_norm(conv, "any") == eqxreg.lipschitz_bound(conv)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", ["all", "", 3, (3.5, 2)])
def test_other_words_are_no_input_shape(shape):
    conv = nn.Conv1d(2, 3, 3, key=KEY)
    with pytest.raises(ValueError, match='for images of every size "any", got'):
        eqxreg.operator_norm(conv, shape)


TOO_SMALL = {
    "kernel": (nn.Conv2d(3, 4, 5, key=KEY), (3, 2, 2)),
    "one axis": (nn.Conv2d(3, 4, 3, key=KEY), (3, 1, 8)),
    "little padding": (nn.Conv2d(3, 4, 5, padding=1, key=KEY), (3, 2, 2)),
    "dilation": (nn.Conv1d(3, 4, 3, dilation=4, key=KEY), (3, 5)),
    "transposed": (nn.ConvTranspose2d(3, 4, 5, padding=4, key=KEY), (3, 2, 2)),
}


@pytest.mark.parametrize("case", TOO_SMALL)
def test_an_image_that_the_kernel_does_not_fit_in_is_an_error(case):
    layer, shape = TOO_SMALL[case]
    with pytest.raises(ValueError, match="`input_shape=.*` is too small for this Conv"):
        eqxreg.operator_norm(layer, shape)
    make = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)
    with pytest.raises(ValueError, match="or pad the layer"):
        make(layer, "weight", input_shape=shape, key=KEY)
    # Nothing is stretched by less than the bound.
    assert eqxreg.lipschitz_bound(layer, shape) > 0


def test_an_image_smaller_than_the_kernel_has_its_norm_if_padding_makes_it_fit():
    conv = built(nn.Conv2d, 2, 3, 5, padding=2)
    found = float(eqxreg.operator_norm(conv, (2, 2, 2)))
    assert found == pytest.approx(dense_norm(conv, (2, 2)), rel=1e-3)


def test_an_empty_image_has_a_bound_with_any_padding():
    for mode in ("REFLECT", "REPLICATE", "CIRCULAR"):
        assert eqxreg.lipschitz_bound(padded(mode, stride=2), (2, 0)) > 0
