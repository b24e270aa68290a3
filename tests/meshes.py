"""Meshes of the eight virtual devices, and what is checked of arrays on them."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from tables import assert_close


# Where the entries of a matrix are on a mesh of data x model.
LAYOUTS = {
    "fsdp": P(("data", "model"), None),
    "column": P("model", None),
    "row": P(None, "model"),
    "both": P("model", "data"),
}


def mesh_of(axes: str = "Auto") -> jax.sharding.Mesh:
    types = (getattr(AxisType, axes),) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=types)


def check_close(found, expected) -> None:
    """Sums in float32, whose order depends on the mesh, make up to 3e-5 of the largest
    entry, in the gradient of a distance to a set."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        assert_close(one, other, 1e-2 if one.dtype == jnp.bfloat16 else 1e-4)


def check_laid_out(tree, layouts) -> None:
    same = lambda leaf, layout: leaf.sharding.is_equivalent_to(layout, leaf.ndim)
    assert all(jax.tree.leaves(jax.tree.map(same, tree, layouts)))
