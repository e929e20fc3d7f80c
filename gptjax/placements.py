"""Where tensors lie: which part of each a device holds, of arrays and of shapes alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding

from gptjax.errors import UserError

Part = tuple[tuple[float, float], ...]
"""Where a device's part begins and ends in each dimension, as fractions from 0 to 1."""


@dataclass(frozen=True)
class Placement:
    """Where one tensor lies.

    Attributes:
        name: its path in the tree.
        shape: of all of it.
        split: for each dimension the mesh axes that split it, the outermost first.
        size: of all of it, in bytes.
        held: device -> the part that it holds.
    """

    name: str
    shape: tuple[int, ...]
    split: tuple[tuple[str, ...], ...]
    size: float
    held: dict[Any, Part]

    def __str__(self) -> str:
        """The shape with what splits it, such as "64÷fsdp × 16"."""
        sizes = (
            f"{n}{''.join(f'÷{axis}' for axis in axes)}"
            for n, axes in zip(self.shape, self.split, strict=True)
        )
        return " × ".join(sizes) or "scalar"

    def bytes_on(self, device: Any) -> float:
        """What the device holds of it."""
        return share(self.held[device]) * self.size if device in self.held else 0.0


@dataclass(frozen=True)
class Placements:
    """Where the tensors of a tree lie.

    Attributes:
        tensors: one for each leaf.
        devices: all that hold something, in the order of the mesh; of an abstract mesh the numbers
            of its places.
        coordinates: mesh axis -> the place of each device along it, of the axes that are longer
            than 1; None for a device outside the mesh.
    """

    tensors: tuple[Placement, ...]
    devices: tuple[Any, ...]
    coordinates: dict[str, tuple[int | None, ...]]


def placements(tree: Any) -> Placements:
    """Reads off where each tensor of a tree lies.

    Args:
        tree: arrays of JAX, or shapes with shardings (`jax.ShapeDtypeStruct`), in any tree. Meshes
            may be abstract.

    Returns:
        The tensors, and the devices of the largest mesh first.

    Raises:
        UserError: if a leaf has no sharding.
    """
    tensors: list[Placement] = []
    largest: list[Any] = []
    others: list[Any] = []
    coordinates: dict[str, tuple[int | None, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "array"
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            raise UserError(f"{name} has no sharding; give arrays of JAX, or shapes with one")
        split: tuple[tuple[str, ...], ...] = ((),) * leaf.ndim
        if isinstance(sharding, NamedSharding):
            mesh = sharding.mesh
            sizes = dict(mesh.shape)
            here = list(range(mesh.size)) if isinstance(mesh, AbstractMesh) else mesh.devices.flat
            split = _split(sharding.spec, leaf.ndim, sizes)
            places = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
            by_axis = dict(zip(sizes, places, strict=True))
            held = dict(zip(here, _parts(split, sizes, by_axis), strict=True))
            if len(held) > len(largest):
                largest = list(held)
                coordinates = {
                    axis: tuple(map(int, by_axis[axis])) for axis, n in sizes.items() if n > 1
                }
        else:
            indices = sharding.devices_indices_map(leaf.shape)
            held = {device: _fractions(index, leaf.shape) for device, index in indices.items()}
        others += held
        size = math.prod(leaf.shape) * _itemsize(leaf.dtype)
        tensors.append(Placement(name, tuple(leaf.shape), split, size, held))
    devices = tuple(dict.fromkeys(largest + others))
    coordinates = {
        axis: places + (None,) * (len(devices) - len(places))
        for axis, places in coordinates.items()
    }
    return Placements(tuple(tensors), devices, coordinates)


def _split(spec: Iterable[Any], ndim: int, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each dimension, without those of size 1."""
    given = [() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in spec]
    given += [()] * (ndim - len(given))
    return tuple(tuple(axis for axis in axes if sizes[axis] > 1) for axes in given)


def _parts(
    split: Sequence[Sequence[str]], sizes: Mapping[str, int], by_axis: Mapping[str, np.ndarray]
) -> list[Part]:
    """The part of each device, in the order of the mesh."""
    ends = []
    for axes in split:
        count = math.prod(sizes[axis] for axis in axes)
        number = np.zeros_like(next(iter(by_axis.values())))
        for axis in axes:
            number = number * sizes[axis] + by_axis[axis]
        ends.append([(int(n) / count, (int(n) + 1) / count) for n in number])
    count = len(next(iter(by_axis.values())))
    return [tuple(dimension[place] for dimension in ends) for place in range(count)]


def _fractions(index: Sequence[slice], shape: Sequence[int]) -> Part:
    places = [part.indices(n) for part, n in zip(index, shape, strict=True)]
    return tuple(
        (start / n, stop / n) if n else (0.0, 1.0)
        for (start, stop, _), n in zip(places, shape, strict=True)
    )


def share(part: Part) -> float:
    """How much of a tensor a part is, from 0 to 1."""
    return math.prod(end - start for start, end in part)


def _itemsize(dtype: Any) -> int:
    # A typed random key is two 32-bit words, which its dtype does not tell.
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize
