"""Measure what constraints cost, beside other libraries: `make bench`.

- maps: a map alone, forward and backward, relative to copying weight and gradient;
- steps: a whole training step, relative to the same step without the constraint;
- compiling: time, and size of the program, for many layers.

All ways of doing one thing take turns in one process, and a number is the median of the
ratios of neighbours. In float32, on the default device. Run `python benchmarks/speed.py
--help` for the flags.
"""

import os


# Two threads of OpenBLAS spin while they wait for each other. Read at import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
import functools as ft
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import peers
import tyro
from cases import (
    compile_sizes,
    layer_calls,
    mlp_steps,
    model_steps,
    norm_maps,
    peer_steps,
    report_calls,
    singular_maps,
    torch_maps,
)
from networks import CNN, LSTM, Transformer
from rich.console import Console
from shown import Result, Target, compile_table, draw, markdown, table_of
from timing import Call, about, in_turn, medians, ratios


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure what constraints cost, beside other libraries."""

    quick: bool = False
    """Fewer sizes, repetitions and networks: a run of about two minutes."""
    output: Path = Path("out/bench")
    """The folder for `speed.json`, `speed.md` and `speed.png`."""
    only: str = ""
    """A regular expression: groups whose title it does not match are left out."""

    @property
    def rounds(self) -> int:
        """How often each call is timed at least."""
        return 5 if self.quick else 40


@dataclasses.dataclass(frozen=True)
class Group:
    """Ways of doing one thing."""

    title: str
    calls: Callable[[], dict[str, Call]]
    """Makes the ways; the first one is what all are measured by."""
    targets: tuple[tuple[str, str, float], ...] = ()
    """What some should reach: a way, another one, and how many times that at most."""


# All of it.


def groups(flags: Flags) -> Iterator[Group]:
    sizes = (256, 1024) if flags.quick else (256, 1024, 4096)
    theirs = "eqx.nn.SpectralNorm"
    for size in sizes:
        targets = [("MaxNorm, unit", "copy", 1.7), ("MaxNorm, whole", "copy", 1.7)]
        if size == 1024:
            step = "SpectralNorm, one step"
            targets += [(step, "copy", 1.9), (step, theirs, 0.2)]
        yield Group(
            f"map, {size} x {size}, forward and backward",
            ft.partial(norm_maps, size),
            tuple(targets) if size >= 1024 else (),
        )
        # Not among the others: its threads and those of JAX wait for each other.
        if peers.is_installed("torch"):
            title = f"PyTorch's map, {size} x {size}, forward and backward"
            yield Group(title, ft.partial(torch_maps, size))
    yield Group(
        "layer, 1024 x 1024, one vector, forward and backward",
        ft.partial(layer_calls, 1024),
        (("SpectralNormConstraint", theirs, 0.2),),
    )
    size = 256 if flags.quick else 1024
    yield Group(
        f"singular values, {size} x {size}, forward",
        ft.partial(singular_maps, size),
        (
            ("Orthogonal", "polar by SVD", 1.0),
            ("Orthogonal, one step off", "polar by SVD", 0.5),
            ("SpectralCap", "cap by SVD", 1 / 1.5),
        ),
    )
    plain = "unconstrained"
    for batch, bounds in ((128, (1.05, 1.12, 1.08)), (16, (1.25, 1.4, 1.35))):
        names = ("MaxNorm", "SpectralNorm", "WeightNorm")
        targets = tuple(
            (f"{name}Constraint", plain, bound)
            for name, bound in zip(names, bounds, strict=True)
        )
        targets += (("project(every=10)", plain, 1.02),)
        yield Group(f"MLP step, batch {batch}", ft.partial(mlp_steps, batch), targets)
        if peers.is_installed("flax"):
            kinds = ("weight norm", "spectral norm")
            steps = ft.partial(peer_steps, peers.flax_step, kinds, batch)
            yield Group(f"Flax's MLP step, batch {batch}", steps)
        if peers.is_installed("torch"):
            kinds = ("max-norm", "weight norm", "spectral norm")
            steps = ft.partial(peer_steps, peers.torch_step, kinds, batch)
            yield Group(f"PyTorch's MLP step, batch {batch}", steps)
    # An epoch of 60,000 samples has 469 steps, and a report is to be 5 % of that.
    names = ("report, SpectralCap", "report, SpectralCap, capped")
    yield Group(
        "report of the MLP, beside a step, batch 128",
        ft.partial(report_calls, 128),
        tuple((name, "step", 0.05 * 469) for name in names),
    )
    yield Group(
        "LSTM step, 100 steps of time",
        ft.partial(model_steps, LSTM, (16, 100, 64)),
        (("constrained, baked", plain, 1.05), ("constrained", plain, 1.3)),
    )
    yield Group("CNN step", ft.partial(model_steps, CNN, (32, 3, 32, 32)))
    yield Group("transformer step", ft.partial(model_steps, Transformer, (8, 64, 128)))


def measure(group: Group, rounds: int) -> Result:
    times = in_turn(group.calls(), rounds)
    baseline = next(iter(times))
    targets = [
        Target(name, to, bound, ratios(times, to)[name])
        for name, to, bound in group.targets
    ]
    relative = ratios(times, baseline)
    return Result(group.title, baseline, medians(times), relative, targets)


def main(flags: Flags) -> None:
    console = Console()
    results = []
    for group in groups(flags):
        if not re.search(flags.only, group.title):
            continue
        results.append(measure(group, flags.rounds))
        console.print(table_of(results[-1]))
        # Programs of one group are of no use to the next.
        jax.clear_caches()
    compiling = []
    if re.search(flags.only, "compiling"):
        compiling = list(compile_sizes(10 if flags.quick else 50))
        console.print(compile_table(compiling))
    flags.output.mkdir(parents=True, exist_ok=True)
    everything = {
        "about": about("optax", "flax", "paramax", "torch"),
        "results": [dataclasses.asdict(result) for result in results],
        "compiling": compiling,
    }
    text = json.dumps(everything, indent=2)
    (flags.output / "speed.json").write_text(text + "\n", encoding="utf-8")
    tables = markdown(results, compiling)
    (flags.output / "speed.md").write_text(tables, encoding="utf-8")
    draw(results, flags.output / "speed.png")
    console.print(f"Written to {flags.output}.")


if __name__ == "__main__":
    main(tyro.cli(Flags))
