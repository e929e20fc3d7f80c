"""Whether an evaluation set was in the training text: shared n-grams of words."""

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.languages import word_pattern
from gptjax.data.sources import TFDS_PREFIX, find_files, read_documents
from gptjax.errors import UserError
from gptjax.evaluation.ngrams import NgramIndex

CONTAMINATION_CAVEATS = (
    "Shared n-grams may be quotations, templates or common phrases, and items that were "
    "paraphrased or translated share none: read some of the items that are told.",
)

# Words of training text that are looked up at a time.
_WORDS = 1 << 20


@dataclass(frozen=True)
class Contamination:
    """How much of an evaluation set is in the training text.

    Attributes:
        n: words of an n-gram.
        shares: for each item, the share of its n-grams that are in the training text; None for an
            item of fewer than n words, which cannot be examined.
        examples: for each dirty item, its first n-gram that is in the training text.
        ngrams: n-grams of all items.
        ngrams_found: how many of them are in the training text.
        documents: how many the training text has.
        words: how many words.
    """

    n: int
    shares: tuple[float | None, ...]
    examples: dict[int, str]
    ngrams: int
    ngrams_found: int
    documents: int
    words: int

    @property
    def dirty(self) -> list[int]:
        """The items that share any n-gram with the training text, numbered from 0."""
        return [number for number, share in enumerate(self.shares) if share]

    @property
    def examined(self) -> int:
        """How many items have at least n words."""
        return sum(share is not None for share in self.shares)

    def to_dict(self) -> dict[str, Any]:
        """What a results file and the model card hold."""
        return {
            "n": self.n,
            "items": len(self.shares),
            "examined": self.examined,
            "dirty": len(self.dirty),
            "dirty_share": len(self.dirty) / self.examined if self.examined else None,
            "ngrams": self.ngrams,
            "ngrams_found": self.ngrams_found,
            "training_documents": self.documents,
            "training_words": self.words,
            "dirty_items": {
                str(number): {"share": self.shares[number], "example": self.examples[number]}
                for number in self.dirty
            },
            "caveats": list(CONTAMINATION_CAVEATS),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.documents} training documents of {self.words} words, {len(self.shares)} items, "
            f"{len(self.shares) - self.examined} of them too short for {self.n} words",
            f"{len(self.dirty)} of {self.examined} items share {self.n} words in a row with the "
            f"training text, and {self.ngrams_found} of {self.ngrams} n-grams are in it",
        ]
        lines += [
            f"  item {number}: {100 * (self.shares[number] or 0):.0f} %, {self.examples[number]!r}"
            for number in self.dirty[:10]
        ]
        if len(self.dirty) > 10:
            lines.append(f"  and {len(self.dirty) - 10} more")
        return "\n".join([*lines, *(f"note: {caveat}" for caveat in CONTAMINATION_CAVEATS)])


def contamination(training: Iterable[str], items: Sequence[str], *, n: int = 13) -> Contamination:
    """Finds which items of an evaluation set share n words in a row with the training text.

    As Brown et al. 2020 (appendix C) examine GPT-3: by words, without capitals and punctuation, 13
    at a time; they take down to 8 for sets of shorter items. In scripts that put no spaces between
    words each character counts as one (see `words_of`).

    The items are held in memory, with some 400 bytes for each of their n-grams; of the training
    text, one document and a million words at a time. Exact: hashes only select.

    Args:
        training: documents, read once.
        items: the text of each item, with what a model is to answer.
        n: words of an n-gram.

    Raises:
        UserError: if `n` is below 1, there are no items or all are shorter than n words.
    """
    words = [list(words_of(item)) for item in items]
    # 0 is any word that no item has, and what stands between documents.
    vocabulary: dict[str, int] = {}
    rows = [[vocabulary.setdefault(word, len(vocabulary) + 1) for word in row] for row in words]
    index = NgramIndex(rows, n)
    if not index.distinct:
        longest = max(map(len, rows), default=0)
        raise UserError(f"none of {len(rows)} items has {n} words, at most {longest}; lower n")
    found = np.zeros(index.distinct, bool)
    documents = total = 0

    def numbers() -> Iterator[int]:
        nonlocal documents, total
        for document in training:
            documents += 1
            for word in words_of(document):
                total += 1
                yield vocabulary.get(word, 0)
            yield 0

    stream = numbers()
    before = np.zeros(0, np.int64)
    while len(piece := np.fromiter(itertools.islice(stream, _WORDS), np.int64)):
        # With the end of the piece before, for n-grams that go across.
        piece = np.concatenate([before, piece])
        for _, grams in index.find(piece):
            found[grams] = True
        before = piece[len(piece) - min(n - 1, len(piece)) :]

    hits = found[index.grams]
    counts = np.bincount(index.sequences, minlength=len(rows))
    shared = np.bincount(index.sequences, hits, minlength=len(rows))
    examples: dict[int, str] = {}
    for gram in hits.nonzero()[0]:
        row = int(index.sequences[gram])
        if row not in examples:
            start = index.starts[gram] - index.begins[row]
            examples[row] = " ".join(words[row][start : start + n])
    return Contamination(
        n=n,
        shares=tuple(
            float(some / all_) if all_ else None for some, all_ in zip(shared, counts, strict=True)
        ),
        examples=examples,
        ngrams=len(hits),
        ngrams_found=int(hits.sum()),
        documents=documents,
        words=total,
    )


def read_items(source: str | Path, *, text_key: str = "text") -> list[str]:
    """Reads the items of an evaluation set.

    Args:
        source: a file of any name, a folder, a pattern or "tfds:NAME", as in `read_documents`. A
            record of .jsonl, .parquet or TFDS is an item, and of other files each line with text.
        text_key: the field of a record that holds its text.

    Raises:
        UserError: if the source cannot be read.
    """
    if str(source).startswith(TFDS_PREFIX):
        return list(read_documents(source, text_key=text_key))
    items: list[str] = []
    for file in find_files(source):
        documents = read_documents(file, text_key=text_key)
        if {".jsonl", ".parquet"} & set(file.suffixes):
            items += documents
        else:
            items += [line for text in documents for line in text.splitlines() if line.strip()]
    return items


def words_of(text: str) -> Iterator[str]:
    """The words of a text without capitals, punctuation and the choice between like characters.

    Compatible characters count as one (NFKC), and an apostrophe inside a word is left out. Where
    words are not set apart by spaces, as in Chinese, Japanese and Thai, each character is a word.

    Examples:
        >>> list(words_of("Don’t say “Hello, World” — 你好"))
        ['dont', 'say', 'hello', 'world', '你', '好']
    """
    for match in word_pattern().finditer(unicodedata.normalize("NFKC", text).casefold()):
        yield match[0].replace("'", "").replace("’", "")
