"""Continuing prompts with a key-value cache: ragged batches, one device program."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.devices import compute_dtype
from gptjax.errors import UserError
from gptjax.layouts import Int8, decoding_params
from gptjax.model import (
    LayerCache,
    hidden_states,
    unembed,
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

if TYPE_CHECKING:
    from gptjax.speculation import Speculation

KVCache = tuple[LayerCache, ...]
"""One `LayerCache` a block. A token's slot is its position: a row's prompt starts at slot 0 and
what is generated follows, so that rows of any lengths share a batch without padding between."""


class DecodeState(NamedTuple):
    """What decoding carries from token to token."""

    cache: KVCache
    """What each block has seen."""
    token_B: jax.Array
    """The last token of each row, not yet in the cache."""
    length_B: jax.Array
    """Tokens of each row that are in the cache."""


class Progress(NamedTuple):
    """What generation carries from token to token. Rows need not have begun together."""

    state: DecodeState
    """The cache, and the last token of each row."""
    keys_B: jax.Array
    """A random key for each row."""
    limit_B: jax.Array
    """The most tokens to draw for each row."""
    stopped_B: jax.Array
    """Which rows a stop token has ended."""
    out_BN: jax.Array
    """The tokens drawn."""
    count_B: jax.Array
    """How many each row has, without the stop token; the next one is drawn with this index."""
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
    """Theirs."""


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


class Prompts(NamedTuple):
    """Prompts to read, and what is to be drawn for each."""

    tokens_BP: jax.Array
    """Filled up at their ends."""
    length_B: jax.Array
    """How many tokens of each row are the prompt."""
    keys_B: jax.Array
    """A random key for each row: for each sample of each prompt."""
    limit_B: jax.Array
    """The most tokens to draw for each row."""


class Draw(NamedTuple):
    """How tokens are drawn in every row, all of it traced."""

    stop_ids: jax.Array
    """Token ids that end a row, `[n]`."""
    values: FilterValues
    """The numbers of the filters."""


def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty cache for `batch` rows of up to `slots` tokens, in the configured dtype."""
    shape = (batch, config.kv_heads, slots, config.head_width)

    def empty() -> Any:
        if config.cache_dtype == "int8":
            return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))
        return jnp.zeros(shape, compute_dtype(config))

    return tuple(LayerCache(empty(), empty()) for _ in range(config.num_layers))


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
    x_BPD, extended, _ = hidden_states(params, prompts_BP, config, cache=cache, slots=slots)
    assert extended is not None
    last_B1D = jnp.take_along_axis(x_BPD, length_B[:, None, None] - 1, axis=1)
    return unembed(params, last_B1D, config)[:, 0], extended


def decode_step(
    params: Params, state: DecodeState, config: ModelConfig
) -> tuple[jax.Array, DecodeState]:
    """Reads one more token a row: `[B, V]` float32 logits of the next, and the state after."""
    x_B1D, cache, _ = hidden_states(
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
    *,
    speculation: "Speculation | None" = None,
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
        speculation: `PromptLookup` or `DraftModel`, which propose several tokens at once: the same
            tokens in fewer passes for greedy choice, and draws (others) of the same distribution.

    Returns:
        For each prompt the list of new ids, without the stop token that ended it; with
        `sampling.num_samples` of n, n lists for each prompt, one after another.

    Raises:
        UserError: if a prompt is empty, has an id outside the vocabulary, or is with the new
            tokens longer than the model's context; if there are not as many seeds as prompts; if
            `sampling` names ids outside the vocabulary or bans all of it; if `speculation` is to
            go past the context, or its draft model has another vocabulary or too small a context.
    """
    found = generate_continuations(
        params, prompt_tokens, config, sampling, key, speculation=speculation
    )
    return [row.tokens for row in found]


def generate_continuations(
    params: Params,
    prompt_tokens: Sequence[Sequence[int]],
    config: ModelConfig,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    *,
    speculation: "Speculation | None" = None,
) -> list[Continuation]:
    """As `generate`, with how each continuation ended and, if asked for, log-probabilities.

    Args:
        params: as in `generate`.
        prompt_tokens: as in `generate`.
        config: as in `generate`.
        sampling: as in `generate`; `logprobs` asks for log-probabilities.
        key: as in `generate`.
        speculation: as in `generate`.

    Returns:
        As `generate`: one for each prompt and sample, in order.

    Raises:
        UserError: as `generate` does; and if log-probabilities are asked for past a full context
            (`overflow="slide"`).
    """
    prompts = [list(map(int, prompt)) for prompt in prompt_tokens]
    _check_prompts(prompts, config, sampling)
    n = sampling.num_samples
    if sampling.overflow == "slide":
        if speculation is not None:
            raise UserError("speculation does not go past the context; set overflow='error'")
        return _slide_all(params, prompts, config, sampling, key)
    N = sampling.max_new_tokens
    if not prompts or N == 0:
        told = None if sampling.logprobs is None else []
        return [Continuation([], "length", told, told) for _ in range(len(prompts) * n)]
    ahead = 0 if speculation is None else speculation.tokens
    call = _prepare(prompts, config, sampling, key, ahead)
    if speculation is None:
        decoding = decoding_params(params, config)
        drawn = _generate(params, decoding, call.prompts, call.draw, config, call.static)
    else:
        from gptjax.speculation import check_speculation, generate_speculatively

        check_speculation(speculation, max(map(len, prompts)), N, config)
        drawn = generate_speculatively(
            params, call.prompts, call.draw, config, call.static, speculation
        )
    drawn = jax.tree.map(np.asarray, drawn)
    return [continuation(drawn, row) for row in range(len(prompts) * n)]


class Drawn(NamedTuple):
    """What `Progress` has for the caller."""

    stopped_B: Any
    """As in `Progress`."""
    out_BN: Any
    """As in `Progress`."""
    count_B: Any
    """As in `Progress`."""
    details: Details | None
    """As in `Progress`."""


def drawn_so_far(progress: Progress) -> Drawn:
    """What has been drawn, without what drawing on needs."""
    return Drawn(progress.stopped_B, progress.out_BN, progress.count_B, progress.details)


def continuation(drawn: Drawn, row: int) -> Continuation:
    """One row of what was drawn, on the host, which must have come to its end."""
    count, details = int(drawn.count_B[row]), drawn.details
    tokens = drawn.out_BN[row, :count].tolist()
    finish = "stop" if drawn.stopped_B[row] else "length"
    if details is None:
        return Continuation(tokens, finish)
    ids, logprobs = (x[row, :count].tolist() for x in details[1:])
    return Continuation(
        tokens,
        finish,
        details.logprob_BN[row, :count].tolist(),
        [list(zip(*place, strict=True)) for place in zip(ids, logprobs, strict=True)],
    )


class Static(NamedTuple):
    """What a compiled program depends on beside the model and the number of rows."""

    filters: Filters
    """Which parts of sampling are on."""
    slots: int
    """Of the cache, for each row."""
    room: int
    """How many tokens drawn fit in, for each row."""
    samples: int
    """How many rows each prompt is drawn for."""
    logprobs: int | None
    """See `Sampling.logprobs`."""


class _Call(NamedTuple):
    """A call's arguments in the shapes that it is compiled for."""

    prompts: Prompts
    draw: Draw
    static: Static


def _prepare(
    prompts: list[list[int]],
    config: ModelConfig,
    sampling: Sampling,
    key: jax.Array | None,
    ahead: int = 0,
) -> _Call:
    """A call's arguments; `ahead` tokens may be read before it is known that they are drawn."""
    N, n = sampling.max_new_tokens, sampling.num_samples
    longest = max(map(len, prompts))
    P = bucket(longest, config.context_length)
    keys_B = _all_keys(len(prompts), sampling, key)
    draw, static = split_draw(sampling, config)
    static = static._replace(
        # The last token drawn is never read, so it needs no slot.
        slots=slot_bucket(max(longest + N - 1 + ahead, P), config),
        room=bucket(N, config.context_length),
        samples=n,
    )
    limit_B = np.full(len(prompts) * n, N, np.int32)
    return _Call(pack(prompts, P, keys_B, limit_B), draw, static)


def pack(prompts: list[list[int]], width: int, keys_B: jax.Array, limit_B: Any) -> Prompts:
    """Prompts of at most `width` tokens as arrays.

    Args:
        prompts: token ids, each row of its own length.
        width: P, at least the longest.
        keys_B: a random key for each row.
        limit_B: the most tokens to draw for each.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return Prompts(jnp.asarray(padded), jnp.asarray(lengths), keys_B, jnp.asarray(limit_B))


def split_draw(sampling: Sampling, config: ModelConfig) -> tuple[Draw, Static]:
    """The traced and the static part of a `Sampling`, the latter without sizes."""
    stop = sorted({token for token in sampling.stop if isinstance(token, int)})
    # Padding by -1, which is no token, to a length that other sets of stop tokens share.
    stop_ids = np.full(bucket(max(len(stop), 1), 2**30, least=4), -1, np.int32)
    stop_ids[: len(stop)] = stop
    filters, values = split_sampling(sampling)
    told = None if sampling.logprobs is None else min(sampling.logprobs, config.vocab_size)
    static = Static(filters, slots=0, room=0, samples=1, logprobs=told)
    return Draw(jnp.asarray(stop_ids), values), static


def prompt_keys(indices: Sequence[int], sampling: Sampling, key: jax.Array | None) -> jax.Array:
    """A random key for each prompt, by its index among all."""
    if sampling.seeds is not None:
        seeds = np.array([sampling.seeds[index] for index in indices], np.uint32)
        return jax.vmap(jax.random.key)(seeds)
    base = jax.random.key(0) if key is None else key
    return jax.vmap(partial(jax.random.fold_in, base))(np.array(indices, np.int32))


def sample_keys(keys_B: jax.Array, sample_B: Any) -> jax.Array:
    """The key of a sample of a prompt, by its index; the first has the prompt's own."""
    sample_B = jnp.asarray(sample_B)
    return jnp.where(sample_B == 0, keys_B, jax.vmap(jax.random.fold_in)(keys_B, sample_B))


def _all_keys(prompts: int, sampling: Sampling, key: jax.Array | None) -> jax.Array:
    """A key for each sample of each prompt."""
    n = sampling.num_samples
    keys_B = prompt_keys(range(prompts), sampling, key)
    if n == 1:
        return keys_B
    return sample_keys(jnp.repeat(keys_B, n), np.tile(np.arange(n), prompts))


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
    progress = start(params, call.prompts, call.draw, config, call.static)
    params = decoding_params(params, config)
    steps = jnp.int32(tokens_per_dispatch)
    given = 0
    while True:
        count = int(progress.count_B[0])
        yield from np.asarray(progress.out_BN[0, given:count]).tolist()
        given = count
        if count >= N or bool(progress.stopped_B[0]):
            return
        progress = _advance_jit(params, progress, steps, call.draw, config, call.static)


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
    keys = _all_keys(len(prompts), sampling, key)
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


def read_prompts(
    params: Params, prompts: Prompts, draw: Draw, config: ModelConfig, static: Static
) -> Progress:
    """Reads the prompts and draws each row's first token.

    Args:
        params: in the form for decoding or as they are trained.
        prompts: what is read.
        draw: how to draw.
        config: the model.
        static: what the program depends on.
    """
    tokens_BP, length_B, keys_B, limit_B = prompts
    cache = init_cache(config, len(tokens_BP), static.slots)
    logits_BV, cache = prefill(params, tokens_BP, length_B, cache, config)
    history = None
    if static.filters.penalties:
        history = start_history(tokens_BP, length_B, config.vocab_size)
    if static.samples > 1:
        # Prompts are read once; from here on each sample is a row.
        each = partial(jnp.repeat, repeats=static.samples, axis=0)
        logits_BV, cache, length_B, history = jax.tree.map(
            each, (logits_BV, cache, length_B, history)
        )
    state = DecodeState(cache, jnp.zeros_like(length_B), length_B)
    progress = nothing_drawn(state, keys_B, limit_B, history, static)
    return _drawn(progress, logits_BV, draw, static)


def nothing_drawn(
    state: DecodeState,
    keys_B: jax.Array,
    limit_B: jax.Array,
    history: History | None,
    static: Static,
) -> Progress:
    """Rows that nothing has been drawn for yet.

    Args:
        state: after the prompts.
        keys_B: a random key for each row.
        limit_B: the most tokens to draw for each.
        history: of the prompts, where there are penalties.
        static: what the program depends on.
    """
    B, room = len(limit_B), static.room
    details = None
    if static.logprobs is not None:
        shape = (B, room, static.logprobs)
        details = Details(
            jnp.zeros((B, room)), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        )
    return Progress(
        state=state,
        keys_B=keys_B,
        limit_B=limit_B,
        stopped_B=jnp.zeros(B, bool),
        out_BN=jnp.zeros((B, room), jnp.int32),
        count_B=jnp.zeros(B, jnp.int32),
        history=history,
        details=details,
    )


def open_rows(progress: Progress) -> jax.Array:
    """Which rows more is to be drawn for, `[B]` bool."""
    return ~progress.stopped_B & (progress.count_B < progress.limit_B)


def advance(
    params: Params,
    progress: Progress,
    steps: jax.Array,
    draw: Draw,
    config: ModelConfig,
    static: Static,
    *,
    enough: jax.Array | int = 0,
) -> Progress:
    """Draws more tokens for the rows that are open; the others stay as they are.

    Args:
        params: with unstacked blocks.
        progress: as it is.
        steps: the most tokens to draw for a row, a scalar.
        draw: how to draw.
        config: the model.
        static: how the program is compiled.
        enough: once no more rows than this are open, nothing more is drawn.
    """

    def unfinished(carry: tuple[jax.Array, Progress]) -> jax.Array:
        step, progress = carry
        return (step < steps) & (jnp.sum(open_rows(progress)) > enough)

    def body(carry: tuple[jax.Array, Progress]) -> tuple[jax.Array, Progress]:
        step, progress = carry
        logits_BV, state = decode_step(params, progress.state, config)
        # A row that has ended reads its last token again, in the same slot: it does not grow beyond
        # the cache or the context while it waits for the others.
        length_B = jnp.where(open_rows(progress), state.length_B, progress.state.length_B)
        progress = progress._replace(state=state._replace(length_B=length_B))
        return step + 1, _drawn(progress, logits_BV, draw, static)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), progress))[1]


def _drawn(progress: Progress, logits_BV: jax.Array, draw: Draw, static: Static) -> Progress:
    """With one more token in each open row, drawn from its logits."""
    # A key for each row and index: what a row draws does not depend on when others begin or end.
    step_keys = jax.vmap(jax.random.fold_in)(progress.keys_B, progress.count_B)
    token_B = sample(logits_BV, step_keys, static.filters, draw.values, progress.history)
    return record(progress, token_B, open_rows(progress), logits_BV, draw, static)


def record(
    progress: Progress,
    token_B: jax.Array,
    open_B: jax.Array,
    logits_BV: jax.Array,
    draw: Draw,
    static: Static,
) -> Progress:
    """With one more token in some rows.

    Args:
        progress: as it is.
        token_B: the token of each row.
        open_B: bool, the rows that get theirs.
        logits_BV: what the model says of the token, before penalties and filters.
        draw: which tokens stop a row.
        static: how the program is compiled.
    """
    count_B, history, details = progress.count_B, progress.history, progress.details
    # Past the end for the other rows, where writing is dropped.
    if history is not None:
        history = extend_history(history, jnp.where(open_B, token_B, logits_BV.shape[-1]))
    places = jnp.arange(len(count_B)), jnp.where(open_B, count_B, static.room)

    def write(x: jax.Array, new: jax.Array) -> jax.Array:
        return x.at[places].set(new, mode="drop")

    if details is not None and static.logprobs is not None:
        logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        top_BK, ids_BK = jax.lax.top_k(logprobs_BV, static.logprobs)
        details = Details(
            write(details.logprob_BN, jnp.take_along_axis(logprobs_BV, token_B[:, None], 1)[:, 0]),
            write(details.top_ids_BNK, ids_BK),
            write(details.top_logprobs_BNK, top_BK),
        )
    is_stop_B = jnp.isin(token_B, draw.stop_ids)
    return progress._replace(
        state=progress.state._replace(token_B=jnp.where(open_B, token_B, progress.state.token_B)),
        stopped_B=progress.stopped_B | (open_B & is_stop_B),
        out_BN=write(progress.out_BN, token_B),
        count_B=count_B + (open_B & ~is_stop_B),
        history=history,
        details=details,
    )


@partial(jax.jit, static_argnames=("config", "static"))
def _generate(
    params: Params,
    decoding: Params,
    prompts: Prompts,
    draw: Draw,
    config: ModelConfig,
    static: Static,
) -> Drawn:
    """The whole of a batch in one program."""
    progress = read_prompts(params, prompts, draw, config, static)
    steps = jnp.max(prompts.limit_B)
    return drawn_so_far(advance(decoding, progress, steps, draw, config, static))


start = jax.jit(read_prompts, static_argnames=("config", "static"))
_advance_jit = jax.jit(advance, static_argnames=("config", "static"), donate_argnames="progress")


def bucket(size: int, limit: int, least: int = 16, parts: int = 1) -> int:
    """The next power of two, at most the limit: few shapes, so few compilations.

    Args:
        size: at least 1.
        limit: the most.
        least: the least, itself a power of two.
        parts: how many sizes there are up to the next power of two.
    """
    power = max(least, 1 << (size - 1).bit_length())
    step = max(least, power // (2 * parts))
    return min(-(-size // step) * step, limit)


def slot_bucket(slots: int, config: ModelConfig) -> int:
    """How many slots a cache gets that needs so many.

    In finer steps than other lengths, since every decode step reads all of the cache.
    """
    return bucket(slots, config.context_length, parts=4)


def _check_prompts(prompts: list[list[int]], config: ModelConfig, sampling: Sampling) -> None:
    otherwise = ", or set overflow='slide' to go on from the last half of a full context"
    for row, prompt in enumerate(prompts):
        check_prompt(f"prompt {row}", prompt, config)
        if sampling.overflow == "error":
            check_length(f"prompt {row}", prompt, sampling.max_new_tokens, config, otherwise)
    check_sampling(config, sampling)
    if sampling.seeds is not None and len(sampling.seeds) != len(prompts):
        raise UserError(f"{len(sampling.seeds)} seeds for {len(prompts)} prompts; one a prompt")


def check_prompt(name: str, prompt: list[int], config: ModelConfig) -> None:
    """Raises UserError for a prompt, told by its name, that is empty or not of this model.

    Raises:
        UserError: for such a prompt.
    """
    if not prompt:
        raise UserError(f"{name} is empty; give at least one token")
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"{name} has token id {token}, but ids run from 0 to {config.vocab_size - 1}; is "
                "it this model's tokenizer?"
            )


def check_length(
    name: str, prompt: list[int], max_new_tokens: int, config: ModelConfig, otherwise: str = ""
) -> None:
    """Raises UserError for a prompt that is too long; `otherwise` names one more way out.

    Args:
        name: of the prompt, for errors.
        prompt: its ids.
        max_new_tokens: that are to follow.
        config: the model.
        otherwise: one more way out, for the error.

    Raises:
        UserError: if both exceed the model's context.
    """
    if len(prompt) + max_new_tokens > config.context_length:
        raise UserError(
            f"{name} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the model's "
            f"context of {config.context_length}; shorten the prompt or ask for at most "
            f"{max(config.context_length - len(prompt), 0)} new tokens{otherwise}"
        )


def check_sampling(config: ModelConfig, sampling: Sampling) -> None:
    """Raises UserError where `sampling` names ids that the model has not, or bans all it has.

    Raises:
        UserError: for such ids.
    """
    named = [token for token, _ in sampling.logit_bias] + list(sampling.banned)
    for token in named:
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"logit_bias or banned names token id {token}, but ids run from 0 to "
                f"{config.vocab_size - 1}"
            )
    if len(set(sampling.banned)) == config.vocab_size:
        raise UserError("banned holds the whole vocabulary; leave at least one token")
