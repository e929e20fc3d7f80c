"""Between the tensors of a file and gptjax's parameters: one table a family, read both ways."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.params import Params, flat, nested, param_shardings, param_specs

_PIECE_BYTES = 1 << 21


class Tensor(Protocol):
    """A tensor that lies in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        ...

    @property
    def dtype(self) -> Any:
        """NumPy's, or the file's own name of one that weights are not in."""
        ...

    def read(self) -> np.ndarray:
        """Its values: a view of the mapped file where the file holds them as they are."""
        ...


@dataclass(frozen=True)
class Weight:
    """One tensor of a file, and where its values belong.

    Dimensions have letters: D model width, H query heads, K key heads, C head width, F hidden
    width, V vocabulary, T context, P the parts of a tensor that holds several parameters.

    Attributes:
        name: the tensor's name, with "{layer}" for the number of a block.
        dims: the tensor's dimensions, separated by spaces; several letters are one dimension that
            is their product, the last letter running fastest: "HPC D" is `[H * P * C, D]`.
        params: the parameters in it, dotted; one for each of P, else one.
        order: the dimensions of each parameter, without the stacked layers.
    """

    name: str
    dims: str
    params: tuple[str, ...]
    order: str


def weight(name: str, dims: str, params: str, order: str) -> Weight:
    """A `Weight`, its parameters separated by spaces.

    Args:
        name: as in `Weight`.
        dims: as in `Weight`.
        params: the dotted parameters, separated by spaces.
        order: as in `Weight`.
    """
    return Weight(name, dims, tuple(params.split()), order)


def parts(entry: Weight, tensor: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
    """The parameters in one tensor, as views of it, each in its own order of dimensions."""
    sizes = dimensions(entry, config)
    letters = entry.dims.replace(" ", "")
    tensor = tensor.reshape([sizes[letter] for letter in letters])
    order = [letters.index(letter) for letter in entry.order]
    if "P" not in letters:
        return [tensor.transpose(order)]
    split = tensor.transpose([letters.index("P"), *order])
    return [split[part] for part in range(len(entry.params))]


def joined(entry: Weight, values: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
    """The inverse of `parts`: the tensor that holds these parameters."""
    letters = entry.dims.replace(" ", "")
    if "P" in letters:
        tensor, order = np.stack(values), "P" + entry.order
    else:
        tensor, order = values[0], entry.order
    tensor = tensor.transpose([order.index(letter) for letter in letters])
    return np.ascontiguousarray(tensor.reshape(file_shape(entry, config)))


def file_shape(entry: Weight, config: ModelConfig) -> tuple[int, ...]:
    """The shape that a tensor must have in the file."""
    sizes = dimensions(entry, config)
    return tuple(int(np.prod([sizes[letter] for letter in dim])) for dim in entry.dims.split())


def dimensions(entry: Weight, config: ModelConfig) -> dict[str, int]:
    """The size of each letter."""
    return {
        "D": config.embed_dim,
        "H": config.num_heads,
        "K": config.kv_heads,
        "C": config.head_width,
        "F": config.mlp_width,
        "V": config.vocab_size,
        "T": config.context_length,
        "P": len(entry.params),
    }


def by_layer(entries: Sequence[Weight], config: ModelConfig) -> Iterator[tuple[str, Weight, int]]:
    """Every tensor of a model: its name in the file, its entry, and its block (0 outside them)."""
    for entry in entries:
        numbers = range(config.num_layers) if "{layer}" in entry.name else range(1)
        for layer in numbers:
            yield entry.name.format(layer=layer), entry, layer


def check_tensors(
    tensors: Mapping[str, Tensor], entries: Sequence[Weight], config: ModelConfig, where: str
) -> None:
    """Compares names and shapes before anything is allocated.

    Args:
        tensors: name -> tensor.
        entries: the family's table.
        config: the model.
        where: they lie, for errors.

    Raises:
        UserError: if a tensor is missing, of another shape, or none of the model's; all are listed.
    """
    expected = {name: file_shape(entry, config) for name, entry, _ in by_layer(entries, config)}
    faults = [f"missing {name} {list(expected[name])}" for name in expected if name not in tensors]
    faults += [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults += [
        f"{name} is of dtype {tensors[name].dtype}, which is quantized or no weight"
        for name in expected
        if name in tensors and isinstance(tensors[name].dtype, str)
    ]
    faults += [f"unknown {name} {list(tensors[name].shape)}" for name in tensors.keys() - expected]
    if faults:
        shown = "; ".join(sorted(faults)[:20])
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError(
            f"the tensors of {where} are not those of its config.json: {shown}{more}; "
            "use the files of one and the same model"
        )


def import_params(
    tensors: Mapping[str, Tensor],
    entries: Sequence[Weight],
    config: ModelConfig,
    mesh: Mesh | None,
    dtype: Any = jnp.float32,
) -> Params:
    """Reads a checked model's tensors into its parameters, one at a time.

    Each goes from the file to its place on the devices by itself and, where it is large, in pieces:
    beside the parameters themselves, memory holds a piece of one.

    Args:
        tensors: name -> tensor, from `check_tensors`.
        entries: the family's table.
        config: the model.
        mesh: where they go; None is the default device.
        dtype: of the parameters.
    """
    specs = flat(param_specs(config))
    places = dict.fromkeys(specs) if mesh is None else flat(param_shardings(config, mesh))
    leaves: dict[str, jax.Array] = {}
    for name, entry, layer in by_layer(entries, config):
        values = parts(entry, tensors[name].read(), config)
        for path, part in zip(entry.params, values, strict=True):
            place = places[path]
            if layer == 0:
                leaves[path] = _zeros(specs[path].shape, np.dtype(dtype), place)()
            outer = (layer,) if specs[path].axes[0] == "layers" else ()
            leaves[path] = _write(leaves[path], part, outer, place)
    return nested(leaves)


def export_tensors(
    params: Params, entries: Sequence[Weight], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, one at a time: the inverse of `import_params`."""
    leaves = flat(params)
    for name, entry, layer in by_layer(entries, config):
        stacked = entry.params[0].startswith("blocks.")
        values = [
            np.asarray(leaves[path][layer] if stacked else leaves[path]) for path in entry.params
        ]
        yield name, joined(entry, values, config)


# Cached, so that parameters of one shape share a compiled program.
@lru_cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, place: NamedSharding | None) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)


def _write(
    whole: jax.Array, part: np.ndarray, outer: tuple[int, ...], place: NamedSharding | None
) -> jax.Array:
    """Writes a part of an array, which is donated: all of it, or the layer that `outer` says."""
    row_place = None
    if place is not None:
        # The rows of what is written at once lie whole on each device, the rest as it ever does.
        spec = [*place.spec, *[None] * (whole.ndim - len(place.spec))]
        spec[: len(outer) + 1] = [None] * (len(outer) + 1)
        row_place = NamedSharding(place.mesh, PartitionSpec(*spec))
    many = max(1, _PIECE_BYTES // max(part[0].nbytes, 1))
    for at in range(0, len(part), many):
        piece = part[at : at + many].reshape(*[1] * len(outer), -1, *part.shape[1:])
        if row_place is None:
            on_device = jnp.asarray(piece)
        else:
            on_device = jax.make_array_from_callback(
                piece.shape, row_place, lambda index, piece=piece: piece[index]
            )
        start = (*outer, at, *[0] * (part.ndim - 1))
        whole = _writer(place)(whole, on_device, start)
        # Else reading runs ahead of writing, and what was read waits in memory.
        whole.block_until_ready()
    return whole


@lru_cache
def _writer(place: NamedSharding | None) -> Any:
    def write(whole: jax.Array, piece: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, piece.astype(whole.dtype), start)

    return jax.jit(write, donate_argnums=0, out_shardings=place)
