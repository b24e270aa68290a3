"""The devices of all processes as a mesh, and what each of them holds."""

from collections import Counter
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, PyTree

from common.cluster import ClusterFlags


def make_mesh(
    flags: ClusterFlags, *, data: Sequence[str], model: Sequence[str]
) -> Mesh:
    """All devices of all processes, as `data` × `model`.

    `data` and `model` name the flags with the sizes of what is cut along that axis.
    """
    count = jax.device_count()
    length = flags.model_axis
    if length is None:
        length = 1 if jax.local_device_count() % 2 else 2
    divides = length > 0 and count % length == 0
    flags.require("model_axis", divides, f"a divisor of {count}, the number of devices")
    shape = (count // length, length)
    for axis, size, names in zip(("data", "model"), shape, (data, model), strict=True):
        for name in names:
            fits = getattr(flags, name) % size == 0
            flags.require(name, fits, f"a multiple of {size}, the {axis} axis")
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def share_of_a_device(tree: PyTree[Array]) -> float:
    """The largest part of all bytes that one device of this process holds."""
    leaves, held = jax.tree.leaves(tree), Counter[jax.Device]()
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values()) / sum(leaf.nbytes for leaf in leaves)
