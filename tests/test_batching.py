"""The queue against the batch: what a prompt gets depends on no slot, order or neighbour."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from small_models import GPT2, MODERN, random_params
from small_tokenizers import chat_like

from gptjax import batching, generation
from gptjax.batching import READ_AHEAD, generate_queue, generate_texts
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation import Continuation, generate_continuations
from gptjax.model import Model
from gptjax.sampling import Sampling
from gptjax.text_generation import generate_chat, generate_text
from gptjax.tokenizer import ByteTokenizer, tokenizer_from_dict

GREEDY = Sampling(max_new_tokens=12, temperature=0)
EVERYTHING = Sampling(
    max_new_tokens=12,
    temperature=1.3,
    top_k=20,
    top_p=0.97,
    min_p=0.001,
    typical_p=0.98,
    repetition_penalty=1.2,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    logit_bias={3: 0.5},
    banned=(4,),
    stop=(5, 6, 7),
    logprobs=2,
    num_samples=2,
)


def random_prompts(rng: np.random.Generator, number: int, longest: int = 20) -> list[list[int]]:
    lengths = rng.integers(1, longest + 1, number)
    return [rng.integers(0, 31, length).tolist() for length in lengths]


def cut(whole: Continuation, limit: int) -> Continuation:
    """What a continuation had been with a lower limit."""
    return Continuation(
        whole.tokens[:limit],
        whole.finish if len(whole.tokens) < limit else "length",
        None if whole.logprobs is None else whole.logprobs[:limit],
        None if whole.top_logprobs is None else whole.top_logprobs[:limit],
    )


def assert_same(one: Continuation, other: Continuation) -> None:
    assert (one.tokens, one.finish) == (other.tokens, other.finish)
    assert (one.logprobs is None) == (other.logprobs is None)
    if one.logprobs is not None and other.logprobs is not None:
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert one.top_logprobs is not None
        assert other.top_logprobs is not None
        for here, there in zip(one.top_logprobs, other.top_logprobs, strict=True):
            np.testing.assert_allclose([x for _, x in here], [x for _, x in there], atol=1e-4)


@pytest.mark.parametrize(
    ("config", "sampling", "slots"),
    [
        (MODERN, GREEDY, 1),
        (GPT2, GREEDY, 8),
        (GPT2, EVERYTHING, 1),
        (MODERN, EVERYTHING, 3),
        (GPT2.replace(cache_dtype="int8"), GREEDY, 3),
    ],
    ids=["one slot", "eight slots", "one slot, all filters", "all filters", "8 bits"],
)
def test_each_is_what_the_batch_of_all_gives(
    config: ModelConfig, sampling: Sampling, slots: int, rng: np.random.Generator
) -> None:
    config = config.replace(context_length=32)
    params = random_params(config, rng)
    # The many filters are compiled for prompts of up to 16 tokens only.
    prompts = random_prompts(rng, 11, longest=20 if sampling is GREEDY else 16)
    limits = rng.integers(1, 13, 11).tolist()
    key, n = jax.random.key(int(rng.integers(2**31))), sampling.num_samples
    with jax.numpy_rank_promotion("raise"):
        whole = generate_continuations(params, prompts, config, sampling, key)
        found = list(
            generate_queue(
                params, prompts, config, sampling, key, slots=slots, max_new_tokens=limits
            )
        )
    assert sorted(index for index, _ in found) == list(range(11 * n))
    for index, continuation in found:
        assert_same(continuation, cut(whole[index], limits[index // n]))
    # Rows did end at steps of their own.
    assert len({len(continuation.tokens) for _, continuation in found}) > 3


def test_seeds_follow_their_prompts_into_any_order(rng: np.random.Generator) -> None:
    params = random_params(MODERN, rng)
    prompts = random_prompts(rng, 7, longest=8)
    seeds = rng.integers(0, 2**32, 7)
    sampling = Sampling(max_new_tokens=5, temperature=2.0, num_samples=2)
    order = rng.permutation(7)
    straight = dict(
        generate_queue(params, prompts, MODERN, sampling.replace(seeds=seeds.tolist()), slots=2)
    )
    shuffled = dict(
        generate_queue(
            params,
            [prompts[i] for i in order],
            MODERN,
            sampling.replace(seeds=seeds[order].tolist()),
            jax.random.key(1),
            slots=3,
        )
    )
    for place, i in enumerate(order):
        for sample in (0, 1):
            assert shuffled[2 * place + sample].tokens == straight[2 * i + sample].tokens


@pytest.mark.parametrize("logprobs", [None, 1])
def test_little_to_do(logprobs: int | None, rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    sampling = GREEDY.replace(max_new_tokens=3, logprobs=logprobs)
    assert list(generate_queue(params, [], GPT2, sampling)) == []
    [expected] = generate_continuations(params, [[1, 2]], GPT2, sampling)
    [(index, only)] = generate_queue(params, [[1, 2]], GPT2, sampling)
    assert index == 0
    assert_same(only, expected)
    # No tokens at all, alone and among others.
    [nothing] = generate_continuations(params, [[3]], GPT2, sampling.replace(max_new_tokens=0))
    assert list(
        generate_queue(params, [[3]] * 20, GPT2, sampling.replace(max_new_tokens=0), slots=2)
    ) == [(index, nothing) for index in range(20)]
    found = dict(
        generate_queue(
            params, [[3], [1, 2], [4]], GPT2, sampling, slots=1, max_new_tokens=[0, 3, 0]
        )
    )
    assert found[0] == found[2] == nothing
    assert_same(found[1], expected)


def test_no_more_is_read_ahead_than_said(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    read = 0

    def endless() -> Iterator[list[int]]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield [number % 31]

    slots, sampling = 2, GREEDY.replace(max_new_tokens=3)
    queue = generate_queue(params, endless(), GPT2, sampling, slots=slots)
    assert read == 0
    begun = set()
    for ended, (index, _) in enumerate(itertools.islice(queue, 30), 1):
        begun.add(index)
        # Beside what waits: what is in the slots, and what has been taken out of them.
        assert read <= ended + 2 * slots + READ_AHEAD * slots
    queue.close()  # pyright: ignore[reportAttributeAccessIssue]
    # In their order, as far as rows that run together have one.
    assert max(begun) < 30 + slots


def compiled() -> dict[str, int]:
    programs: dict[str, Any] = {
        "start": generation.start,
        "put": batching._put,
        "advance": batching._advance,
        "resized": batching._resized,
        "empty": batching._empty,
    }
    return {name: program._cache_size() for name, program in programs.items()}


def test_one_compilation_a_bucket_and_kind(rng: np.random.Generator) -> None:
    """Over fifty prompts of random lengths and numbers of new tokens."""
    config = GPT2.replace(context_length=64)
    params = random_params(config, rng)
    before = compiled()
    for _ in range(2):
        prompts = random_prompts(rng, 25, longest=40)
        sampling = Sampling(
            temperature=float(rng.uniform(0.5, 2)),
            top_k=int(rng.integers(1, 40)),
            stop=tuple(rng.integers(0, 31, 2).tolist()),
        )
        limits = [int(rng.integers(1, 65 - len(prompt))) for prompt in prompts]
        found = generate_queue(params, prompts, config, sampling, slots=3, max_new_tokens=limits)
        assert len(list(found)) == 25
    made = {name: number - before[name] for name, number in compiled().items()}
    # One or two prompts at once, of up to 16, 32 or 64 tokens; caches of 16, 32, 48 or 64 slots.
    assert made["advance"] <= 4
    assert made["start"] <= 2 * 3
    assert made["put"] <= 2 * (4 + 3 + 1)
    assert made["empty"] <= 2
    assert made["resized"] <= 4 * 3


def test_the_cache_is_as_long_as_what_is_in_hand(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPT2.replace(context_length=64)
    params = random_params(config, rng)
    sizes = []
    advance: Callable[..., Any] = batching._advance

    def watched(*arguments: Any) -> Any:
        sizes.append(arguments[-1].slots)
        return advance(*arguments)

    monkeypatch.setattr(batching, "_advance", watched)
    monkeypatch.setattr(batching, "READ_AHEAD", 1)
    prompts = [[1, 2], [3], [4] * 40, [5, 6], [7], [8] * 3, [9, 1], [2, 2]]
    limits = [4, 14, 20, 3, 4, 8, 7, 6]
    sampling = Sampling(max_new_tokens=20, repetition_penalty=1.3, logprobs=1)
    whole = generate_continuations(params, prompts, config, sampling)
    found = list(
        generate_queue(params, iter(prompts), config, sampling, slots=2, max_new_tokens=limits)
    )
    assert len(found) == 8
    for index, continuation in found:
        assert_same(continuation, cut(whole[index], limits[index]))
    # 40 tokens and 20 new ones, the last of which needs no slot, fit in 64.
    assert [size for size, _ in itertools.groupby(sizes)] == [16, 64, 16]


def test_slots_are_filled_while_others_go_on(rng: np.random.Generator) -> None:
    """And with the longest first, where it is known what is left."""
    params = random_params(GPT2, rng)
    limits = [2, 2, 2, 2, 2, 12, 2]
    found = generate_queue(params, [[1]] * 7, GPT2, GREEDY, slots=2, max_new_tokens=limits)
    # Six short ones run beside the long one: their steps are no more than its own.
    assert [index for index, _ in found] == [0, 1, 2, 3, 4, 6, 5]

    # Where more may come, all are begun in their order.
    prompts = itertools.chain([[1]] * 7, ([1] for _ in itertools.count()))
    endless = itertools.chain(limits, itertools.repeat(2))
    found = generate_queue(params, prompts, GPT2, GREEDY, slots=2, max_new_tokens=endless)
    first = [index for index, _ in itertools.islice(found, 30)]
    assert first.index(5) > first.index(6)
    assert sorted(first[:5]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], [2], [], [3]], {}, "prompt 2 is empty"),
        ([[1], [2], [31], [3]], {}, "prompt 2 has token id 31"),
        ([[1], [2], [1] * 14], {}, r"prompt 2 of 14 tokens and 3 new.*at most 2 new tokens$"),
        ([[1], [2]], {"seeds": (1,)}, "1 seeds and more prompts"),
        ([[1], [2]], {"seeds": (1, 2, 3)}, "3 seeds for 2 prompts"),
    ],
)
def test_illegal_prompts_are_refused_when_they_are_reached(
    prompts: Any, options: dict, words: str, rng: np.random.Generator
) -> None:
    params = random_params(GPT2, rng)
    sampling = Sampling(max_new_tokens=3, temperature=0, **options)
    found = []
    queue = generate_queue(params, prompts, GPT2, sampling, slots=1)

    def run() -> None:
        for index, _ in queue:
            found.append(index)

    with pytest.raises(UserError, match=words):
        run()
    # What stood before it is not lost.
    assert found == list(range(min(2, len(options.get("seeds", "  ")))))


def test_other_errors(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    for slots, sampling, words in (
        (0, GREEDY, "slots is 0; at least 1"),
        (1, GREEDY.replace(overflow="slide"), "does not slide"),
        (1, GREEDY.replace(banned=(40,)), "token id 40"),
    ):
        with pytest.raises(UserError, match=words):
            generate_queue(params, [[1]], GPT2, sampling, slots=slots)
    for limits, words in (([2], "1 numbers and no more"), ([2, 2, 2], "more than 2 numbers")):
        queue = generate_queue(params, [[1], [2]], GPT2, GREEDY, max_new_tokens=limits)
        with pytest.raises(UserError, match=words):
            list(queue)
    with pytest.raises(UserError, match="prompt 1: max_new_tokens is -1"):
        list(generate_queue(params, [[1], [2]], GPT2, GREEDY, max_new_tokens=[2, -1]))

    def broken() -> Iterator[list[int]]:
        yield [1]
        raise OSError("the disk is gone")

    queue = generate_queue(params, broken(), GPT2, GREEDY)
    assert next(queue)[0] == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(queue)


def text_model(rng: np.random.Generator) -> Model:
    tokenizer = ByteTokenizer()
    config = GPT2.replace(vocab_size=tokenizer.vocab_size + 3, context_length=64)
    return Model(config, random_params(config, rng), tokenizer)


@pytest.mark.parametrize("stop", [(), ("e", "xy", 7), ("ab",)])
def test_texts_are_what_generate_text_gives(
    stop: tuple, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = text_model(rng)
    letters = tuple(range(97, 123))
    # Most texts have an "e", whatever the weights that are drawn.
    bias = dict.fromkeys(letters, 6.0) | {ord("e"): 9.0}
    sampling = Sampling(max_new_tokens=24, num_samples=2, stop=stop, logit_bias=bias, logprobs=0)
    texts = ["a", "to be", "", "the question", "é", "or not"]
    expected = generate_text(model, texts, sampling, jax.random.key(5))
    drawn = []
    made: Callable[..., Continuation] = batching.continuation

    def watched(*arguments: Any) -> Continuation:
        drawn.append(made(*arguments))
        return drawn[-1]

    monkeypatch.setattr(batching, "continuation", watched)
    found = dict(generate_texts(model, iter(texts), sampling, jax.random.key(5), slots=3))
    assert [found[index].text for index in range(12)] == expected
    assert model.tokenizer is not None
    for completion in found.values():
        continuation = completion.continuation
        assert continuation.logprobs is not None
        assert len(continuation.logprobs) == len(continuation.tokens)
        if stop == ("ab",) and len(continuation.tokens) < 24 and continuation.finish == "stop":
            whole = model.tokenizer.decode(continuation.tokens)
            assert whole == completion.text or whole == completion.text + "ab"
    if stop == ("e", "xy", 7):
        # A row is not drawn to its limit when its text is over: "e" comes up soon.
        longest = max(len(completion.continuation.tokens) for completion in found.values())
        assert max(len(row.tokens) for row in drawn) <= longest + batching.WATCHED_STEPS
        assert any(
            "e" in model.tokenizer.decode(completion.continuation.tokens)
            and completion.continuation.finish == "stop"
            for completion in found.values()
        )


def test_conversations_and_texts_in_one_queue(rng: np.random.Generator) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = tokenizer_from_dict(chat_like().to_dict() | {"chat_template": template})
    config = GPT2.replace(vocab_size=tokenizer.vocab_size, context_length=96)
    model = Model(config, random_params(config, rng), tokenizer)
    messages = [{"role": "user", "content": "hello"}]
    sampling = GREEDY.replace(max_new_tokens=9)
    found = dict(generate_texts(model, [messages, "hello", messages], sampling, slots=2))
    assert found[0] == found[2]
    assert found[0].text == generate_chat(model, messages, sampling)
    assert found[1].text == generate_text(model, "hello", sampling)[0]


def test_texts_that_cannot_be_continued(rng: np.random.Generator) -> None:
    model = text_model(rng)
    with pytest.raises(UserError, match="prompt 1: this model has no chat template"):
        list(generate_texts(model, ["a", [{"role": "user", "content": "b"}]], GREEDY))
    with pytest.raises(UserError, match="prompt 0: the text is not UTF-8"):
        list(generate_texts(model, ["a\udcff"], GREEDY))
    with pytest.raises(UserError, match="no tokenizer"):
        generate_texts(Model(model.config, model.params), ["a"], GREEDY)
