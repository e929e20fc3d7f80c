"""Where arrays lie: a mesh, and one table from logical axes to mesh axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")

RULES: dict[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "sequence": ("context",),
    # Parameters: a matrix is split once over fsdp, by its model width, and once over tensor.
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "head": (),
    "context": (),
    # The width of activations is whole: only weights are split over fsdp.
    "width": (),
}
"""Logical axis -> the mesh axes that it is split over."""


TOKENS_PER_CORE = 256
"""The fewest tokens of a step for which another core of a CPU is used as a device."""


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    expert: int = 1,
    stage: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over the devices, with the six axes of `MESH_AXES`.

    Args:
        data: replicas, each with its share of the batch.
        fsdp: parts that parameters, optimizer state and the batch are split into.
        tensor: parts that heads, hidden width and vocabulary are split into.
        context: parts that the sequence is split into.
        expert: parts that experts are split into.
        stage: parts that the depth is split into.
        devices: None means all.

    One axis may be -1: as many as there are devices left.

    Raises:
        UserError: if the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor, context, expert, stage]
    shape = dict(zip(MESH_AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh axes {shape}: each is at least 1, and one may be -1 (what is left)")
    if -1 in sizes:
        if len(devices) % known:
            raise UserError(f"mesh axes {shape}: {known} does not divide {len(devices)} devices")
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh axes {shape} make {math.prod(sizes)} devices, but there are {len(devices)}; "
            "set one axis to -1 to take what is left, or pass devices="
        )
    axis_types = (AxisType.Auto,) * len(sizes)
    if len(devices) == 1:
        return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=axis_types)
    return jax.make_mesh(sizes, MESH_AXES, axis_types, devices=devices)


def data_mesh(rows: int, tokens: int) -> Mesh | None:
    """A mesh of replicas for steps over batches.

    It takes as many of the devices as divide the rows. Where these are a CPU's cores (see
    `gptjax.devices.cores_as_devices`), each is to have some hundred tokens, since narrow products
    waste more than the further core gives.

    Args:
        rows: what the rows of every batch are a multiple of.
        tokens: of a step, in all rows together.

    Returns:
        The mesh, or None where one device is to do all.
    """
    devices = jax.devices()
    most = len(devices)
    if devices[0].platform == "cpu":
        most = min(most, tokens // TOKENS_PER_CORE)
    count = max((n for n in range(1, most + 1) if rows % n == 0), default=1)
    return make_mesh(data=count, devices=devices[:count]) if count > 1 else None


def mesh_devices(mesh: Mesh | None) -> list[Any]:
    """The devices of a mesh; for None the default one."""
    return [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of each logical axis; None is not split."""
    return PartitionSpec(*(RULES[axis] or None if axis is not None else None for axis in axes))


def named_sharding(
    mesh: Mesh, axes: Sequence[str], shape: Sequence[int], name: str
) -> NamedSharding:
    """The sharding of an array by its logical axes.

    Raises:
        UserError: if a dimension does not divide: GSPMD would silently replicate it.
    """
    for axis, size in zip(axes, shape, strict=True):
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in RULES[axis])
        if size % parts:
            raise UserError(
                f"{name}: axis {axis!r} of size {size} does not divide over the mesh's "
                f"{' × '.join(RULES[axis])} = {parts}; choose a divisor of {size}"
            )
    return NamedSharding(mesh, partition_spec(axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of `[B, T]` arrays: rows over data and fsdp, tokens over context."""
    return NamedSharding(mesh, partition_spec(("batch", "sequence")))


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Starts a batch's way to the devices of a mesh; for None to the default one."""
    return jax.device_put(batch, None if mesh is None else batch_sharding(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an intermediate value's layout, by logical axes, under the mesh in force.

    The identity where no mesh is set (`jax.set_mesh`) or it has one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def like_params(tree: Any, params: Any, shardings: Any, other: Any) -> Any:
    """Shardings for a tree that repeats the parameters' tree inside, as optimizer states do.

    Args:
        tree: the tree, of anything with a shape.
        params: the parameters' tree, of anything with a shape.
        shardings: the parameters' shardings.
        other: the sharding of leaves that belong to no parameter.

    Returns:
        `tree` with shardings for leaves. A leaf takes the sharding of the parameter whose path
        ends its own, if their shapes agree.
    """
    by_path = {
        jax.tree_util.keystr(path): (leaf.shape, place)
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        for start in range(len(path)):
            shape, found = by_path.get(jax.tree_util.keystr(path[start:]), (None, None))
            if found is not None and shape == leaf.shape:
                return found
        return other

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_parts() -> int:
    """How many devices share the rows of a batch under the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"])
