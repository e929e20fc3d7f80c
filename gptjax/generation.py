"""Continuing prompts with a key-value cache: ragged batches, one device program."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

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
from gptjax.sampling import Filters, FilterValues, Sampling, sample, split_sampling

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
        For each prompt the list of new ids, without the stop token that ended it.

    Raises:
        UserError: if a prompt is empty, has an id outside the vocabulary, or is with the new
            tokens longer than the model's context; if there are not as many seeds as prompts.
    """
    prompts = [list(map(int, prompt)) for prompt in prompt_tokens]
    _check_prompts(prompts, config, sampling)
    if sampling.overflow == "slide":
        base = jax.random.key(0) if key is None else key
        return [
            _slide(params, prompt, config, sampling, jax.random.fold_in(base, row), row)
            for row, prompt in enumerate(prompts)
        ]
    N = sampling.max_new_tokens
    if not prompts or N == 0:
        return [[] for _ in prompts]
    call = _prepare(prompts, config, sampling, key)
    out_BN, count_B = _generate(
        params,
        unstack_blocks(params, config)["blocks"],
        call.prompts_BP,
        call.length_B,
        jnp.int32(N),
        call.draw,
        config,
        call.filters,
        call.slots,
        call.room,
    )
    out, counts = np.asarray(out_BN), np.asarray(count_B)
    return [out[row, : counts[row]].tolist() for row in range(len(prompts))]


class _Call(NamedTuple):
    """A call's arguments in the shapes that it is compiled for."""

    prompts_BP: jax.Array
    length_B: jax.Array
    draw: Draw
    filters: Filters
    slots: int
    room: int


def _prepare(
    prompts: list[list[int]], config: ModelConfig, sampling: Sampling, key: jax.Array | None
) -> _Call:
    N = sampling.max_new_tokens
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    P = _bucket(int(lengths.max()), config.context_length)
    padded = np.zeros((len(prompts), P), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    if sampling.seeds is not None:
        keys_B = jax.vmap(jax.random.key)(np.array(sampling.seeds, np.uint32))
    else:
        base = jax.random.key(0) if key is None else key
        keys_B = jax.vmap(partial(jax.random.fold_in, base))(np.arange(len(prompts)))
    stop = sorted({token for token in sampling.stop if isinstance(token, int)})
    # Padding by -1, which is no token, to a length that other sets of stop tokens share.
    stop_ids = np.full(_bucket(max(len(stop), 1), 2**30, least=4), -1, np.int32)
    stop_ids[: len(stop)] = stop
    filters, values = split_sampling(sampling)
    return _Call(
        prompts_BP=jnp.asarray(padded),
        length_B=jnp.asarray(lengths),
        draw=Draw(keys_B, jnp.asarray(stop_ids), values),
        filters=filters,
        # The last token drawn is never read, so it needs no slot.
        slots=_bucket(int(lengths.max()) + N - 1, config.context_length),
        room=_bucket(N, config.context_length),
    )


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
        call.filters,
        call.slots,
        call.room,
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
        progress = _advance_jit(params, progress, until, call.draw, config, call.filters)


def _slide(
    params: Params,
    prompt: list[int],
    config: ModelConfig,
    sampling: Sampling,
    key: jax.Array,
    row: int,
) -> list[int]:
    """Continues one prompt past the context, from its last half each time that it is full."""
    if sampling.seeds is not None:
        key = jax.random.key(sampling.seeds[row])
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
        part = sampling.replace(max_new_tokens=room, overflow="error", seeds=None)
        more = generate(params, [seen], config, part, jax.random.fold_in(key, turn))[0]
        new += more
        turn += 1
        if len(more) < room:
            break
    return new


def _start(
    params: Params,
    prompts_BP: jax.Array,
    length_B: jax.Array,
    draw: Draw,
    config: ModelConfig,
    filters: Filters,
    slots: int,
    room: int,
) -> Progress:
    """Reads the prompts and draws each row's first token."""
    B = prompts_BP.shape[0]
    logits_BV, cache = prefill(params, prompts_BP, length_B, init_cache(config, B, slots), config)
    first_B = _drawn(logits_BV, jnp.int32(0), draw, filters)
    done_B = jnp.isin(first_B, draw.stop_ids)
    return Progress(
        index=jnp.int32(1),
        state=DecodeState(cache, first_B, length_B),
        done_B=done_B,
        out_BN=jnp.zeros((B, room), jnp.int32).at[:, 0].set(first_B),
        count_B=(~done_B).astype(jnp.int32),
    )


def _advance(
    params: Params,
    progress: Progress,
    until: jax.Array,
    draw: Draw,
    config: ModelConfig,
    filters: Filters,
) -> Progress:
    """Draws more tokens, until there are so many or all rows have ended."""

    def unfinished(progress: Progress) -> jax.Array:
        return (progress.index < until) & ~jnp.all(progress.done_B)

    def body(progress: Progress) -> Progress:
        index, state, done_B, out_BN, count_B = progress
        logits_BV, state = decode_step(params, state, config)
        token_B = _drawn(logits_BV, index, draw, filters)
        done_B = done_B | jnp.isin(token_B, draw.stop_ids)
        out_BN = jax.lax.dynamic_update_index_in_dim(out_BN, token_B, index, axis=1)
        count_B = count_B + ~done_B
        return Progress(index + 1, state._replace(token_B=token_B), done_B, out_BN, count_B)

    return jax.lax.while_loop(unfinished, body, progress)


def _drawn(logits_BV: jax.Array, index: jax.Array, draw: Draw, filters: Filters) -> jax.Array:
    # A key for each row and index: what a row draws does not depend on when others end.
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(draw.keys_B, index)
    return sample(logits_BV, step_keys, filters, draw.values)


@partial(jax.jit, static_argnames=("config", "filters", "slots", "room"))
def _generate(
    params: Params,
    blocks: tuple[Params, ...],
    prompts_BP: jax.Array,
    length_B: jax.Array,
    max_new: jax.Array,
    draw: Draw,
    config: ModelConfig,
    filters: Filters,
    slots: int,
    room: int,
) -> tuple[jax.Array, jax.Array]:
    """New tokens `[B, room]` and how many of them each row has."""
    progress = _start(params, prompts_BP, length_B, draw, config, filters, slots, room)
    unstacked = {**params, "blocks": blocks}
    progress = _advance(unstacked, progress, max_new, draw, config, filters)
    return progress.out_BN, progress.count_B


_start_jit = partial(jax.jit, static_argnames=("config", "filters", "slots", "room"))(_start)
_advance_jit = partial(jax.jit, static_argnames=("config", "filters"), donate_argnames="progress")(
    _advance
)


def _bucket(size: int, limit: int, least: int = 16) -> int:
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
    if sampling.seeds is not None and len(sampling.seeds) != len(prompts):
        raise UserError(f"{len(sampling.seeds)} seeds for {len(prompts)} prompts; one a prompt")
