"""Weights of transformers' Flax classes, which it has no longer: msgpack files and trees in memory.

Flax calls a tensor by its path in a tree, `transformer/h/0/attn/c_attn/kernel`, and PyTorch by
`transformer.h.0.attn.c_attn.weight`. What was a `kernel` lies transposed: a Dense layer of Flax has
`[in, out]` where PyTorch's Linear has `[out, in]`, and GPT-2's FlaxConv1D has `[out, in]` where
PyTorch's Conv1D has `[in, out]`. All else lies alike. Here tensors get PyTorch's names and order;
the families' tables do the rest.

The files hold the tree as msgpack, arrays as flax.serialization writes them: an extension of kind 1
that holds a shape, a dtype's name and the values, and above 1 GiB several of them. It is read by
skipping over the values, which stay in the mapped file until they are used. Nothing in such a file
is code.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from gptjax.adapters import merge_params
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.pretrained.families import family_of, read_config
from gptjax.pretrained.json_files import refuse_other_content
from gptjax.pretrained.mapping import Tensor, export_tensors, import_params
from gptjax.pretrained.safetensors_files import DTYPES, MappedTensor, OtherTensor, open_shards

INDEX = "flax_model.msgpack.index.json"
SINGLE = "flax_model.msgpack"
FAMILIES = ("gpt2", "llama", "mistral")
"""The families, of those here, that transformers had Flax classes of."""

_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}
_ARRAY = 1  # flax.serialization's kind of extension for an array.
_CHUNKED = "__msgpack_chunked_array__"
_MOST_DIMENSIONS = 64  # NumPy's own limit.
_LONGEST_HEADER = 4096  # Bytes of an array's shape and dtype, of which any model has less.
_Read = TypeVar("_Read")
_RENAMED = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


@dataclass(frozen=True)
class Turned:
    """A kernel, as PyTorch has it.

    Attributes:
        tensor: as Flax has it.
    """

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """As PyTorch has it."""
        return self.tensor.shape[::-1]

    @property
    def dtype(self) -> Any:
        """The tensor's."""
        return self.tensor.dtype

    def read(self) -> np.ndarray:
        """The values: a view."""
        return self.tensor.read().T


@dataclass(frozen=True)
class InMemory:
    """A tensor of a tree of arrays, on any device.

    Attributes:
        array: a jax or numpy array.
    """

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        """NumPy's, or the name of one that weights are not in."""
        own = np.dtype(self.array.dtype)
        return own if own.name in _DTYPES else own.name

    def read(self) -> np.ndarray:
        """The values on the host."""
        return np.asarray(self.array)


@dataclass(frozen=True)
class Chunked:
    """A tensor that lies in several pieces, of which the values follow each other.

    Attributes:
        shape: of the whole.
        pieces: 1-D each, in order.
    """

    shape: tuple[int, ...]
    pieces: tuple[Tensor, ...]

    @property
    def dtype(self) -> Any:
        """That of its pieces."""
        return self.pieces[0].dtype

    def read(self) -> np.ndarray:
        """The values, copied together."""
        return np.concatenate([piece.read() for piece in self.pieces]).reshape(self.shape)


def is_directory(directory: Path) -> bool:
    """Whether a folder holds weights of a Flax class."""
    return (directory / INDEX).is_file() or (directory / SINGLE).is_file()


def open_directory(directory: Path) -> dict[str, Tensor]:
    """Opens all tensors of a folder, by PyTorch's names.

    Raises:
        UserError: if a file is missing, or not whole, or holds something else.
    """
    if (directory / INDEX).is_file():
        tensors = open_shards(directory, directory / INDEX, _open_tree)
    else:
        tensors = _open_tree(directory / SINGLE)
    return as_pytorch(tensors)


def as_pytorch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by PyTorch's names, in PyTorch's order of dimensions.

    Args:
        tensors: by Flax's names, with "/" or, as in the safetensors files of Flax classes, ".".
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # A module's variables may come with their collection's name.
        *modules, leaf = name.replace("/", ".").removeprefix("params.").split(".")
        named[".".join([*modules, _RENAMED.get(leaf, leaf)])] = (
            Turned(tensor) if leaf == "kernel" else tensor
        )
    return named


def is_flax(tensors: Mapping[str, Any]) -> bool:
    """Whether the names of a file's tensors are Flax's: later Flax classes wrote safetensors."""
    return any(name.endswith(".kernel") for name in tensors)


def from_flax_params(
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    mesh: Mesh | None = None,
    *,
    dtype: Any = jnp.float32,
) -> Model:
    """A model of the parameters of one of transformers' Flax classes.

    Args:
        params: the tree: `model.params` of a FlaxGPT2LMHeadModel, FlaxLlamaForCausalLM or
            FlaxMistralForCausalLM, with or without "params" around it. Leaves are arrays of NumPy
            or JAX.
        config: the values of its config.json: `model.config.to_dict()`.
        mesh: where the parameters shall lie; None is the default device.
        dtype: of the parameters.

    Returns:
        The model, without a tokenizer.

    Raises:
        UserError: if the family is not one of these or has a setting that is not supported, or the
            arrays are not those of the config.
    """
    from gptjax.pretrained.huggingface import named_tensors

    values = dict(config)
    family, own = read_config(values, "the config given")
    tensors: dict[str, Tensor] = {}
    for path, leaf in flatten_dict(_plain(params), sep="/").items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise UserError(
                f"{path} of the parameters is a {type(leaf).__name__}; give the tree of arrays, "
                "model.params"
            )
        tensors[path] = InMemory(leaf)
    named = named_tensors(family, own, as_pytorch(tensors), "the parameters given")
    return Model(
        own,
        import_params(named, family.weights(own), own, mesh, dtype),
        source=values,
        dtypes={name: np.dtype(tensor.dtype).name for name, tensor in named.items()},
    )


def to_flax_params(model: Model) -> dict[str, Any]:
    """The parameters as transformers' Flax class of the model's family had them.

    Args:
        model: of a family that transformers had a Flax class of: GPT-2, Llama or Mistral.

    Returns:
        A nested dict of NumPy arrays: `flax.serialization.to_bytes` of it is a
        flax_model.msgpack.

    Raises:
        UserError: if the model is of no such family.
    """
    config = model.config
    family = family_of(config, model.source.get("model_type"))
    if family.model_type not in FAMILIES:
        raise UserError(
            f"transformers had no Flax class of {family.model_type}; of these it had: "
            f"{', '.join(FAMILIES)}"
        )
    # Llama's norms called their gain as PyTorch does.
    gain = "scale" if family.model_type == "gpt2" else "weight"
    flat: dict[tuple[str, ...], np.ndarray] = {}
    params = merge_params(model.params)
    for name, array in export_tensors(params, family.weights(config), config):
        *modules, leaf = name.split(".")
        if leaf == "weight" and modules[-1] in ("wte", "wpe", "embed_tokens"):
            leaf = "embedding"
        elif leaf == "weight" and array.ndim == 1:
            leaf = gain
        elif leaf == "weight":
            leaf, array = "kernel", np.ascontiguousarray(array.T)
        flat[(*modules, leaf)] = array
    return unflatten_dict(flat)


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dicts: Flax's own are of a type that is no dict."""
    return {
        str(name): _plain(value) if isinstance(value, Mapping) else value
        for name, value in tree.items()
    }


def _open_tree(path: Path) -> dict[str, Tensor]:
    """Opens the tensors of one file, by their paths with "/".

    Raises:
        UserError: if it is no whole tree of arrays.
    """
    import msgpack

    size = path.stat().st_size
    with path.open("rb") as stream:
        refuse_other_content(path, stream.read(512))
        if not size:
            raise UserError(f"{path} is empty; download it again")
        stream.seek(0)
        file = np.memmap(path, np.uint8, "r")
        # What is skipped passes through the reader's buffer, a value at a time.
        reader = msgpack.Unpacker(
            stream, max_buffer_size=min(size, 2**32 - 1), max_array_len=_MOST_DIMENSIONS
        )
        try:
            spans = dict(_spans(reader, file, ""))
            if reader.tell() != size:
                raise ValueError("more follows the tree")
            return _tensors(path, file, spans)
        except msgpack.OutOfData:
            raise UserError(f"{path} is incomplete ({size} bytes); download it again") from None
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
            raise UserError(
                f"{path} is no tree of arrays in Flax's msgpack, or is damaged "
                f"({error or type(error).__name__}); download it again"
            ) from None


def _spans(reader: Any, file: np.memmap, prefix: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Where each value that is no map begins and ends in the file, by its path."""
    for _ in range(reader.read_map_header()):
        key = reader.unpack()
        if not isinstance(key, str):
            raise ValueError("a name is no text")
        start = reader.tell()
        first = file[start] if start < len(file) else 0
        # A map's first byte by msgpack's specification: fixmap, map 16, map 32.
        if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            yield from _spans(reader, file, f"{prefix}{key}/")
        else:
            reader.skip()
            yield prefix + key, (start, reader.tell())


def _tensors(
    path: Path, file: np.memmap, spans: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """The tensors of a file by their paths, those in pieces as one."""
    import msgpack

    def number(name: str) -> int:
        start, end = spans[name]
        value = msgpack.unpackb(file[start:end])
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is no size")
        return value

    def tensor(name: str) -> Tensor:
        return _array(path, file, name, *spans[name])

    chunked = tuple(name.removesuffix(_CHUNKED) for name in spans if name.endswith("/" + _CHUNKED))
    tensors = {name: tensor(name) for name in spans if not name.startswith(chunked)}
    for prefix in chunked:
        shape = tuple(_numbered(f"{prefix}shape/", spans, number))
        pieces = tuple(_numbered(f"{prefix}chunks/", spans, tensor))
        held = sum(math.prod(piece.shape) for piece in pieces)
        if held != math.prod(shape) or len({piece.dtype for piece in pieces}) != 1:
            raise ValueError(f"the pieces of {prefix[:-1]} are not of shape {shape}")
        tensors[prefix[:-1]] = Chunked(shape, pieces)
    return tensors


def _numbered(
    prefix: str, spans: Mapping[str, tuple[int, int]], read: Callable[[str], _Read]
) -> list[_Read]:
    """What is numbered from 0 under a path, as Flax writes a tuple."""
    count = sum(name.startswith(prefix) for name in spans)
    names = [f"{prefix}{place}" for place in range(count)]
    if not count or not all(name in spans for name in names):
        raise ValueError(f"{prefix} is not numbered from 0")
    return [read(name) for name in names]


def _array(path: Path, file: np.memmap, name: str, start: int, end: int) -> Tensor:
    """The array of an extension of msgpack, whose values are the last that is in it."""
    import msgpack

    # The first byte says how many bytes the extension's size takes, or, from 0xd4 to 0xd8, the size
    # itself; one byte for its kind follows.
    header = {0xC7: 3, 0xC8: 4, 0xC9: 6, **dict.fromkeys(range(0xD4, 0xD9), 2)}.get(
        int(file[start])
    )
    if header is None or file[start + header - 1] != _ARRAY:
        raise ValueError(f"{name} is no array")
    inner = start + header
    reader = msgpack.Unpacker(raw=True, max_array_len=_MOST_DIMENSIONS)
    reader.feed(file[inner : min(inner + _LONGEST_HEADER, end)].tobytes())
    if reader.read_array_header() != 3:
        raise ValueError(f"{name} is no shape, dtype and values")
    shape, kind = reader.unpack(), reader.unpack()
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name} has no shape")
    if not isinstance(kind, bytes):
        raise ValueError(f"{name} has no dtype")
    # Values are bin 8, 16 or 32: a byte that says which, and as many bytes for their size.
    at = inner + reader.tell()
    width = {0xC4: 1, 0xC5: 2, 0xC6: 4}.get(int(file[at]) if at < end else 0)
    values = at + 1 + (width or 0)
    if width is None or int.from_bytes(file[at + 1 : values].tobytes(), "big") != end - values:
        raise ValueError(f"{name} has no values")
    dtype = _DTYPES.get(kind.decode("ascii", "replace"))
    if dtype is None:
        return OtherTensor(tuple(shape), kind.decode("ascii", "replace"), path)
    if math.prod(shape) * dtype.itemsize != end - values:
        raise ValueError(f"{name} of shape {shape} has {end - values} bytes of {dtype.name}")
    return MappedTensor(tuple(shape), dtype, file, values)
