"""Filters against a plain computation, and draws against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.sampling import (
    Sampling,
    adjust_logits,
    extend_history,
    filter_logits,
    sample,
    split_sampling,
    start_history,
)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def kept(logits: np.ndarray, sampling: Sampling) -> set[int]:
    """The tokens that the filters leave, one row, in float64 and token by token."""
    scaled = logits.astype(np.float64) / sampling.temperature
    tokens = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if sampling.top_k is not None:
        tokens = tokens[: sampling.top_k]
    if sampling.top_p is not None and sampling.top_p < 1:  # 1 keeps all, however small
        probs = softmax(scaled[tokens])
        total, count = 0.0, 0
        while count < len(tokens) and total < sampling.top_p:
            total += probs[count]
            count += 1
        tokens = tokens[:count]
    if sampling.min_p is not None:
        probs = softmax(scaled[tokens])
        tokens = [t for t, p in zip(tokens, probs, strict=True) if p >= sampling.min_p * probs[0]]
    if sampling.typical_p is not None and sampling.typical_p < 1:
        probs = softmax(scaled[tokens])
        surprise = -np.log(probs)
        distance = np.abs(surprise - np.sum(probs * surprise))
        order = np.argsort(distance, kind="stable")
        total, count = 0.0, 0
        while count < len(order) and total < sampling.typical_p:
            total += probs[order[count]]
            count += 1
        tokens = [tokens[place] for place in order[:count]]
    return set(tokens)


def adjusted(
    logits: np.ndarray, prompt: list[int], new: list[int], sampling: Sampling
) -> np.ndarray:
    """Penalties and biases, one row, token by token."""
    result = logits.astype(np.float64)
    for token in set(prompt) | set(new):
        penalty = sampling.repetition_penalty
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token in set(new):
        result[token] -= sampling.presence_penalty
        result[token] -= sampling.frequency_penalty * new.count(token)
    for token, bias in sampling.logit_bias:
        result[token] += bias
    result[list(sampling.banned)] = -np.inf
    return result


@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.7, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.2])
@pytest.mark.parametrize("typical_p", [None, 0.3, 0.9])
def test_filters(
    rng: np.random.Generator,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    typical_p: float | None,
) -> None:
    temperature = float(rng.uniform(0.3, 2))
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p
    )
    logits = rng.normal(0, 2, (20, 37)).astype(np.float32)
    got = np.asarray(filter_logits(jnp.asarray(logits), *split_sampling(sampling)))
    for row, before in zip(got, logits, strict=True):
        stays = kept(before, sampling)
        assert set(np.flatnonzero(row > -np.inf)) == stays
        index = sorted(stays)
        np.testing.assert_allclose(row[index], before[index] / temperature, rtol=1e-6)


def test_ties_stay_together() -> None:
    logits = jnp.array([[1.0, 3.0, 2.0, 2.0, 0.0]])
    got = filter_logits(logits, *split_sampling(Sampling(top_k=2)))
    assert np.flatnonzero(np.asarray(got[0]) > -np.inf).tolist() == [1, 2, 3]


ADJUSTMENTS = pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 0.8},
        {"frequency_penalty": -0.4},
        {"logit_bias": {3: 2.5, 7: -1.0, 30: -np.inf}},
        {"banned": (0, 4, 30)},
        {
            "repetition_penalty": 1.3,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "logit_bias": ((2, 1.0), (4, 9.0)),
            "banned": (4,),
        },
    ],
)


@ADJUSTMENTS
def test_penalties_and_biases(rng: np.random.Generator, options: dict) -> None:
    sampling = Sampling(**options)
    filters, values = split_sampling(sampling)
    lengths = np.array([1, 5, 3], np.int32)
    prompts = rng.integers(0, 31, (3, 8)).astype(np.int32)
    new = rng.integers(0, 6, (3, 4))  # Few ids, so that some come twice.
    history = start_history(jnp.asarray(prompts), jnp.asarray(lengths), 31)
    for step in range(4):
        history = extend_history(history, jnp.asarray(new[:, step]))
    logits = rng.normal(0, 2, (3, 31)).astype(np.float32)
    got = np.asarray(adjust_logits(jnp.asarray(logits), filters, values, history))
    for row in range(3):
        prompt = prompts[row, : lengths[row]].tolist()
        expected = adjusted(logits[row], prompt, new[row].tolist(), sampling)
        np.testing.assert_allclose(got[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 5}, {"temperature": 0.6, "top_p": 0.8}, {"min_p": 0.3}, {"typical_p": 0.6}],
)
def test_draws_follow_the_distribution(options: dict) -> None:
    draws = 20_000
    sampling = Sampling(**options)
    logits = np.linspace(-2, 1, 8)[[3, 1, 4, 0, 5, 7, 2, 6]].astype(np.float32)
    keys = jax.random.split(jax.random.key(5), draws)
    filters, values = split_sampling(sampling)
    tokens = sample(jnp.broadcast_to(logits, (draws, 8)), keys, filters, values)
    counts = np.bincount(np.asarray(tokens), minlength=8)
    index = sorted(kept(logits, sampling))
    assert counts.sum() == counts[index].sum() == draws
    expected = draws * softmax(logits[index].astype(np.float64) / sampling.temperature)
    # The 99.99 % quantile of chi-square at 7 degrees of freedom is 29.9.
    assert np.sum((counts[index] - expected) ** 2 / expected) < 29.9


def test_greedy_takes_the_likeliest(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(9, 31)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 9)
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 1}, {"top_p": 1e-6}):
        tokens = sample(jnp.asarray(logits), keys, *split_sampling(Sampling(**options)))
        assert np.asarray(tokens).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"typical_p": 0.0}, "typical_p is 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias of token 3"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop": ("",)}, "empty string"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"top_kk": 3}, "did you mean 'top_k'"),
    ],
)
def test_illegal_settings_are_refused(options: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        Sampling().replace(**options)


def test_values_are_traced_and_switches_static() -> None:
    filters, values = split_sampling(Sampling(temperature=0.5, top_k=3))
    other_filters, other_values = split_sampling(Sampling(temperature=0.9, top_k=2**40))
    assert filters == other_filters
    assert hash(filters) == hash(other_filters)
    assert all(isinstance(value, jax.Array) for value in (*values, *other_values))
