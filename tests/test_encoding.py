"""Encoding in pieces and by words: what `encode` gives for the whole document."""

import re
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from small_tokenizers import (
    GPT2,
    TEXTS,
    chat_like,
    fuzzed,
    llama_like,
    random_unicode,
    smollm2,
)

import gptjax.data.encoding as module
from gptjax.data.encoding import Encoder, encode_documents, encode_pieces
from gptjax.errors import UserError
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

# Where runs of spaces, letters, digits and other characters meet, in ASCII and beyond.
TIGHT = [*" \n\t\r5a9Z'.!-é½，。中文\x1c\x1f\u3000\x85\u2028", "'s", "''", " '", "5é", "  5", ". "]
# Merges of these go across all borders of ASCII within a word.
MERGED = ["naïve", "café", " café", "5½", "½5", "!—", "—!", "a中", "中a", "  5", "'sé", "éa", "é5"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    found: dict[str, Tokenizer | None] = {
        "trained": BPETokenizer.train([*TEXTS * 3, *MERGED * 9], 500),
        "added tokens": chat_like(),
        "characters of llama": llama_like(),
        "bytes": ByteTokenizer(),
        "smollm2": smollm2(),
        "gpt2": BPETokenizer.from_files(GPT2 / "vocab.json", GPT2 / "merges.txt")
        if GPT2.is_dir()
        else None,
    }
    return {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}


def tight(rng: np.random.Generator, length: int) -> str:
    parts = np.array(TIGHT + MERGED, object)
    return "".join(rng.choice(parts, size=rng.integers(length + 1)))


def torn(rng: np.random.Generator, documents: Iterable[str], most: int) -> Iterator:
    """Tears documents into pieces of up to `most` characters, some empty."""
    for text in documents:
        while len(text) > (size := int(rng.integers(most + 1))):
            yield text[:size], False
            text = text[size:]
        yield text, True


def joined(pieces: Iterable) -> list[list[int]]:
    documents: list[list[int]] = [[]]
    for ids, ends in pieces:
        documents[-1] += ids.tolist()
        if ends:
            documents.append([])
    assert documents.pop() == []
    return documents


def test_pieces_give_the_ids_of_the_whole(
    rng: np.random.Generator, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small enough that documents are cut in many places and the memory for words overflows.
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 7)
    monkeypatch.setattr(module, "_MOST_WORDS", 50)
    monkeypatch.setattr(module, "_LONGEST_KEPT", 6)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 90)
    for _ in range(20):
        documents = [fuzzed(rng, 60) for _ in range(15)]
        documents += [tight(rng, 40) for _ in range(15)]
        documents += [random_unicode(rng, 40) for _ in range(5)]
        all_of_them = {**tokenizers, "own": CharTokenizer.from_text([*documents, "x"])}
        for name, tokenizer in all_of_them.items():
            encoder = Encoder(tokenizer)
            found = joined(encode_pieces(encoder, torn(rng, documents, 9)))
            for text, ids in zip(documents, found, strict=True):
                assert ids == tokenizer.encode(text), (name, text)
            assert len(encoder._words or ()) <= 50


def test_long_texts_are_cut_and_others_held(tokenizers: dict[str, Tokenizer]) -> None:
    text = "word " * 5_000
    for name, tokenizer in tokenizers.items():
        pieces = [(text, False)] * 60 + [("", True)]
        cut = list(Encoder(tokenizer).cut(pieces))
        assert "".join(piece for piece, _ in cut) == text * 60
        assert [ends for _, ends in cut] == [False] * (len(cut) - 1) + [True]
        longest = max(len(piece) for piece, _ in cut)
        holds = name in ("added tokens", "characters of llama")
        assert longest == len(text) * 60 if holds else longest < 2 * len(text), name
    one_string = [("这是一个很长的句子，没有空格。" * 40_000, True)]
    assert max(len(piece) for piece, _ in Encoder(tokenizers["trained"]).cut(one_string)) < 300_000


def test_a_word_without_end_is_refused(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_WORD", 1000)
    pieces = [("some words and ", False), *[("a" * 100, False)] * 18, ("", True)]
    with pytest.raises(UserError, match=r"1,001 characters without a space.*1,000") as caught:
        list(Encoder(tokenizers["trained"]).cut(pieces))
    assert "'bytes'" in str(caught.value)
    list(Encoder(ByteTokenizer()).cut(pieces))
    pieces[10] = ("a a", False)
    list(Encoder(tokenizers["trained"]).cut(pieces))


def test_spaces_are_those_of_unicode() -> None:
    """The property White_Space, by the categories of Python's own tables."""
    space = re.compile(f"[{module._SPACE}]")
    controls = {*range(0x09, 0x0E), 0x85}
    for point in range(0x110000):
        is_separator = unicodedata.category(chr(point)) in ("Zs", "Zl", "Zp")
        assert bool(space.fullmatch(chr(point))) == (is_separator or point in controls), hex(point)


def test_encode_documents_is_encode_joined(
    rng: np.random.Generator, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small enough that documents are cut, and batches end inside documents.
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 20)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 90)
    for count in (0, 1, 2, 3, 30):
        documents = [fuzzed(rng, 120) for _ in range(count)]
        characters = CharTokenizer.from_text([*documents, "x"])
        for tokenizer in (*tokenizers.values(), characters):
            tail = [tokenizer.eos_id] if count > 1 and tokenizer.eos_id is not None else []
            expected = [i for text in documents for i in tokenizer.encode(text) + tail]
            tokens = encode_documents(tokenizer, iter(documents))
            assert tokens.dtype == np.uint16
            assert tokens.ndim == 1
            assert tokens.tolist() == expected


def test_text_is_only_cut_where_that_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers

    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 3)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(["abc def " * 9], trainer)
    tokenizer = BPETokenizer(library, eos_token=None)
    assert tokenizer.eos_id is None
    text = "abc def " * 3
    assert encode_documents(tokenizer, [text]).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_dtype_holds_the_vocabulary(vocab_size: int, dtype: type) -> None:
    class Wide:
        eos_id = vocab_size - 1
        bos_id = None

        def __init__(self) -> None:
            self.vocab_size = vocab_size

        def encode(self, text: str) -> list[int]:
            return [ord(c) for c in text]

        def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
            return "".join(map(chr, ids))

        def to_dict(self) -> dict:
            return {}

    tokens = encode_documents(Wide(), ["ab", "", "c"])
    assert tokens.dtype == dtype
    end = vocab_size - 1
    assert tokens.tolist() == [97, 98, end, end, 99, end]
