"""Overlaps against every pair of places tried; reproduced passages of a model that knows a text."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import Command
from small_models import GPT2, MODERN, random_params

from gptjax.data import BatchLoader, load_corpus
from gptjax.data.token_files import read_tokens, write_tokens
from gptjax.data.token_shards import ShardedTokens
from gptjax.errors import UserError
from gptjax.evaluation import memorization as module
from gptjax.evaluation import ngrams
from gptjax.evaluation.memorization import (
    Memorization,
    Overlap,
    draw_texts,
    longest_overlaps,
    memorization,
    overlap_report,
)
from gptjax.evaluation.ngrams import NgramIndex
from gptjax.evaluation.results import accuracy_interval
from gptjax.fitting import fit
from gptjax.model import Model
from gptjax.optimizer import OptimizerConfig
from gptjax.sampling import Sampling
from gptjax.tokenizer import ByteTokenizer, CharTokenizer


def tried(row: np.ndarray, text: np.ndarray) -> Overlap:
    """The first of the longest common stretches, by trying all."""
    for length in range(min(len(row), len(text)), 0, -1):
        for t in range(len(text) - length + 1):
            for i in range(len(row) - length + 1):
                if row[i : i + length].tolist() == text[t : t + length].tolist():
                    return Overlap(length, i, t)
    return Overlap(0, 0, 0)


def cases(rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Few letters, so that there are many repetitions, and one that the text lacks."""
    letters = int(rng.integers(1, 4))
    text = rng.integers(0, letters, rng.integers(1, 40)).astype(np.uint16)
    rows = [rng.integers(0, letters + 1, rng.integers(0, 20)) for _ in range(4)]
    start = rng.integers(0, len(text))
    return [*rows, text[start : start + 15]], text


def test_overlaps_are_the_longest(rng: np.random.Generator) -> None:
    for _ in range(60):
        rows, text = cases(rng)
        expected = [tried(row, text) for row in rows]
        for seed_length in (1, 2, 3, 8):
            assert longest_overlaps(rows, text, seed_length=seed_length) == expected


def test_overlaps_in_small_pieces(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pieces and batches of pairs of any size, memory maps, shards: all the same."""
    for _ in range(30):
        monkeypatch.setattr(ngrams, "CHUNK", int(rng.integers(1, 9)))
        monkeypatch.setattr(module, "_PAIRS", int(rng.integers(1, 6)))
        rows, text = cases(rng)
        expected = [tried(row, text) for row in rows]
        write_tokens(tmp_path / "text", text, 5)
        cuts = np.sort(rng.integers(0, len(text) + 1, 2))
        shards = ShardedTokens(np.split(text, cuts))
        for training in (text, read_tokens(tmp_path / "text"), shards):
            assert longest_overlaps(rows, training, seed_length=2) == expected


def test_repetitions_do_not_take_time_by_their_product() -> None:
    """200 times 200 thousand places would be followed for up to 200 tokens each."""
    rows = [np.full(200, 3), np.append(np.full(150, 3), 4)]
    text = np.full(200_000, 3, np.uint32)
    assert longest_overlaps(rows, text) == [Overlap(200, 0, 0), Overlap(150, 0, 0)]


def test_large_ids_and_many_tokens(rng: np.random.Generator) -> None:
    text = rng.integers(0, 2**32, 30_000, dtype=np.uint32)
    rows = [rng.integers(0, 2**32, 100) for _ in range(5)]
    for number, row in enumerate(rows):
        row[20 : 40 + number] = text[number * 1000 :][: 20 + number]
    found = longest_overlaps(rows, text)
    assert found == [Overlap(20 + number, 20, number * 1000) for number in range(5)]


def test_the_index_finds_every_ngram(rng: np.random.Generator) -> None:
    for n in (1, 2, 4):
        rows = [rng.integers(0, 3, rng.integers(0, 9)) for _ in range(5)]
        text = rng.integers(0, 3, 50)
        index = NgramIndex(rows, n)
        grams = {tuple(row[i : i + n].tolist()) for row in rows for i in range(len(row) - n + 1)}
        assert index.distinct == len(grams)
        expected = [t for t in range(50 - n + 1) if tuple(text[t : t + n].tolist()) in grams]
        found = list(index.find(text))
        places = np.concatenate([part for part, _ in found]) if found else np.zeros(0)
        assert places.tolist() == expected
        for part, which in found:
            for place, gram in zip(part, which, strict=True):
                start = index.starts[index.grams.tolist().index(gram)]
                assert index.numbers[start : start + n].tolist() == text[place : place + n].tolist()


def test_hashes_only_select(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every place has the hash of one n-gram, only that n-gram is found."""
    text = rng.integers(0, 5, 80)
    index = NgramIndex([rng.integers(0, 5, 12), text[30:35]], 2)
    shared = index._hashes[int(rng.integers(index.distinct))]
    monkeypatch.setattr(index, "_hash", lambda columns: np.full(len(columns[0]), shared))
    [gram] = index._order[index._hashes == shared]
    expected = [t for t in range(79) if text[t : t + 2].tolist() == index._rows[gram].tolist()]
    found = [(places.tolist(), set(grams)) for places, grams in index.find(text)]
    assert found == ([(expected, {gram})] if expected else [])


def test_report(rng: np.random.Generator) -> None:
    tokenizer = CharTokenizer("abcdé日 \n")
    text = "abc dé日 abcd\n"
    training = np.array(tokenizer.encode(text), np.uint16)
    generations = [tokenizer.encode(t) for t in ("ddé日 add", "abc d", "\n\n")]
    report = overlap_report(generations, training, tokenizer)
    assert report.texts == ("dé日 a", "abc d", "\n")
    assert report.lengths == (8, 5, 2)
    values = report.to_dict()
    assert values["found_whole"] == 1
    assert values["longest"] == "dé日 a"
    assert values["longest_overlap_tokens"]["median"] == 5
    assert values["longest_overlap_characters"]["longest"] == 5
    assert "the longest: 'dé日 a'" in str(report)
    assert str(report).count("note: ") == 2
    json.dumps(values)
    assert "longest" not in overlap_report(generations, training).to_dict()


def test_overlaps_refuse(rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match="shape"):
        longest_overlaps([[1]], np.zeros(0, np.uint16))
    with pytest.raises(UserError, match="seed_length is 0"):
        longest_overlaps([[1]], np.zeros(3, np.uint16), seed_length=0)
    with pytest.raises(UserError, match="no generations"):
        overlap_report([], np.zeros(3, np.uint16))
    assert longest_overlaps([], np.zeros(3, np.uint16)) == []


def successor(vocab_size: int) -> Model:
    """A model that says after token t the token (t + 1) modulo 16."""
    config = GPT2.replace(vocab_size=vocab_size, context_length=64, embed_dim=32, num_layers=1)
    params = jax.tree.map(jnp.zeros_like, random_params(config, np.random.default_rng(0)))
    return Model(config, params, None)


def test_passages_are_compared_token_by_token(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a model that counts: what it reproduces is known."""
    model = successor(32)

    def counting(params: object, prompts: list[list[int]], config: object, sampling: object):
        assert sampling.temperature == 0  # pyright: ignore[reportAttributeAccessIssue]
        n = sampling.max_new_tokens  # pyright: ignore[reportAttributeAccessIssue]
        return [[(prompt[-1] + 1 + k) % 16 for k in range(n)] for prompt in prompts]

    monkeypatch.setattr(module, "generate", counting)
    text = np.arange(2000) % 16
    text[rng.integers(0, 2000, 40)] = 20
    found = memorization(
        model, text.astype(np.uint16), prefix_length=5, continuation_length=7, count=50, seed=3
    )
    passages = module._passages(model, text, 12, 50, 3)
    assert len(passages) == len(found.matching) == 50
    for passage, matching in zip(passages, found.matching, strict=True):
        right = [(passage[4] + 1 + k) % 16 == passage[5 + k] for k in range(7)]
        assert matching == (right.index(False) if False in right else 7)
    whole = sum(matching == 7 for matching in found.matching)
    assert 0 < whole < 50
    assert found.reproduced == whole
    assert found.interval == accuracy_interval(whole, 50)
    values = found.to_dict()
    assert values["share"] == whole / 50
    assert values["mean_matching_tokens"] == np.mean(found.matching)
    assert f"{whole} of 50 passages" in str(found)


def test_passages_lie_inside_documents(rng: np.random.Generator) -> None:
    model = dataclasses.replace(successor(257), tokenizer=ByteTokenizer())
    text = rng.integers(0, 256, 3000)
    text[rng.integers(0, 3000, 60)] = 256
    passages = module._passages(model, text, 20, 100, 0)
    assert passages.shape == (100, 20)
    assert (passages < 256).all()
    windows = {tuple(text[t : t + 20].tolist()) for t in range(2981)}
    assert {tuple(passage) for passage in passages.tolist()} <= windows
    assert len({tuple(passage) for passage in passages.tolist()}) == 100
    # A short text has only so many.
    assert len(module._passages(model, np.arange(25), 20, 100, 0)) == 6


def test_memorization_refuses(rng: np.random.Generator) -> None:
    model = successor(32)
    text = np.arange(100) % 32
    with pytest.raises(UserError, match="context is 64"):
        memorization(model, text, prefix_length=40, continuation_length=30)
    with pytest.raises(UserError, match="no document has a passage of 12 tokens"):
        memorization(model, text[:11], prefix_length=6, continuation_length=6)
    with pytest.raises(UserError, match="count is 0"):
        memorization(model, text, count=0)


def test_a_model_that_learned_a_text_by_heart(
    tmp_path: Path, rng: np.random.Generator, command: Command
) -> None:
    """It reproduces what it was trained on and not what it was not; the command says so too."""
    text = "".join(rng.choice(list("abcdefgh"), 240)) + "\n"
    source = tmp_path / "text.txt"
    source.write_text(text)
    corpus = load_corpus(source, tokenizer="characters", validation_fraction=0.5)
    config = MODERN.replace(
        vocab_size=corpus.vocab_size, context_length=24, num_layers=1, embed_dim=64
    )
    result = fit(
        config,
        OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
        BatchLoader(corpus.train, batch_size=16, context_length=24),
        steps=200,
        eval_every=200,
        checkpoint_every=200,
        sampling=Sampling(max_new_tokens=2),
        out=tmp_path / "run",
        tokenizer=corpus.tokenizer,
        settings={"data": str(source), "validation_fraction": 0.5},
        progress=False,
    )
    model = Model(config, result.params, corpus.tokenizer)
    known = memorization(model, corpus.train, prefix_length=12, continuation_length=8, count=40)
    other = memorization(
        model, corpus.validation, prefix_length=12, continuation_length=8, count=40
    )
    assert known.reproduced >= 30
    assert other.reproduced <= 2
    texts = draw_texts(model, 40, max_new_tokens=20, batch_size=16)
    assert [len(row) for row in texts] == [20] * 40
    # A text's beginning is not by heart, so that single ones may go astray.
    shared, chance = (
        np.mean([o.length for o in longest_overlaps(texts, tokens)])
        for tokens in (corpus.train, corpus.validation)
    )
    print(f"shared {shared}, by chance {chance}")
    assert shared > 1.5 * chance
    out = tmp_path / "memorization.json"
    arguments = ("memorization", tmp_path / "run", "--samples", 5, "--passages", 40)
    flags = ("--prefix-length", 12, "--continuation-length", 8, "--out", out)
    status, printed, error = command("gptjax", *arguments, *flags)
    assert (status, error) == (0, "")
    assert f"training text: {known}" in printed
    stored = json.loads(out.read_text())
    assert stored["memorization, training text"] == known.to_dict()
    assert stored["memorization, held-out text"] == other.to_dict()
    assert stored["overlap of generations"]["generations"] == 5
    status, _, error = command("gptjax", *arguments, "--out", tmp_path / "none" / "x.json")
    assert status == 2
    assert "cannot write" in error


def test_shares_and_intervals() -> None:
    found = Memorization(3, 4, (4, 0, 4, 2))
    assert found.reproduced == 2
    low, high = found.interval
    assert low < 0.5 < high
