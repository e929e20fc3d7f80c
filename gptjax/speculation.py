"""Speculative decoding: several tokens proposed cheaply, then verified in one pass.

Every token has exactly the distribution that it has without (Leviathan et al. 2023; Chen et al.
2023), and greedy choice the same tokens: a proposal x, drawn from q, is kept with probability
min(1, p(x) / q(x)), and where it is not, the token is drawn from max(0, p - q), normalized. Here p
is the model's distribution after penalties, temperature and filters.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation import (
    DecodeState,
    Draw,
    Drawn,
    KVCache,
    Progress,
    Prompts,
    Static,
    decode_step,
    drawn_so_far,
    init_cache,
    open_rows,
    prefill,
    read_prompts,
    record,
)
from gptjax.layouts import decoding_params
from gptjax.model import hidden_states, unembed
from gptjax.params import Params
from gptjax.sampling import (
    Filters,
    FilterValues,
    History,
    adjust_logits,
    extend_history,
    filter_logits,
)


@dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Proposes what followed the last time that the text ended as it does now (Saxena 2023).

    It pays where the continuation repeats the prompt or itself: copying, editing, summaries, code.

    Attributes:
        tokens: how many to propose at once.
        ngram: the most last tokens that are looked for; the longest match wins, then the latest.
    """

    tokens: int = 8
    ngram: int = 3

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if self.ngram < 1:
            raise UserError(f"ngram is {self.ngram}; at least 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class DraftModel:
    """Proposes what a smaller model with the same vocabulary draws.

    Attributes:
        params: of the smaller model.
        config: of the smaller model.
        tokens: how many to propose at once.
    """

    params: Params
    config: ModelConfig
    tokens: int = 4

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)


Speculation = PromptLookup | DraftModel


def _check_tokens(tokens: int) -> None:
    if tokens < 1:
        raise UserError(f"tokens is {tokens}; propose at least 1 at once")


class Plan(NamedTuple):
    """The static part of a `Speculation`."""

    tokens: int
    """How many are proposed at once."""
    ngram: int
    """The most last tokens that are looked for."""
    draft: ModelConfig | None
    """The draft model; None where the prompt is looked up."""


class Carry(NamedTuple):
    """What goes from pass to pass."""

    progress: Progress
    """What generation carries without proposals."""
    text_BS: jax.Array
    """The tokens of each row, drawn ones too, each in the place that is its slot."""
    draft_cache: KVCache | None
    """Of the draft model: holds what the model's own cache holds."""


class Proposals(NamedTuple):
    """What is proposed after the last token of each row."""

    tokens_BK: jax.Array
    """-1 where nothing is."""
    probs_BKV: jax.Array | None
    """The distributions that they were drawn from; None where they were not drawn."""


def check_speculation(
    speculation: Speculation, longest: int, max_new_tokens: int, config: ModelConfig
) -> None:
    """Raises UserError for a draft model that cannot serve.

    Args:
        speculation: what proposes.
        longest: tokens of the longest prompt.
        max_new_tokens: that are to follow.
        config: the model whose tokens are proposed.

    Raises:
        UserError: if the draft model's vocabulary is another, or its context too short.
    """
    if not isinstance(speculation, DraftModel):
        return
    draft = speculation.config
    if draft.vocab_size != config.vocab_size:
        raise UserError(
            f"the draft model has a vocabulary of {draft.vocab_size}, the model one of "
            f"{config.vocab_size}; both must have the same tokens"
        )
    if longest + max_new_tokens > draft.context_length:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the draft model's "
            f"context of {draft.context_length}; shorten them, or use another draft model"
        )


def generate_speculatively(
    params: Params,
    prompts: Prompts,
    draw: Draw,
    config: ModelConfig,
    static: Static,
    speculation: Speculation,
) -> Drawn:
    """As `generation` draws without; `static.slots` has room for the proposals of the last pass.

    Args:
        params: of the model.
        prompts: what is read.
        draw: how to draw.
        config: the model.
        static: what the program depends on.
        speculation: what proposes.
    """
    draft, draft_params = None, None
    if isinstance(speculation, DraftModel):
        draft = speculation.config
        draft_params = decoding_params(speculation.params, draft)
    ngram = speculation.ngram if isinstance(speculation, PromptLookup) else 0
    plan = Plan(speculation.tokens, ngram, draft)
    decoding = decoding_params(params, config)
    return _generate(params, decoding, draft_params, prompts, draw, config, static, plan)


@partial(jax.jit, static_argnames=("config", "static", "plan"))
def _generate(
    params: Params,
    decoding: Params,
    draft_params: Params | None,
    prompts: Prompts,
    draw: Draw,
    config: ModelConfig,
    static: Static,
    plan: Plan,
) -> Drawn:
    """The whole of a batch in one program."""
    progress = read_prompts(params, prompts, draw, config, static)
    each = partial(jnp.repeat, repeats=static.samples, axis=0)
    P = prompts.tokens_BP.shape[1]
    # One more than slots, for the last token drawn, which is never read.
    text_BS = jnp.pad(each(prompts.tokens_BP), ((0, 0), (0, static.slots + 1 - P)))
    rows = jnp.arange(len(text_BS))
    text_BS = text_BS.at[rows, progress.state.length_B].set(progress.state.token_B)
    draft_cache = None
    if plan.draft is not None:
        assert draft_params is not None
        B = len(prompts.tokens_BP)
        cache = init_cache(plan.draft, B, static.slots)
        _, cache = prefill(draft_params, prompts.tokens_BP, prompts.length_B, cache, plan.draft)
        draft_cache = jax.tree.map(each, cache)

    def unfinished(carry: Carry) -> jax.Array:
        return jnp.any(open_rows(carry.progress))

    def body(carry: Carry) -> Carry:
        if plan.draft is None:
            proposals = look_up(carry, plan)
        else:
            assert draft_params is not None
            proposals, cache = ask_draft(draft_params, carry, draw, static.filters, plan)
            carry = carry._replace(draft_cache=cache)
        return verify(decoding, carry, proposals, draw, config, static)

    carry = jax.lax.while_loop(unfinished, body, Carry(progress, text_BS, draft_cache))
    return drawn_so_far(carry.progress)


def look_up(carry: Carry, plan: Plan) -> Proposals:
    """What followed the longest earlier occurrence of each row's last tokens."""
    text_BS, last_B = carry.text_BS, carry.progress.state.length_B
    S = text_BS.shape[1]
    place_S = jnp.arange(S)
    matched_BS = jnp.zeros(text_BS.shape, jnp.int32)
    so_far_BS = place_S[None] < last_B[:, None]
    for back in range(plan.ngram):
        # Whether the token `back` before each place is the one `back` before the last.
        sought_B1 = jnp.take_along_axis(text_BS, jnp.maximum(last_B - back, 0)[:, None], axis=1)
        shifted_BS = jnp.pad(text_BS, ((0, 0), (back, 0)), constant_values=-1)[:, :S]
        so_far_BS &= shifted_BS == sought_B1
        matched_BS += so_far_BS
    # The longest match, and of those the latest.
    end_B = jnp.argmax(matched_BS * S + place_S[None], axis=1)
    found_B1 = jnp.max(matched_BS, axis=1, keepdims=True) > 0
    # Beyond the last token, what would follow if the text went on repeating.
    period_B1 = jnp.maximum(last_B - end_B, 1)[:, None]
    source_BK = end_B[:, None] + 1 + jnp.arange(plan.tokens)[None] % period_B1
    tokens_BK = jnp.take_along_axis(text_BS, jnp.minimum(source_BK, S - 1), axis=1)
    return Proposals(jnp.where(found_B1, tokens_BK, -1), None)


def ask_draft(
    params: Params, carry: Carry, draw: Draw, filters: Filters, plan: Plan
) -> tuple[Proposals, KVCache]:
    """What the draft model draws, one token after another.

    Args:
        params: the draft model's.
        carry: the texts, and its cache.
        draw: how to draw.
        filters: which parts of sampling are on.
        plan: how many to propose.

    Returns:
        The proposals, and the extended cache.
    """
    config, progress = plan.draft, carry.progress
    assert config is not None
    assert carry.draft_cache is not None
    state = DecodeState(carry.draft_cache, progress.state.token_B, progress.state.length_B)

    def step(inner: tuple[DecodeState, History | None], index: jax.Array):
        state, history = inner
        logits_BV, state = decode_step(params, state, config)
        logits_BV = adjust_logits(logits_BV, filters, draw.values, history)
        if filters.greedy:
            token_B, probs_BV = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), None
        else:
            logits_BV = filter_logits(logits_BV, filters, draw.values)
            keys_B = _keys(progress, progress.count_B + index, 2)
            token_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
            probs_BV = jax.nn.softmax(logits_BV, axis=-1)
        if history is not None:
            history = extend_history(history, token_B)
        return (state._replace(token_B=token_B), history), (token_B, probs_BV)

    # One step more than proposals: it writes the last of them into the cache.
    steps = jnp.arange(plan.tokens + 1)
    (state, _), (tokens_KB, probs_KBV) = jax.lax.scan(step, (state, progress.history), steps)
    probs_BKV = None if probs_KBV is None else probs_KBV[:-1].swapaxes(0, 1)
    return Proposals(tokens_KB[:-1].T, probs_BKV), state.cache


def verify(
    params: Params,
    carry: Carry,
    proposals: Proposals,
    draw: Draw,
    config: ModelConfig,
    static: Static,
) -> Carry:
    """Reads the proposals in one pass, keeps those that stand, and draws one token more.

    Args:
        params: of the model.
        carry: the texts so far.
        proposals: what was proposed for each row.
        draw: how to draw.
        config: the model.
        static: what the program depends on.
    """
    before = carry.progress
    length_B, B = before.state.length_B, len(before.count_B)
    K = proposals.tokens_BK.shape[1]
    read_BT = jnp.concatenate(
        [before.state.token_B[:, None], jnp.maximum(proposals.tokens_BK, 0)], axis=1
    )
    slots_BT = length_B[:, None] + jnp.arange(K + 1)[None]
    x_BTD, cache, _ = hidden_states(
        params, read_BT, config, cache=before.state.cache, slots=slots_BT
    )
    assert cache is not None
    logits_TBV = unembed(params, x_BTD, config).swapaxes(0, 1)
    # After the last proposal stands none.
    proposed_TB = jnp.pad(proposals.tokens_BK, ((0, 0), (0, 1)), constant_values=-1).T
    probs_TBV = None
    if proposals.probs_BKV is not None:
        probs_TBV = jnp.pad(proposals.probs_BKV, ((0, 0), (0, 1), (0, 0))).swapaxes(0, 1)

    def one(inner: tuple[Progress, jax.Array, jax.Array], token: tuple[jax.Array, Any, Any]):
        progress, text_BS, standing_B = inner
        logits_BV, proposed_B, probs_BV = token
        active_B = standing_B & open_rows(progress)
        keys = [_keys(progress, progress.count_B, purpose) for purpose in (0, 1)]
        adjusted_BV = adjust_logits(logits_BV, static.filters, draw.values, progress.history)
        token_B, kept_B = settle(
            adjusted_BV, proposed_B, probs_BV, keys, static.filters, draw.values
        )
        place_B = length_B + 1 + progress.count_B - before.count_B
        place_B = jnp.where(active_B, place_B, text_BS.shape[1])
        text_BS = text_BS.at[jnp.arange(B), place_B].set(token_B, mode="drop")
        progress = record(progress, token_B, active_B, logits_BV, draw, static)
        return (progress, text_BS, active_B & kept_B), active_B

    without_cache = before._replace(state=before.state._replace(cache=()))
    (progress, text_BS, _), active_TB = jax.lax.scan(
        one,
        (without_cache, carry.text_BS, open_rows(before)),
        (logits_TBV, proposed_TB, probs_TBV),
    )
    # The cache holds the last token read before, and the proposals that stood.
    grown_B = jnp.sum(active_TB, axis=0, dtype=jnp.int32)
    state = progress.state._replace(cache=cache, length_B=length_B + grown_B)
    return carry._replace(progress=progress._replace(state=state), text_BS=text_BS)


def settle(
    logits_BV: jax.Array,
    proposed_B: jax.Array,
    probs_BV: jax.Array | None,
    keys: list[jax.Array],
    filters: Filters,
    values: FilterValues,
) -> tuple[jax.Array, jax.Array]:
    """One token a row, and whether it is the one proposed.

    Args:
        logits_BV: the model's, after penalties and biases.
        proposed_B: -1 where nothing is proposed.
        probs_BV: what the proposal was drawn from (zeros where nothing is proposed); None where it
            is certain.
        keys: random keys, two a row.
        filters: which filters are on.
        values: their numbers.
    """
    if filters.greedy:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return token_B, token_B == proposed_B
    model_BV = jax.nn.softmax(filter_logits(logits_BV, filters, values), axis=-1)
    if probs_BV is None:
        # Rows of zeros where nothing is proposed.
        probs_BV = jax.nn.one_hot(proposed_B, logits_BV.shape[-1], dtype=model_BV.dtype)
    index_B1 = jnp.maximum(proposed_B, 0)[:, None]
    p_B, q_B = (jnp.take_along_axis(x, index_B1, axis=1)[:, 0] for x in (model_BV, probs_BV))
    uniform_B = jax.vmap(jax.random.uniform)(keys[0])
    kept_B = (proposed_B >= 0) & (uniform_B * q_B < p_B)
    rest_BV = jnp.maximum(model_BV - probs_BV, 0)
    # Nothing is left where both agree; then a proposal is refused by rounding alone.
    rest_BV = jnp.where(jnp.sum(rest_BV, axis=-1, keepdims=True) > 0, rest_BV, model_BV)
    other_B = jax.vmap(jax.random.categorical)(keys[1], jnp.log(rest_BV))
    return jnp.where(kept_B, proposed_B, other_B).astype(jnp.int32), kept_B


def _keys(progress: Progress, index_B: jax.Array, purpose: int) -> jax.Array:
    """A random key for each row, token and purpose, whatever the pass that the token falls into."""
    keys_B = jax.vmap(jax.random.fold_in)(progress.keys_B, index_B)
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, purpose)
