"""What `gpu.py` times: maps alone, steps, and what others make of the same."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import optax
import peers
from cases import row_maps, warm_step, wrapper_of
from jaxtyping import Array, PRNGKeyArray
from networks import RATE, is_stateful
from steps import Own
from timing import Call


BOUND = 0.5
UNIT = eqxreg.MaxNorm(BOUND, axis="unit")


def maps(size: int, dtype: str) -> dict[str, Call]:
    """Maps alone and their gradients, beside a copy of weight and gradient."""
    keys = jax.random.split(jax.random.key(0))
    weight = (jax.random.normal(keys[0], (size, size)) / size**0.5).astype(dtype)
    cotangent = jax.random.normal(keys[1], (size, size)).astype(dtype)
    made = row_maps(weight) | {"SpectralNorm, one step": warm_step(weight)}
    if dtype == "float32":
        made["eqx.nn.SpectralNorm"] = wrapper_of(eqx.nn.SpectralNorm, size)
    return {name: ft.partial(fn, weight, cotangent) for name, fn in made.items()}


# Steps. The memory of the old weights is that of the new ones, as in training.


def stepped(
    model: Any,
    state: Any,
    loss: Callable[[Any, Any], tuple[Array, Any]],
    after: optax.GradientTransformation | None = None,
) -> Call:
    optimiser = optax.chain(optax.sgd(RATE), after or optax.identity())
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @ft.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, optimiser_state: Any, state: Any) -> Any:
        of = lambda params: loss(eqx.combine(params, static), state)
        (_, new_state), grads = jax.value_and_grad(of, has_aux=True)(params)
        updates, optimiser_state = optimiser.update(grads, optimiser_state, params)
        return optax.apply_updates(params, updates), optimiser_state, new_state

    # What is donated is this way's own.
    own = jax.tree.map(jnp.copy, (params, optimiser.init(params), state))
    kept = [own]

    def call() -> Any:
        kept[0] = step(*kept[0])
        return kept[0]

    return call


def steps(size: int, batch: int, dtype: str) -> dict[str, Call]:
    """One step of a linear layer."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (batch, size)).astype(dtype)

    def loss(model: Any, state: Any) -> tuple[Array, Any]:
        if is_stateful(model):
            out, state = jax.vmap(model, in_axes=(0, None), out_axes=(0, None))(
                x, state
            )
        else:
            out = jax.vmap(model)(x)
        return jnp.mean(out.astype(jnp.float32) ** 2), state

    def of(wrap: Callable[[Any], Any] = lambda t: t, **options: Any) -> Call:
        linear = eqx.nn.Linear(size, size, dtype=jnp.dtype(dtype), key=key)
        model, state = eqx.nn.make_with_state(wrap)(linear)
        return stepped(model, state, loss, **options)

    calls = {
        "unconstrained": of(),
        "MaxNormConstraint, unit": of(lambda t: eqxreg.Constraint(t, "weight", UNIT)),
        "MaxNormConstraint, whole": of(
            lambda t: eqxreg.MaxNormConstraint(t, "weight", BOUND)
        ),
        "snippet, unit": of(lambda t: peers.Snippet(t, BOUND, 1)),
        "MaxNorm, one's own module": of(
            lambda t: eqxreg.Constraint(Own(t.weight, t.bias), "weight", UNIT)
        ),
        "WeightNormConstraint": of(eqxreg.WeightNormConstraint),
        "eqx.nn.WeightNorm": of(eqx.nn.WeightNorm),
        "SpectralNormConstraint": of(
            lambda t: eqxreg.SpectralNormConstraint(t, key=key)
        ),
        "project(every=1)": of(after=eqxreg.project(UNIT)),
        "project(every=10)": of(after=eqxreg.project(UNIT, every=10)),
    }
    if dtype == "float32":
        calls["eqx.nn.SpectralNorm"] = of(
            lambda t: eqx.nn.SpectralNorm(t, "weight", key=key)
        )
    return calls


class OwnAttention(eqx.Module):
    """Causal attention of one's own, with one array for queries, keys and values."""

    inner: Own
    outer: Own
    heads: int = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        length, width = x.shape
        parts = jax.vmap(self.inner)(x).reshape(length, 3, self.heads, -1)
        q, k, v = (parts[None, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)[0]
        return jax.vmap(self.outer)(mixed.reshape(length, width))


class EquinoxAttention(eqx.Module):
    """The same from `eqx.nn`."""

    attention: eqx.nn.MultiheadAttention

    def __call__(self, x: Array) -> Array:
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        return self.attention(x, x, x, mask=mask)


class Block(eqx.Module):
    """Attention and two linear layers, each with a normalisation before it."""

    norms: list[eqx.nn.RMSNorm]
    attention: OwnAttention | EquinoxAttention
    up: Any
    down: Any

    def __init__(self, width: int, own: bool, key: PRNGKeyArray):
        keys = iter(jax.random.split(key, 4))
        half: Any = {"dtype": jnp.bfloat16}

        def linear(i: int, o: int) -> Any:
            made = eqx.nn.Linear(i, o, **half, key=next(keys))
            return Own(made.weight, made.bias) if own else made

        heads = max(1, width // 128)
        self.norms = [eqx.nn.RMSNorm(width, **half) for _ in range(2)]
        if own:
            inner, outer = linear(width, 3 * width), linear(width, width)
            self.attention = OwnAttention(inner, outer, heads)
        else:
            attention = eqx.nn.MultiheadAttention(heads, width, **half, key=next(keys))
            self.attention = EquinoxAttention(attention)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(jax.vmap(self.norms[0])(x))
        y = jax.vmap(self.norms[1])(x)
        return x + jax.vmap(lambda y: self.down(jax.nn.gelu(self.up(y))))(y)


def block_steps(width: int, own: bool) -> dict[str, Call]:
    """One step of a transformer block, with all weights constrained, or projected."""
    model = Block(width, own, jax.random.key(0))
    shape = (4, 16 if width < 1024 else 512, width)
    x = jax.random.normal(jax.random.key(1), shape).astype(jnp.bfloat16)

    def loss(model: Any, state: Any) -> tuple[Array, Any]:
        return jnp.mean(jax.vmap(model)(x).astype(jnp.float32) ** 2), state

    baked = lambda model, state: loss(eqxreg.bake(model), state)
    constrained = eqxreg.constrain(model, UNIT)
    return {
        "unconstrained": stepped(model, None, loss),
        "constrained": stepped(constrained, None, loss),
        "constrained, baked": stepped(constrained, None, baked),
        "project(every=1)": stepped(model, None, loss, eqxreg.project(UNIT)),
        "project(every=10)": stepped(model, None, loss, eqxreg.project(UNIT, every=10)),
    }


# PyTorch, on the same device.


def has_torch() -> bool:
    """Whether there is a PyTorch that computes where JAX does."""
    if not peers.is_installed("torch"):
        return False
    import torch

    platform = jax.devices()[0].platform
    return platform == "cpu" or (platform == "gpu" and torch.cuda.is_available())


def _torch_device() -> str:
    return "cuda" if jax.devices()[0].platform == "gpu" else "cpu"


class _Begun:
    """What PyTorch has begun, for JAX to wait for."""

    def block_until_ready(self) -> None:
        import torch

        if _torch_device() == "cuda":
            torch.cuda.synchronize()


def _waiting(fn: Callable[[], Any]) -> Call:
    def call() -> _Begun:
        fn()
        return _Begun()

    return call


def torch_maps(size: int) -> dict[str, Call]:
    kinds = ("copy", "max-norm", "weight norm", "spectral norm")
    device = _torch_device()
    return {kind: _waiting(peers.torch_map(kind, size, device)) for kind in kinds}


def torch_steps(size: int, batch: int, dtype: str) -> dict[str, Call]:
    import torch

    device, kind_of = _torch_device(), getattr(torch, dtype)
    x = torch.randn(batch, size, device=device, dtype=kind_of)

    def of(kind: str | None) -> Call:
        linear = peers.torch_linear(kind, size).to(device, kind_of)
        optimiser = torch.optim.SGD(linear.parameters(), lr=RATE)

        def step() -> None:
            optimiser.zero_grad()
            torch.mean(linear(x).float() ** 2).backward()
            optimiser.step()

        return _waiting(step)

    kinds = ("max-norm", "weight norm", "spectral norm")
    return {"unconstrained": of(None)} | {kind: of(kind) for kind in kinds}
