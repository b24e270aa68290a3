"""Check and time maps, wrappers and steps on an accelerator: `make bench-gpu`.

Six minutes on one GPU, with nothing but JAX, Equinox, Optax and jaxtyping, and PyTorch
if it is there. The package is read from this checkout, installed or not.

- checks: every map and wrapper against float64 on the host, as `agreement.py` says;
- times: maps alone, steps of a linear layer, a transformer block, singular values.

Ways of doing one thing take turns in one process. Each turn is a burst of calls, so
that the time to start a program is not what is measured; a number is the median of the
ratios of neighbours. `--platform cpu --quick` tries the script where there is no GPU.
"""

import argparse
import dataclasses
import functools as ft
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent.parent))
# Read at import: two threads of OpenBLAS spin while they wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@dataclasses.dataclass(frozen=True)
class Flags:
    platform: str | None
    quick: bool
    output: Path
    minutes: float
    only: str


def flags() -> Flags:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--platform", help="gpu, tpu or cpu; by default JAX's choice")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--output", type=Path, default=Path("out/gpu/gpu.json"))
    parser.add_argument(
        "--minutes", type=float, default=6, help="groups that begin later are left out"
    )
    parser.add_argument(
        "--only", default="", help="a regular expression for titles and checks"
    )
    return Flags(**vars(parser.parse_args()))


@dataclasses.dataclass(frozen=True)
class Group:
    """Ways of doing one thing."""

    title: str
    calls: Callable[[], dict[str, Callable[[], Any]]]
    """Makes the ways; the first one is what all are measured by."""


def groups(quick: bool) -> Iterator[Group]:
    import accelerated
    import cases

    for dtype in ("float32", "bfloat16"):
        for size in (256, 512) if quick else (1024, 2048, 4096, 8192):
            title = f"map, {size} x {size}, {dtype}, forward and backward"
            yield Group(title, ft.partial(accelerated.maps, size, dtype))
    if accelerated.has_torch():
        for size in (256,) if quick else (1024, 4096):
            title = f"PyTorch's map, {size} x {size}, forward and backward"
            yield Group(title, ft.partial(accelerated.torch_maps, size))
    size = 256 if quick else 4096
    for dtype in ("float32", "bfloat16"):
        for batch in (32, 128) if quick else (256, 4096):
            title = f"step, Linear {size} x {size}, batch {batch}, {dtype}"
            yield Group(title, ft.partial(accelerated.steps, size, batch, dtype))
            if accelerated.has_torch():
                title = f"PyTorch's {title}"
                step = ft.partial(accelerated.torch_steps, size, batch, dtype)
                yield Group(title, step)
    width = 64 if quick else 4096
    for own in (False, True):
        kind = "one's own modules" if own else "eqx.nn"
        title = f"step, transformer block of width {width}, bfloat16, {kind}"
        yield Group(title, ft.partial(accelerated.block_steps, width, own))
    for size in (64, 128) if quick else (1024, 2048):
        title = f"singular values, {size} x {size}, float32, forward"
        methods = ("factorisation", "products")
        yield Group(title, ft.partial(cases.singular_maps, size, methods))


def measure(group: Group, rounds: int) -> dict[str, Any]:
    from timing import in_turn, medians, ratios

    calls = group.calls()
    baseline = next(iter(calls))
    count = _burst(calls[baseline])
    times = in_turn({n: ft.partial(_often, c, count) for n, c in calls.items()}, rounds)
    return {
        "title": group.title,
        "baseline": baseline,
        "calls_in_a_burst": count,
        "milliseconds": {n: t / count for n, t in medians(times).items()},
        "ratios": ratios(times, baseline),
    }


def _often(call: Callable[[], Any], count: int) -> Any:
    """The last of several results. What one call is given does not wait for another."""
    for _ in range(count):
        out = call()
    return out


def _burst(call: Callable[[], Any]) -> int:
    """How many calls take about ten milliseconds."""
    import jax

    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(_often(call, 3))
    each = (time.perf_counter() - start) / 3
    return max(1, min(100, round(0.01 / each)))


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['title']}", f"{'':36}{'ms':>10}  / {result['baseline']}"]
    for name, taken in result["milliseconds"].items():
        lines.append(f"{name:36}{taken:10.3g}  {result['ratios'][name]:.2f}")
    return "\n".join(lines) + "\n"


def main(flags: Flags) -> int:
    begin = time.perf_counter()
    if flags.platform is not None:
        # The host takes part in the checks.
        platforms = {"gpu": "cuda,cpu", "cpu": "cpu"}.get(flags.platform)
        os.environ["JAX_PLATFORMS"] = platforms or f"{flags.platform},cpu"

    import agreement
    import jax
    from timing import about

    passed = lambda check: "" if check.passed else "  NOT PASSED"
    found = []
    for check in agreement.checks(flags.only):
        found.append(check)
        print(
            f"{check.dtype:9} {check.name:34} value {check.value:.0e} gradient "
            f"{check.gradient:.0e} (at most {check.limit:.0e}){passed(check)}",
            flush=True,
        )
    results, left_out, failed = [], [], []
    for group in groups(flags.quick):
        if not re.search(flags.only, group.title):
            continue
        if time.perf_counter() - begin > 60 * flags.minutes:
            left_out.append(group.title)
            continue
        try:
            results.append(measure(group, 5 if flags.quick else 15))
        except Exception as error:
            failed.append({"title": group.title, "error": repr(error)})
            print(f"{group.title}: {error!r}", flush=True)
            continue
        finally:
            # Programs and arrays of one group are of no use to the next.
            jax.clear_caches()
        print(table(results[-1]), flush=True)
    everything = {
        "about": about("optax", "jaxtyping", "torch")
        | {"card": jax.devices()[0].device_kind, "quick": flags.quick},
        "checks": [check._asdict() | {"passed": check.passed} for check in found],
        "times": results,
        "failed": failed,
        "left_out": left_out,
        "seconds": time.perf_counter() - begin,
    }
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(everything, indent=1)
    flags.output.write_text(text + "\n", encoding="utf-8")
    wrong = [check for check in found if not check.passed]
    print(
        f"{len(found) - len(wrong)} of {len(found)} checks passed, {len(failed)} "
        f"groups failed, {len(left_out)} were left out. Written to {flags.output}."
    )
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main(flags()))
