"""Filters against a plain computation, and draws against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.sampling import Sampling, filter_logits, sample, split_sampling


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
    return set(tokens)


@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.7, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.2])
def test_filters(
    rng: np.random.Generator, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    temperature = float(rng.uniform(0.3, 2))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
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


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"temperature": 0.6, "top_p": 0.8}])
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
