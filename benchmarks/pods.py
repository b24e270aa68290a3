"""Count what constraints cost a transformer of 70 billion weights on a whole TPU pod.

One training step is compiled by the compiler for real TPUs, for 256 chips (v5e:16x16)
and for 4,096 (v5p:16x16x16), on a machine that has none of them. No array is ever made:
the model is built from shapes. Counted, for one chip and one step, are collectives,
what they move, the traffic of the main memory and its peak. Nothing runs, so there are
no times. Run
`python benchmarks/pods.py --help` for the flags.

The transformer: 80 scanned layers, 8192 wide, 64 heads that share 8 keys and values, a
gated feed-forward layer of 28672, no biases, no position encoding, 32000 tokens, padded
to a multiple of the chips. All in bfloat16 with Adam, weights sharded over data (FSDP)
and over 8 chips within each layer (tensor parallel), one sequence of 4096 tokens for
each of these groups, and the activations within each layer computed again for the
gradient.
"""

import dataclasses
import functools as ft
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# First, for it sets what the compiler reads from the environment.
import compilers
import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, PRNGKeyArray
from programs import Moved, Program, all_moved
from rich.console import Console


TENSOR_PARALLEL = 8
PODS = {"v5e:16x16": 256, "v5p:16x16x16": 4096}
BOUND = 1.0


@dataclasses.dataclass(frozen=True)
class Flags:
    """Count what a constrained step of a 70B-parameter transformer does on a pod."""

    pods: tuple[str, ...] = tuple(PODS)
    """Which topologies to compile for."""
    layers: int = 80
    """How many layers. They are scanned, so fewer compile no faster."""
    json: Path | None = None
    """A JSON file for all numbers."""


class Size(NamedTuple):
    """What a transformer is made of."""

    layers: int = 80
    width: int = 8192
    hidden: int = 28672
    heads: int = 64
    key_heads: int = 8
    tokens: int = 32000
    length: int = 4096

    @property
    def head(self) -> int:
        return self.width // self.heads

    def padded(self, chips: int) -> "Size":
        """With tokens that nobody uses, so that their number can be divided."""
        return self._replace(tokens=-(-self.tokens // chips) * chips)


# The model. Every layer may be stateful.


class Block(eqx.Module):
    """Attention and a gated feed-forward layer, each after a normalisation."""

    norms: tuple[eqx.nn.RMSNorm, eqx.nn.RMSNorm]
    layers: dict[str, Any]
    size: Size = eqx.field(static=True)

    def __init__(self, size: Size, wrap: Callable, key: PRNGKeyArray):
        shapes = {
            "query": (size.width, size.width),
            "key": (size.width, size.key_heads * size.head),
            "value": (size.width, size.key_heads * size.head),
            "out": (size.width, size.width),
            "gate": (size.width, size.hidden),
            "up": (size.width, size.hidden),
            "down": (size.hidden, size.width),
        }
        linear = ft.partial(eqx.nn.Linear, use_bias=False, dtype=jnp.bfloat16)
        keys = jax.random.split(key, len(shapes))
        self.layers = {
            name: wrap(linear(*shape, key=key), key=key)
            for (name, shape), key in zip(shapes.items(), keys, strict=True)
        }
        norm = ft.partial(eqx.nn.RMSNorm, use_bias=False, dtype=jnp.bfloat16)
        self.norms = (norm(size.width), norm(size.width))
        self.size = size

    def __call__(self, x: Array, state: Any, shard: Callable) -> tuple[Array, Any]:
        batch, length, _ = x.shape

        def apply(name: str, x: Array, spec: P, state: Any) -> tuple[Array, Any]:
            layer = self.layers[name]
            # Over the batch and over the sequence.
            if isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful():
                fn = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None))
                fn = jax.vmap(fn, in_axes=(0, None), out_axes=(0, None))
                x, state = fn(x, state)
            else:
                x = jax.vmap(jax.vmap(layer))(x)
            return shard(x, spec), state

        inside, outside = P("data", None, "model"), P("data", None, None)
        y = over_tokens(self.norms[0], x)
        q, state = apply("query", y, inside, state)
        k, state = apply("key", y, inside, state)
        v, state = apply("value", y, inside, state)
        q, k, v = (z.reshape(batch, length, -1, self.size.head) for z in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        y, state = apply("out", y.reshape(batch, length, -1), outside, state)
        x = x + y
        y = over_tokens(self.norms[1], x)
        gate, state = apply("gate", y, inside, state)
        up, state = apply("up", y, inside, state)
        y, state = apply("down", jax.nn.silu(gate) * up, outside, state)
        return x + y, state


class Transformer(eqx.Module):
    """An embedding, a stack of blocks and a linear layer."""

    embedding: eqx.nn.Embedding
    blocks: Block
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, size: Size, wrap: Callable, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        half = jnp.bfloat16
        self.embedding = eqx.nn.Embedding(
            size.tokens, size.width, dtype=half, key=keys[0]
        )
        make = lambda key: Block(size, wrap, key)
        self.blocks = eqx.filter_vmap(make)(jax.random.split(keys[1], size.layers))
        self.norm = eqx.nn.RMSNorm(size.width, use_bias=False, dtype=half)
        self.head = eqx.nn.Linear(
            size.width, size.tokens, use_bias=False, dtype=half, key=keys[2]
        )

    def __call__(self, tokens: Array, state: Any, shard: Callable) -> tuple[Array, Any]:
        x = shard(self.embedding.weight[tokens], P("data", None, None))
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        @jax.checkpoint
        def step(x, given):
            arrays, state = given
            return eqx.combine(arrays, static)(x, state, shard)

        x, state = jax.lax.scan(step, x, (arrays, state))
        logits = over_tokens(self.head, over_tokens(self.norm, x))
        return shard(logits, P("data", None, "model")), state


def over_tokens(layer: Callable, x: Array) -> Array:
    return jax.vmap(jax.vmap(layer))(x)


# Its variants.


class Variant(NamedTuple):
    """A way to constrain the matrices of all blocks."""

    wrap: Callable[..., Any] = lambda layer, key: layer
    map: eqxreg.Projection | None = None
    """To constrain the stack with, once it is built."""
    every: int | None = None
    """How often to project after the update."""


PLAIN = "unconstrained"
UNIT = eqxreg.MaxNorm(BOUND, axis="unit")
IN_BLOCKS = eqxreg.select(eqx.nn.Linear, where=lambda path, *_: "blocks" in path)
VARIANTS = {
    PLAIN: Variant(),
    "max-norm": Variant(map=UNIT),
    "spectral (warm)": Variant(
        lambda layer, key: eqxreg.SpectralNormConstraint(layer, "weight", key=key)
    ),
    "project, every 10": Variant(every=10),
}


def make_step(variant: Variant, size: Size, mesh: Mesh) -> tuple[Any, tuple]:
    """One step of training, not yet compiled, and the shapes of its arguments."""
    optimiser = optax.adam(1e-3)
    if variant.every is not None:
        projection = eqxreg.project(UNIT, every=variant.every, mask=IN_BLOCKS)
        optimiser = optax.chain(optimiser, projection)

    def shard(x: Array, spec: P) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def build(key):
        model = Transformer(size, variant.wrap, key)
        if variant.map is not None:
            model = eqxreg.constrain(model, variant.map, where=IN_BLOCKS)
        state = eqx.nn.State(model)
        model = eqx.nn.delete_init_state(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        return model, state, optimiser.init(params)

    def loss(model, state, tokens):
        logits, state = model(tokens, state, shard)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
        )
        return jnp.mean(losses), state

    shapes = eqx.filter_eval_shape(build, jax.random.key(0))
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    shapes, static = eqx.partition(shapes, is_shape)

    def step(arrays, tokens):
        model, state, carried = eqx.combine(arrays, static)
        grad = eqx.filter_value_and_grad(loss, has_aux=True)
        (value, state), grads = grad(model, state, tokens)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, carried = optimiser.update(grads, carried, params)
        model = eqx.apply_updates(model, updates)
        return eqx.filter((model, state, carried), eqx.is_array), value

    def laid_out(path, s):
        spec = layout(jax.tree_util.keystr(path), s.ndim, size, s.shape)
        return jax.ShapeDtypeStruct(
            s.shape, s.dtype, sharding=NamedSharding(mesh, spec)
        )

    shapes = jax.tree_util.tree_map_with_path(laid_out, shapes)
    tokens = jax.ShapeDtypeStruct(
        (mesh.shape["data"], size.length),
        jnp.int32,
        sharding=NamedSharding(mesh, P("data")),
    )
    layouts = jax.tree.map(lambda s: s.sharding, shapes)
    whole = NamedSharding(mesh, P())
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(layouts, whole))
    return compiled, (shapes, tokens)


def layout(path: str, ndim: int, size: Size, shape: tuple[int, ...]) -> P:
    """How an array is sharded: matrices over both axes of the mesh, by what they
    multiply; what is small, not at all."""
    if ndim < 2 or min(shape[-2:]) < 1024:
        return P()
    splits_inputs = "'out'" in path or "'down'" in path or "embedding" in path
    axes = ("data", "model") if splits_inputs else ("model", "data")
    return P(*(None for _ in shape[:-2]), *axes)


# Counting.


@dataclasses.dataclass(frozen=True)
class Count:
    """What one chip does in one step."""

    pod: str
    chips: int
    variant: str
    collectives: dict[str, Moved]
    """With the side of each conditional that moves less, which is nearly always taken.
    """
    all_collectives: dict[str, Moved]
    """With the one that moves more."""
    hbm: float
    """Bytes to and from the main memory, on the former way."""
    peak: float
    seconds: float
    """What compiling took."""

    @property
    def gathered(self) -> int:
        """Bytes gathered at most. The compiler writes gathers as permutations too."""
        kinds = ("all-gather", "collective-permute")
        return sum(self.all_collectives.get(kind, Moved()).bytes for kind in kinds)


def compile_all(console: Console, flags: Flags) -> Iterator[Count]:
    for pod in flags.pods:
        devices = compilers.tpus(pod).reshape(-1, TENSOR_PARALLEL)
        mesh = Mesh(devices, ("data", "model"))
        for name, variant in VARIANTS.items():
            with console.status(f"{pod}: {name}"):
                start = time.perf_counter()
                size = Size(layers=flags.layers).padded(devices.size)
                step, shapes = make_step(variant, size, mesh)
                compiled = step.lower(*shapes).compile()
                seconds = time.perf_counter() - start
                program = Program(compiled.as_text())
            console.print(f"{pod}, {name}: compiled in {seconds:.0f} s")
            yield Count(
                pod=pod,
                chips=devices.size,
                variant=name,
                collectives=program.collectives(usual=True),
                all_collectives=program.collectives(usual=False),
                hbm=program.traffic(usual=True).hbm,
                peak=compiled.memory_analysis().peak_memory_in_bytes,
                seconds=seconds,
            )


def markdown(counts: list[Count]) -> str:
    """A table for each pod."""
    lines = []
    for pod in dict.fromkeys(c.pod for c in counts):
        group = [c for c in counts if c.pod == pod]
        kinds = sorted({kind for c in group for kind in c.all_collectives})
        titles = [f"{group[0].chips:,} chips ({pod})", *kinds]
        titles += ["moved, GB", "with the rare branches, GB", "HBM, GB", "peak, GB"]
        lines += [
            "| " + " | ".join(titles) + " |",
            "| --- |" + " ---: |" * (len(titles) - 1),
        ]
        for c in group:
            counted = [c.collectives.get(kind, Moved()).number for kind in kinds]
            moved = [all_moved(m)[0] for m in (c.collectives, c.all_collectives)]
            numbers = (
                *(f"{n:,}" for n in counted),
                *(f"{n / 1e9:.2f}" for n in moved),
                f"{c.hbm / 1e9:,.0f}",
                f"{c.peak / 1e9:.2f}",
            )
            lines.append("| " + " | ".join((c.variant, *numbers)) + " |")
        lines.append("")
    return "\n".join(lines)


def gathers_more(counts: list[Count]) -> Iterator[str]:
    """The variants that gather more than the unconstrained step, by a tenth of a
    percent or more: vectors may be."""
    plain = {c.pod: c for c in counts if c.variant == PLAIN}
    for c in counts:
        more = c.gathered - plain[c.pod].gathered
        if more > 1e-3 * plain[c.pod].gathered:
            yield f"{c.variant} on {c.pod} gathers {more / 1e9:.3f} GB more."


def run(flags: Flags) -> bool:
    """Compiles everything and prints the tables. Whether no weight is gathered for a
    constraint."""
    console = Console(highlight=False)
    counts: list[Count] = []
    for count in compile_all(console, flags):
        counts.append(count)
        if flags.json is not None:
            # After each, for they take minutes.
            rows = [dataclasses.asdict(c) for c in counts]
            text = json.dumps({"about": compilers.about(), "counts": rows}, indent=2)
            flags.json.write_text(text + "\n", encoding="utf-8")
    print(markdown(counts))
    wrong = list(gathers_more(counts))
    for line in wrong:
        console.print(line, soft_wrap=True)
    return not wrong


if __name__ == "__main__":
    sys.exit(not run(tyro.cli(Flags)))
