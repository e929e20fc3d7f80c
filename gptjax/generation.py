"""Continuing prompts with a key-value cache: ragged batches, one device program."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import (
    LayerCache,
    Model,
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
        params: with unstacked blocks (`unstack_blocks`).
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
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    P = _bucket(int(lengths.max()), config.context_length)
    # The last token drawn is never read, so it needs no slot.
    S = _bucket(int(lengths.max()) + N - 1, config.context_length)
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
    out_BN, count_B = _generate(
        unstack_blocks(params, config),
        jnp.asarray(padded),
        jnp.asarray(lengths),
        keys_B,
        jnp.asarray(stop_ids),
        jnp.int32(N),
        values,
        config,
        filters,
        S,
        _bucket(N, config.context_length),
    )
    out, counts = np.asarray(out_BN), np.asarray(count_B)
    return [out[row, : counts[row]].tolist() for row in range(len(prompts))]


def generate_text(
    model: Model,
    prompts: str | Sequence[str],
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
) -> list[str]:
    """Continues texts.

    Args:
        model: with a tokenizer.
        prompts: one text or several. An empty one starts from the tokenizer's end-of-text token.
        sampling: how to draw. The tokenizer's end-of-text token stops a row as well as
            `sampling.stop` does.
        key: random key; None is `jax.random.key(0)`.

    Returns:
        The continuations, without the prompts, each cut before the first stop string.

    Raises:
        UserError: if the model has no tokenizer, a text is empty and the tokenizer has no
            end-of-text token, and as `generate` does.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError("this model has no tokenizer; use generate() with token ids")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    start = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = [tokenizer.encode(text) or start for text in texts]
    stop_ids = tuple(stop for stop in sampling.stop if isinstance(stop, int)) + tuple(start)
    rows = generate(model.params, ids, model.config, sampling.replace(stop=stop_ids), key)
    continuations = []
    for row in rows:
        text = tokenizer.decode(row)
        ends = [text.find(stop) for stop in sampling.stop if isinstance(stop, str)]
        continuations.append(text[: min([end for end in ends if end >= 0], default=None)])
    return continuations


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


@partial(jax.jit, static_argnames=("config", "filters", "slots", "room"))
def _generate(
    params: Params,
    prompts_BP: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    stop_ids: jax.Array,
    max_new: jax.Array,
    values: FilterValues,
    config: ModelConfig,
    filters: Filters,
    slots: int,
    room: int,
) -> tuple[jax.Array, jax.Array]:
    """New tokens `[B, room]` and how many of them each row has."""
    B = prompts_BP.shape[0]

    def draw(logits_BV: jax.Array, index: jax.Array) -> jax.Array:
        # A key for each row and index: what a row draws does not depend on when others end.
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
        return sample(logits_BV, step_keys, filters, values)

    logits_BV, cache = prefill(params, prompts_BP, length_B, init_cache(config, B, slots), config)
    first_B = draw(logits_BV, jnp.int32(0))
    state = DecodeState(cache, first_B, length_B)
    done_B = jnp.isin(first_B, stop_ids)
    out_BN = jnp.zeros((B, room), jnp.int32).at[:, 0].set(first_B)
    count_B = (~done_B).astype(jnp.int32)

    def unfinished(carry: tuple) -> jax.Array:
        index, _, done_B, _, _ = carry
        return (index < max_new) & ~jnp.all(done_B)

    def body(carry: tuple) -> tuple:
        index, state, done_B, out_BN, count_B = carry
        logits_BV, state = decode_step(params, state, config)
        token_B = draw(logits_BV, index)
        done_B = done_B | jnp.isin(token_B, stop_ids)
        out_BN = jax.lax.dynamic_update_index_in_dim(out_BN, token_B, index, axis=1)
        count_B = count_B + ~done_B
        return index + 1, state._replace(token_B=token_B), done_B, out_BN, count_B

    carry = (jnp.int32(1), state, done_B, out_BN, count_B)
    _, _, _, out_BN, count_B = jax.lax.while_loop(unfinished, body, carry)
    return out_BN, count_B


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
