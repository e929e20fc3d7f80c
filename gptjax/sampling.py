"""From logits to the next token."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How continuations are drawn.

    Attributes:
        max_new_tokens: the most tokens to add to each prompt.
        temperature: divides the logits; 0 is greedy.
        top_k: keep only the k likeliest tokens; None keeps all, as does a k beyond the vocabulary.
        top_p: keep the likeliest tokens that together reach this probability (Holtzman et al.
            2020); None or 1 keeps all.
        min_p: keep tokens at least this likely relative to the likeliest (Nguyen et al. 2024).
        typical_p: keep the tokens whose surprise is nearest to the expected one, that together
            reach this probability (Meister et al. 2023); None or 1 keeps all.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that
            the prompt or the continuation holds (Keskar et al. 2019); 1 is none.
        presence_penalty: subtracted from the logits of tokens that the continuation holds.
        frequency_penalty: subtracted from them once for each time that it holds them.
        logit_bias: added to the logits of token ids: a mapping, or pairs of id and number.
        banned: token ids that are never drawn.
        num_samples: how many continuations of each prompt, one after another in the result.
        logprobs: how many of the likeliest tokens `generate_continuations` tells with their
            log-probabilities at each place; 0 tells that of the drawn token alone, None nothing.
        stop: token ids, and for text strings, that end a continuation; they are not part of it.
        seeds: one integer a prompt. A prompt's draws then depend on its own seed alone, neither on
            the key nor on the prompts beside it.
        overflow: what happens where a prompt and its new tokens exceed the model's context:
            "error"; or "slide", which continues from the last half of the context each time that
            the context is full, row by row.

    Penalties and biases come first, for greedy choice too; then temperature, top-k, top-p, min-p
    and typical-p.

    Raises:
        UserError: if a value is out of range.
    """

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()
    num_samples: int = 1
    logprobs: int | None = None
    stop: tuple[int | str, ...] = ()
    seeds: tuple[int, ...] | None = None
    overflow: Literal["error", "slide"] = "error"

    def __post_init__(self) -> None:
        pairs: Any = self.logit_bias
        pairs = pairs.items() if isinstance(pairs, Mapping) else pairs
        object.__setattr__(self, "logit_bias", tuple((int(i), float(b)) for i, b in pairs))
        object.__setattr__(self, "banned", tuple(map(int, self.banned)))
        stop = (self.stop,) if isinstance(self.stop, int | str) else self.stop
        object.__setattr__(self, "stop", tuple(stop))
        if "" in self.stop:
            raise UserError("stop holds an empty string, which stands everywhere; leave it out")
        if self.seeds is not None:
            object.__setattr__(self, "seeds", tuple(self.seeds))
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; at least 0")
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; at least 1, or None to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; from 0 to 1")
        if self.typical_p is not None and not 0 < self.typical_p <= 1:
            raise UserError(f"typical_p is {self.typical_p}; above 0 and at most 1")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; above 0, 1 is none")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}; a finite number, 0 is none")
        for token, bias in self.logit_bias:
            if math.isnan(bias) or bias == math.inf:
                raise UserError(f"logit_bias of token {token} is {bias}; a number, or -inf")
        if self.num_samples < 1:
            raise UserError(f"num_samples is {self.num_samples}; at least 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise UserError(f"logprobs is {self.logprobs}; at least 0, or None")

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed.

        Raises:
            UserError: if a field is unknown or a value illegal.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UserError(f"unknown field {name!r} of Sampling{nearest(name, known)}")
        return dataclasses.replace(self, **changes)


class Filters(NamedTuple):
    """Which parts of the sampling program are on: what a compiled program depends on.

    Attributes:
        greedy: whether the likeliest token is taken.
        top_k: and likewise the other three: whether this filter is on.
        top_p: likewise.
        min_p: likewise.
        typical_p: likewise.
        penalties: whether any penalty is on.
        bias: whether tokens are biased or banned.
    """

    greedy: bool
    top_k: bool
    top_p: bool
    min_p: bool
    typical_p: bool
    penalties: bool
    bias: bool


class FilterValues(NamedTuple):
    """The numbers of the filters, traced, so that a new one does not recompile.

    Attributes:
        temperature: 1 where the likeliest token is taken.
        top_k: as `Sampling` has it, or anything where it is off; likewise the rest.
        top_p: likewise.
        min_p: likewise.
        typical_p: likewise.
        repetition_penalty: likewise.
        presence_penalty: likewise.
        frequency_penalty: likewise.
        bias_ids: `[n]` int32 token ids, filled up with ones beyond every vocabulary.
        biases: `[n]` float32, what is added to the logits of these.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    bias_ids: jax.Array
    biases: jax.Array


class History(NamedTuple):
    """What penalties look at."""

    seen_BV: jax.Array
    """bool: which tokens each row's prompt or continuation holds."""
    counts_BV: jax.Array
    """int32: how often each row's continuation holds each token."""


_NO_TOKEN = 2**30


def split_sampling(sampling: Sampling) -> tuple[Filters, FilterValues]:
    """The static and the traced part of a `Sampling`."""
    biases = [*sampling.logit_bias, *((token, -math.inf) for token in sampling.banned)]
    # Lengths are powers of two, so that sets of few sizes compile.
    size = 1 << max(len(biases) - 1, 3).bit_length() if biases else 0
    ids = np.full(size, _NO_TOKEN, np.int32)
    numbers = np.zeros(size, np.float32)
    for place, (token, bias) in enumerate(biases):
        ids[place], numbers[place] = token, bias
    filters = Filters(
        greedy=sampling.temperature == 0,
        top_k=sampling.top_k is not None,
        top_p=sampling.top_p is not None and sampling.top_p < 1,
        min_p=bool(sampling.min_p),
        typical_p=sampling.typical_p is not None and sampling.typical_p < 1,
        penalties=sampling.repetition_penalty != 1
        or bool(sampling.presence_penalty or sampling.frequency_penalty),
        bias=bool(biases),
    )
    values = FilterValues(
        temperature=jnp.float32(sampling.temperature or 1.0),
        top_k=jnp.int32(min(sampling.top_k or 1, 2**31 - 1)),
        top_p=jnp.float32(sampling.top_p or 1.0),
        min_p=jnp.float32(sampling.min_p or 0.0),
        typical_p=jnp.float32(sampling.typical_p or 1.0),
        repetition_penalty=jnp.float32(sampling.repetition_penalty),
        presence_penalty=jnp.float32(sampling.presence_penalty),
        frequency_penalty=jnp.float32(sampling.frequency_penalty),
        bias_ids=jnp.asarray(ids),
        biases=jnp.asarray(numbers),
    )
    return filters, values


def start_history(prompts_BP: jax.Array, length_B: jax.Array, vocab_size: int) -> History:
    """The history of rows that have drawn nothing yet.

    Args:
        prompts_BP: `[B, P]` token ids, filled up at their ends.
        length_B: `[B]`, how many of them are real.
        vocab_size: V.
    """
    B, P = prompts_BP.shape
    real_BP = jnp.arange(P)[None] < length_B[:, None]
    ids_BP = jnp.where(real_BP, prompts_BP, _NO_TOKEN)
    rows = jnp.arange(B)[:, None]
    seen_BV = jnp.zeros((B, vocab_size), bool).at[rows, ids_BP].set(True, mode="drop")
    return History(seen_BV, jnp.zeros((B, vocab_size), jnp.int32))


def extend_history(history: History, token_B: jax.Array) -> History:
    """With one more token a row."""
    rows = jnp.arange(token_B.shape[0])
    return History(
        history.seen_BV.at[rows, token_B].set(True), history.counts_BV.at[rows, token_B].add(1)
    )


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    filters: Filters,
    values: FilterValues,
    history: History | None = None,
) -> jax.Array:
    """Draws one token a row, `[B]` int32.

    Args:
        logits_BV: `[B, V]` float32.
        keys_B: `[B]` random keys, one a row, so that no row's draw depends on another.
        filters: which filters are on (static).
        values: their numbers (traced).
        history: what the rows hold; needed where there are penalties.
    """
    logits_BV = adjust_logits(logits_BV, filters, values, history)
    if filters.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(logits_BV, filters, values)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def adjust_logits(
    logits_BV: jax.Array, filters: Filters, values: FilterValues, history: History | None
) -> jax.Array:
    """Logits with penalties and biases.

    Args:
        logits_BV: `[B, V]` float32.
        filters: which parts are on.
        values: their numbers.
        history: what the rows hold, where there are penalties.
    """
    if filters.penalties:
        assert history is not None
        penalty = values.repetition_penalty
        penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(history.seen_BV, penalized_BV, logits_BV)
        logits_BV -= values.presence_penalty * (history.counts_BV > 0)
        logits_BV -= values.frequency_penalty * history.counts_BV
    if filters.bias:
        logits_BV = logits_BV.at[:, values.bias_ids].add(values.biases[None], mode="drop")
    return logits_BV


def filter_logits(logits_BV: jax.Array, filters: Filters, values: FilterValues) -> jax.Array:
    """Logits divided by the temperature, -inf for the tokens that the filters drop."""
    V = logits_BV.shape[-1]
    logits_BV = logits_BV / values.temperature
    if filters.top_k or filters.top_p:
        # One sort serves both; a filter is then a threshold, so that ties stay together.
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        if filters.top_k:
            last = jnp.minimum(values.top_k, V) - 1
            threshold = jax.lax.dynamic_index_in_dim(sorted_BV, last, axis=1)
            logits_BV = jnp.where(logits_BV < threshold, -jnp.inf, logits_BV)
            sorted_BV = jnp.where(jnp.arange(V) > last, -jnp.inf, sorted_BV)
        if filters.top_p:
            probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
            # A token stays while those before it have not reached p, so the likeliest always does.
            kept_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < values.top_p
            threshold = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
            logits_BV = jnp.where(logits_BV < threshold, -jnp.inf, logits_BV)
    if filters.min_p:
        floor = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(values.min_p)
        logits_BV = jnp.where(logits_BV < floor, -jnp.inf, logits_BV)
    if filters.typical_p:
        logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        probs_BV = jnp.exp(logp_BV)
        entropy_B1 = -jnp.sum(
            jnp.where(probs_BV > 0, probs_BV * logp_BV, 0), axis=-1, keepdims=True
        )
        distance_BV = jnp.abs(-logp_BV - entropy_B1)
        ordered_BV, mass_BV = jax.lax.sort((distance_BV, probs_BV), dimension=1, num_keys=1)
        kept_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV < values.typical_p
        farthest = jnp.max(jnp.where(kept_BV, ordered_BV, -jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(distance_BV > farthest, -jnp.inf, logits_BV)
    return logits_BV
