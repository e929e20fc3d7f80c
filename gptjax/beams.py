"""Beam search: the likeliest continuations of prompts, ragged batches, one device program.

Shapes are in the names: B prompts, P their tokens, W beams of each, M = B · W rows of the model,
N new tokens, V vocabulary.
"""

import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation import (
    DecodeState,
    _check_prompts,
    bucket,
    decode_step,
    init_cache,
    prefill,
    slot_bucket,
)
from gptjax.layouts import decoding_params
from gptjax.params import Params
from gptjax.sampling import Sampling


class Beam(NamedTuple):
    """One continuation that a beam search found."""

    tokens: list[int]
    """The new ids, without the stop token that ended them."""
    score: float
    """Sum of log-probabilities in nats over length ** length_penalty. Both count the new tokens
    and the stop token after them, and not the prompt."""


class Rules(NamedTuple):
    """What decides about a search, all of it traced."""

    max_new: jax.Array
    """The most tokens of a continuation."""
    divisor_N: jax.Array
    """What a sum of n + 1 log-probabilities is divided by."""
    is_stop_V: jax.Array
    """Which tokens end one."""
    ends_when_full: jax.Array
    """Whether a prompt's search ends with its W-th finished continuation, whatever its score."""
    hopes_for_longest: jax.Array
    """Whether an open beam is judged by the divisor of the greatest length, not of its own."""


class Search(NamedTuple):
    """What the search carries from token to token. Beams are in the order of their scores."""

    index: jax.Array
    """How many tokens each open beam has."""
    state: DecodeState
    """Of `[M]` rows: the open beams of the first prompt, then of the second."""
    open_total_BW: jax.Array
    """Sums of log-probabilities of the beams that go on; -inf where there are fewer than W."""
    open_BWN: jax.Array
    """The tokens of the open beams."""
    done_score_BW: jax.Array
    """Scores of the best that have ended; -inf where there are fewer than W."""
    done_BWN: jax.Array
    """The tokens of those that have ended."""
    done_count_BW: jax.Array
    """How many tokens they have, without the stop token."""
    going_B: jax.Array
    """Which prompts are still searched."""


def beam_search(
    params: Params,
    prompt_tokens: Sequence[Sequence[int]],
    config: ModelConfig,
    *,
    num_beams: int = 4,
    max_new_tokens: int = 100,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    stop: Sequence[int] = (),
    num_return: int = 1,
) -> list[list[Beam]]:
    """Finds the likeliest continuations of each prompt by beam search.

    The search and its options are those of `generate(num_beams=..., do_sample=False)` in Hugging
    Face transformers 5.23, and so are the ids found. Each step extends the `num_beams` best open
    beams by every token. Of the best `num_beams` extensions those end that end in a stop token or
    have `max_new_tokens`; the best that go on are the next beams. One beam is greedy decoding.

    It differs only where there are fewer than `num_beams` continuations (a vocabulary smaller than
    the beams): transformers fills up with duplicates, and this gives fewer.

    A prompt's result is that of the prompt alone, as in `generate`. Compiled once for a number of
    prompts, a number of beams and a power of two that the lengths fit in; `max_new_tokens`,
    `length_penalty`, `early_stopping`, `stop` and `num_return` do not recompile. The cache is
    `num_beams` times that of `generate`.

    Args:
        params: as `init_params` makes them.
        prompt_tokens: token ids of each prompt, of any lengths.
        config: the model.
        num_beams: how many beams a prompt has, at least 1.
        max_new_tokens: the most tokens to add to each prompt, a stop token included.
        length_penalty: the exponent of the length that a sum of log-probabilities is divided by.
            Sums are negative, so more than 0 favours long continuations and less than 0 short ones.
        early_stopping: when a prompt's search ends, once `num_beams` continuations have. True: at
            once. False: when the best open beam, scored at its present length, is not better than
            the worst of them. "never": when it is not even at the length that suits it best, which
            is `max_new_tokens` for a `length_penalty` above 0.
        stop: token ids that end a continuation, such as `model.stop_ids`.
        num_return: how many continuations to give for each prompt, at most `num_beams`.

    Returns:
        For each prompt its `num_return` best `Beam`s, the best first. Where `max_new_tokens` is 0
        that is one without tokens and with score 0.

    Raises:
        UserError: if an option is outside what is said above; if a prompt is empty, has an id
            outside the vocabulary, or is with the new tokens longer than the model's context.
    """
    prompts = [list(map(int, prompt)) for prompt in prompt_tokens]
    _check_options(num_beams, max_new_tokens, early_stopping, num_return)
    stop_ids = _stop_ids(stop, config.vocab_size)
    # Sliding past the context is not offered here, so the length is checked with its own words.
    _check_prompts(prompts, config, Sampling(max_new_tokens=max_new_tokens, overflow="slide"))
    for row, prompt in enumerate(prompts):
        if len(prompt) + max_new_tokens > config.context_length:
            raise UserError(
                f"prompt {row} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the "
                f"model's context of {config.context_length}; shorten the prompt or ask for at "
                f"most {max(config.context_length - len(prompt), 0)} new tokens"
            )
    room = bucket(max(max_new_tokens, 1), config.context_length)
    divisor_N = _divisors(length_penalty, room, max_new_tokens)
    if not prompts or max_new_tokens == 0:
        return [[Beam([], 0.0)] for _ in prompts]

    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    P = bucket(int(lengths.max()), config.context_length)
    padded_BP = np.zeros((len(prompts), P), np.int32)
    for row, prompt in enumerate(prompts):
        padded_BP[row, : len(prompt)] = prompt
    is_stop_V = np.zeros(config.vocab_size, bool)
    is_stop_V[stop_ids] = True
    found = _search(
        params,
        decoding_params(params, config),
        jnp.asarray(padded_BP),
        jnp.asarray(lengths),
        Rules(
            max_new=jnp.int32(max_new_tokens),
            divisor_N=jnp.asarray(divisor_N),
            is_stop_V=jnp.asarray(is_stop_V),
            # One beam goes on after its end in the general rules; greedy decoding does not.
            ends_when_full=jnp.asarray(early_stopping is True or num_beams == 1),
            hopes_for_longest=jnp.asarray(early_stopping == "never" and length_penalty > 0),
        ),
        config,
        num_beams,
        # The last token found is never read, so it needs no slot.
        slot_bucket(max(int(lengths.max()) + max_new_tokens - 1, P), config),
    )
    done_BWN, count_BW, score_BW = map(np.asarray, found)
    return [
        [
            Beam(tokens_N[:count].tolist(), float(score))
            for tokens_N, count, score in zip(*row, strict=True)
            if score > -math.inf
        ][:num_return]
        for row in zip(done_BWN, count_BW, score_BW, strict=True)
    ]


@partial(jax.jit, static_argnames=("config", "num_beams", "slots"))
def _search(
    params: Params,
    decoding: Params,
    prompts_BP: jax.Array,
    length_B: jax.Array,
    rules: Rules,
    config: ModelConfig,
    num_beams: int,
    slots: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best that ended: tokens `[B, W, N]`, how many are theirs `[B, W]`, scores `[B, W]`."""
    (B, _), W, N = prompts_BP.shape, num_beams, rules.divisor_N.shape[0]
    logits_BV, cache = prefill(params, prompts_BP, length_B, init_cache(config, B, slots), config)
    logits_MV, cache, length_M = jax.tree.map(
        lambda x: jnp.repeat(x, W, axis=0), (logits_BV, cache, length_B)
    )
    nothing_BW = jnp.full((B, W), -jnp.inf)
    search = Search(
        index=jnp.int32(0),
        state=DecodeState(cache, jnp.zeros(B * W, jnp.int32), length_M),
        # All beams of a prompt are still the same, so only the first is open.
        open_total_BW=nothing_BW.at[:, 0].set(0),
        open_BWN=jnp.zeros((B, W, N), jnp.int32),
        done_score_BW=nothing_BW,
        done_BWN=jnp.zeros((B, W, N), jnp.int32),
        done_count_BW=jnp.zeros((B, W), jnp.int32),
        going_B=jnp.ones(B, bool),
    )
    search = _extend(search, logits_MV, rules)

    def unfinished(search: Search) -> jax.Array:
        return (search.index < rules.max_new) & jnp.any(search.going_B)

    def body(search: Search) -> Search:
        logits_MV, state = decode_step(decoding, search.state, config)
        return _extend(search._replace(state=state), logits_MV, rules)

    search = jax.lax.while_loop(unfinished, body, search)
    return search.done_BWN, search.done_count_BW, search.done_score_BW


def _extend(search: Search, logits_MV: jax.Array, rules: Rules) -> Search:
    """One token more: the best extensions end or go on, and the cache follows those that do."""
    B, W, _ = search.open_BWN.shape
    n = search.index
    logprobs_BWV = jax.nn.log_softmax(logits_MV, axis=-1).reshape(B, W, -1)
    total_BWV = search.open_total_BW[:, :, None] + logprobs_BWV

    # Only what is among the W best of all ends, or a poor end would take the place of a beam that
    # is about to come to a better one.
    total_BW, parent_BW, token_BW = _best(total_BWV)
    stops_BW = rules.is_stop_V[token_BW]
    ends_BW = (stops_BW | (n + 1 == rules.max_new)) & search.going_B[:, None]
    score_BW = jnp.where(ends_BW, total_BW / rules.divisor_N[n], -jnp.inf)
    done_score_BW, order_BW = jax.lax.top_k(
        jnp.concatenate([search.done_score_BW, score_BW], axis=1), W
    )
    grown_BWN = _gather(search.open_BWN, parent_BW).at[:, :, n].set(token_BW)
    done_BWN, done_count_BW = (
        _gather(jnp.concatenate(both, axis=1), order_BW)
        for both in (
            (search.done_BWN, grown_BWN),
            (search.done_count_BW, n + (~stops_BW).astype(jnp.int32)),
        )
    )

    # transformers takes the W best of (1 + number of stop tokens) · W candidates that do not stop.
    # Those are the W best of all that do not stop, whatever the number of stop tokens.
    going_on_BWV = jnp.where(rules.is_stop_V[None, None], -jnp.inf, total_BWV)
    open_total_BW, parent_BW, token_BW = _best(going_on_BWV)
    parent_M = (parent_BW + W * jnp.arange(B)[:, None]).reshape(-1)
    state = search.state._replace(
        cache=jax.tree.map(lambda x: x[parent_M], search.state.cache),
        token_B=token_BW.reshape(-1),
    )

    divisor = jnp.where(
        rules.hopes_for_longest, rules.divisor_N[rules.max_new - 1], rules.divisor_N[n]
    )
    worst_B = done_score_BW[:, -1]
    is_full_B = worst_B > -jnp.inf
    can_improve_B = open_total_BW[:, 0] / divisor > worst_B
    return Search(
        index=n + 1,
        state=state,
        open_total_BW=open_total_BW,
        open_BWN=_gather(search.open_BWN, parent_BW).at[:, :, n].set(token_BW),
        done_score_BW=done_score_BW,
        done_BWN=done_BWN,
        done_count_BW=done_count_BW,
        going_B=search.going_B & can_improve_B & ~(is_full_B & rules.ends_when_full),
    )


def _best(total_BWV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The W greatest of each row in order, the beam and the token of each: `[B, W]` all three."""
    B, W, V = total_BWV.shape
    total_BW, index_BW = jax.lax.top_k(total_BWV.reshape(B, W * V), W)
    # Who takes a part of these would, without the barrier, take it from a sort of all: XLA then
    # no longer sees a top-k in it.
    total_BW, index_BW = jax.lax.optimization_barrier((total_BW, index_BW))
    return total_BW, index_BW // V, index_BW % V


def _gather(x: jax.Array, beam_BW: jax.Array) -> jax.Array:
    """The beams of `x`, along its second axis, in the order of `beam_BW`."""
    return jnp.take_along_axis(x, beam_BW.reshape(*beam_BW.shape, *[1] * (x.ndim - 2)), axis=1)


def _divisors(length_penalty: float, room: int, max_new_tokens: int) -> np.ndarray:
    # On the host, in float64, as transformers has it: the same scores to the last bit or so.
    lengths_N = np.minimum(np.arange(1, room + 1), max(max_new_tokens, 1))
    with np.errstate(over="ignore", under="ignore"):
        divisor_N = (lengths_N.astype(np.float64) ** length_penalty).astype(np.float32)
    if not np.all(np.isfinite(divisor_N) & (divisor_N >= np.finfo(np.float32).tiny)):
        raise UserError(
            f"length_penalty is {length_penalty}: {max_new_tokens} tokens to that power are no "
            "float32; usual are values from 0 to 2"
        )
    return divisor_N


def _stop_ids(stop: Sequence[int], vocab_size: int) -> list[int]:
    try:
        ids = [operator.index(token) for token in stop]
    except TypeError:
        raise UserError(
            f"stop is {stop!r}; give a sequence of token ids, such as model.stop_ids"
        ) from None
    # Ids beyond the vocabulary cannot come up: a tokenizer may have more than the model.
    return [token for token in ids if 0 <= token < vocab_size]


def _check_options(
    num_beams: int, max_new_tokens: int, early_stopping: bool | str, num_return: int
) -> None:
    if num_beams < 1:
        raise UserError(f"num_beams is {num_beams}; at least 1 (greedy)")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}; at least 0")
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise UserError(f"early_stopping is {early_stopping!r}; True, False or 'never'")
    if not 1 <= num_return <= num_beams:
        raise UserError(
            f"num_return is {num_return}; from 1 to num_beams, which is {num_beams}: "
            "raise num_beams for more continuations"
        )
