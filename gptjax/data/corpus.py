"""From a source to two arrays of token ids, train and validation, and the tokenizer of both."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.sources import EMBEDDED, TEXT_SUFFIXES, TFDS_PREFIX, read_documents
from gptjax.data.token_files import check_ids, open_tokens
from gptjax.errors import UserError, nearest
from gptjax.pretrained.tokenizer_files import read_tokenizer
from gptjax.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    encode_documents,
    tokenizer_from_dict,
)

TOKENIZER_NAMES = ("characters", "bytes", "bpe")
DEFAULT_BPE_VOCAB_SIZE = 1024

_SPLIT_SUFFIXES = (".bin", *TEXT_SUFFIXES)


@dataclass(frozen=True)
class Corpus:
    """Text as token ids, ready for the loader.

    Attributes:
        train: 1-D ids, uint16 or uint32; a memory map where the source is a token file.
        validation: The held-out ids, likewise.
        tokenizer: None where a token file came without one.
        vocab_size: Every id lies below it: the tokenizer's size; for token files what their
            sidecar, else the tokenizer, else the caller says, else the largest id + 1.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer | None
    vocab_size: int


def load_corpus(
    source: str | Path = "embedded",
    *,
    tokenizer: str | Path | Tokenizer = "characters",
    vocab_size: int | None = None,
    validation_fraction: float = 0.1,
    text_key: str = "text",
    data_dir: str | Path | None = None,
) -> Corpus:
    """Reads a source, splits it, and encodes both sides.

    How it is split:
        A folder with `train.*` and `validation.*` (or `val.*`) files is split already.
        A single document is cut after `int(n * (1 - validation_fraction))` of its n characters
        (a single token file: tokens).
        Of several documents each goes whole to the side that a hash of its text says, so that
        neither order nor additions move it and copies never lie on both sides. Of all hashes the
        smallest is always validation and the largest always train, so that no side is empty.

    The text is held in memory; token files are memory-mapped. Empty documents are dropped.

    Args:
        source: As in `read_documents`; or a token file `NAME.bin`, see `write_tokens`.
        tokenizer: `"characters"` (of train and validation together), `"bytes"`, `"bpe"` (trained
            on the train documents), a folder with tokenizer.json or vocab.json and merges.txt, or
            a tokenizer. A token file brings its own: leave the default, or name the one it was
            written with.
        vocab_size: How many tokens `"bpe"` learns, by default 1024. For token files without a
            sidecar, the size that their ids are checked against.
        validation_fraction: In (0, 1), of characters or of documents.
        text_key: The field of a record that holds its text.
        data_dir: Where TFDS keeps prepared data.

    Raises:
        UserError: The source cannot be read or is too short to split, or an argument is not legal.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(
            f"validation_fraction is {validation_fraction}: give a number between 0 and 1, "
            "for example 0.1"
        )
    is_path = source != EMBEDDED and not str(source).startswith(TFDS_PREFIX)
    files = _split_files(Path(source)) if is_path else None
    if files is None and str(source).endswith(".bin"):
        files = (Path(source),)
    if files is not None and files[0].suffix == ".bin":
        return _token_corpus(files, tokenizer, vocab_size, validation_fraction)
    _check_tokenizer(tokenizer, vocab_size)
    if files is not None:
        train, validation = (
            [text for text in read_documents(path, text_key=text_key) if text] for path in files
        )
        if not train or not validation:
            raise UserError(
                f"{str(source)!r} has {len(train)} train and {len(validation)} validation "
                "documents with text: each needs one"
            )
    else:
        documents = read_documents(source, text_key=text_key, data_dir=data_dir)
        train, validation = _split(
            [text for text in documents if text], validation_fraction, str(source)
        )
    chosen = _make_tokenizer(tokenizer, vocab_size, train, validation)
    return Corpus(
        train=encode_documents(chosen, train),
        validation=encode_documents(chosen, validation),
        tokenizer=chosen,
        vocab_size=chosen.vocab_size,
    )


def _split_files(folder: Path) -> tuple[Path, Path] | None:
    """Finds the two files of a folder that is split already."""
    if not folder.is_dir():
        return None
    train = _named(folder, ("train",))
    validation = _named(folder, ("validation", "val"))
    if not train or not validation:
        return None
    for found in (train, validation):
        if len(found) > 1:
            raise UserError(
                f"folder {str(folder)!r} has {' and '.join(p.name for p in found)}: keep one, or "
                "give a file as the source"
            )
    if (train[0].suffix == ".bin") != (validation[0].suffix == ".bin"):
        raise UserError(
            f"folder {str(folder)!r} has {train[0].name} and {validation[0].name}: either both or "
            "neither may be token files"
        )
    return train[0], validation[0]


def _named(folder: Path, stems: Sequence[str]) -> list[Path]:
    names = [stem + suffix for stem in stems for suffix in _SPLIT_SUFFIXES]
    return [folder / name for name in names if (folder / name).is_file()]


def _split(documents: list[str], fraction: float, source: str) -> tuple[list[str], list[str]]:
    if len(documents) == 1:
        (text,) = documents
        cut = int(len(text) * (1 - fraction))
        train, validation = text[:cut], text[cut:]
        if not train or not validation:
            raise UserError(
                f"source {source!r} has {len(text)} characters, which split into {len(train)} for "
                f"train and {len(validation)} for validation: give more text"
            )
        return [train], [validation]
    hashes = [_hash(text) for text in documents]
    if len(set(hashes)) < 2:
        raise UserError(
            f"source {source!r} has {len(documents)} documents with text, {len(set(hashes))} of "
            "them distinct: give at least two, one for train and one for validation"
        )
    smallest, largest, limit = min(hashes), max(hashes), int(fraction * 2**64)
    sides: tuple[list[str], list[str]] = ([], [])
    for text, value in zip(documents, hashes, strict=True):
        held_out = value == smallest or (value < limit and value != largest)
        sides[held_out].append(text)
    return sides


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def _check_tokenizer(tokenizer: str | Path | Tokenizer, vocab_size: int | None) -> None:
    """Refuses what cannot be honoured before any text is read."""
    if vocab_size is not None and tokenizer != "bpe":
        raise UserError(
            f"vocab_size={vocab_size} is for tokenizer='bpe', which is trained; tokenizer="
            f"{_spelled(tokenizer)} has its own: leave vocab_size out"
        )
    if not isinstance(tokenizer, str | Path) or str(tokenizer) in TOKENIZER_NAMES:
        return
    if not Path(tokenizer).is_dir():
        raise UserError(
            f"no tokenizer {str(tokenizer)!r}{nearest(str(tokenizer), TOKENIZER_NAMES)} (a folder "
            "with tokenizer.json, or vocab.json and merges.txt, is legal too)"
        )


def _make_tokenizer(
    tokenizer: str | Path | Tokenizer,
    vocab_size: int | None,
    train: Sequence[str],
    validation: Sequence[str],
) -> Tokenizer:
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    if tokenizer == "characters":
        return CharTokenizer.from_text([*train, *validation])
    if tokenizer == "bytes":
        return ByteTokenizer()
    if tokenizer == "bpe":
        return BPETokenizer.train(train, vocab_size or DEFAULT_BPE_VOCAB_SIZE)
    found = read_tokenizer(tokenizer)
    if found is None:
        raise UserError(
            f"no tokenizer in {str(tokenizer)!r}: it needs tokenizer.json, or vocab.json and "
            "merges.txt"
        )
    return found


def _token_corpus(
    files: Sequence[Path],
    tokenizer: str | Path | Tokenizer,
    vocab_size: int | None,
    fraction: float,
) -> Corpus:
    opened = [open_tokens(path) for path in files]
    own, known_size = _agreed([sidecar for _, sidecar in opened], files)
    chosen = _token_tokenizer(own, tokenizer, files[0])
    known_size = known_size or vocab_size or (chosen.vocab_size if chosen else None)
    if vocab_size is not None and vocab_size != known_size:
        raise UserError(
            f"vocab_size is {vocab_size}, but {str(files[0])!r} says {known_size}: leave it out"
        )
    if chosen is not None and known_size is not None and chosen.vocab_size > known_size:
        raise UserError(
            f"the tokenizer has {chosen.vocab_size} ids, {str(files[0])!r} was written for "
            f"{known_size}: give the tokenizer it was written with"
        )
    arrays: list[np.ndarray] = [tokens for tokens, _ in opened]
    if len(arrays) == 1:
        cut = int(len(arrays[0]) * (1 - fraction))
        arrays = [arrays[0][:cut], arrays[0][cut:]]
    train, validation = arrays
    if not len(train) or not len(validation):
        raise UserError(
            f"{str(files[0])!r} gives {len(train)} train and {len(validation)} validation tokens: "
            "each needs some"
        )
    if known_size is None:
        known_size = int(max(train.max(), validation.max())) + 1
    elif opened[0][1] is None or chosen is not own:
        for (tokens, _), path in zip(opened, files, strict=True):
            check_ids(tokens, chosen.vocab_size if chosen else known_size, str(path))
    return Corpus(train, validation, chosen, known_size)


def _agreed(
    sidecars: Sequence[dict[str, Any] | None], files: Sequence[Path]
) -> tuple[Tokenizer | None, int | None]:
    """Returns the tokenizer and vocabulary size that all sidecars name."""
    claims = [s and {key: s[key] for key in ("vocab_size", "tokenizer")} for s in sidecars]
    if any(claim != claims[0] for claim in claims):
        raise UserError(
            f"{' and '.join(str(path) for path in files)} were written with different tokenizers "
            "or vocabulary sizes: write both with one"
        )
    if claims[0] is None:
        return None, None
    saved = claims[0]["tokenizer"]
    return None if saved is None else tokenizer_from_dict(saved), claims[0]["vocab_size"]


def _token_tokenizer(
    own: Tokenizer | None, given: str | Path | Tokenizer, path: Path
) -> Tokenizer | None:
    if given == "characters":
        return own
    if given == "bpe":
        raise UserError(
            f"tokenizer='bpe' is trained on text and {str(path)!r} holds tokens: name the folder "
            "or the tokenizer they were made with, or leave it out"
        )
    _check_tokenizer(given, None)
    chosen = _make_tokenizer(given, None, (), ())
    if own is None or own.to_dict() == chosen.to_dict():
        return chosen
    raise UserError(
        f"{str(path)!r} was written with another tokenizer than {_spelled(given)}: leave tokenizer "
        "out to use the file's own"
    )


def _spelled(tokenizer: str | Path | Tokenizer) -> str:
    named = isinstance(tokenizer, str | Path)
    return repr(str(tokenizer)) if named else type(tokenizer).__name__
