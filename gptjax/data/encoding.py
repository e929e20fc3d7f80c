"""Documents to token ids: what `encode` gives for each, in pieces and with a memory for words.

GPT-2's pattern cuts text before anything is merged. Where it is known to cut, text may be taken
apart and every part encoded by itself. Large cuts let a document of any length pass through bounded
memory; small ones, about a word each, are looked up rather than encoded again.
"""

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gptjax.errors import UserError
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, token_dtype

Piece = tuple[str, bool]
"""Some text, and whether its document ends with it."""

LONGEST_WORD = 1 << 22
"""Characters without a space that are still encoded; merging takes 80 bytes for each."""

_PIECE_CHARACTERS = 1 << 18
_BATCH_CHARACTERS = 1 << 21

# Entries take some 250 bytes each; longer words seldom come again.
_MOST_WORDS = 1 << 17
_LONGEST_KEPT = 32

# \s of GPT-2's pattern; Python's also has U+001C to U+001F.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# No token goes on from another character to a space, nor, for texts without spaces, from such a
# punctuation mark to a Chinese character. Greedy, so that a match ends at the last such place.
_LAST_CUT = re.compile(rf"(?s:.*)(?:[^{_SPACE}](?=[{_SPACE}])|[，。！？；：、](?=[一-鿿]))")

# One or several whole tokens of GPT-2's pattern each. Which characters beyond ASCII are letters or
# digits depends on the version of Unicode, so there, and in what touches them, only spaces cut.
# Digits keep the spaces before them, for some tokenizers cut between the two first. The plus signs
# are doubled (possessive) where half a run is no token.
_WORDS = re.compile(
    r"'(?:[stmd]|re|ve|ll)"
    r"| ?[A-Za-z]++(?![^\0-\x7f])"
    rf"|[{_SPACE}]*+[0-9]++(?![^\0-\x7f])"
    rf"| ?[^{_SPACE}A-Za-z0-9\x80-\U0010ffff]++(?![^\0-\x7f])"
    rf"|[{_SPACE}]*+[^{_SPACE}\0-/:-\x7f][^{_SPACE}]*"
    rf"| ?[^{_SPACE}]+"
    rf"|[{_SPACE}]+(?![^{_SPACE}])"
    rf"|[{_SPACE}]+"
)


class Encoder:
    """Encodes text in pieces, and keeps the ids of the words that it has met.

    Args:
        tokenizer: Documents are taken apart where it is one of characters, of bytes, or a BPE that
            cuts as GPT-2 does (`splits_at_spaces`). For any other the places are not known: each
            document is held and encoded whole.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._words = None
        if isinstance(tokenizer, BPETokenizer) and tokenizer.splits_at_spaces:
            self._words = _Words(tokenizer)

    def cut(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yields the same documents in pieces that can be encoded one by one.

        Raises:
            UserError: A document that must be cut has more than `LONGEST_WORD` characters without a
                place for it.
        """
        if isinstance(self.tokenizer, CharTokenizer | ByteTokenizer):
            return iter(pieces)
        return _whole(pieces) if self._words is None else cut_at_spaces(pieces)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, 1-D, in the dtype that holds the vocabulary."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, CharTokenizer):
            return [tokenizer.encode_array(text).astype(self.dtype) for text in texts]
        if isinstance(tokenizer, ByteTokenizer):
            found = [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]
            return [ids.astype(self.dtype) for ids in found]
        if self._words is not None:
            ids_of = self._words.__getitem__
            joined = [b"".join(map(ids_of, _WORDS.findall(text))) for text in texts]
            return [np.frombuffer(ids, self.dtype) for ids in joined]
        if isinstance(tokenizer, BPETokenizer):
            return [np.array(ids, self.dtype) for ids in tokenizer.encode_batch(texts)]
        return [np.array(tokenizer.encode(text), self.dtype) for text in texts]


class _Words(dict[str, bytes]):
    """The ids of each word, as bytes; what is not there is encoded."""

    def __init__(self, tokenizer: BPETokenizer):
        super().__init__()
        self._tokenizer = tokenizer
        self._typecode = {2: "H", 4: "I"}[token_dtype(tokenizer.vocab_size).itemsize]

    def __missing__(self, word: str) -> bytes:
        [ids] = self._tokenizer.encode_batch([word])
        found = array(self._typecode, ids).tobytes()
        if len(word) <= _LONGEST_KEPT:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = found
        return found


def encode_pieces(encoder: Encoder, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
    """Yields ids in order, and whether they end a document."""
    for batch in batches(encoder.cut(pieces), _BATCH_CHARACTERS):
        arrays = encoder.encode([text for text, _ in batch])
        yield from zip(arrays, (ends for _, ends in batch), strict=True)


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """Encodes documents into one 1-D array of ids, uint16 or uint32 by the vocabulary.

    Each document is followed by `eos_id` if the tokenizer has one and there is more than one
    document. Documents are taken one after another, so they need not be in memory together.
    """
    encoder = Encoder(tokenizer)
    end = b"" if tokenizer.eos_id is None else np.array([tokenizer.eos_id], encoder.dtype).tobytes()
    tokens = bytearray()
    first_length = 0
    count = 0
    for ids, ends_document in encode_pieces(encoder, ((text, True) for text in documents)):
        tokens += ids.tobytes()
        if not ends_document:
            continue
        count += 1
        if count == 1:
            first_length = len(tokens)
            continue
        if count == 2:
            tokens[first_length:first_length] = end
        tokens += end
    return np.frombuffer(tokens, encoder.dtype)


def batches(pieces: Iterable[Piece], characters: int) -> Iterator[list[Piece]]:
    """Yields the pieces in lists that reach a number of characters, the last one aside."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0]) + 1
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def cut_at_spaces(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yields the same documents in pieces that end where GPT-2's pattern always cuts.

    Raises:
        UserError: A document has more than `LONGEST_WORD` characters without such a place.
    """
    held: list[str] = []
    for text, ends in _small(pieces):
        if ends:
            yield "".join([*held, text]), True
            held = []
        elif place := _LAST_CUT.match(text):
            yield "".join([*held, text[: place.end()]]), False
            held = [text[place.end() :]]
        else:
            held.append(text)
            length = sum(map(len, held))
            if length > LONGEST_WORD:
                start = "".join(held)[:20]
                raise UserError(
                    f"{length:,} characters without a space, beginning {start!r}, are more than "
                    f"the {LONGEST_WORD:,} that BPE can merge in bounded memory: put spaces into "
                    "this text, or use the tokenizer 'bytes' or 'characters'"
                )


def _small(pieces: Iterable[Piece]) -> Iterator[Piece]:
    for text, ends in pieces:
        for start in range(0, max(1, len(text)), _PIECE_CHARACTERS):
            stop = start + _PIECE_CHARACTERS
            yield text[start:stop], ends and stop >= len(text)


def _whole(pieces: Iterable[Piece]) -> Iterator[Piece]:
    held: list[str] = []
    for text, ends in pieces:
        held.append(text)
        if ends:
            yield "".join(held), True
            held = []
