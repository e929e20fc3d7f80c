"""From a source to two arrays of token ids, train and validation, and the tokenizer of both."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.encoding import encode_documents
from gptjax.data.sources import EMBEDDED, TEXT_SUFFIXES, TFDS_PREFIX, read_documents
from gptjax.data.token_files import check_ids, check_width, open_tokens
from gptjax.data.token_shards import Tokens, holds_shards, open_token_shards
from gptjax.errors import UserError, nearest
from gptjax.pretrained.tokenizer_files import read_tokenizer
from gptjax.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    tokenizer_from_dict,
)

TOKENIZER_NAMES = ("characters", "bytes", "bpe")
DEFAULT_BPE_VOCAB_SIZE = 1024

_SPLIT_SUFFIXES = (".bin", *TEXT_SUFFIXES)


@dataclass(frozen=True)
class Corpus:
    """Text as token ids, ready for the loader.

    Attributes:
        train: 1-D ids, uint16 or uint32; a memory map where the source is a token file, or several
            that read as one where it is a folder of token shards.
        validation: The held-out ids, likewise.
        tokenizer: None where a token file came without one.
        vocab_size: Every id lies below it: the tokenizer's size; for token files what their
            sidecar, else the tokenizer, else the caller says, else the largest id + 1.
    """

    train: Tokens
    validation: Tokens
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
        A folder that `gptjax tokenize` wrote was split then, by these rules.
        A folder with `train.*` and `validation.*` (or `val.*`) files is split already.
        A single document is cut after `int(n * (1 - validation_fraction))` of its n characters
        (a single token file: tokens).
        Of several documents each goes whole to the side that a hash of its text says, so that
        neither order nor additions move it and copies never lie on both sides. Of all hashes the
        smallest is always validation and the largest always train, so that no side is empty.

    The text is held in memory; token files are memory-mapped. Empty documents are dropped.
    `tokenize` does the same for more text than fits in memory.

    Args:
        source: As in `read_documents`; or a token file `NAME.bin`, see `write_tokens`; or a folder
            of token shards, see `tokenize`.
        tokenizer: `"characters"` (of train and validation together), `"bytes"`, `"bpe"` (trained
            on the train documents), a folder with tokenizer.json or vocab.json and merges.txt, or
            a tokenizer. A token file brings its own: leave the default, or name the one it was
            written with. So do token shards, whose own `"bpe"` means as well.
        vocab_size: How many tokens `"bpe"` learns, by default 1024. For token files without a
            sidecar, the size that their ids are checked against.
        validation_fraction: In (0, 1), of characters or of documents.
        text_key: The field of a record that holds its text.
        data_dir: Where TFDS keeps prepared data.

    Raises:
        UserError: The source cannot be read or is too short to split, or an argument is not legal.
    """
    check_fraction(validation_fraction)
    if source != EMBEDDED and holds_shards(Path(source)):
        return _shard_corpus(source, tokenizer, vocab_size)
    files = split_files(source)
    if files is None and str(source).endswith(".bin"):
        files = (Path(source),)
    if files is not None and files[0].suffix == ".bin":
        return _token_corpus(files, tokenizer, vocab_size, validation_fraction)
    check_tokenizer(tokenizer, vocab_size)
    if files is not None:
        train, validation = (
            [text for text in read_documents(path, text_key=text_key) if text] for path in files
        )
        check_sides(len(train), len(validation), str(source))
    else:
        documents = read_documents(source, text_key=text_key, data_dir=data_dir)
        train, validation = _split(
            [text for text in documents if text], validation_fraction, str(source)
        )
    chosen = make_tokenizer(tokenizer, vocab_size, train, validation)
    return Corpus(
        train=encode_documents(chosen, train),
        validation=encode_documents(chosen, validation),
        tokenizer=chosen,
        vocab_size=chosen.vocab_size,
    )


def check_fraction(validation_fraction: float) -> None:
    """Refuses what is no part of a whole.

    Raises:
        UserError: It is not between 0 and 1.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(
            f"validation_fraction is {validation_fraction}: give a number between 0 and 1, "
            "for example 0.1"
        )


def check_sides(train: int, validation: int, source: str) -> None:
    """Refuses a source that is split already and leaves a side without documents.

    Raises:
        UserError: A side has none.
    """
    if not train or not validation:
        raise UserError(
            f"{source!r} has {train} train and {validation} validation documents with text: each "
            "needs one"
        )


def split_files(source: str | Path) -> tuple[Path, Path] | None:
    """Returns the files for train and validation of a folder that is split already, or None.

    Raises:
        UserError: A side has two files, or one side text and the other tokens.
    """
    folder = Path(source)
    if source == EMBEDDED or str(source).startswith(TFDS_PREFIX) or not folder.is_dir():
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


class HashSplit(NamedTuple):
    """Which of several documents are held out, by the digests of `new_hash`.

    Attributes:
        smallest: The smallest digest of all documents, which is always held out.
        largest: The largest, which never is.
        limit: Digests below it, as whole numbers, are held out.
    """

    smallest: bytes
    largest: bytes
    limit: int

    def holds_out(self, digest: bytes) -> bool:
        """Says whether the document with this digest is for validation."""
        is_below = int.from_bytes(digest, "big") < self.limit
        return digest == self.smallest or (is_below and digest != self.largest)


def hash_split(
    smallest: bytes, largest: bytes, documents: int, fraction: float, source: str
) -> HashSplit:
    """Returns the rule for several documents, by two of their digests.

    Args:
        smallest: Of all digests.
        largest: Of all digests.
        documents: How many there are, for errors.
        fraction: The share to hold out.
        source: For errors.

    Raises:
        UserError: All documents are the same.
    """
    if smallest == largest:
        raise UserError(
            f"source {source!r} has {documents} documents with text, all the same: give at least "
            "two different ones, one for train and one for validation"
        )
    return HashSplit(smallest, largest, int(fraction * 2**64))


def cut_place(characters: int, fraction: float, source: str) -> int:
    """Returns how many characters of a single document are for train.

    Raises:
        UserError: Too few for two sides.
    """
    cut = int(characters * (1 - fraction))
    if not 0 < cut < characters:
        raise UserError(
            f"source {source!r} has {characters} characters, which split into {cut} for train and "
            f"{characters - cut} for validation: give more text"
        )
    return cut


def check_text(documents: int, source: str) -> None:
    """Refuses a source without any text.

    Raises:
        UserError: There is none.
    """
    if not documents:
        raise UserError(f"source {source!r} has 0 documents with text: give one with text")


def _split(documents: list[str], fraction: float, source: str) -> tuple[list[str], list[str]]:
    check_text(len(documents), source)
    if len(documents) == 1:
        (text,) = documents
        cut = cut_place(len(text), fraction, source)
        return [text[:cut]], [text[cut:]]
    hashes = [new_hash(text).digest() for text in documents]
    rule = hash_split(min(hashes), max(hashes), len(documents), fraction, source)
    sides: tuple[list[str], list[str]] = ([], [])
    for text, value in zip(documents, hashes, strict=True):
        sides[rule.holds_out(value)].append(text)
    return sides


def new_hash(text: str = "") -> "hashlib.blake2b":
    """Returns the hash of a document, to which more UTF-8 can be added."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8)


def check_tokenizer(tokenizer: str | Path | Tokenizer, vocab_size: int | None) -> None:
    """Refuses what cannot be honoured, before any text is read.

    Raises:
        UserError: The name is unknown, or `vocab_size` is given for what has its own.
    """
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


def make_tokenizer(
    tokenizer: str | Path | Tokenizer,
    vocab_size: int | None,
    train: Iterable[str],
    validation: Iterable[str],
) -> Tokenizer:
    """Returns a tokenizer by its name or folder, of or trained on text where its kind needs it.

    Args:
        tokenizer: As in `load_corpus`.
        vocab_size: How many tokens `"bpe"` learns.
        train: Documents, of which `"bpe"` learns and `"characters"` takes the alphabet.
        validation: Documents, whose characters are in the alphabet too.

    Raises:
        UserError: A folder holds none, or one that cannot be read.
    """
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
    if known_size is not None:
        for tokens, path in zip((tokens for tokens, _ in opened), files, strict=True):
            check_width(tokens.dtype, known_size, str(path))
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


def _shard_corpus(
    folder: str | Path, tokenizer: str | Path | Tokenizer, vocab_size: int | None
) -> Corpus:
    shards = open_token_shards(folder)
    if tokenizer == "bpe":
        # What scripts say by default. There is no text to learn from, nor a need to.
        tokenizer, vocab_size = "characters", None
    chosen = _token_tokenizer(shards.tokenizer, tokenizer, Path(folder))
    if vocab_size is not None and vocab_size != shards.vocab_size:
        raise UserError(
            f"vocab_size is {vocab_size}, but {str(folder)!r} says {shards.vocab_size}: leave it "
            "out"
        )
    return Corpus(shards.train.tokens, shards.validation.tokens, chosen, shards.vocab_size)


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
    check_tokenizer(given, None)
    chosen = make_tokenizer(given, None, (), ())
    if own is None or own.to_dict() == chosen.to_dict():
        return chosen
    raise UserError(
        f"{str(path)!r} was written with another tokenizer than {_spelled(given)}: leave tokenizer "
        "out to use the file's own"
    )


def _spelled(tokenizer: str | Path | Tokenizer) -> str:
    named = isinstance(tokenizer, str | Path)
    return repr(str(tokenizer)) if named else type(tokenizer).__name__
