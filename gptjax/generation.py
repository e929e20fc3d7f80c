"""Continuing prompts with a key-value cache: ragged batches, one device program."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import (
    LayerCache,
    compute_dtype,
    hidden_states,
    unembed,
    unstack_blocks,
)
from gptjax.params import Params
from gptjax.sampling import (
    Filters,
    FilterValues,
    History,
    Sampling,
    extend_history,
    sample,
    split_sampling,
    start_history,
)

KVCache = tuple[LayerCache, ...]
"""One `LayerCache` a block. A token's slot is its position: a row's prompt starts at slot 0 and
what is generated follows, so that rows of any lengths share a batch without padding between."""


class DecodeState(NamedTuple):
    """What decoding carries from token to token."""

    cache: KVCache
    token_B: jax.Array
    """The last token of each row, not yet in the cache."""
    length_B: jax.Array
    """Tokens of each row that are in the cache."""


class Progress(NamedTuple):
    """What generation carries from token to token."""

    index: jax.Array
    """How many tokens have been drawn for each row, those after its end counted too."""
    state: DecodeState
    done_B: jax.Array
    """Which rows have ended."""
    out_BN: jax.Array
    """The tokens drawn."""
    count_B: jax.Array
    """How many of them belong to each row: those before its end."""
    history: History | None
    """What the rows hold, where there are penalties."""
    details: "Details | None"
    """What is told of each token drawn, where that is asked for."""


class Details(NamedTuple):
    """Log-probabilities by the model itself, before penalties, biases and filters."""

    logprob_BN: Any
    """Of each token drawn."""
    top_ids_BNK: Any
    """The K likeliest tokens at each place, the likeliest first."""
    top_logprobs_BNK: Any


@dataclass(frozen=True)
class Continuation:
    """What was drawn for one prompt, and how it ended."""

    tokens: list[int]
    """New ids, without the stop token."""
    finish: Literal["stop", "length"]
    """Whether a stop token ended it, or the number of tokens asked for."""
    logprobs: list[float] | None = None
    """The log-probability (natural) of each token by the model itself, before penalties, biases,
    temperature and filters; None unless `Sampling.logprobs` asks for it."""
    top_logprobs: list[list[tuple[int, float]]] | None = None
    """At each place the likeliest ids with their log-probabilities, the likeliest first."""


class Draw(NamedTuple):
    """What decides about the tokens drawn, all of it traced."""

    keys_B: jax.Array
    stop_ids: jax.Array
    values: FilterValues


def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty cache for `batch` rows of up to `slots` tokens, in the compute dtype."""
    shape = (batch, slots, config.kv_heads, config.head_width)
    dtype = compute_dtype(config)
    return tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(config.num_layers)
    )


def prefill(
    params: Params, prompts_BP: jax.Array, length_B: jax.Array, cache: KVCache, config: ModelConfig
) -> tuple[jax.Array, KVCache]:
    """Reads prompts into an empty cache.

    Args:
        params: with blocks of either form; stacked ones compile to a loop, which one pass over many
            tokens loses nothing by.
        prompts_BP: `[B, P]` int32, each row filled up at its end with any token. What is written
            for the filling lies beyond the row's length and is overwritten before it is seen.
        length_B: `[B]` int32, the real length of each prompt, at least 1.
        cache: from `init_cache`.
        config: the model.

    Returns:
        `[B, V]` float32 logits of each row's first new token, and the cache.
    """
    B, P = prompts_BP.shape
    slots = jnp.broadcast_to(jnp.arange(P), (B, P))
    x_BPD, extended = hidden_states(params, prompts_BP, config, cache=cache, slots=slots)
    assert extended is not None
    last_B1D = jnp.take_along_axis(x_BPD, length_B[:, None, None] - 1, axis=1)
    return unembed(params, last_B1D, config)[:, 0], extended


def decode_step(
    params: Params, state: DecodeState, config: ModelConfig
) -> tuple[jax.Array, DecodeState]:
    """Reads one more token a row: `[B, V]` float32 logits of the next, and the state after."""
    x_B1D, cache = hidden_states(
        params,
        state.token_B[:, None],
        config,
        cache=state.cache,
        slots=state.length_B[:, None],
    )
    logits_BV = unembed(params, x_B1D, config)[:, 0]
    return logits_BV, state._replace(cache=cache, length_B=state.length_B + 1)


def generate(
    params: Params,
    prompt_tokens: Sequence[Sequence[int]],
    config: ModelConfig,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
) -> list[list[int]]:
    """Continues each prompt by up to `sampling.max_new_tokens` tokens.

    A row's result is that of its prompt alone: neither the other rows nor their lengths change it.
    Compiled once for a number of rows and a power of two that the lengths fit in; temperature,
    filters' values, seeds and the number of new tokens do not recompile.

    Args:
        params: as `init_params` makes them.
        prompt_tokens: token ids of each prompt, of any lengths.
        config: the model.
        sampling: how to draw. Only token ids of `sampling.stop` count here.
        key: random key; None is `jax.random.key(0)`.

    Returns:
        For each prompt the list of new ids, without the stop token that ended it; with
        `sampling.num_samples` of n, n lists for each prompt, one after another.

    Raises:
        UserError: if a prompt is empty, has an id outside the vocabulary, or is with the new
            tokens longer than the model's context; if there are not as many seeds as prompts; if
            `sampling` names ids outside the vocabulary or bans all of it.
    """
    found = generate_continuations(params, prompt_tokens, config, sampling, key)
    return [continuation.tokens for continuation in found]


def generate_continuations(
    params: Params,
    prompt_tokens: Sequence[Sequence[int]],
    config: ModelConfig,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
) -> list[Continuation]:
    """As `generate`, with how each continuation ended and, if asked for, log-probabilities.

    Args:
        params: as in `generate`.
        prompt_tokens: as in `generate`.
        config: as in `generate`.
        sampling: as in `generate`; `logprobs` asks for log-probabilities.
        key: as in `generate`.

    Raises:
        UserError: as `generate` does; and if log-probabilities are asked for past a full context
            (`overflow="slide"`).
    """
    prompts = [list(map(int, prompt)) for prompt in prompt_tokens]
    _check_prompts(prompts, config, sampling)
    n = sampling.num_samples
    if sampling.overflow == "slide":
        return _slide_all(params, prompts, config, sampling, key)
    N = sampling.max_new_tokens
    if not prompts or N == 0:
        told = None if sampling.logprobs is None else []
        return [Continuation([], "length", told, told) for _ in range(len(prompts) * n)]
    call = _prepare(prompts, config, sampling, key)
    progress = _generate(
        params,
        unstack_blocks(params, config)["blocks"],
        call.prompts_BP,
        call.length_B,
        jnp.int32(N),
        call.draw,
        config,
        call.static,
    )
    out, counts = np.asarray(progress.out_BN), np.asarray(progress.count_B)
    done = np.asarray(progress.done_B)
    details = None if progress.details is None else Details(*map(np.asarray, progress.details))
    return [
        _continuation(out[row, :count].tolist(), bool(done[row]), details, row)
        for row, count in enumerate(counts)
    ]


def _continuation(tokens: list[int], done: bool, details: Details | None, row: int) -> Continuation:
    finish = "stop" if done else "length"
    if details is None:
        return Continuation(tokens, finish)
    places = range(len(tokens))
    ids, logprobs = details.top_ids_BNK[row].tolist(), details.top_logprobs_BNK[row].tolist()
    return Continuation(
        tokens,
        finish,
        details.logprob_BN[row, : len(tokens)].tolist(),
        [list(zip(ids[place], logprobs[place], strict=True)) for place in places],
    )


class _Static(NamedTuple):
    """What a compiled program depends on beside the model and the number of rows."""

    filters: Filters
    slots: int
    room: int
    samples: int
    logprobs: int | None


class _Call(NamedTuple):
    """A call's arguments in the shapes that it is compiled for."""

    prompts_BP: jax.Array
    length_B: jax.Array
    draw: Draw
    static: _Static


def _prepare(
    prompts: list[list[int]], config: ModelConfig, sampling: Sampling, key: jax.Array | None
) -> _Call:
    N = sampling.max_new_tokens
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    P = bucket(int(lengths.max()), config.context_length)
    padded = np.zeros((len(prompts), P), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    keys_B = _sample_keys(_row_keys(len(prompts), sampling, key), sampling.num_samples)
    stop = sorted({token for token in sampling.stop if isinstance(token, int)})
    # Padding by -1, which is no token, to a length that other sets of stop tokens share.
    stop_ids = np.full(bucket(max(len(stop), 1), 2**30, least=4), -1, np.int32)
    stop_ids[: len(stop)] = stop
    filters, values = split_sampling(sampling)
    static = _Static(
        filters=filters,
        # The last token drawn is never read, so it needs no slot.
        slots=bucket(int(lengths.max()) + N - 1, config.context_length),
        room=bucket(N, config.context_length),
        samples=sampling.num_samples,
        logprobs=None if sampling.logprobs is None else min(sampling.logprobs, config.vocab_size),
    )
    draw = Draw(keys_B, jnp.asarray(stop_ids), values)
    return _Call(jnp.asarray(padded), jnp.asarray(lengths), draw, static)


def _row_keys(rows: int, sampling: Sampling, key: jax.Array | None) -> jax.Array:
    """A random key for each prompt."""
    if sampling.seeds is not None:
        return jax.vmap(jax.random.key)(np.array(sampling.seeds, np.uint32))
    base = jax.random.key(0) if key is None else key
    return jax.vmap(partial(jax.random.fold_in, base))(np.arange(rows))


def _sample_keys(keys_B: jax.Array, samples: int) -> jax.Array:
    """A key for each sample of each prompt; the first is the prompt's own."""
    if samples == 1:
        return keys_B
    further = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(samples)))
    keys_BS = further(keys_B).at[:, 0].set(keys_B)
    return keys_BS.reshape(-1)


def stream(
    params: Params,
    prompt: Sequence[int],
    config: ModelConfig,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    *,
    tokens_per_dispatch: int = 4,
) -> Iterator[int]:
    """Continues one prompt, giving each token as it comes: the tokens that `generate` gives.

    Args:
        params: as in `generate`.
        prompt: token ids.
        config: as in `generate`.
        sampling: as in `generate`, for one row; `overflow` must be "error".
        key: as in `generate`.
        tokens_per_dispatch: how many tokens the device draws before Python sees them. The first
            comes alone.

    Yields:
        New ids, without the stop token. Leaving the loop early leaves nothing running.

    Raises:
        UserError: as `generate` does, at the first token.
    """
    prompts = [list(map(int, prompt))]
    if sampling.overflow != "error":
        raise UserError("stream() does not slide past the context; set overflow='error'")
    if sampling.num_samples != 1:
        raise UserError(f"stream() gives one sample, not {sampling.num_samples}")
    _check_prompts(prompts, config, sampling)
    N = sampling.max_new_tokens
    if N == 0:
        return
    call = _prepare(prompts, config, sampling, key)
    progress = _start_jit(
        params,
        call.prompts_BP,
        call.length_B,
        call.draw,
        config,
        call.static,
    )
    params = unstack_blocks(params, config)
    given = 0
    while True:
        count = int(progress.count_B[0])
        yield from np.asarray(progress.out_BN[0, given:count]).tolist()
        given = count
        if count >= N or bool(progress.done_B[0]):
            return
        until = jnp.int32(min(count + tokens_per_dispatch, N))
        progress = _advance_jit(params, progress, until, call.draw, config, call.static)


def _slide_all(
    params: Params,
    prompts: list[list[int]],
    config: ModelConfig,
    sampling: Sampling,
    key: jax.Array | None,
) -> list[Continuation]:
    """Continues prompts past the context, one after another."""
    if sampling.logprobs is not None:
        raise UserError("logprobs are not told past a full context; set overflow='error'")
    keys = _sample_keys(_row_keys(len(prompts), sampling, key), sampling.num_samples)
    one = sampling.replace(seeds=None, num_samples=1)
    repeated = [prompt for prompt in prompts for _ in range(sampling.num_samples)]
    return [_slide(params, prompt, config, one, keys[row]) for row, prompt in enumerate(repeated)]


def _slide(
    params: Params, prompt: list[int], config: ModelConfig, sampling: Sampling, key: jax.Array
) -> Continuation:
    """Continues one prompt past the context, from its last half each time that it is full."""
    half = max(1, config.context_length // 2)
    new: list[int] = []
    turn = 0
    while len(new) < sampling.max_new_tokens:
        seen = prompt + new
        if len(seen) >= config.context_length:
            seen = seen[-half:]
        room = min(sampling.max_new_tokens - len(new), config.context_length - len(seen))
        if room == 0:
            raise UserError("a context of one token has no room to slide")
        part = sampling.replace(max_new_tokens=room, overflow="error")
        turn_key = jax.random.fold_in(key, turn)
        more = generate_continuations(params, [seen], config, part, turn_key)[0]
        new += more.tokens
        turn += 1
        if more.finish == "stop":
            return Continuation(new, "stop")
    return Continuation(new, "length")


def _start(
    params: Params,
    prompts_BP: jax.Array,
    length_B: jax.Array,
    draw: Draw,
    config: ModelConfig,
    static: _Static,
) -> Progress:
    """Reads the prompts and draws each row's first token."""
    B, room = prompts_BP.shape[0], static.room
    cache = init_cache(config, B, static.slots)
    logits_BV, cache = prefill(params, prompts_BP, length_B, cache, config)
    history = None
    if static.filters.penalties:
        history = start_history(prompts_BP, length_B, config.vocab_size)
    if static.samples > 1:
        # Prompts are read once; from here on each sample is a row.
        each = partial(jnp.repeat, repeats=static.samples, axis=0)
        logits_BV, cache, length_B, history = jax.tree.map(
            each, (logits_BV, cache, length_B, history)
        )
    rows = B * static.samples
    details = None
    if static.logprobs is not None:
        shape = (rows, room, static.logprobs)
        details = Details(
            jnp.zeros((rows, room)), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        )
    empty = Progress(
        index=jnp.int32(0),
        state=DecodeState(cache, jnp.zeros(rows, jnp.int32), length_B),
        done_B=jnp.zeros(rows, bool),
        out_BN=jnp.zeros((rows, room), jnp.int32),
        count_B=jnp.zeros(rows, jnp.int32),
        history=history,
        details=details,
    )
    return _drawn(empty, logits_BV, draw, static)


def _advance(
    params: Params,
    progress: Progress,
    until: jax.Array,
    draw: Draw,
    config: ModelConfig,
    static: _Static,
) -> Progress:
    """Draws more tokens, until there are so many or all rows have ended."""

    def unfinished(progress: Progress) -> jax.Array:
        return (progress.index < until) & ~jnp.all(progress.done_B)

    def body(progress: Progress) -> Progress:
        logits_BV, state = decode_step(params, progress.state, config)
        return _drawn(progress._replace(state=state), logits_BV, draw, static)

    return jax.lax.while_loop(unfinished, body, progress)


def _drawn(progress: Progress, logits_BV: jax.Array, draw: Draw, static: _Static) -> Progress:
    """With one more token a row, drawn from its logits."""
    index, history, details = progress.index, progress.history, progress.details
    # A key for each row and index: what a row draws does not depend on when others end.
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(draw.keys_B, index)
    token_B = sample(logits_BV, step_keys, static.filters, draw.values, history)
    if history is not None:
        history = extend_history(history, token_B)
    write = partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=1)
    if details is not None and static.logprobs is not None:
        logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        top_BK, ids_BK = jax.lax.top_k(logprobs_BV, static.logprobs)
        details = Details(
            write(details.logprob_BN, jnp.take_along_axis(logprobs_BV, token_B[:, None], 1)[:, 0]),
            write(details.top_ids_BNK, ids_BK),
            write(details.top_logprobs_BNK, top_BK),
        )
    done_B = progress.done_B | jnp.isin(token_B, draw.stop_ids)
    return Progress(
        index=index + 1,
        state=progress.state._replace(token_B=token_B),
        done_B=done_B,
        out_BN=write(progress.out_BN, token_B),
        count_B=progress.count_B + ~done_B,
        history=history,
        details=details,
    )


@partial(jax.jit, static_argnames=("config", "static"))
def _generate(
    params: Params,
    blocks: tuple[Params, ...],
    prompts_BP: jax.Array,
    length_B: jax.Array,
    max_new: jax.Array,
    draw: Draw,
    config: ModelConfig,
    static: _Static,
) -> Progress:
    """The whole of a batch in one program: its rows as they end, without their cache."""
    progress = _start(params, prompts_BP, length_B, draw, config, static)
    unstacked = {**params, "blocks": blocks}
    progress = _advance(unstacked, progress, max_new, draw, config, static)
    nothing = DecodeState((), progress.state.token_B, progress.state.length_B)
    return progress._replace(state=nothing, history=None)


_start_jit = partial(jax.jit, static_argnames=("config", "static"))(_start)
_advance_jit = partial(jax.jit, static_argnames=("config", "static"), donate_argnames="progress")(
    _advance
)


def bucket(size: int, limit: int, least: int = 16) -> int:
    """The next power of two, at most the limit: few shapes, so few compilations."""
    return min(max(least, 1 << (size - 1).bit_length()), limit)


def _check_prompts(prompts: list[list[int]], config: ModelConfig, sampling: Sampling) -> None:
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} is empty; give at least one token")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < config.vocab_size:
                raise UserError(
                    f"prompt {row} has token id {token}, but ids run from 0 to "
                    f"{config.vocab_size - 1}; is it this model's tokenizer?"
                )
        total = len(prompt) + sampling.max_new_tokens
        if sampling.overflow == "error" and total > config.context_length:
            raise UserError(
                f"prompt {row} of {len(prompt)} tokens and {sampling.max_new_tokens} new ones "
                f"exceed the model's context of {config.context_length}; shorten the prompt or ask "
                f"for at most {max(config.context_length - len(prompt), 0)} new tokens, or set "
                "overflow='slide' to go on from the last half of a full context"
            )
    named = [token for token, _ in sampling.logit_bias] + list(sampling.banned)
    for token in named:
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"logit_bias or banned names token id {token}, but ids run from 0 to "
                f"{config.vocab_size - 1}"
            )
    if len(set(sampling.banned)) == config.vocab_size:
        raise UserError("banned holds the whole vocabulary; leave at least one token")
    if sampling.seeds is not None and len(sampling.seeds) != len(prompts):
        raise UserError(f"{len(sampling.seeds)} seeds for {len(prompts)} prompts; one a prompt")
