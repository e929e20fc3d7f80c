"""Where arrays lie: a mesh, and one table from logical axes to mesh axes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.devices import platform
from gptjax.errors import UserError, nearest

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")

RULES: dict[str, tuple[str, ...]] = {
    # Activations. Whatever holds experts holds rows too, so that it has work between them.
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    # Between the products of a block, where every device of a tensor group would else hold and
    # compute the same (Korthikanti et al. 2022, section 4.2.2).
    "residual": ("context", "tensor"),
    # The width of activations is whole: only weights are split over fsdp.
    "width": (),
    "columns": ("tensor",),
    # Parameters: a matrix is split once over fsdp, by its model width, and once over tensor.
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "router": (),
    "layers": ("stage",),
    "head": (),
    "rank": (),
    # Tables of vectors are split by their width alone, so that they may have any number of rows.
    "table": ("tensor", "fsdp"),
    "vocab": (),
    "context": (),
    # The output matrix in use, padded to divide.
    "vocab_parts": ("tensor",),
}
"""Logical axis -> the mesh axes that it is split over."""

PRESETS = ("dp", "fsdp", "tp", "fsdp+tp", "context", "expert", "stage")
"""Names of meshes, see `mesh_axes`."""


TOKENS_PER_CORE = 256
"""The fewest tokens of a step for which another core of a CPU is used as a device."""
PARAMS_PER_TOKEN = 10_000
"""The most parameters for each token of a step with which a CPU's cores are used as devices."""


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
        fsdp: parts that parameters, optimizer state and the batch are split into (Rajbhandari et
            al. 2020, stage 3).
        tensor: parts that heads, hidden width and vocabulary are split into (Shoeybi et al. 2019),
            and between them the sequence.
        context: parts that the sequence is split into, attention going round in a ring.
        expert: parts that experts are split into, and the batch.
        stage: parts that the depth is split into, a batch passing through in microbatches.
        devices: None means all.

    One axis may be -1: as many as there are devices left. Of TPU slices joined by a data-center
    network, `data` is what spans them.

    Returns:
        A mesh for `init_state`, `make_train_step` and `fit`.

    Raises:
        UserError: if the product of the axes is not the number of devices, or `data` does not
            divide over the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    given = (data, fsdp, tensor, context, expert, stage)
    axes = mesh_axes(dict(zip(MESH_AXES, given, strict=True)), len(devices))
    sizes = list(axes.values())
    return Mesh(_arranged(devices, sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def _arranged(devices: Sequence[Any], sizes: list[int]) -> np.ndarray:
    """The devices as an array of the mesh's shape, neighbours of the network next to each other."""
    # A GPU has such a number too, one a host, which says nothing about the mesh.
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if slices == 1:
        # A torus of three dimensions may be asked for two, or for parts of one.
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, *rest = sizes
    if data % slices:
        raise UserError(
            f"the mesh's data axis is {data}, but the devices are {slices} slices, over which it "
            f"divides; give a multiple of {slices}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        [data // slices, *rest],
        [slices] + [1] * len(rest),
        devices,
        allow_split_physical_axes=True,
    )


def parse_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh from its name or sizes, as a command's flag gives it.

    Args:
        text: see `mesh_axes`.
        devices: None means all.

    Returns:
        As `make_mesh`.

    Raises:
        UserError: as `mesh_axes` and `make_mesh` do.
    """
    devices = jax.devices() if devices is None else list(devices)
    axes: Any = mesh_axes(text, len(devices))
    return make_mesh(**axes, devices=devices)


def mesh_axes(mesh: str | Mapping[str, int], devices: int) -> dict[str, int]:
    """The sizes of all six axes of a mesh.

    Args:
        mesh: sizes such as "fsdp=4,tensor=2", axis -> size, or a preset: "dp", "fsdp", "tp",
            "context", "expert" and "stage" put all devices on that axis; "fsdp+tp" puts up to 8 on
            `tensor` (a power of two whose square they hold) and the rest on `fsdp`. Axes left out
            are 1; one may be -1: as many as there are devices left.
        devices: how many the mesh has.

    Raises:
        UserError: if an axis is unknown, or the product is not the number of devices.
    """
    if isinstance(mesh, str):
        mesh = _preset_axes(mesh, devices) or _parsed_axes(mesh)
    for axis in mesh:
        if axis not in MESH_AXES:
            raise UserError(f"{axis!r} is no mesh axis{nearest(axis, MESH_AXES)}")
    axes = {axis: mesh.get(axis, 1) for axis in MESH_AXES}
    shown = " × ".join(f"{axis} {size}" for axis, size in axes.items() if size != 1) or "of 1"
    known = math.prod(size for size in axes.values() if size != -1)
    left = [axis for axis, size in axes.items() if size == -1]
    if len(left) > 1 or any(size < 1 and size != -1 for size in axes.values()):
        raise UserError(f"mesh {shown}: each axis is at least 1, and one may be -1 (what is left)")
    if left:
        if devices % known:
            raise UserError(f"mesh {shown}: {known} does not divide {devices} devices")
        axes[left[0]] = devices // known
    if math.prod(axes.values()) != devices:
        raise UserError(
            f"the mesh {shown} makes {math.prod(axes.values())} devices, but there are {devices}; "
            "set one axis to -1 to take what is left"
        )
    return axes


def _preset_axes(name: str, devices: int) -> dict[str, int] | None:
    if name == "fsdp+tp":
        tensor = max(n for n in (1, 2, 4, 8) if n * n <= devices and devices % n == 0)
        return {"fsdp": -1, "tensor": tensor}
    return {{"dp": "data", "tp": "tensor"}.get(name, name): -1} if name in PRESETS else None


def _parsed_axes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in MESH_AXES:
            known = MESH_AXES if "=" in text else (*PRESETS, "auto")
            raise UserError(f"mesh {text!r}: {axis!r} is no mesh axis{nearest(axis, known)}")
        if axis in sizes or not size.removeprefix("-").isdecimal():
            raise UserError(f"mesh {text!r}: give each axis one whole number, as in {axis}=2")
        sizes[axis] = int(size)
    return sizes


def data_mesh(rows: int, tokens: int, params: int = 0) -> Mesh | None:
    """A mesh of replicas for steps over batches.

    It takes as many of the devices as divide the rows. Where these are a CPU's cores (see
    `gptjax.devices.cores_as_devices`), each is to have some hundred tokens, since narrow products
    waste more than the further core gives; and a large model on few tokens stays on one, which has
    the help of all cores in its products: replicas would each hold its gradient and update it all.

    Args:
        rows: what the rows of every batch are a multiple of.
        tokens: of a step, in all rows together.
        params: how many are trained.

    Returns:
        The mesh, or None where one device is to do all.
    """
    devices = jax.devices()
    most = len(devices)
    if devices[0].platform == "cpu":
        most = min(most, tokens // TOKENS_PER_CORE) if params <= PARAMS_PER_TOKEN * tokens else 1
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

    Args:
        mesh: the mesh.
        axes: a logical axis for each dimension, see `RULES`.
        shape: of the array.
        name: of the array, for errors.

    Raises:
        UserError: if a dimension does not divide: GSPMD would silently replicate it.
    """
    for axis, size in zip(axes, shape, strict=True):
        parts = axis_parts(axis, mesh)
        if size % parts:
            legal = [n for n in range(1, size + 1) if size % n == 0]
            raise UserError(
                f"{name}: axis {axis!r} of size {size} does not divide over the mesh's "
                f"{' × '.join(RULES[axis])} = {parts}; choose one of {_shortened(legal)}"
            )
    return NamedSharding(mesh, partition_spec(axes))


def axis_parts(axis: str, mesh: Any = None) -> int:
    """How many parts a logical axis has on a mesh, or under the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in RULES[axis])


def _shortened(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"{numbers[:12]} …"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of `[B, T]` arrays: rows over data and fsdp, tokens over context."""
    return NamedSharding(mesh, partition_spec(("batch", "sequence")))


def check_batch(rows: int, length: int, mesh: Mesh, parts: int = 1) -> None:
    """Checks that a batch divides over a mesh.

    Args:
        rows: B.
        length: T, tokens a row.
        mesh: the mesh.
        parts: microbatches that the rows are split into first.

    Raises:
        UserError: if not; the nearest sizes that do are named.
    """
    for what, size, axis, micros in (
        (f"batch of {rows} rows", rows, "batch", parts),
        (f"sequence of {length} tokens", length, "sequence", 1),
    ):
        divisor = axis_parts(axis, mesh) * micros
        if size % divisor:
            below = size // divisor * divisor
            nearest_sizes = [n for n in (below, below + divisor) if n]
            raise UserError(
                f"{what} does not divide into {divisor} parts, over the mesh's "
                f"{' × '.join(RULES[axis])}{f' and {micros} microbatches' if micros > 1 else ''}; "
                f"the nearest that do are {nearest_sizes}"
            )


@dataclass(frozen=True)
class UnreadBatch:
    """A batch whose rows are read where they are needed.

    Attributes:
        rows: B.
        read: gives rows `[start, stop)` as a dict of arrays, whichever B the batch has.
    """

    rows: int
    read: Callable[[int, int], Mapping[str, np.ndarray]]


def deal_rows(x: jax.Array, parts: int) -> jax.Array:
    """Microbatches in front: `[B, …]` becomes `[parts, B / parts, …]`.

    Row r goes to microbatch r mod `parts`: a batch that is split over devices by rows then stays
    where it is, where consecutive rows would have to travel.
    """
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Starts a batch's way to the devices of a mesh; for None to the default one.

    Args:
        batch: a dict of arrays `[B, T]`, of which every process has the whole, or an `UnreadBatch`,
            of which each reads the rows that its own devices hold.
        mesh: the mesh, which may reach over several processes.

    Returns:
        The dict of global arrays.
    """
    if mesh is None:
        return jax.device_put(batch, None)
    place = batch_sharding(mesh)
    if place.is_fully_addressable:
        return jax.device_put(batch, place)
    if not isinstance(batch, UnreadBatch):
        whole = batch
        rows = len(next(iter(whole.values())))
        batch = UnreadBatch(rows, lambda start, stop: {k: x[start:stop] for k, x in whole.items()})
    by_rows = NamedSharding(mesh, PartitionSpec(place.spec[0]))
    held = by_rows.addressable_devices_indices_map((batch.rows,)).values()
    # Devices that differ in other axes than rows hold the same ones: these are read once.
    ranges = {index[0].indices(batch.rows)[:2] for index in held if index is not None}
    parts = {part: batch.read(*part) for part in sorted(ranges)}

    def global_array(name: str, length: int) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            return parts[index[0].indices(batch.rows)[:2]][name][:, index[1]]

        return jax.make_array_from_callback((batch.rows, length), place, shard)

    one = next(iter(parts.values()))
    return {name: global_array(name, array.shape[1]) for name, array in one.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an intermediate value's layout, by logical axes, under the mesh in force.

    The identity where no mesh is set (`jax.set_mesh`) or it has one device. A dimension that does
    not divide, such as the rows of a few prompts, is left whole: parameters and training batches
    have been checked before.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x

    def fitting(axis: str | None, size: int) -> str | None:
        if axis is None or size % axis_parts(axis) == 0:
            return axis
        return fitting("sequence", size) if axis == "residual" else None

    fit = [fitting(axis, size) for axis, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, partition_spec(fit))


def on_each_device(
    function: Callable[..., Any],
    inputs: Sequence[Sequence[str | None]],
    outputs: Sequence[Any],
) -> Callable[..., Any]:
    """The function on every device's own part of its inputs, under the mesh in force.

    Args:
        function: of arrays, the parts of one device; it may communicate over mesh axes by name.
        inputs: the logical axes of each argument.
        outputs: the logical axes of the result, or of each where there are several.

    Raises:
        UserError: when called, if an argument does not divide.
    """
    # What varies over which axis is not tracked: Pallas kernels cannot say it, and a function that
    # is mapped over stages is refused.
    mapped = jax.shard_map(
        function,
        in_specs=tuple(partition_spec(axes) for axes in inputs),
        out_specs=tuple(partition_spec(axes) for axes in outputs)
        if isinstance(outputs[0], tuple)
        else partition_spec(outputs),
        check_vma=False,
    )

    def call(*arguments: Any) -> Any:
        for axes, argument in zip(inputs, arguments, strict=True):
            for axis, size in zip(axes, jnp.shape(argument), strict=True):
                parts = 1 if axis is None else axis_parts(axis)
                if size % parts:
                    raise UserError(
                        f"{axis} of size {size} does not divide over the mesh's "
                        f"{' × '.join(RULES[axis or ''])} = {parts}"
                    )
        return mapped(*arguments)

    return call


def on_rows_and_heads(
    function: Callable[..., jax.Array],
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    *more: jax.Array,
) -> jax.Array:
    """Attention of whole sequences on every device's own rows and heads, under the mesh in force.

    Kernels are not split by the compiler. Without a mesh the function is called as it is.

    Args:
        function: of queries, keys, values and the rest, to what is shaped like the queries.
        q_BTHC: queries.
        k_BTKC: keys.
        v_BTKC: values.
        more: `[B, T]`, such as the documents of the tokens, or scalars.
    """
    inputs = (q_BTHC, k_BTKC, v_BTKC, *more)
    if jax.sharding.get_abstract_mesh().empty:
        return function(*inputs)
    queries, keys = ("batch", None, "heads", "head"), ("batch", None, "kv_heads", "head")
    axes = [queries, keys, keys, *(("batch", None) if x.ndim else () for x in more)]
    return on_each_device(function, axes, queries)(*inputs)


def are_cpu_replicas() -> bool:
    """Whether the mesh in force splits the batch and nothing else, over CPU devices."""
    mesh = jax.sharding.get_abstract_mesh()
    only_data = not mesh.empty and 1 < mesh.size == mesh.shape["data"]
    # Where no mesh is in force, as for each replica by itself, the default device decides.
    return only_data and platform() == jax.default_backend() == "cpu"


def on_replicas(function: Callable[..., Any]) -> Callable[..., Any]:
    """The sum over replicas of what a function gives for each one's rows, under the mesh in force.

    It is exchanged as one array. Where the compiler splits a step, a CPU's devices wait for each
    other once for each array of the gradients, block by block.

    Args:
        function: of what every replica has whole and of `[B, T]` arrays, to arrays of floats that
            are sums over rows. It sees no mesh, whose constraints and sums would exchange again.
    """

    def local(whole: Any, rows: Any) -> Any:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            sums = function(whole, rows)
        together, apart = ravel_pytree(sums)
        return apart(jax.lax.psum(together, "data"))

    specs = (PartitionSpec(), PartitionSpec("data"))
    return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)


def gathered(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """On each device, the parts of all devices of a mesh axis, one after another."""
    return jax.lax.all_gather(x, axis, axis=dimension, tiled=True) if _is_split(axis) else x


def scattered_sum(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """On each device, its part of the sum over the devices of a mesh axis."""
    if not _is_split(axis):
        return x
    return jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)


def summed(x: jax.Array, *axes: str) -> jax.Array:
    """On each device, the sum over the devices of mesh axes."""
    split = tuple(axis for axis in axes if _is_split(axis))
    return jax.lax.psum(x, split) if split else x


def _is_split(axis: str) -> bool:
    # XLA's CPU backend does not leave out what a group of one would exchange with itself; and with
    # no more threads than devices, a second exchange in a program can keep the first from ending.
    return jax.sharding.get_abstract_mesh().shape[axis] > 1


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
