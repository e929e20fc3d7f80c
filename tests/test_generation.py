"""Decoding with a cache against the full forward, and rows that do not know of each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2, STYLES, random_params
from test_sampling import adjusted

from gptjax import generation
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation import (
    DecodeState,
    decode_step,
    generate,
    generate_continuations,
    init_cache,
    prefill,
    stream,
)
from gptjax.layouts import unstack_blocks
from gptjax.model import forward
from gptjax.params import Params
from gptjax.sampling import Sampling

run = jax.jit(forward, static_argnames="config")


def random_prompts(rng: np.random.Generator, lengths: tuple[int, ...]) -> list[list[int]]:
    return [rng.integers(0, 31, length).tolist() for length in lengths]


def uncached_greedy(
    params: Params, prompt: list[int], config: ModelConfig, new: int
) -> tuple[list[int], float]:
    """The likeliest tokens by the full forward, and how clearly they were the likeliest."""
    tokens, margin = list(prompt), np.inf
    for _ in range(new):
        padded = np.zeros((1, config.context_length), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(run(params, padded, config))[0, len(tokens) - 1]
        second, first = np.sort(logits)[-2:]
        margin = min(margin, first - second)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], float(margin)


@STYLES
def test_the_cache_gives_the_logits_of_the_full_forward(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params = random_params(config, rng)
    T = config.context_length
    tokens = rng.integers(0, 31, (3, T)).astype(np.int32)
    lengths = np.array([1, 6, 4], np.int32)
    prompts = tokens[:, :6].copy()
    prompts[np.arange(6) >= lengths[:, None]] = 30
    whole = np.asarray(run(params, tokens, config))
    single = unstack_blocks(params, config)
    cache = init_cache(config, 3, T)
    logits, cache = jax.jit(prefill, static_argnames="config")(
        single, prompts, lengths, cache, config
    )
    rows = np.arange(3)
    np.testing.assert_allclose(logits, whole[rows, lengths - 1], atol=1e-5)
    step = jax.jit(decode_step, static_argnames="config")
    state = DecodeState(cache, jnp.asarray(tokens[rows, lengths]), jnp.asarray(lengths))
    for made in range(T - int(lengths.max())):
        logits, state = step(single, state, config)
        np.testing.assert_allclose(logits, whole[rows, lengths + made], atol=1e-5)
        following = tokens[rows, np.minimum(lengths + made + 1, T - 1)]
        state = state._replace(token_B=jnp.asarray(following))


@STYLES
def test_rows_do_not_know_of_each_other(config: ModelConfig, rng: np.random.Generator) -> None:
    params = random_params(config, rng)
    prompts = random_prompts(rng, (1, 9, 4))
    greedy = Sampling(max_new_tokens=7, temperature=0)
    together = generate(params, prompts, config, greedy)
    for row, prompt in enumerate(prompts):
        expected, margin = uncached_greedy(params, prompt, config, 7)
        if margin > 1e-4:
            assert together[row] == expected
        assert generate(params, [prompt], config, greedy) == [together[row]]

    seeded = Sampling(max_new_tokens=7, seeds=(5, 6, 7))
    together = generate(params, prompts, config, seeded, jax.random.key(1))
    alone = [
        generate(params, [prompt], config, seeded.replace(seeds=(seed,)), jax.random.key(2))[0]
        for prompt, seed in zip(prompts, (5, 6, 7), strict=True)
    ]
    assert together == alone


def test_draws_follow_key_and_seed(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    prompts = random_prompts(rng, (3,)) * 3
    sampling = Sampling(max_new_tokens=12)
    a, b = jax.random.split(jax.random.key(int(rng.integers(2**31))))
    first = generate(params, prompts, GPT2, sampling, a)
    assert first == generate(params, prompts, GPT2, sampling, a)
    assert first != generate(params, prompts, GPT2, sampling, b)
    assert len({tuple(row) for row in first}) == 3
    # Fewer new tokens are the beginning of more.
    assert generate(params, prompts, GPT2, sampling.replace(max_new_tokens=5), a) == [
        row[:5] for row in first
    ]
    equal = generate(params, prompts, GPT2, sampling.replace(seeds=(4, 9, 4)), b)
    assert equal[0] == equal[2] != equal[1]


def test_the_first_draw_follows_the_distribution(rng: np.random.Generator) -> None:
    config = GPT2.replace(vocab_size=5)
    params = random_params(config, rng)
    rows = 4000
    out = generate(params, [[1, 2]] * rows, config, Sampling(max_new_tokens=2), jax.random.key(3))
    logits = np.asarray(run(params, np.array([[1, 2]]), config), np.float64)[0, -1]
    probs = np.exp(logits) / np.exp(logits).sum()
    counts = np.bincount([row[0] for row in out], minlength=5)
    # The 99.99 % quantile of chi-square at 4 degrees of freedom is 23.5.
    assert np.sum((counts - rows * probs) ** 2 / (rows * probs)) < 23.5


def test_stop_tokens_end_rows_and_are_left_out(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    prompts = random_prompts(rng, (2, 5, 3))
    sampling = Sampling(max_new_tokens=10)
    free = generate(params, prompts, GPT2, sampling)
    for stop in ((free[0][0],), (free[1][4], free[2][2]), tuple(range(31))):
        stopped = generate(params, prompts, GPT2, sampling.replace(stop=stop))
        for row, full in zip(stopped, free, strict=True):
            ends = [n for n, token in enumerate(full) if token in stop]
            assert row == full[: ends[0] if ends else None]


def test_nothing_asked_for_is_nothing_given(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    none = Sampling(max_new_tokens=0)
    assert generate(params, [[1], [2, 3]], GPT2, none) == [[], []]
    assert generate(params, [[1], [2, 3]], GPT2, none.replace(overflow="slide")) == [[], []]
    assert generate(params, [], GPT2) == []


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 31]], {}, "token id 31.*0 to 30"),
        ([[-1, 3]], {}, "token id -1"),
        ([[1] * 10], {"max_new_tokens": 7}, "10 tokens and 7 new.*context of 16.*at most 6"),
        ([[1] * 17], {"max_new_tokens": 0}, "17 tokens.*context of 16"),
        ([[1], [2]], {"seeds": (1,)}, "1 seeds for 2 prompts"),
        ([[1] * 20, []], {"overflow": "slide"}, "prompt 1 is empty"),
    ],
)
def test_illegal_prompts_are_refused(prompts: Any, options: dict, words: str) -> None:
    sampling = Sampling(**{"max_new_tokens": 4, **options})
    with pytest.raises(UserError, match=words) as error:
        generate({}, prompts, GPT2, sampling)
    assert "\n" not in str(error.value)


def test_a_full_context_is_used_to_its_end(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    prompt = random_prompts(rng, (9,))[0]
    (new,) = generate(params, [prompt], GPT2, Sampling(max_new_tokens=7, temperature=0))
    expected, margin = uncached_greedy(params, prompt, GPT2, 7)
    assert len(new) == 7
    assert new == expected or margin < 1e-4


def test_sliding_goes_past_the_context(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    greedy = Sampling(max_new_tokens=30, temperature=0, overflow="slide")
    prompts = random_prompts(rng, (3, 21))
    out = generate(params, prompts, GPT2, greedy)
    assert [len(row) for row in out] == [30, 30]
    assert generate(params, prompts[1:], GPT2, greedy) == out[1:]
    # Each time that the context is full it goes on from the last half.
    for prompt, row in zip(prompts, out, strict=True):
        seen, tokens = list(prompt), []
        while len(tokens) < 30:
            if len(seen) >= 16:
                seen = seen[-8:]
            room = min(16 - len(seen), 30 - len(tokens))
            part = greedy.replace(max_new_tokens=room, overflow="error")
            more = generate(params, [seen], GPT2, part)[0]
            tokens += more
            seen += more
        assert row == tokens
    # Where nothing slides, the mode makes no difference.
    short = greedy.replace(max_new_tokens=5)
    error = short.replace(overflow="error")
    assert generate(params, prompts[:1], GPT2, short) == generate(params, prompts[:1], GPT2, error)
    stop = out[0][20]
    stopped = generate(params, prompts[:1], GPT2, greedy.replace(stop=(stop,)))[0]
    assert stopped == out[0][: out[0].index(stop)]


def test_numbers_do_not_recompile(rng: np.random.Generator) -> None:
    config = GPT2.replace(context_length=64)
    params = random_params(config, rng)
    compiled: Any = generation._generate
    base = Sampling(max_new_tokens=9, top_k=3)
    generate(params, [[1, 2], [3]], config, base)
    before = compiled._cache_size()
    for changes in (
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 1000},
        {"max_new_tokens": 1},
        {"max_new_tokens": 14},
        {"seeds": (1, 2)},
        {"stop": (4, 5, 6)},
    ):
        generate(params, [[1, 2, 3], [3]], config, base.replace(**changes), jax.random.key(1))
    assert compiled._cache_size() == before
    generate(params, [[1, 2], [3]], config, base.replace(top_p=0.5))
    assert compiled._cache_size() == before + 1


@STYLES
def test_no_rank_is_promoted(config: ModelConfig, rng: np.random.Generator) -> None:
    params = random_params(config, rng)
    sampling = Sampling(max_new_tokens=3, top_k=5, top_p=0.9, min_p=0.1, stop=(4,))
    with jax.numpy_rank_promotion("raise"):
        generate(params, [[1, 2, 3], [4]], config, sampling)
        generate(params, [[1, 2, 3], [4]], config, Sampling(max_new_tokens=3, temperature=0))


def test_penalties_look_at_prompt_and_continuation(rng: np.random.Generator) -> None:
    """Greedy decoding with penalties against the full forward, token by token."""
    params = random_params(GPT2, rng)
    sampling = Sampling(
        max_new_tokens=9,
        temperature=0,
        repetition_penalty=1.4,
        frequency_penalty=0.7,
        presence_penalty=0.3,
        banned=(5,),
        logit_bias={2: 0.5},
    )
    for prompt in random_prompts(rng, (1, 6)):
        tokens: list[int] = []
        for _ in range(sampling.max_new_tokens):
            padded = np.zeros((1, GPT2.context_length), np.int32)
            seen = prompt + tokens
            padded[0, : len(seen)] = seen
            logits = np.asarray(run(params, padded, GPT2))[0, len(seen) - 1]
            tokens.append(int(adjusted(logits, prompt, tokens, sampling).argmax()))
        assert generate(params, [prompt], GPT2, sampling) == [tokens]
        assert list(stream(params, prompt, GPT2, sampling)) == tokens


def test_samples_of_a_prompt(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    prompts = random_prompts(rng, (2, 5, 3))
    sampling = Sampling(max_new_tokens=6, num_samples=4, seeds=(1, 2, 3))
    rows = generate(params, prompts, GPT2, sampling)
    assert len(rows) == 12
    assert len({tuple(row) for row in rows}) > 8
    for place, prompt in enumerate(prompts):
        one = sampling.replace(seeds=(place + 1,))
        assert generate(params, [prompt], GPT2, one) == rows[4 * place : 4 * place + 4]
        first = one.replace(num_samples=1)
        assert generate(params, [prompt], GPT2, first) == rows[4 * place : 4 * place + 1]
    slid = sampling.replace(overflow="slide", max_new_tokens=3, num_samples=2, seeds=None)
    assert len(generate(params, prompts, GPT2, slid)) == 6


@STYLES
def test_log_probabilities_are_the_models_own(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params = random_params(config, rng)
    prompts = random_prompts(rng, (3, 6))
    sampling = Sampling(max_new_tokens=7, temperature=0.5, top_k=4, banned=(1,), logprobs=3)
    found = generate_continuations(params, prompts, config, sampling)
    for prompt, continuation in zip(prompts, found, strict=True):
        seen = np.array([prompt + continuation.tokens])
        logits = np.asarray(run(params, jnp.asarray(seen), config), np.float64)[0]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert continuation.finish == "length"
        assert continuation.logprobs is not None
        assert continuation.top_logprobs is not None
        for place, token in enumerate(continuation.tokens):
            row = logprobs[len(prompt) + place - 1]
            assert continuation.logprobs[place] == pytest.approx(row[token], abs=1e-4)
            ids, values = zip(*continuation.top_logprobs[place], strict=True)
            assert list(ids) == np.argsort(-row)[:3].tolist()
            np.testing.assert_allclose(values, row[list(ids)], atol=1e-4)
    alone = generate_continuations(params, prompts, config, sampling.replace(logprobs=0))
    assert [row.tokens for row in alone] == [row.tokens for row in found]
    assert all(top == [] for row in alone for top in row.top_logprobs or [])
    plain = generate_continuations(params, prompts, config, sampling.replace(logprobs=None))
    assert plain[0].logprobs is None


def test_how_a_row_ended(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    [prompt] = random_prompts(rng, (4,))
    sampling = Sampling(max_new_tokens=8, temperature=0)
    tokens = generate(params, [prompt], GPT2, sampling)[0]
    stop = tokens[3]
    ended = generate_continuations(params, [prompt], GPT2, sampling.replace(stop=(stop,)))[0]
    assert ended.finish == "stop"
    assert ended.tokens == tokens[: tokens.index(stop)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"banned": (31,)}, "token id 31"),
        ({"logit_bias": {-1: 1.0}}, "token id -1"),
        ({"banned": tuple(range(31))}, "whole vocabulary"),
        ({"logprobs": 1, "overflow": "slide"}, "logprobs are not told"),
    ],
)
def test_settings_that_do_not_fit_the_model(
    rng: np.random.Generator, options: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        generate(random_params(GPT2, rng), [[1]], GPT2, Sampling(max_new_tokens=2, **options))


def test_one_compilation_a_bucket(rng: np.random.Generator) -> None:
    """Over fifty prompts of random lengths and numbers of new tokens."""
    config = GPT2.replace(context_length=128)
    params = random_params(config, rng)
    generation._generate.clear_cache()
    buckets = set()
    for _ in range(50):
        length, new = int(rng.integers(1, 64)), int(rng.integers(1, 64))
        sampling = Sampling(
            max_new_tokens=new,
            temperature=float(rng.uniform(0.1, 2)),
            top_p=float(rng.uniform(0.1, 0.9)),
            banned=tuple(rng.integers(0, 30, 3).tolist()),
        )
        generate(params, random_prompts(rng, (length,)), config, sampling)
        read, room = (1 << max(4, (size - 1).bit_length()) for size in (length, new))
        # Caches come in finer steps than prompts.
        kept = next(size for size in range(16, 129, 16) if max(length + new - 1, read) <= size)
        buckets.add((read, room, kept))
    assert generation._generate._cache_size() <= len(buckets)
