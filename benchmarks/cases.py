"""What is measured: maps alone, layers, training steps and compiling."""

import functools as ft
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import optax
import peers
from eqxreg._maps import WeightNorm, warm
from jax import lax
from jaxtyping import Array
from networks import MLP, is_stateful, stepper
from timing import Call


BOUND = 0.5
"""Below the norms of units of a new layer, so that constraints have something to do."""


# Maps alone.


def forward_and_backward(p: Callable[[Array], Array]) -> Callable[..., Any]:
    def both(weight: Array, cotangent: Array) -> tuple[Array, Array]:
        value, pull_back = jax.vjp(p, weight)
        return value, pull_back(cotangent)[0]

    return jax.jit(both)


def remembering(measured: Callable, start: Any) -> Callable[..., Any]:
    """A map that goes on from what it found last."""

    @jax.jit
    def both(weight: Array, cotangent: Array, start: Any) -> Any:
        p = lambda weight: measured(weight, start)
        value, pull_back, start = jax.vjp(p, weight, has_aux=True)
        return value, pull_back(cotangent)[0], start

    kept = [start]

    def call(weight: Array, cotangent: Array) -> Any:
        value, gradient, kept[0] = both(weight, cotangent, kept[0])
        return value, gradient

    return call


class Itself(eqx.Module):
    """A layer that returns its weight."""

    weight: Array

    def __call__(self, x: Array) -> Array:
        return self.weight


def wrapper_of(build: Callable[..., Any], size: int) -> Callable[..., Any]:
    """The weight that a stateful wrapper makes, and its gradient."""
    key = jax.random.key(0)
    linear = eqx.nn.Linear(size, size, use_bias=False, key=key)
    layer, state = eqx.nn.make_with_state(build)(linear, "weight", key=key)

    layer = eqx.tree_at(lambda t: t.layer, layer, Itself(linear.weight))

    def measured(weight: Array, state: Any) -> tuple[Array, Any]:
        changed = eqx.tree_at(lambda t: t.layer.weight, layer, weight)
        return changed(jnp.zeros(()), state)

    return remembering(measured, state)


def row_maps(weight: Array) -> dict[str, Callable[..., Any]]:
    """Max-norm and weight normalisation, beside a copy of weight and gradient."""
    gain = jnp.ones((len(weight), 1), weight.dtype)
    return {
        "copy": jax.jit(lambda weight, cotangent: (weight + 1, cotangent + 1)),
        "MaxNorm, unit": forward_and_backward(eqxreg.MaxNorm(BOUND, "unit")),
        "snippet, unit": forward_and_backward(ft.partial(peers.max_norm, BOUND, 1)),
        "MaxNorm, whole": forward_and_backward(eqxreg.MaxNorm(BOUND)),
        "snippet, whole": forward_and_backward(ft.partial(peers.max_norm, BOUND, None)),
        "WeightNorm": forward_and_backward(WeightNorm("unit", gain)),
    }


def warm_step(weight: Array) -> Callable[..., Any]:
    """One step of the spectral norm, from what the last one found."""
    p = eqxreg.SpectralNorm()
    step = lambda weight, start: p.measured(weight, warm(1), start)
    return remembering(step, p.cold_start(weight))


def norm_maps(size: int) -> dict[str, Call]:
    weight = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
    cotangent = jax.random.normal(jax.random.key(1), (size, size))
    made = row_maps(weight)
    if size <= 1024:
        made |= {
            "SpectralNorm, one step": warm_step(weight),
            "SpectralNormConstraint": wrapper_of(eqxreg.SpectralNormConstraint, size),
            "eqx.nn.SpectralNorm": wrapper_of(eqx.nn.SpectralNorm, size),
        }
    linear = eqx.nn.Linear(size, size, use_bias=False, key=jax.random.key(0))
    normed = eqx.nn.WeightNorm(linear)

    def equinox_weight_norm(weight: Array) -> Array:
        layer = eqx.tree_at(lambda t: t.layer, normed, Itself(weight))
        return layer(jnp.zeros(()))

    made["eqx.nn.WeightNorm"] = forward_and_backward(equinox_weight_norm)
    if peers.is_installed("paramax"):
        normalised = forward_and_backward(peers.paramax_map(weight))
        made["paramax.WeightNormalization"] = normalised
    if peers.is_installed("flax"):
        for kind in ("weight norm", "spectral norm") if size <= 1024 else ():
            made[f"Flax, {kind}"] = remembering(*peers.flax_map(kind, weight))
    return {name: ft.partial(fn, weight, cotangent) for name, fn in made.items()}


# Layers.


def layer_calls(size: int) -> dict[str, Call]:
    """A linear layer of one vector, and its gradient."""
    key, x = jax.random.key(0), jnp.linspace(-1.0, 1.0, size)
    linear = eqx.nn.Linear(size, size, key=key)
    wraps = {
        "unconstrained": lambda layer: layer,
        "MaxNormConstraint": lambda layer: eqxreg.MaxNormConstraint(
            layer, "weight", BOUND, axis="unit"
        ),
        "SpectralNormConstraint": ft.partial(eqxreg.SpectralNormConstraint, key=key),
        "eqx.nn.SpectralNorm": lambda layer: eqx.nn.SpectralNorm(
            layer, "weight", key=key
        ),
        "WeightNormConstraint": eqxreg.WeightNormConstraint,
        "eqx.nn.WeightNorm": eqx.nn.WeightNorm,
    }

    def call_of(wrap: Callable[..., Any]) -> Call:
        layer, state = eqx.nn.make_with_state(wrap)(linear)
        params, static = eqx.partition(layer, eqx.is_inexact_array)

        @jax.jit
        def gradient(params: Any, state: Any) -> Any:
            def loss(params: Any) -> tuple[Array, Any]:
                layer = eqx.combine(params, static)
                if is_stateful(layer):
                    out, new = layer(x, state)
                else:
                    out, new = layer(x), state
                return jnp.sum(out * out), new

            return jax.value_and_grad(loss, has_aux=True)(params)

        kept = [state]

        def call() -> Any:
            (value, kept[0]), grads = gradient(params, kept[0])
            return value, grads

        return call

    return {name: call_of(wrap) for name, wrap in wraps.items()}


# Singular values.


def singular_maps(size: int, methods: tuple[Any, ...] = (None,)) -> dict[str, Call]:
    """The polar factor and the cap by each method, beside an SVD."""
    keys = jax.random.split(jax.random.key(0))
    weight = jax.random.normal(keys[0], (size, size)) / size**0.5
    near = jnp.linalg.qr(weight)[0] + 1e-3 * jax.random.rademacher(
        keys[1], weight.shape, weight.dtype
    )
    made = {
        "polar by SVD": (peers.polar_by_svd, weight),
        "cap by SVD": (ft.partial(peers.cap_by_svd, BOUND), weight),
    }
    for method in methods:
        by = "" if method is None else f", {method}"
        polar = eqxreg.Orthogonal(method=method)
        cap = eqxreg.SpectralCap(BOUND, method=method)
        made |= {
            f"Orthogonal{by}": (polar, weight),
            f"Orthogonal{by}, one step off": (polar, near),
            f"SpectralCap{by}": (cap, weight),
        }
    return {name: ft.partial(jax.jit(fn), w) for name, (fn, w) in made.items()}


# Steps.


def mlp_steps(batch: int) -> dict[str, Call]:
    width, key = 1024, jax.random.key(0)
    x = jax.random.normal(key, (batch, width))
    y = jnp.zeros((batch, width))
    after = lambda every: eqxreg.project(eqxreg.MaxNorm(BOUND, "unit"), every=every)

    def ours(build: Callable[..., Any] | None = None, **options: Any) -> Call:
        wrap = build or (lambda layer, key: layer)
        model, state = eqx.nn.make_with_state(MLP)(width, wrap, key)
        return stepper(model, state, x, y, **options)

    constrained = lambda layer, key: eqxreg.MaxNormConstraint(
        layer, "weight", BOUND, axis="unit"
    )
    calls = {
        "unconstrained": ours(),
        "MaxNormConstraint": ours(constrained),
        "MaxNormConstraint, baked": ours(constrained, baked=True),
        "snippet": ours(lambda layer, key: peers.Snippet(layer, BOUND, 1)),
        "SpectralNormConstraint": ours(eqxreg.SpectralNormConstraint),
        "eqx.nn.SpectralNorm": ours(
            lambda layer, key: eqx.nn.SpectralNorm(layer, "weight", key=key)
        ),
        "WeightNormConstraint": ours(
            lambda layer, key: eqxreg.WeightNormConstraint(layer)
        ),
        "eqx.nn.WeightNorm": ours(lambda layer, key: eqx.nn.WeightNorm(layer)),
        "project(every=1)": ours(after=after(1)),
        "project(every=10)": ours(after=after(10)),
        "a conditional alone": ours(after=conditional()),
    }
    if peers.is_installed("paramax"):
        calls["paramax.WeightNormalization"] = ours(
            lambda layer, key: peers.paramax_weight_norm(layer)
        )
    return calls


def report_calls(batch: int) -> dict[str, Call]:
    """A step, and what the weights are like: outside of a set, on its boundary and
    well inside."""
    width, key = 1024, jax.random.key(0)
    model, _ = eqx.nn.make_with_state(MLP)(width, lambda layer, key: layer, key)
    x = jax.random.normal(key, (batch, width))
    cap = eqxreg.SpectralCap(BOUND)
    capped = eqxreg.project_params(model, cap)
    report = lambda model, p: lambda: eqxreg.report(model, projection=p)
    return {
        "step": stepper(model, None, x, jnp.zeros((batch, width))),
        "report": report(model, None),
        "report, MaxNorm": report(model, eqxreg.MaxNorm(BOUND, "unit")),
        "report, SpectralCap": report(model, cap),
        "report, SpectralCap, capped": report(capped, cap),
        "report, SpectralCap, inside": report(model, eqxreg.SpectralCap(4 * BOUND)),
    }


def torch_maps(size: int) -> dict[str, Call]:
    kinds = ("copy", "max-norm", "weight norm", "spectral norm")
    return {kind: peers.torch_map(kind, size) for kind in kinds}


def conditional() -> optax.GradientTransformation:
    """A condition that is never true, and nothing else. What it costs is the bound of
    all that is done in some steps only: a branch can be given an update that is in
    memory, where the unconstrained step never writes it."""

    def update(updates, count, params=None):
        negated = lambda updates: jax.tree.map(jnp.negative, updates)
        updates = lax.cond(count < 0, negated, lambda updates: updates, updates)
        return updates, count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), int), update)


def peer_steps(build: Callable[..., Call], kinds: tuple[str, ...], batch: int):
    none = {"unconstrained": build(None, 1024, batch)}
    return none | {kind: build(kind, 1024, batch) for kind in kinds}


def model_steps(build: Callable[..., Any], shape: tuple[int, ...]) -> dict[str, Call]:
    """A network unconstrained, with all its weights constrained, and projected."""
    model = build(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), shape)
    out, _ = jax.eval_shape(jax.vmap(lambda x: model(x, None)), x)
    y = jnp.zeros(out.shape)
    p = eqxreg.MaxNorm(BOUND, axis="unit")
    wrapped = eqxreg.constrain(model, p)
    step = lambda model, **options: stepper(model, None, x, y, **options)
    return {
        "unconstrained": step(model),
        "constrained": step(wrapped),
        "constrained, baked": step(wrapped, baked=True),
        "project(every=1)": step(model, after=eqxreg.project(p)),
        "project(every=10)": step(model, after=eqxreg.project(p, every=10)),
    }


# Compiling.


def compile_sizes(depth: int) -> Iterator[dict[str, Any]]:
    """The time to compile the gradient of a deep network, and the number of operations
    of the program before and after XLA has optimised it."""
    p = eqxreg.MaxNorm(BOUND, axis="unit")
    for scan in (False, True):
        model = eqx.nn.MLP(64, 64, 64, depth, scan=scan, key=jax.random.key(0))
        networks = {
            "unconstrained": model,
            "constrained": eqxreg.constrain(model, p),
        }
        if not scan:
            snippets = tuple(peers.Snippet(layer, BOUND, 1) for layer in model.layers)
            networks["snippet"] = eqx.tree_at(lambda m: m.layers, model, snippets)
        for name, network in networks.items():
            params, static = eqx.partition(network, eqx.is_inexact_array)

            def loss(params, x, static=static):
                return jnp.sum(eqx.combine(params, static)(x) ** 2)

            start = time.perf_counter()
            lowered = jax.jit(jax.grad(loss)).lower(params, jnp.ones(64))
            traced = time.perf_counter()
            compiled = lowered.compile().as_text()
            yield {
                "network": f"{depth} layers" + (", scanned" if scan else ""),
                "variant": name,
                "trace_seconds": traced - start,
                "compile_seconds": time.perf_counter() - traced,
                "operations": len(re.findall(r"^ +%?\S+ = ", lowered.as_text(), re.M)),
                "compiled_operations": len(re.findall(r"^ +\S.* = ", compiled, re.M)),
            }
