"""From logits to the next token."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp

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
        stop: token ids, and for text strings, that end a continuation; they are not part of it.
        seeds: one integer a row. A row's draw then depends on its own seed alone, neither on the
            key nor on the rows beside it.
        overflow: what happens where a prompt and its new tokens exceed the model's context:
            "error"; or "slide", which continues from the last half of the context each time that
            the context is full, row by row.

    Filters apply in the order temperature, top-k, top-p, min-p.
    """

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: tuple[int | str, ...] = ()
    seeds: tuple[int, ...] | None = None
    overflow: Literal["error", "slide"] = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
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
    """Which parts of the sampling program are on: what a compiled program depends on."""

    greedy: bool
    top_k: bool
    top_p: bool
    min_p: bool


class FilterValues(NamedTuple):
    """The numbers of the filters, traced, so that a new one does not recompile."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


def split_sampling(sampling: Sampling) -> tuple[Filters, FilterValues]:
    """The static and the traced part of a `Sampling`."""
    filters = Filters(
        greedy=sampling.temperature == 0,
        top_k=sampling.top_k is not None,
        top_p=sampling.top_p is not None and sampling.top_p < 1,
        min_p=bool(sampling.min_p),
    )
    values = FilterValues(
        temperature=jnp.float32(sampling.temperature or 1.0),
        top_k=jnp.int32(min(sampling.top_k or 1, 2**31 - 1)),
        top_p=jnp.float32(sampling.top_p or 1.0),
        min_p=jnp.float32(sampling.min_p or 0.0),
    )
    return filters, values


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, filters: Filters, values: FilterValues
) -> jax.Array:
    """Draws one token a row, `[B]` int32.

    Args:
        logits_BV: `[B, V]` float32.
        keys_B: `[B]` random keys, one a row, so that no row's draw depends on another.
        filters: which filters are on (static).
        values: their numbers (traced).
    """
    if filters.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(logits_BV, filters, values)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


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
    return logits_BV
