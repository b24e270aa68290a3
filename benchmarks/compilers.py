"""The compilers of accelerators, on a machine that has none.

Import this before JAX: it sets what the compilers read from the environment.
"""

import os


# The compiler for TPUs asks neither a metadata server nor a device. It takes none, so
# that several processes may compile at once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import topologies


def tpus(topology: str) -> np.ndarray:
    """The chips of a topology such as `v5e:2x2`, to compile for."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return np.array(found.devices)


def gpu(target: Path) -> Any:
    """The GPU that a file describes, to compile for."""
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology="1x1x1",
        target_config=target.read_text(encoding="utf-8"),
    )
    return found.devices[0]


def about() -> dict[str, str]:
    """With what the numbers were made."""
    versions = {}
    for name in ("eqxreg", "equinox", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
