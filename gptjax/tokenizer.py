"""Text to token ids and back: characters, bytes, and byte-level BPE behind one small protocol.

Every tokenizer is complete in its `to_dict()`, so a checkpoint can carry it in its metadata and
`tokenizer_from_dict` brings it back without any file.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from gptjax.errors import UserError, nearest

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
_KINDS = ("characters", "bytes", "bpe")

# Texts go to the BPE library in pieces, many at a time: it works on the pieces of a batch in
# parallel, and what it holds for each token (strings, offsets) is far larger than the token.
_PIECE_CHARACTERS = 1 << 16
_BATCH_CHARACTERS = 1 << 21
_PIECE_END = re.compile(r"\S(?= )")


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of gptjax asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids lie in `[0, vocab_size)`."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document; None where the vocabulary has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, adding no special tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Returns all of the tokenizer as JSON-serializable values."""
        ...


@dataclass(frozen=True)
class CharTokenizer:
    """One token a character; the id is the character's place in `alphabet`.

    Raises:
        UserError: `alphabet` is empty or repeats a character.
    """

    alphabet: str

    def __post_init__(self) -> None:
        if not self.alphabet:
            raise UserError("the alphabet is empty: a character tokenizer needs some text first")
        if len(set(self.alphabet)) != len(self.alphabet):
            twice = next(c for i, c in enumerate(self.alphabet) if c in self.alphabet[:i])
            raise UserError(f"the alphabet holds {twice!r} twice: give each character once")

    @classmethod
    def from_text(cls, text: str | Iterable[str]) -> "CharTokenizer":
        """Returns the tokenizer of the sorted distinct characters of one text or of several."""
        characters: set[str] = set()
        for part in [text] if isinstance(text, str) else text:
            characters.update(part)
        return cls("".join(sorted(characters)))

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    @property
    def eos_id(self) -> int | None:
        return None

    def encode(self, text: str) -> list[int]:
        """Returns the id of each character of `text`.

        Raises:
            UserError: A character is not in the alphabet; names it, its code point and position.
        """
        return self._encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the characters of `ids`.

        Raises:
            UserError: An id lies outside the vocabulary.
        """
        return "".join([self.alphabet[i] for i in _checked_ids(ids, self.vocab_size)])

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "characters", "alphabet": self.alphabet}

    def _encode_array(self, text: str) -> np.ndarray:
        points = _code_points(text)
        # The table ends with an unknown, to which every larger code point is clipped.
        ids = self._id_of_code_point[np.minimum(points, len(self._id_of_code_point) - 1)]
        unknown = ids < 0
        if unknown.any():
            position = int(unknown.argmax())
            character = text[position]
            raise UserError(
                f"character {character!r} (U+{ord(character):04X}) at position {position} is not "
                f"among the {self.vocab_size} of this tokenizer: encode text of its alphabet, or "
                "build the tokenizer from all of the text"
            )
        return ids

    @cached_property
    def _id_of_code_point(self) -> np.ndarray:
        points = _code_points(self.alphabet)
        table = np.full(int(points.max()) + 2, -1, np.int32)
        table[points] = np.arange(len(points))
        return table


@dataclass(frozen=True)
class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 as the end of a document."""

    @property
    def vocab_size(self) -> int:
        return 257

    @property
    def eos_id(self) -> int | None:
        return 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, without any end of document; never fails on broken UTF-8.

        Raises:
            UserError: An id lies outside the vocabulary.
        """
        checked = _checked_ids(ids, self.vocab_size)
        return bytes(i for i in checked if i < 256).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class BPETokenizer:
    """Byte-pair encoding by the `tokenizers` library, as GPT-2 and its kin use it.

    Text that spells a special token, such as `<|endoftext|>`, is encoded as ordinary text: a
    document cannot end itself. The eos id is there to be appended by the caller.
    """

    def __init__(self, library: "tokenizers.Tokenizer", eos_token: str | None = END_OF_TEXT):
        """Wraps (and takes over) a tokenizer of the library.

        Args:
            library: Its model must be BPE.
            eos_token: The token that ends a document, None for none.

        Raises:
            UserError: The model is not BPE, or `eos_token` is not in the vocabulary.
        """
        spec = json.loads(library.to_str())
        kind = spec["model"]["type"]
        if kind != "BPE":
            raise UserError(f"the tokenizer's model is {kind}: give one whose model is BPE")
        # Files may carry a truncation length or padding, which would silently change documents.
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        self._library = library
        self._splits_at_spaces = _splits_at_spaces(spec)
        self._eos_token = eos_token
        self._eos_id = None if eos_token is None else library.token_to_id(eos_token)
        self._vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        if eos_token is not None and self._eos_id is None:
            raise UserError(
                f"the end-of-text token {eos_token!r} is not among the {self._vocab_size} tokens "
                "of the vocabulary: name one that is, or None"
            )

    @classmethod
    def from_files(cls, vocab_json: str | Path, merges_txt: str | Path) -> "BPETokenizer":
        """Reads GPT-2's two files; eos is `<|endoftext|>` where the vocabulary has it.

        Raises:
            UserError: A file is missing or is not what its name says.
        """
        import tokenizers

        for path in (vocab_json, merges_txt):
            if not Path(path).is_file():
                raise UserError(f"no tokenizer file {str(path)!r}: give vocab.json and merges.txt")
        try:
            model = tokenizers.models.BPE.from_file(str(vocab_json), str(merges_txt))
        except Exception as error:  # The library raises bare Exception.
            raise UserError(
                f"cannot read {str(vocab_json)!r} with {str(merges_txt)!r} as a BPE vocabulary "
                f"({_first_line(error)}): give GPT-2's vocab.json and merges.txt"
            ) from error
        library = _byte_level(model)
        has_eos = library.token_to_id(END_OF_TEXT) is not None
        if has_eos:
            library.add_special_tokens([END_OF_TEXT])
        return cls(library, END_OF_TEXT if has_eos else None)

    @classmethod
    def from_directory(cls, directory: str | Path) -> "BPETokenizer":
        """Reads `tokenizer.json`, or `vocab.json` with `merges.txt`, from a folder.

        Where both are there `tokenizer.json` is read, for it also says how text is cut before
        merging. Eos is `eos_token` of `tokenizer_config.json`, else `<|endoftext|>` where the
        vocabulary has it.

        Raises:
            UserError: The folder lacks these files, or they cannot be read.
        """
        import tokenizers

        directory = Path(directory)
        whole = directory / "tokenizer.json"
        if not whole.is_file():
            if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
                tokenizer = cls.from_files(directory / "vocab.json", directory / "merges.txt")
                named = _configured_eos(directory)
                return tokenizer if named is None else cls(tokenizer._library, named)
            raise UserError(
                f"no tokenizer in {str(directory)!r}: it needs tokenizer.json, or vocab.json "
                "and merges.txt"
            )
        try:
            library = tokenizers.Tokenizer.from_file(str(whole))
        except Exception as error:  # The library raises bare Exception.
            raise UserError(
                f"cannot read {str(whole)!r} ({_first_line(error)}): give a tokenizer.json of the "
                "tokenizers library"
            ) from error
        named = _configured_eos(directory)
        if named is None and library.token_to_id(END_OF_TEXT) is not None:
            named = END_OF_TEXT
        return cls(library, named)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learns a byte-level vocabulary: 256 bytes, `<|endoftext|>` (id 0, eos), then merges.

        The same documents give the same vocabulary. It has fewer than `vocab_size` tokens only
        where the documents hold no more pairs to merge.

        Raises:
            UserError: `vocab_size` is below 257.
        """
        import tokenizers

        if vocab_size < 257:
            raise UserError(
                f"vocab_size is {vocab_size}: byte-level BPE needs at least 257, the 256 bytes "
                f"and {END_OF_TEXT}"
            )
        library = _byte_level(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        )
        pieces = (piece for document in documents for piece in _pieces(document))
        library.train_from_iterator(pieces, trainer)
        return cls(library)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eos_id(self) -> int | None:
        return self._eos_id

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, special tokens spelled out.

        Raises:
            UserError: An id lies outside the vocabulary.
        """
        checked = _checked_ids(ids, self.vocab_size)
        return self._library.decode(checked, skip_special_tokens=False)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bpe", "json": self._library.to_str(), "eos_token": self._eos_token}

    def _encode_pieces(self, documents: Iterable[str]) -> Iterator[tuple[np.ndarray, bool]]:
        """Yields ids in order, and whether they end a document."""
        batch: list[tuple[str, bool]] = []
        size = 0
        for document in documents:
            pieces = list(_pieces(document)) if self._splits_at_spaces else [document]
            for number, piece in enumerate(pieces, 1):
                batch.append((piece, number == len(pieces)))
                size += len(piece) + 1
                if size >= _BATCH_CHARACTERS:
                    yield from self._encode_batch(batch)
                    batch, size = [], 0
        yield from self._encode_batch(batch)

    def _encode_batch(self, batch: Sequence[tuple[str, bool]]) -> Iterator[tuple[np.ndarray, bool]]:
        texts = [text for text, _ in batch]
        encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        for encoding, (_, ends) in zip(encodings, batch, strict=True):
            yield np.array(encoding.ids, np.uint32), ends


def tokenizer_from_dict(values: dict[str, Any]) -> Tokenizer:
    """Rebuilds the tokenizer whose `to_dict()` gave `values`.

    Raises:
        UserError: `values` is not such a dict.
    """
    kind = values.get("kind")
    try:
        if kind == "characters":
            return CharTokenizer(values["alphabet"])
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "bpe":
            import tokenizers

            return BPETokenizer(
                tokenizers.Tokenizer.from_str(values["json"]), eos_token=values["eos_token"]
            )
    except KeyError as error:
        raise UserError(
            f"the saved {kind} tokenizer lacks {error}: it holds {', '.join(sorted(values))}; "
            "pass what to_dict() returned"
        ) from error
    raise UserError(f"no tokenizer of kind {kind!r}{nearest(str(kind), _KINDS)}")


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smaller of uint16 and uint32 that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """Encodes documents into one 1-D array of ids, uint16 or uint32 by the vocabulary.

    Each document is followed by `eos_id` if the tokenizer has one and there is more than one
    document. Documents are taken one after another, so they need not be in memory together.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    end = b"" if tokenizer.eos_id is None else np.array([tokenizer.eos_id], dtype).tobytes()
    tokens = bytearray()
    first_length = 0
    count = 0
    for ids, ends_document in _encode_each(tokenizer, documents):
        tokens += ids.astype(dtype).tobytes()
        if not ends_document:
            continue
        count += 1
        if count == 1:
            first_length = len(tokens)
            continue
        if count == 2:
            tokens[first_length:first_length] = end
        tokens += end
    return np.frombuffer(tokens, dtype)


def _encode_each(
    tokenizer: Tokenizer, documents: Iterable[str]
) -> Iterator[tuple[np.ndarray, bool]]:
    if isinstance(tokenizer, BPETokenizer):
        yield from tokenizer._encode_pieces(documents)
    elif isinstance(tokenizer, CharTokenizer):
        yield from ((tokenizer._encode_array(text), True) for text in documents)
    elif isinstance(tokenizer, ByteTokenizer):
        yield from ((np.frombuffer(text.encode("utf-8"), np.uint8), True) for text in documents)
    else:
        yield from ((np.array(tokenizer.encode(text), np.uint32), True) for text in documents)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.dtype("<u4"))


def _checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    checked = [int(i) for i in ids]
    for position, i in enumerate(checked):
        if not 0 <= i < vocab_size:
            raise UserError(
                f"id {i} at position {position} is outside the vocabulary of {vocab_size}: decode "
                "ids of this tokenizer only"
            )
    return checked


def _byte_level(model: "tokenizers.models.Model") -> "tokenizers.Tokenizer":
    """Puts GPT-2's cut before a model and its byte alphabet on both sides of it."""
    import tokenizers

    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text before spaces, where GPT-2's pattern always cuts too."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = _PIECE_END.search(text, start + _PIECE_CHARACTERS)
        if end is None:
            break
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]


def _splits_at_spaces(spec: dict[str, Any]) -> bool:
    """Says whether encoding the `_pieces` of a text is encoding the text."""
    before = spec["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    *digits, last = steps
    return (
        spec["normalizer"] is None
        and all(step["type"] == "Digits" for step in digits)
        and last.get("type") == "ByteLevel"
        and last["use_regex"]
        and not last["add_prefix_space"]
    )


def _configured_eos(directory: Path) -> str | None:
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not JSON ({error}): repair or remove it") from error
    return token["content"] if isinstance(token, dict) else token


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
