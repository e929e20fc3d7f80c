"""A folder of token ids that is written once: shards, document boundaries, and a manifest.

Layout, with all numbers little-endian:
    manifest.json: what the folder holds, with the size and SHA-256 of every other file. It is
        written last, so a folder without it is not complete.
    train-00000.bin, train-00001.bin, … and validation-00000.bin, …: ids, uint16 or uint32, as in
        token files. A shard ends with the document that fills it.
    train.index and validation.index: uint64, 0 and then where each document ends, counted in tokens
        from the beginning of the first shard.
"""

import bisect
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from gptjax.data.token_files import check_width
from gptjax.errors import UserError
from gptjax.tokenizer import Tokenizer, tokenizer_from_dict

MANIFEST = "manifest.json"
LOCK = ".lock"
SPLITS = ("train", "validation")

_FORMAT = "gptjax token shards"
_VERSION = 1
_OFFSET = np.dtype("<u8")
_OWN_FILE = re.compile(
    rf"(train|validation)(-\d{{5}}\.bin|\.index)|manifest\.json(\.partial)?|{re.escape(LOCK)}"
)
_BUFFER_BYTES = 1 << 20


class ShardedTokens:
    """Several 1-D arrays of ids that read as one; a slice is a copy only across their ends."""

    ndim = 1

    def __init__(self, shards: Sequence[np.ndarray]):
        self._shards = list(shards)
        self._starts = list(itertools.accumulate((len(s) for s in shards), initial=0))
        self.dtype = self._shards[0].dtype
        self.shape = (self._starts[-1],)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, key: int) -> np.integer: ...
    @overload
    def __getitem__(self, key: slice) -> np.ndarray: ...
    def __getitem__(self, key: int | slice) -> np.integer | np.ndarray:
        if not isinstance(key, slice):
            place = range(len(self))[key]
            number = bisect.bisect_right(self._starts, place) - 1
            return self._shards[number][place - self._starts[number]]
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise UserError(f"a step of {step}: tokens in shards are sliced one after another")
        parts = []
        number = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            offset = self._starts[number]
            part = self._shards[number][start - offset : stop - offset]
            parts.append(part)
            start += len(part)
            number += 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)


Tokens = np.ndarray | ShardedTokens
"""1-D ids: an array, or several that read as one."""


def gather_windows(tokens: Tokens, starts: np.ndarray, length: int) -> np.ndarray:
    """Returns `[len(starts), length]`, the ids from each start on."""
    if isinstance(tokens, ShardedTokens):
        return np.stack([tokens[start : start + length] for start in starts.tolist()])
    # A view: gathering its rows is one copy a row, half the time of indexing token by token.
    return np.lib.stride_tricks.sliding_window_view(tokens, length)[starts]


class TokenDocuments(Sequence[np.ndarray]):
    """The documents of a split: `documents[i]` is a view of ids, with the eos id that ends it."""

    def __init__(self, tokens: Tokens, offsets: np.ndarray):
        self._tokens = tokens
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, key: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, key: slice) -> list[np.ndarray]: ...
    def __getitem__(self, key: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(key, slice):
            return [self[number] for number in range(*key.indices(len(self)))]
        number = range(len(self))[key]
        return self._tokens[int(self._offsets[number]) : int(self._offsets[number + 1])]


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """One side of a folder, mapped into memory.

    Attributes:
        tokens: All ids, each document followed by eos where the manifest says so.
        documents: The same ids by document.
    """

    tokens: Tokens
    documents: TokenDocuments


@dataclass(frozen=True, eq=False)
class TokenShards:
    """An opened folder.

    Attributes:
        train: What to train on.
        validation: What is held out.
        tokenizer: What made the ids.
        vocab_size: Every id lies below it.
        manifest: All that manifest.json says.
    """

    train: TokenSplit
    validation: TokenSplit
    tokenizer: Tokenizer
    vocab_size: int
    manifest: dict[str, Any]


def holds_shards(folder: Path) -> bool:
    """Says whether a path is a folder of token shards, complete or not."""
    return folder.is_dir() and any((folder / f"{split}-00000.bin").exists() for split in SPLITS)


def open_token_shards(folder: str | Path) -> TokenShards:
    """Maps a folder that `gptjax.data.tokenize` wrote, without reading its tokens.

    The size of every file is compared with the manifest; `verify_token_shards` compares hashes.

    Returns:
        The train and validation tokens, 1-D, and the tokenizer.

    Raises:
        UserError: The folder is not complete, a file is missing or has another size, or the
            manifest cannot be read or is of a newer version.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for name, entry in _files(manifest):
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise UserError(
                f"{str(path)!r} {found}, {MANIFEST} says {entry['bytes']:,}: copy the folder again "
                "or repeat gptjax tokenize"
            )
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    check_width(dtype, manifest["vocab_size"], str(folder))
    train, validation = (_open_split(folder, manifest["splits"][name], dtype) for name in SPLITS)
    tokenizer = tokenizer_from_dict(manifest["tokenizer"])
    return TokenShards(train, validation, tokenizer, manifest["vocab_size"], manifest)


def verify_token_shards(folder: str | Path) -> None:
    """Reads every file of a folder and compares its SHA-256 with the manifest.

    Raises:
        UserError: As `open_token_shards` does; or files were changed, all of which are named.
    """
    folder = Path(folder)
    manifest = open_token_shards(folder).manifest
    damaged = []
    for name, entry in _files(manifest):
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry["sha256"]:
            damaged.append(name)
    if damaged:
        raise UserError(
            f"{', '.join(damaged)} in {str(folder)!r} differ from what was written (SHA-256): copy "
            "the folder again or repeat gptjax tokenize"
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    again = "repeat gptjax tokenize with this destination, which begins again"
    if not path.is_file():
        if not folder.is_dir():
            raise UserError(f"no folder {str(folder)!r}: write one with gptjax tokenize")
        raise UserError(
            f"{str(folder)!r} has no {MANIFEST}, so its token shards are not complete: {again}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}")
        if manifest["version"] > _VERSION:
            raise UserError(
                f"{str(path)!r} is of version {manifest['version']}, this gptjax reads up to "
                f"{_VERSION}: update gptjax"
            )
        if manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"its dtype is {manifest['dtype']!r}")
        for split in SPLITS:
            entry = manifest["splits"][split]
            shards = [shard["bytes"] for shard in entry["shards"]]
            expected = entry["tokens"] * np.dtype(manifest["dtype"]).itemsize
            if sum(shards) != expected or 0 in shards or not shards:
                raise ValueError(f"its {split} shards have {sum(shards):,} bytes for {expected:,}")
            if entry["index"]["bytes"] != (entry["documents"] + 1) * _OFFSET.itemsize:
                raise ValueError(f"its {split} index does not fit the number of documents")
        if not {"vocab_size", "tokenizer"} <= manifest.keys():
            raise ValueError("it lacks vocab_size or tokenizer")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{str(path)!r} is damaged ({type(error).__name__}: {error}): copy it again, or {again}"
        ) from error
    return manifest


def _files(manifest: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    splits = [manifest["splits"][name] for name in SPLITS]
    entries = [entry for split in splits for entry in (*split["shards"], split["index"])]
    return [(entry["name"], entry) for entry in entries]


def _open_split(folder: Path, entry: Mapping[str, Any], dtype: np.dtype) -> TokenSplit:
    shards = [np.memmap(folder / shard["name"], dtype, mode="r") for shard in entry["shards"]]
    tokens = shards[0] if len(shards) == 1 else ShardedTokens(shards)
    offsets = np.memmap(folder / entry["index"]["name"], _OFFSET, mode="r")
    return TokenSplit(tokens, TokenDocuments(tokens, offsets))


class SplitWriter:
    """Writes the shards and the index of one split, document after document.

    Args:
        folder: An existing folder.
        split: `"train"` or `"validation"`.
        dtype: Of the ids.
        shard_tokens: A shard that has so many is closed when its document ends.
        end_id: What follows each document where there are several; None for nothing.
    """

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, end_id: int | None
    ):
        self._folder, self._split = folder, split
        self._dtype = dtype.newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._end = b"" if end_id is None else np.array([end_id], self._dtype).tobytes()
        self._shard: _HashedFile | None = None
        self._shards: list[dict[str, Any]] = []
        self._index = _HashedFile(folder / f"{split}.index")
        self._index.write(bytes(_OFFSET.itemsize))
        self._first_is_open = False
        self.documents = 0
        self.tokens = 0

    def add(self, ids: np.ndarray, ends_document: bool) -> None:
        """Writes the next ids of a document."""
        if self._first_is_open:
            # Only now is the first one not the only one.
            self._end_document(self._end)
            self._first_is_open = False
        self._write(np.ascontiguousarray(ids, self._dtype).tobytes())
        if ends_document:
            self.documents += 1
            self._first_is_open = self.documents == 1
            if not self._first_is_open:
                self._end_document(self._end)

    def close(self) -> dict[str, Any]:
        """Completes the files and returns what the manifest says of them."""
        if self._first_is_open:
            self._end_document(b"")
        self._close_shard()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "shards": self._shards,
            "index": self._index.close(),
        }

    def _write(self, data: bytes) -> None:
        if not data:
            return
        if self._shard is None:
            name = f"{self._split}-{len(self._shards):05}.bin"
            self._shard = _HashedFile(self._folder / name)
        self._shard.write(data)
        self.tokens += len(data) // self._dtype.itemsize

    def _end_document(self, end: bytes) -> None:
        self._write(end)
        self._index.write(self.tokens.to_bytes(_OFFSET.itemsize, "little"))
        if self._shard and self._shard.size >= self._shard_tokens * self._dtype.itemsize:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close())
            self._shard = None


class _HashedFile:
    """A file whose size and SHA-256 are known when it is closed, and which is then on the disk."""

    def __init__(self, path: Path):
        self._name = path.name
        self._file = path.open("wb", buffering=_BUFFER_BYTES)
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"name": self._name, "bytes": self.size, "sha256": self._sha256.hexdigest()}


def write_manifest(
    folder: Path,
    *,
    dtype: np.dtype,
    tokenizer: Tokenizer,
    source: str,
    end_id: int | None,
    splits: Mapping[str, dict[str, Any]],
) -> None:
    """Makes a folder complete: writes its manifest, all or nothing.

    Args:
        folder: Of the shards.
        dtype: Of the tokens.
        tokenizer: Is stored whole.
        source: What was tokenized.
        end_id: The id after each document; None where there is none.
        splits: Of each split what `SplitWriter` says of its files.
    """
    values = {
        "format": _FORMAT,
        "version": _VERSION,
        "source": source,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "end_id": end_id,
        "splits": splits,
        "tokenizer": tokenizer.to_dict(),
    }
    partial = folder / f"{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MANIFEST)


def clear_shards(folder: Path, only_check: bool = False) -> None:
    """Removes what an earlier run left in a folder, its manifest first.

    Raises:
        UserError: The folder holds other files, too, and nothing was removed.
    """
    found = sorted(path.name for path in folder.iterdir())
    others = [name for name in found if not _OWN_FILE.fullmatch(name)]
    if others:
        raise UserError(
            f"{str(folder)!r} holds other files ({', '.join(others[:3])}): give a folder that is "
            "empty or new"
        )
    if only_check:
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in found:
        if name != LOCK:
            (folder / name).unlink(missing_ok=True)
