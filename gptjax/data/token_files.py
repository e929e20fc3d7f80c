"""Token ids on disk: raw numbers, mapped into memory, and a JSON file that explains them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.tokenizer import Tokenizer, token_dtype

_CHUNK = 1 << 22


def write_tokens(
    path: str | Path, tokens: np.ndarray, vocab_size: int, tokenizer: Tokenizer | None = None
) -> Path:
    """Writes ids as raw little-endian uint16 or uint32 to `PATH.bin`, and what they are beside it.

    `PATH.json` holds dtype, count, vocab_size and the tokenizer's dict or null. uint16 is used
    for a vocabulary of up to 65,536, which is also nanoGPT's format.

    Args:
        path: With or without `.bin`; its folder is made if need be.
        tokens: 1-D ids.
        vocab_size: Every id must lie below it.
        tokenizer: What made the ids.

    Returns:
        The path of the `.bin` file.

    Raises:
        UserError: The ids are not 1-D integers in `[0, vocab_size)`, or do not fit the dtype.
    """
    binary, sidecar = _token_paths(path)
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"tokens are {tokens.dtype} of shape {tokens.shape}: give a 1-D array of integer ids"
        )
    if not 0 < vocab_size <= 2**32:
        raise UserError(f"vocab_size is {vocab_size}: uint32 token files hold 1 to {2**32}")
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"vocab_size is {vocab_size}, the tokenizer's is {tokenizer.vocab_size}: give at least "
            "the tokenizer's"
        )
    check_ids(tokens, vocab_size, "tokens")
    dtype = token_dtype(vocab_size).newbyteorder("<")
    # Under another name until complete, for half a token file reads like a whole one.
    partial = binary.with_name(binary.name + ".partial")
    binary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            for start in range(0, len(tokens), _CHUNK):
                chunk = tokens[start : start + _CHUNK]
                file.write(chunk.astype(dtype).tobytes())
        values = {
            "dtype": dtype.name,
            "count": len(tokens),
            "vocab_size": vocab_size,
            "tokenizer": None if tokenizer is None else tokenizer.to_dict(),
        }
        sidecar.write_text(json.dumps(values), encoding="utf-8")
        os.replace(partial, binary)
    finally:
        partial.unlink(missing_ok=True)
    return binary


def read_tokens(path: str | Path, vocab_size: int | None = None) -> np.memmap:
    """Maps a token file into memory, read-only, without reading it.

    A `.bin` without `.json` beside it is taken as uint16, nanoGPT's format.

    Args:
        path: With or without `.bin`.
        vocab_size: If given, every id is read once and must lie below it.

    Raises:
        UserError: No such file, its length does not fit, an id is too large, or the vocabulary is
            larger than the file's dtype.
    """
    tokens, _ = open_tokens(path)
    if vocab_size is not None:
        check_width(tokens.dtype, vocab_size, str(path))
        check_ids(tokens, vocab_size, str(path))
    return tokens


def open_tokens(path: str | Path) -> tuple[np.memmap, dict[str, Any] | None]:
    """Returns the mapped ids and what the sidecar says, None where there is none.

    Raises:
        UserError: The file is missing or of the wrong size, or its sidecar cannot be read.
    """
    binary, sidecar = _token_paths(path)
    if not binary.is_file():
        raise UserError(f"no token file {str(binary)!r}: write one with write_tokens")
    values = None
    dtype, count = np.dtype("<u2"), None
    if sidecar.is_file():
        try:
            values = json.loads(sidecar.read_text(encoding="utf-8"))
            dtype, count = np.dtype(values["dtype"]).newbyteorder("<"), int(values["count"])
            if (
                dtype.name not in ("uint16", "uint32")
                or not {"vocab_size", "tokenizer"} <= values.keys()
            ):
                raise ValueError("it needs dtype uint16 or uint32, vocab_size and tokenizer")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(sidecar)!r} does not describe a token file ({error}): write the tokens "
                "again with write_tokens, or remove it to read uint16"
            ) from error
        check_width(dtype, values["vocab_size"], str(binary))
    size = binary.stat().st_size
    wanted = size if count is None else count * dtype.itemsize
    if size == 0 or size % dtype.itemsize or size != wanted:
        expected = f"a multiple of {dtype.itemsize}" if count is None else f"{wanted:,}"
        raise UserError(
            f"{str(binary)!r} has {size:,} bytes, {dtype.name} tokens need {expected} and not 0: "
            "copy or write it again"
        )
    return np.memmap(binary, dtype, mode="r"), values


def _token_paths(path: str | Path) -> tuple[Path, Path]:
    stem = Path(str(path).removesuffix(".bin"))
    return stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".json")


def check_width(dtype: np.dtype, vocab_size: int, name: str) -> None:
    """Raises where ids of a vocabulary do not fit a dtype, so that larger ones have wrapped.

    Raises:
        UserError: They do not fit.
    """
    if vocab_size > np.iinfo(dtype).max + 1:
        raise UserError(
            f"{name!r} holds {dtype.name} tokens, in which ids from {np.iinfo(dtype).max + 1:,} on "
            f"wrap, for a vocabulary of {vocab_size:,}: write them as uint32, as write_tokens and "
            "gptjax tokenize do"
        )


def check_ids(tokens: np.ndarray, vocab_size: int, name: str) -> None:
    """Raises where an id is not in the vocabulary, reading a chunk at a time.

    Raises:
        UserError: One is outside; names it and its place.
    """
    for start in range(0, len(tokens), _CHUNK):
        chunk = np.asarray(tokens[start : start + _CHUNK])
        wrong = (chunk < 0) | (chunk >= vocab_size)
        if wrong.any():
            position = int(wrong.argmax())
            raise UserError(
                f"{name}: id {chunk[position]} at position {start + position} is outside the "
                f"vocabulary of {vocab_size}: give the vocab_size or tokenizer of these tokens"
            )
