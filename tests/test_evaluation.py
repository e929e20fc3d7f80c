"""Log-likelihoods, long texts and last words against the full forward; figures; stopped runs."""

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from small_models import GPT2, STYLES, random_params
from small_tokenizers import TEXTS, llama_like

from gptjax import token_scores
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.evaluation.completions import (
    Task,
    read_tasks,
    score_completions,
    summarize_completions,
)
from gptjax.evaluation.last_word import read_passages, score_last_words, summarize_last_words
from gptjax.evaluation.loglikelihood import Loglikelihood, each_group, loglikelihoods
from gptjax.evaluation.long_text import score_long_texts, summarize_long_texts, window_texts
from gptjax.evaluation.results import (
    Estimate,
    accuracy_interval,
    collect,
    exponential,
    mean,
    print_estimates,
    ratio,
    scaled,
    to_json,
)
from gptjax.model import Model, forward
from gptjax.resumable import model_settings
from gptjax.sampling import Sampling
from gptjax.text_generation import generate_text
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

run = jax.jit(forward, static_argnames="config")
ALPHABET = "abcdefghijklmnopqrstuvwxyz .,!\n"
CLOSE = {"rel": 2e-5, "abs": 2e-4}


def model_of(
    config: ModelConfig, tokenizer: Tokenizer, rng: np.random.Generator, context: int = 64
) -> Model:
    config = config.replace(vocab_size=tokenizer.vocab_size, context_length=context)
    return Model(config, random_params(config, rng), tokenizer)


def logprobs_after(model: Model, ids: list[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Float64 log-probabilities of the last tokens of ids, and of all tokens in their places."""
    C = model.config.context_length
    read = ids[-(C + 1) :][:-1]
    padded = np.full((1, C), 3, np.int32)
    padded[0, : len(read)] = read
    logits = np.asarray(run(model.params, padded, model.config), np.float64)[0, : len(read)]
    table = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    table = table[len(read) - count :]
    return table[np.arange(count), ids[len(ids) - count :]], table


def expected(model: Model, context: list[int], continuation: list[int]) -> Loglikelihood:
    count = len(continuation)
    own, table = logprobs_after(model, [*context, *continuation], count)
    is_greedy = table.argmax(-1).tolist() == continuation
    return Loglikelihood(float(own.sum()), is_greedy, count)


def assert_close(one: Loglikelihood, other: Loglikelihood) -> None:
    assert one.logprob == pytest.approx(other.logprob, **CLOSE)
    assert (one.is_greedy, one.tokens) == (other.is_greedy, other.tokens)


def ids_of(rng: np.random.Generator, length: int, vocab_size: int = 31) -> list[int]:
    return rng.integers(0, vocab_size, length).tolist()


@STYLES
def test_loglikelihoods_are_those_of_the_full_forward(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    """Of any lengths, in any order; also where the context is cut and where it is filled."""
    model = model_of(config, CharTokenizer(ALPHABET), rng, context=32)
    lengths = [(1, 1), (5, 3), (1, 31), (1, 32), (20, 12), (21, 12), (90, 4), (33, 32), (16, 1)]
    requests = [(ids_of(rng, one), ids_of(rng, other)) for one, other in lengths]
    for batch_size in (1, 4):
        results = loglikelihoods(model, requests, batch_size=batch_size)
        for result, request in zip(results, requests, strict=True):
            assert_close(result, expected(model, *request))


def test_an_impossible_context_changes_nothing_beyond_what_is_read(
    rng: np.random.Generator,
) -> None:
    """Of a context that is too long the right end is kept, as long as it can be."""
    model = model_of(GPT2, CharTokenizer(ALPHABET), rng, context=16)
    context, continuation = ids_of(rng, 40), ids_of(rng, 5)
    # The last token is not read: 16 tokens are the continuation's first four and twelve before.
    seen = loglikelihoods(model, [(context, continuation), (context[-12:], continuation)])
    assert seen[0] == seen[1]
    shorter = loglikelihoods(model, [(context[-11:], continuation)])
    assert abs(shorter[0].logprob - seen[0].logprob) > 1e-3


def test_greedy_is_what_greedy_decoding_gives(rng: np.random.Generator) -> None:
    model = model_of(GPT2, CharTokenizer(ALPHABET), rng)
    prompt = "the cat"
    [text] = generate_text(model, prompt, Sampling(max_new_tokens=6, temperature=0))
    assert model.tokenizer is not None
    context, greedy = model.tokenizer.encode(prompt), model.tokenizer.encode(text)
    other = [*greedy[:3], (greedy[3] + 1) % 31, *greedy[4:]]
    last = [*greedy[:-1], (greedy[-1] + 1) % 31]
    results = loglikelihoods(model, [(context, greedy), (context, other), (context, last)])
    assert [result.is_greedy for result in results] == [True, False, False]


def test_nothing_to_say_is_certain(rng: np.random.Generator) -> None:
    model = model_of(GPT2, CharTokenizer(ALPHABET), rng)
    one = ids_of(rng, 4), ids_of(rng, 2)
    results = loglikelihoods(model, [([1], []), one, (ids_of(rng, 90), [])])
    assert results[0] == results[2] == Loglikelihood(0.0, True, 0)
    assert_close(results[1], expected(model, *one))
    assert loglikelihoods(model, []) == []


def test_an_empty_context_is_what_begins_a_text(rng: np.random.Generator) -> None:
    for tokenizer, lead in ((ByteTokenizer(), 256), (llama_like(), llama_like().bos_id)):
        model = model_of(GPT2, tokenizer, rng)
        continuation = tokenizer.encode("cat")
        [result] = loglikelihoods(model, [([], continuation)])
        assert lead is not None
        assert_close(result, expected(model, [lead], continuation))
    with pytest.raises(UserError, match="context of request 1 is empty"):
        loglikelihoods(model_of(GPT2, CharTokenizer(ALPHABET), rng), [([1], [2]), ([], [1])])


def test_few_compilations_and_few_logits(rng: np.random.Generator) -> None:
    model = model_of(GPT2.replace(num_layers=1), CharTokenizer(ALPHABET), rng)
    lengths = rng.integers(1, 60, (40, 2))
    requests = [(ids_of(rng, int(a)), ids_of(rng, int(min(b, 5)))) for a, b in lengths]
    before = token_scores._scored._cache_size()
    loglikelihoods(model, requests, batch_size=4)
    # Rows of 16, 32, 48 and 64 tokens, whatever number of tokens is scored.
    assert token_scores._scored._cache_size() - before <= 4


def test_groups_come_whole(rng: np.random.Generator) -> None:
    model = model_of(GPT2, CharTokenizer(ALPHABET), rng)
    sizes = [3, 1, 5, 2]
    groups = [
        [(ids_of(rng, int(rng.integers(1, 50))), ids_of(rng, 3)) for _ in range(size)]
        for size in sizes
    ]
    found = dict(each_group(model, groups, batch_size=2))
    assert sorted(found) == [0, 1, 2, 3]
    for index, group in enumerate(groups):
        for result, request in zip(found[index], group, strict=True):
            assert_close(result, expected(model, *request))


def test_illegal_requests_are_refused(rng: np.random.Generator) -> None:
    model = model_of(GPT2, CharTokenizer(ALPHABET), rng, context=16)

    def refused(words: str, requests: list, **options: Any) -> None:
        with pytest.raises(UserError, match=words) as error:
            loglikelihoods(model, requests, **options)
        assert "\n" not in str(error.value)

    refused("continuation of request 1 has 17 tokens.*16", [([1], [2]), ([1], [2] * 17)])
    refused("request 0 has token id 31.*0 to 30", [([1], [31])])
    refused("request 0 has token id -1", [([-1], [1])])
    refused("batch_size is 0", [([1], [1])], batch_size=0)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    model = dataclasses.replace(model, params=broken)
    refused("logits of request 0 are not finite", [([1], [1])])


def test_transformers_agrees(tmp_path: Path, rng: np.random.Generator) -> None:
    torch: Any = pytest.importorskip("torch", reason="PyTorch is missing")
    transformers: Any = pytest.importorskip("transformers", reason="transformers is missing")
    from gptjax.pretrained.huggingface import save_pretrained

    model = model_of(GPT2, BPETokenizer.train(TEXTS * 3, 300), rng)
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    requests = [(ids_of(rng, n, 300), ids_of(rng, m, 300)) for n, m in ((3, 4), (30, 9), (1, 1))]
    for result, (context, continuation) in zip(
        loglikelihoods(model, requests), requests, strict=True
    ):
        with torch.no_grad():
            logits = theirs(torch.tensor([context + continuation])).logits[0].double()
        table = torch.log_softmax(logits, -1)[len(context) - 1 : -1].numpy()
        own = table[np.arange(len(continuation)), continuation].sum()
        assert result.logprob == pytest.approx(own, **CLOSE)


def test_a_mean_has_its_standard_error(rng: np.random.Generator) -> None:
    values = rng.normal(3, 2, 50)
    got = mean(values.tolist())
    assert got.value == pytest.approx(values.mean())
    assert got.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert got.count == 50
    assert math.isnan(mean([1.0]).stderr)
    assert math.isnan(mean([]).value)
    # Accuracies: the error of a proportion.
    assert mean([1.0] * 30 + [0.0] * 70).stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_a_ratio_has_the_error_that_other_samples_have(rng: np.random.Generator) -> None:
    def sample() -> Estimate:
        sizes = rng.integers(5, 50, 300)
        amounts = sizes * rng.normal(2, 0.5, 300) + rng.normal(0, 3, 300)
        return ratio(amounts.tolist(), sizes.tolist())

    found = [sample() for _ in range(400)]
    spread = np.std([estimate.value for estimate in found], ddof=1)
    assert np.mean([estimate.stderr for estimate in found]) == pytest.approx(spread, rel=0.2)
    assert found[0].value == pytest.approx(2, abs=0.1)


def test_estimates_in_other_units(rng: np.random.Generator) -> None:
    estimate = Estimate(1.5, 0.02, 9)
    assert scaled(estimate, -2) == (-3.0, 0.04, 9)
    drawn = np.exp(rng.normal(1.5, 0.02, 100_000))
    got = exponential(estimate)
    assert got.value == pytest.approx(math.exp(1.5))
    assert got.stderr == pytest.approx(drawn.std(), rel=0.03)
    assert exponential(Estimate(1e4, 1, 2)).value == math.inf


def test_wilsons_interval() -> None:
    # By hand: the roots of (p̂ - p)² = z² p (1 - p) / n.
    z = 1.959963984540054
    for correct, count in ((0, 10), (3, 10), (10, 10), (172, 200)):
        low, high = accuracy_interval(correct, count)
        for end in (low, high):
            left = (correct / count - end) ** 2
            assert left == pytest.approx(z * z * end * (1 - end) / count, abs=1e-12)
        assert 0 <= low <= correct / count <= high <= 1
        assert low < high
    inner, outer = accuracy_interval(3, 10, 0.5), accuracy_interval(3, 10, 0.99)
    assert outer[0] < inner[0] < inner[1] < outer[1]
    for arguments in ((-1, 3), (4, 3), (0, 0), (1, 2, 1.0), (1, 2, 0.0)):
        with pytest.raises(UserError):
            accuracy_interval(*arguments)


def test_wilsons_interval_covers(rng: np.random.Generator) -> None:
    for truth in (0.02, 0.5, 0.9):
        drawn = rng.binomial(60, truth, 2000)
        inside = [low <= truth <= high for low, high in (accuracy_interval(n, 60) for n in drawn)]
        assert 0.9 < np.mean(inside) < 0.99


def test_estimates_are_printed_and_written() -> None:
    results = {
        "one": {"accuracy": Estimate(0.29551, 0.0321, 200), "perplexity": Estimate(40.06, 1.48, 9)},
        "two": {"alone": Estimate(0.5, math.nan, 1), "exact": Estimate(1.0, 0.0, 3)},
    }
    out = io.StringIO()
    print_estimates(results, Console(file=out, width=100))
    rows = [line.split() for line in out.getvalue().splitlines()[1:]]
    assert rows == [
        ["one", "accuracy", "0.296", "0.032", "200"],
        ["perplexity", "40.1", "1.5", "9"],
        ["two", "alone", "0.5", "nan", "1"],
        ["exact", "1", "0", "3"],
    ]
    values = json.loads(json.dumps(to_json(results), allow_nan=False))
    assert values["one"]["accuracy"] == {"value": 0.29551, "stderr": 0.0321, "count": 200}
    assert values["two"]["alone"] == {"value": 0.5, "stderr": None, "count": 1}


class Work:
    """Squares numbers, the last first, and counts; stops after some."""

    def __init__(self, most: int | None = None):
        self.done: list[int] = []
        self._most = most

    def __call__(self, indices: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in reversed(indices):
            if len(self.done) == self._most:
                raise KeyboardInterrupt
            self.done.append(index)
            yield index, {"square": index * index}


def test_a_stopped_evaluation_goes_on(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "items.jsonl"
    settings = {"suite": "squares", "items": "abc"}
    whole = [{"square": index * index} for index in range(9)]
    assert collect(Work(), 9) == whole
    with pytest.raises(KeyboardInterrupt):
        collect(Work(4), 9, path=path, settings=settings)
    assert len(path.read_text().splitlines()) == 4
    # Killed in the middle of a line.
    cut = int(rng.integers(1, 8))
    path.write_bytes(path.read_bytes()[:-cut])
    work = Work()
    assert collect(work, 9, path=path, settings=settings) == whole
    assert work.done == [5, 4, 3, 2, 1, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(9))
    work = Work()
    assert collect(work, 9, path=path, settings=settings) == whole
    assert work.done == []


def test_lines_of_other_runs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    model = Model(GPT2, random_params(GPT2, np.random.default_rng(0)))
    settings = {"suite": "squares", "items": "abc", **model_settings(model)}
    collect(Work(), 3, path=path, settings=settings)
    before = path.read_bytes()

    def refused(words: str, count: int = 3, **changes: Any) -> None:
        with pytest.raises(UserError, match=words):
            collect(Work(), count, path=path, settings={**settings, **changes})
        assert path.read_bytes() == before

    other = Model(GPT2, random_params(GPT2, np.random.default_rng(1)))
    refused("other items", items="abd")
    refused("suite squares, not cubes", suite="cubes")
    refused("another model", params=model_settings(other)["params"])
    refused("another model", model=model_settings(Model(GPT2.replace(num_layers=3), {}))["model"])
    refused(r"items\.jsonl:\d is no record of these 2 items", count=2)
    with filelock.FileLock(f"{path}.lock"):
        refused("in use by another run")
    before = path.read_bytes() + b'{"index": "a"}\n'
    path.write_bytes(before)
    refused(r"items\.jsonl:4 is no record")
    before = b"[1]\n"
    path.write_bytes(before)
    refused(r"items\.jsonl:1: a list; give one object a line")


def strided(model: Model, ids: list[int], context: int, stride: int) -> list[float]:
    """Log-probabilities of all tokens but the first, as transformers' documentation has it.

    Each by the tokens of the first window that reaches the one before it.
    """
    logprobs = []
    for token in range(1, len(ids)):
        start = next(s for s in range(0, len(ids), stride) if s + context >= token)
        own, _ = logprobs_after(model, ids[start : token + 1], 1)
        logprobs.append(float(own[0]))
    return logprobs


@STYLES
def test_long_texts_in_windows(config: ModelConfig, rng: np.random.Generator) -> None:
    tokenizer = ByteTokenizer()
    model = model_of(config, tokenizer, rng, context=16)
    texts = ["é" + "".join(rng.choice(list(ALPHABET), n)) for n in (45, 20, 3)]
    for context, stride in ((16, 4), (16, 16), (12, 7), (16, 1)):
        windowed = window_texts(model, texts, context=context, stride=stride)
        indices = list(range(len(windowed.parts)))
        records = dict(score_long_texts(model, windowed, indices, batch_size=3))
        nats, tokens = [0.0] * 3, [0] * 3
        for record in records.values():
            nats[record["text"]] += record["nats"]
            tokens[record["text"]] += record["tokens"]
        rows = [[256, *text.encode()] for text in texts]
        wanted = [-sum(strided(model, row, context, stride)) for row in rows]
        assert nats == pytest.approx(wanted, rel=1e-4)
        assert tokens == [len(text.encode()) for text in texts]
        # Some windows by themselves, as where a run goes on.
        some = dict(score_long_texts(model, windowed, indices[1::2], batch_size=2))
        for place, record in some.items():
            other = records[indices[1::2][place]]
            assert record["nats"] == pytest.approx(other["nats"], rel=1e-4)
    figures = summarize_long_texts(windowed, [records[index] for index in indices])
    total, size = sum(wanted), sum(tokens)
    assert figures["perplexity"].value == pytest.approx(math.exp(total / size), rel=1e-3)
    assert figures["bits per byte"].value == pytest.approx(total / size / math.log(2), rel=1e-4)
    letters, words = sum(map(len, texts)), sum(len(text.split()) for text in texts)
    assert figures["bits per character"].value == pytest.approx(
        total / letters / math.log(2), rel=1e-4
    )
    assert math.log(figures["word perplexity"].value) == pytest.approx(total / words, rel=1e-4)


def test_defaults_are_the_models_context_and_half_of_it(rng: np.random.Generator) -> None:
    model = model_of(GPT2, ByteTokenizer(), rng, context=16)
    text = "a" * 60
    given, asked = window_texts(model, [text]), window_texts(model, [text], context=16, stride=8)
    assert given.parts == asked.parts
    assert given.parts != window_texts(model, [text], stride=7).parts


def test_errors_are_over_texts_or_over_windows(rng: np.random.Generator) -> None:
    model = model_of(GPT2, ByteTokenizer(), rng, context=16)
    texts = ["é" + "".join(rng.choice(list(ALPHABET), n)) for n in (33, 40, 21, 60)]

    def figures(texts: list[str]) -> tuple[dict[str, Estimate], list[dict[str, Any]]]:
        windowed = window_texts(model, texts)
        found = dict(score_long_texts(model, windowed, list(range(len(windowed.parts)))))
        records = [found[index] for index in sorted(found)]
        return summarize_long_texts(windowed, records), records

    several, records = figures(texts)
    nats = [sum(r["nats"] for r in records if r["text"] == n) for n in range(4)]
    sizes = [len(text.encode()) for text in texts]
    wanted = scaled(ratio(nats, sizes), 1 / math.log(2))
    assert several["bits per byte"] == pytest.approx(wanted)
    assert several["perplexity"].count == 4
    single, records = figures(texts[:1])
    wanted = ratio([r["nats"] for r in records], [r["tokens"] for r in records])
    assert single["perplexity"] == pytest.approx(exponential(wanted))
    assert single["perplexity"].count == len(records) > 1
    per_character = scaled(wanted, len(texts[0].encode()) / len(texts[0]) / math.log(2))
    assert single["bits per character"] == pytest.approx(per_character)


def test_what_is_not_predicted_has_no_bytes(rng: np.random.Generator) -> None:
    """Without a token that begins a text, the first character is read and not predicted."""
    tokenizer = CharTokenizer.from_text("abcdefgh")
    config = GPT2.replace(vocab_size=8)
    model = Model(config, jax.tree.map(jnp.zeros_like, random_params(config, rng)), tokenizer)
    windowed = window_texts(model, ["ab", "cd", "efgh", "a"])
    records = dict(score_long_texts(model, windowed, range(len(windowed.parts))))
    figures = summarize_long_texts(windowed, [records[n] for n in range(len(windowed.parts))])
    for name in ("bits per byte", "bits per character"):
        assert figures[name].value == pytest.approx(3, rel=1e-5)


def test_another_tokenizer_is_another_model(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    one, other = (Model(GPT2, params, CharTokenizer.from_text(text)) for text in ("abc", "abd"))
    assert model_settings(one) != model_settings(other)


def test_illegal_windows_are_refused(rng: np.random.Generator) -> None:
    model = model_of(GPT2, CharTokenizer(ALPHABET), rng, context=16)
    for words, options in (
        ("context is 17; from 1 to the model's 16", {"context": 17}),
        ("context is 0", {"context": 0}),
        ("stride is 9; from 1 to the context of 8", {"context": 8, "stride": 9}),
        ("stride is 0", {"stride": 0}),
    ):
        with pytest.raises(UserError, match=words):
            window_texts(model, ["abc"], **options)
    with pytest.raises(UserError, match="no token to predict"):
        window_texts(model, ["a", ""])


def test_last_words(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "passages.txt"
    path.write_text("\ufeffthe cat sat on the mat\r\n\nthe hat  \nthe bat!\n", encoding="utf-8")
    passages = read_passages(path)
    assert passages == [("the cat sat on the", " mat"), ("the", " hat"), ("the", " bat!")]
    jsonl = tmp_path / "passages.jsonl"
    jsonl.write_text('{"text": "the cat sat on the mat"}\n\n{"text": "the hat"}\n')
    assert read_passages(jsonl) == passages[:2]
    tokenizer = BPETokenizer.train(TEXTS * 3, 300)
    model = model_of(GPT2, tokenizer, rng)
    [greedy] = generate_text(model, "the", Sampling(max_new_tokens=2, temperature=0))
    passages.append(("the", greedy))
    found = dict(score_last_words(model, passages, batch_size=2))
    records = [found[index] for index in range(4)]
    wanted = []
    for (before, word), record in zip(passages, records, strict=True):
        whole = tokenizer.encode(before + word)
        context = tokenizer.encode(before)
        if whole[: len(context)] != context:
            whole = [*context, *tokenizer.encode(word)]
        wanted.append(expected(model, context, whole[len(context) :]))
        assert record["logprob"] == pytest.approx(wanted[-1].logprob, **CLOSE)
        assert record["is_greedy"] == wanted[-1].is_greedy
    figures = summarize_last_words(records)
    assert figures["accuracy"].value == np.mean([result.is_greedy for result in wanted])
    # By word, not by token.
    total = sum(result.logprob for result in wanted)
    assert math.log(figures["perplexity"].value) == pytest.approx(-total / 4, rel=1e-4)


def test_passages_that_are_none_are_refused(tmp_path: Path) -> None:
    for name, text, words in (
        ("a.txt", "two words\nword\n", r"a\.txt:2 is 'word'; give a passage of two words"),
        ("b.jsonl", '{"text": "two words"}\n{"word": 1}\n', r"b\.jsonl:2 has no text"),
        ("c.jsonl", '{"text": "two words"}\n{\n', r"c\.jsonl:2: not JSON"),
        ("d.jsonl", "\n", r"d\.jsonl is empty"),
        ("e.txt", " \n", r"e\.txt is empty"),
    ):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_passages(path)
    path = tmp_path / "f.txt"
    path.write_bytes(b"two words\n\xff")
    with pytest.raises(UserError, match=r"f\.txt is not UTF-8 at byte 10"):
        read_passages(path)


def test_completions(tmp_path: Path, rng: np.random.Generator) -> None:
    model = model_of(GPT2, CharTokenizer(ALPHABET), rng)
    greedy = Sampling(max_new_tokens=8, temperature=0, stop=("\n",))
    prompts = ["the cat", "a", "on the mat. the hat"]
    texts = generate_text(model, prompts, greedy)
    answers = [[f" {texts[0]} "], [texts[1] + "x"], ["no", texts[2]]]
    path = tmp_path / "tasks.jsonl"
    lines = [
        json.dumps({"prompt": prompt, "answers": right})
        for prompt, right in zip(prompts, answers, strict=True)
    ]
    path.write_text("\n".join(lines))
    tasks = read_tasks(path)
    assert tasks[2] == Task(prompts[2], ("no", texts[2]))
    found = dict(score_completions(model, tasks, batch_size=2, max_new_tokens=8))
    assert [found[index]["completion"] for index in range(3)] == texts
    assert [found[index]["is_exact"] for index in range(3)] == [True, False, True]
    figures = summarize_completions([found[index] for index in range(3)])
    assert figures["exact match"].value == pytest.approx(2 / 3)
    for line in ('{"prompt": "a"}', '{"prompt": "a", "answers": []}', '{"answers": ["a"]}'):
        path.write_text(line)
        with pytest.raises(UserError, match=r"tasks\.jsonl:1 is no task"):
            read_tasks(path)
