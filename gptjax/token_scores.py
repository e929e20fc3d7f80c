"""What a model makes of given tokens: windows of long rows, batches of like lengths, few logits.

B rows, T tokens, D model width, V vocabulary, S = B · T places of a batch, n places of one block.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation import bucket
from gptjax.loss import LOGITS_AT_ONCE
from gptjax.model import hidden_states, unembed
from gptjax.params import Params

BLOCK = 256
"""The most places whose logits are computed at once: enough to keep a device busy, and few enough
that little is wasted where a batch has fewer tokens to score."""


class Window(NamedTuple):
    """Tokens `[start, end)` of a row are read, and tokens `[first, end]` are scored by that.

    Attributes:
        row: its number.
        start: the first token that is read.
        end: where reading ends.
        first: the first token that is scored.
    """

    row: int
    start: int
    end: int
    first: int


class TokenScores(NamedTuple):
    """Of each token: the logarithm of its probability, the entropy before it, and its rank.

    Attributes:
        logprobs: float32, in nats.
        entropies: float32, in nats.
        ranks: int32, how many tokens of the vocabulary are strictly likelier.
    """

    logprobs: np.ndarray
    entropies: np.ndarray
    ranks: np.ndarray


def windows(row: int, length: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that score every token of a row but its first, each of them once.

    A window reads `context` tokens and begins `stride` tokens after the one before. It scores what
    those before it have not, so that a token has at least `context - stride` tokens before it, or
    all there are.

    Args:
        row: its number.
        length: tokens it has.
        context: tokens that a window reads.
        stride: tokens from one window to the next.
    """
    start, first = 0, 1
    while first < length:
        # The last token is only predicted, never read.
        end = min(start + context, length - 1)
        yield Window(row, start, end, first)
        start, first = start + stride, end + 1


def score_windows(
    params: Params,
    config: ModelConfig,
    rows: Sequence[np.ndarray],
    parts: Sequence[Window],
    *,
    batch_size: int,
) -> Iterator[tuple[int, TokenScores]]:
    """Scores the tokens that windows of rows ask for.

    The longest windows come first and those of like lengths share a batch, filled up to a power of
    two or half as much again: compiled once for each such length, and for fewer rows in the last
    batch. Logits are computed where a token is scored and nowhere else, in float32 and in blocks,
    so that those of all tokens are never held.

    Args:
        params: as `init_params` makes them.
        config: the model.
        rows: token ids of each row.
        parts: windows of them, none longer than the model's context.
        batch_size: the most windows that are read at once.

    Yields:
        The index of a window and the scores of its tokens from `first` to `end`, as batches are
        complete.

    Raises:
        UserError: if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; at least 1")
    order = sorted(range(len(parts)), key=lambda i: parts[i].start - parts[i].end)
    running: tuple[list[int], Any] | None = None
    # The next batch is under way while the last one is fetched.
    for start in itertools.chain(range(0, len(order), batch_size), [None]):
        before, running = running, None
        if start is not None:
            batch = order[start : start + batch_size]
            running = batch, _read(params, config, rows, [parts[i] for i in batch], batch_size)
        if before is not None:
            yield from _split(*before, parts)


def _read(
    params: Params,
    config: ModelConfig,
    rows: Sequence[np.ndarray],
    batch: list[Window],
    batch_size: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reads windows as one batch; the scores of all their tokens, one window after another."""
    longest = max(window.end - window.start for window in batch)
    B = bucket(len(batch), batch_size, least=1)
    T = bucket(longest, config.context_length, parts=2)
    block = max(min(LOGITS_AT_ONCE // config.vocab_size, BLOCK, B * T), 1)
    # Filled up at the end of rows, which nothing before it sees.
    tokens_BT = np.zeros((B, T), np.int32)
    # As long as it can be needed, so that the number of tokens to score compiles nothing.
    place_S, target_S = np.zeros((2, -(-B * T // block) * block), np.int32)
    count = 0
    for b, (row, start, end, first) in enumerate(batch):
        tokens_BT[b, : end - start] = rows[row][start:end]
        more = end + 1 - first
        place_S[count : count + more] = np.arange(first - 1 - start, end - start) + b * T
        target_S[count : count + more] = rows[row][first : end + 1]
        count += more
    return _scored(params, tokens_BT, place_S, target_S, np.int32(count), config, block)


def _split(
    batch: list[int], read: tuple[jax.Array, ...], parts: Sequence[Window]
) -> Iterator[tuple[int, TokenScores]]:
    values, at = jax.device_get(read), 0
    for index in batch:
        end = at + parts[index].end + 1 - parts[index].first
        yield index, TokenScores(*(part[at:end] for part in values))
        at = end


@partial(jax.jit, static_argnames=("config", "block"))
def _scored(
    params: Params,
    tokens_BT: jax.Array,
    place_S: jax.Array,
    target_S: jax.Array,
    count: jax.Array,
    config: ModelConfig,
    block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability, entropy and rank `[S]` of the first `count` targets, each at its place."""
    x_BTD, *_ = hidden_states(params, tokens_BT, config)
    x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])

    def read(i: jax.Array, values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        place_n, target_n = (
            jax.lax.dynamic_slice_in_dim(part, i * block, block) for part in (place_S, target_S)
        )
        logits_nV = unembed(params, x_SD[place_n][None], config)[0]
        logprobs_nV = jax.nn.log_softmax(logits_nV)
        logprob_n1 = jnp.take_along_axis(logprobs_nV, target_n[:, None], axis=-1)
        entropy_n = -jnp.sum(jnp.exp(logprobs_nV) * logprobs_nV, axis=-1)
        # By logits: the logarithms of two probabilities may round to one number.
        target_n1 = jnp.take_along_axis(logits_nV, target_n[:, None], axis=-1)
        rank_n = jnp.sum(logits_nV > target_n1, axis=-1, dtype=jnp.int32)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new, i * block, axis=0)
            for old, new in zip(values, (logprob_n1[:, 0], entropy_n, rank_n), strict=True)
        )

    none_S = jnp.zeros(len(place_S), jnp.float32)
    blocks = (count + block - 1) // block
    logprob, entropy, rank = jax.lax.fori_loop(
        0, blocks, read, (none_S, none_S, none_S.astype(jnp.int32))
    )
    return logprob, entropy, rank
