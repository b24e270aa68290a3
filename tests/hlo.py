"""What compiled programs do, read from their text."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import pytest


counts_of_today = pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="counts are of the XLA of JAX 0.10: an older one fuses less",
)
"""For ceilings of what XLA makes of a program."""


def program_of(function: Callable, *args: Any) -> jax.stages.Compiled:
    """As users have it, and not as other tests do; see `flags.py`."""
    return jax.jit(function).lower(*args).compile({"xla_backend_extra_options": ""})


class Collective(NamedTuple):
    """An operation in which devices take part together."""

    kind: str
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    """The numbers of entries of its results, on one device."""
    line: str

    @property
    def is_half(self) -> bool:
        """Whether it is in half precision. A compiler for a device that cannot do that
        rewrites it in single precision, and says so in the name of the sum."""
        halves = {"bf16", "f16"} & set(self.dtypes)
        return bool(halves) or "promoted" in self.line


_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives(text: str) -> list[Collective]:
    """All of a compiled program."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match[1])
            sizes = (math.prod(int(n) for n in d.split(",") if n) for _, d in shapes)
            dtypes = tuple(dtype for dtype, _ in shapes)
            found.append(Collective(match[2], dtypes, tuple(sizes), line.strip()))
    return found
