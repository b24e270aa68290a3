"""Other libraries doing the same work: the plain snippets that users write, Equinox's
wrappers, paramax, Flax and PyTorch. Those that are not installed are left out."""

import importlib.util
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from networks import RATE


def is_installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


class Snippet(eqx.Module):
    """Max-norm as it is usually written. It overflows, and is not the identity inside
    to the last bit."""

    layer: Any
    bound: float = eqx.field(static=True)
    axis: int | None = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        weight = max_norm(self.bound, self.axis, self.layer.weight)
        return eqx.tree_at(lambda layer: layer.weight, self.layer, weight)(x)


def max_norm(bound: float, axis: int | None, weight: Array) -> Array:
    norm = jnp.linalg.norm(weight, axis=axis, keepdims=True)
    return weight * jnp.minimum(1, bound / jnp.maximum(norm, 1e-7))


def cap_by_svd(bound: float, weight: Array) -> Array:
    """`SpectralCap`, as one would write it."""
    left, values, right = jnp.linalg.svd(weight, full_matrices=False)
    return (left * jnp.minimum(values, bound)) @ right


def polar_by_svd(weight: Array) -> Array:
    """`Orthogonal`, as one would write it."""
    left, _, right = jnp.linalg.svd(weight, full_matrices=False)
    return left @ right


class Paramax(eqx.Module):
    """A layer whose weight is a parametrization of paramax, which is unwrapped here."""

    layer: Any

    def __call__(self, x: Array) -> Array:
        import paramax

        return paramax.unwrap(self.layer)(x)


def paramax_weight_norm(layer: eqx.nn.Linear) -> Any:
    import paramax

    return Paramax(
        eqx.tree_at(lambda t: t.weight, layer, replace_fn=paramax.WeightNormalization)
    )


def flax_step(kind: str | None, width: int, batch: int) -> Callable[[], Any]:
    """One step of Flax's MLP of three layers."""
    import flax.linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = nn.relu(x) if i else x
                dense = nn.Dense(width)
                if kind == "weight norm":
                    x = nn.WeightNorm(dense)(x)
                elif kind == "spectral norm":
                    x = nn.SpectralNorm(dense)(x, update_stats=True)
                else:
                    x = dense(x)
            return x

    network = Network()
    x, y = jnp.ones((batch, width)), jnp.zeros((batch, width))
    variables = network.init(jax.random.key(0), x)
    params = variables["params"]
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params, rest):
        mutable = ["batch_stats"] if kind == "spectral norm" else False
        out = network.apply({"params": params, **rest}, x, mutable=mutable)
        out, rest = out if mutable else (out, rest)
        return jnp.mean((out - y) ** 2), rest

    @jax.jit
    def step(params, rest):
        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest)
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), rest, value

    kept = [rest]

    def call():
        new, kept[0], value = step(params, kept[0])
        return new, value

    return call


def paramax_map(weight: Array) -> Callable[[Array], Array]:
    """paramax's weight normalisation of such weights, its gain as it is."""
    import paramax

    normalised = paramax.WeightNormalization(weight)
    where = lambda t: t.weight
    return lambda weight: paramax.unwrap(eqx.tree_at(where, normalised, weight))


def flax_map(kind: str, weight: Array) -> tuple[Callable[..., Any], Any]:
    """A weight as Flax's wrapper makes it and the new state, from a weight and a state;
    and the first state."""
    import flax.linen as nn

    class Itself(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param("kernel", lambda key: weight)

    class Network(nn.Module):
        @nn.compact
        def __call__(self):
            if kind == "weight norm":
                return nn.WeightNorm(Itself())()
            return nn.SpectralNorm(Itself())(update_stats=True)

    network = Network()
    variables = network.init(jax.random.key(0))
    rest = {name: value for name, value in variables.items() if name != "params"}
    leaves, structure = jax.tree.flatten(variables["params"])
    [place] = [i for i, leaf in enumerate(leaves) if leaf.shape == weight.shape]

    def measured(weight: Array, rest: Any) -> tuple[Array, Any]:
        params = structure.unflatten([*leaves[:place], weight, *leaves[place + 1 :]])
        mutable = list(rest) or False
        out = network.apply({"params": params, **rest}, mutable=mutable)
        return out if mutable else (out, rest)

    return measured, rest


def torch_step(kind: str | None, width: int, batch: int) -> Callable[[], Any]:
    """One step of PyTorch's MLP of three layers, with as many threads as cores."""
    import torch

    torch.manual_seed(0)
    layers = [torch_linear(kind, width) for _ in range(3)]
    relu = torch.nn.ReLU()
    network = torch.nn.Sequential(layers[0], relu, layers[1], relu, layers[2])
    optimiser = torch.optim.SGD(network.parameters(), lr=RATE)
    x, y = torch.ones(batch, width), torch.zeros(batch, width)

    def call():
        optimiser.zero_grad()
        torch.mean((network(x) - y) ** 2).backward()
        optimiser.step()
        # What JAX is asked to wait for must be something that it knows.
        return np.zeros(())

    return call


def torch_linear(kind: str | None, width: int) -> Any:
    """A square layer of PyTorch with a parametrization."""
    import torch
    from torch.nn.utils import parametrizations, parametrize

    class Renorm(torch.nn.Module):
        def forward(self, weight):
            return torch.renorm(weight, 2, 0, 0.5)

    linear = torch.nn.Linear(width, width)
    if kind == "weight norm":
        return parametrizations.weight_norm(linear)
    if kind == "spectral norm":
        return parametrizations.spectral_norm(linear)
    if kind == "max-norm":
        parametrize.register_parametrization(linear, "weight", Renorm())
    return linear


def torch_map(kind: str, width: int, device: str = "cpu") -> Callable[[], Any]:
    """The weight that a parametrization makes, and its gradient; or copies of both."""
    import torch

    torch.manual_seed(0)
    linear = torch_linear(kind, width).to(device)
    cotangent = torch.randn(width, width, device=device)

    def call():
        if kind == "copy":
            return np.zeros(()), linear.weight.detach() + 1, cotangent + 1
        linear.zero_grad()
        linear.weight.backward(cotangent)
        return np.zeros(())

    return call
