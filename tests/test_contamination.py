"""Shared n-grams against sets of n-grams made from whole texts."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import Command

from gptjax.errors import UserError
from gptjax.evaluation import contamination as module
from gptjax.evaluation import ngrams
from gptjax.evaluation.contamination import contamination, read_items, words_of

WORDS = ["the", "cat", "sat", "on", "mat", "hat"]


def text_of(rng: np.random.Generator, length: int, words: list[str] = WORDS) -> str:
    return " ".join(rng.choice(words, length))


def ngrams_of(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def test_what_is_shared(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (1, 2, 3, 5):
        # Pieces of any size, so that n-grams go across their ends.
        monkeypatch.setattr(module, "_WORDS", int(rng.integers(1, 12)))
        monkeypatch.setattr(ngrams, "CHUNK", int(rng.integers(1, 12)))
        documents = [text_of(rng, int(length)) for length in rng.integers(0, 30, 6)]
        items = [text_of(rng, int(length), [*WORDS, "dog"]) for length in rng.integers(0, 9, 12)]
        items[0] = text_of(rng, 9)
        known = {gram for document in documents for gram in ngrams_of(document, n)}
        found = contamination(iter(documents), items, n=n)
        everything = 0
        for number, item in enumerate(items):
            own = ngrams_of(item, n)
            hits = [gram for gram in own if gram in known]
            everything += len(hits)
            share = found.shares[number]
            assert share == (pytest.approx(len(hits) / len(own)) if own else None)
            assert found.examples.get(number) == (" ".join(hits[0]) if hits else None)
            assert (number in found.dirty) == bool(hits)
        assert found.ngrams_found == everything
        assert found.ngrams == sum(len(ngrams_of(item, n)) for item in items)
        assert found.examined == sum(len(item.split()) >= n for item in items)
        assert found.documents == 6
        assert found.words == sum(len(document.split()) for document in documents)


def test_nothing_goes_across_documents() -> None:
    found = contamination(["the cat sat", "on the mat"], ["cat sat on the"], n=3)
    assert found.dirty == []
    assert contamination(["the cat sat on the mat"], ["cat sat on the"], n=3).dirty == [0]


def test_normalization() -> None:
    text = "He said: “DON'T panic” — it’s a cafe\u0301, a ｆｕｌｌ ﬁt (of 3.5)…"
    expected = ["he", "said", "dont", "panic", "its", "a", "café", "a", "full", "fit", "of"]
    assert list(words_of(text)) == [*expected, "3", "5"]
    assert list(words_of("Straße STRASSE _x_ a_b don''t 'tis")) == [
        *("strasse", "strasse", "x", "a", "b", "don", "t", "tis")
    ]
    assert list(words_of("我们GPT说“你好”。カタカナ")) == [*"我们", "gpt", *"说你好カタカナ"]
    # Vowel signs belong to their words.
    assert list(words_of("हिन्दी में")) == ["हिन्दी", "में"]
    found = contamination(["THE cat, sat -- on\nthe “mat”!"], ["the Cat sat on; the mat"], n=6)
    assert found.dirty == [0]


def test_thirteen_words_by_default(rng: np.random.Generator) -> None:
    text = [f"w{number}" for number in range(40)]
    shared = [" ".join(["a", *text[5 : 5 + length], "b"]) for length in (12, 13)]
    found = contamination([" ".join(text)], [*shared, "short"])
    assert found.dirty == [1]
    assert found.shares == (0.0, pytest.approx(1 / 3), None)
    told = str(found)
    assert "1 of 2 items share 13 words in a row" in told
    assert "1 of them too short for 13 words" in told
    assert "note: " in told
    json.dumps(found.to_dict())


def test_refused() -> None:
    with pytest.raises(UserError, match="none of 1 items has 13 words, at most 2"):
        contamination(["a"], ["two words"])
    with pytest.raises(UserError, match="none of 0 items"):
        contamination(["a"], [])
    with pytest.raises(UserError, match="n-grams of 0"):
        contamination(["a"], ["b"], n=0)


def test_items_and_command(tmp_path: Path, command: Command) -> None:
    lines = tmp_path / "items.tsv"
    lines.write_text("the cat sat on\t1\n\n a new line here\t0\n")
    assert read_items(lines) == ["the cat sat on\t1", " a new line here\t0"]
    records = tmp_path / "items.jsonl"
    records.write_text('{"q": "the cat\\nsat on"}\n{"q": "a new line here"}\n')
    assert read_items(records, text_key="q") == ["the cat\nsat on", "a new line here"]
    train = tmp_path / "train.txt"
    train.write_text("Then the cat sat on it.")
    out = tmp_path / "out.json"
    arguments = ("--train", train, "--eval", records, "--eval-key", "q", "--n", 4, "--out", out)
    status, printed, error = command("gptjax", "contamination", *arguments)
    assert (status, error) == (0, "")
    assert "1 of 2 items share 4 words in a row" in printed
    stored = json.loads(out.read_text())["contamination"]
    assert stored["dirty_items"] == {"0": {"share": 1.0, "example": "the cat sat on"}}
    assert (stored["dirty"], stored["dirty_share"]) == (1, 0.5)
