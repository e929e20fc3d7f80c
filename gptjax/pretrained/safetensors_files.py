"""Weights in safetensors files: opened as mapped memory, checked before anything is read."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.errors import UserError
from gptjax.pretrained.json_files import read_json, refuse_other_content

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_LONGEST_HEADER = 100_000_000  # The format's own limit, in bytes.

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes of weights by safetensors' names."""


@dataclass(frozen=True)
class MappedTensor:
    """A tensor in a mapped file: its bytes are read when they are used.

    Attributes:
        shape: its dimensions.
        dtype: NumPy's.
        file: the whole file, mapped as bytes.
        start: the place of the tensor's first byte in it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: np.memmap
    start: int

    def read(self) -> np.ndarray:
        """The values, as a view of the file."""
        return np.ndarray(self.shape, self.dtype, self.file, self.start)


@dataclass(frozen=True)
class OtherTensor:
    """A tensor of a dtype that weights are not in, such as a mask's; only its name counts.

    Attributes:
        shape: its dimensions.
        dtype: the file's own name of it.
        path: of the file, for errors.
    """

    shape: tuple[int, ...]
    dtype: str
    path: Path

    def read(self) -> np.ndarray:
        """Refuses.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self.path} holds weights as {self.dtype}, which are quantized or no weights; "
            f"export the model in one of {', '.join(DTYPES)}"
        )


def open_directory(directory: Path) -> dict[str, Any]:
    """Opens all tensors of a Hugging Face directory, by name.

    Raises:
        UserError: if there are no safetensors files, a shard is missing, or a file is not whole.
    """
    index = directory / INDEX
    if index.is_file():
        return open_shards(directory, index, open_file)
    if (directory / SINGLE).is_file():
        return open_file(directory / SINGLE)
    found = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickles = [name for name in found if name.endswith(PICKLES)]
    if pickles:
        raise UserError(_pickle_message(directory, pickles[0]))
    others = [name for name in found if name.endswith(".safetensors")]
    advice = f"rename it to {SINGLE}" if len(others) == 1 else f"give its {INDEX} too"
    raise UserError(
        f"{directory} holds no {SINGLE}"
        + (f" but {', '.join(others)}; {advice}" if others else "; download the weights again")
    )


def refuse_pickle(path: Path) -> None:
    """Refuses a file of pickled weights by its name.

    Raises:
        UserError: if it is one: unpickling runs whatever code the file holds.
    """
    if path.name.endswith(PICKLES):
        raise UserError(_pickle_message(path.parent, path.name))


def _pickle_message(directory: Path, name: str) -> str:
    return (
        f"{directory / name} is pickled, and reading a pickle runs the code in it: not read. If "
        "you trust its origin, convert it where PyTorch and transformers are installed: python -c "
        '"from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained({str(directory)!r}).save_pretrained('converted')\""
    )


def open_shards(
    directory: Path, index: Path, open_shard: Callable[[Path], Mapping[str, Any]]
) -> dict[str, Any]:
    """Opens the tensors of all files that an index names.

    Args:
        directory: of the files.
        index: a JSON file that says of each tensor which file holds it.
        open_shard: opens the tensors of one file.

    Raises:
        UserError: if a file is missing, outside the directory, or without a tensor that it should
            hold.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; download it again")
    shards = sorted(set(map(str, weight_map.values())))
    for name in shards:
        # By its name alone: in a hub's cache the file itself is a link to elsewhere, and rightly.
        # Windows' rules take both kinds of slashes, and so are the stricter ones everywhere.
        path = PureWindowsPath(name)
        if path.drive or path.root or ".." in path.parts:
            raise UserError(f"{index} names {name!r}, outside its directory: not read")
    missing = [name for name in shards if not (directory / name).is_file()]
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} of {len(shards)} weight files: "
            f"{', '.join(missing)}; download them"
        )
    tensors: dict[str, Any] = {}
    for name in shards:
        shard = open_shard(directory / name)
        stated = {tensor for tensor, file in weight_map.items() if file == name}
        absent = sorted(stated - shard.keys())
        if absent:
            raise UserError(
                f"{directory / name} lacks tensors that {index.name} says it holds: "
                f"{', '.join(absent[:10])}; download both again"
            )
        tensors |= shard
    return tensors


def open_file(path: Path) -> dict[str, Any]:
    """Opens the tensors of one file, by name.

    Raises:
        UserError: if it is not a whole safetensors file.
    """
    import safetensors

    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        refuse_other_content(path, start)
        if start.startswith(b"PK\x03\x04"):  # What torch.save writes, under another name.
            raise UserError(_pickle_message(path.parent, path.name))
        length = int.from_bytes(start[:8], "little")
        if size >= 8 and length > _LONGEST_HEADER:
            raise UserError(_foreign(path))
        if size < 8 + length:
            raise UserError(_incomplete(path, size))
        file.seek(8)
        header_bytes = file.read(length)
    try:
        header = json.loads(header_bytes)
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(_foreign(path)) from None
    if size < end:
        raise UserError(_incomplete(path, size, end))
    try:
        # The library checks what is left: that offsets follow each other and match the shapes.
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from error
    mapped = np.memmap(path, np.uint8, "r")
    tensors: dict[str, Any] = {}
    for name, entry in header.items():
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        if dtype in DTYPES:
            offset = 8 + length + entry["data_offsets"][0]
            tensors[name] = MappedTensor(shape, DTYPES[dtype], mapped, offset)
        else:
            tensors[name] = OtherTensor(shape, dtype, path)
    return tensors


def _incomplete(path: Path, size: int, end: int | None = None) -> str:
    of = "" if end is None else f" of {end}"
    return f"{path} is incomplete ({size}{of} bytes); download it again"


def _foreign(path: Path) -> str:
    return f"{path} is not a safetensors file, or is damaged; download it again"


def write_directory(
    directory: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    max_shard_bytes: int,
) -> None:
    """Writes tensors as one file or as shards with an index, each replaced at once.

    Args:
        directory: an existing folder.
        tensors: names and values, in the order of `shapes`; held for one shard at a time.
        shapes: shape and dtype of every tensor, which the values are cast to.
        max_shard_bytes: the most that one file holds (a single larger tensor has one to itself).
    """
    import safetensors.numpy

    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, (shape, dtype) in shapes.items():
        size = int(np.prod(shape)) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    count = len(shards)
    names = [SINGLE]
    if count > 1:
        names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    stream = iter(tensors)
    for file, held in zip(names, shards, strict=True):
        own = itertools.islice(stream, len(held))
        values = {name: array.astype(shapes[name][1]) for name, array in own}
        unfinished = directory / (file + ".new")
        safetensors.numpy.save_file(values, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, directory / file)
    # What an earlier export left would be read together with this one, or instead of it.
    for old in directory.glob("model*.safetensors"):
        if old.name not in names:
            old.unlink()
    index = directory / INDEX
    index.unlink(missing_ok=True)
    if count > 1:
        weight_map = {name: file for file, held in zip(names, shards, strict=True) for name in held}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        index.write_text(text + "\n", encoding="utf-8")
