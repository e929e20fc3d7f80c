"""Inside a forward pass: the residual stream, attention maps, and the logit lens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.devices import compute_dtype
from gptjax.errors import UserError
from gptjax.layouts import unstack_blocks
from gptjax.model import (
    Context,
    Layer,
    block,
    embed,
    layer_traits,
    normalize,
    queries_keys_values,
    rope_rotation,
    self_attention,
    unembed,
)
from gptjax.params import Params
from gptjax.tokenizer import Tokenizer

_SIGNS = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "←"})


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a model computes on its way to the logits; shapes as in `gptjax.model`.

    Attributes:
        residuals: `[L + 1, B, T, D]`, the residual stream in the compute dtype: at 0 the embedded
            tokens, at l what has passed l blocks.
        queries: `[L, B, T, H, C]`, as they are multiplied with the keys: normalized, rotated and
            scaled where the model does so.
        keys: `[L, B, T, K, C]`, likewise.
        values: `[L, B, T, K, C]`.
        attention: `[L, B, H, T, T]` float32, how much the token at t (second to last) takes from
            each token (last). Rows sum to 1.
        attention_added: `[L, B, T, D]`, what attention adds to the residual stream.
        mlp_added: `[L, B, T, D]`, what the feed-forward layer adds to it: the rest of what the
            block adds.
    """

    residuals: jax.Array
    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    attention: jax.Array
    attention_added: jax.Array
    mlp_added: jax.Array

    def norms(self, row: int = 0) -> dict[str, np.ndarray]:
        """Euclidean lengths of a row's vectors, for `plot_norms`.

        Args:
            row: of the batch.

        Returns:
            For "residual stream" `[L + 1, T]`, for "added by attention" and "added by MLP"
            `[L, T]`, all float32.
        """
        vectors = {
            "residual stream": self.residuals,
            "added by attention": self.attention_added,
            "added by MLP": self.mlp_added,
        }
        return {
            name: np.linalg.norm(np.asarray(x[:, row], np.float32), axis=-1)
            for name, x in vectors.items()
        }


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What the model would predict if it ended after each block.

    Attributes:
        tokens: `[L + 1, B, T, top]` int32, the likeliest next tokens, the likeliest first. At 0
            they are read off the embedded tokens, at l off what has passed l blocks.
        probabilities: `[L + 1, B, T, top]` float32, theirs.
    """

    tokens: np.ndarray
    probabilities: np.ndarray


def inspect(
    params: Params,
    tokens_BT: Any,
    config: ModelConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> Inspection:
    """Runs the model's own blocks one by one and keeps what passes between and in them.

    The normalized and unembedded `residuals[-1]` are the logits of `forward`. All attention maps
    are kept, which takes 4 · L · B · H · T² bytes: meant for short texts.

    Args:
        params: as `forward` takes them.
        tokens_BT: `[B, T]` token ids, also as lists of equal lengths.
        config: the model.
        positions: as in `forward`.
        segment_ids: as in `forward`.

    Returns:
        What passed by.

    Raises:
        UserError: if the tokens are not of two dimensions, longer than the model's context, or
            outside its vocabulary.
    """
    tokens = _checked(tokens_BT, config)
    T = tokens.shape[1]
    positions = jnp.arange(T)[None] if positions is None else jnp.asarray(positions)
    x_BTD = embed(params["embed"], tokens, positions, config, compute_dtype(config))
    rotation = rope_rotation(positions, config) if config.position == "rope" else None
    segments = None if segment_ids is None else jnp.asarray(segment_ids)
    context = Context(rotation, segments, None)
    layers = layer_traits(config)

    residuals, parts = [x_BTD], []
    for number, weights in enumerate(unstack_blocks(params, config)["blocks"]):
        traits = jax.tree.map(lambda values, number=number: values[number], layers)
        *attended, added_BTD = _attention_parts(weights, x_BTD, context, config, traits)
        # By itself, since a program that also gave its parts would be fused and rounded otherwise.
        after_BTD, _, _ = _block(weights, x_BTD, context, config, traits)
        parts.append((*attended, added_BTD, after_BTD - x_BTD - added_BTD))
        x_BTD = after_BTD
        residuals.append(x_BTD)
    return Inspection(jnp.stack(residuals), *(jnp.stack(part) for part in zip(*parts, strict=True)))


_block = partial(jax.jit, static_argnames="config")(block)


@partial(jax.jit, static_argnames="config")
def _attention_parts(
    weights: Params, x_BTD: jax.Array, context: Context, config: ModelConfig, layer: Layer
) -> tuple[jax.Array, ...]:
    """Queries, keys, values, probabilities, and what attention adds to the residual stream."""
    params = weights["attention"]
    h_BTD = normalize(x_BTD, weights["attention_norm"], config)
    q_BTHC, k_BTKC, v_BTKC = queries_keys_values(params, h_BTD, context, config, layer)
    probs_BHTS = attention_map(q_BTHC, k_BTKC, layer.window, context.segments_BT)
    added_BTD, _ = self_attention(params, h_BTD, context, config, layer, None, None)
    return q_BTHC, k_BTKC, v_BTKC, probs_BHTS, added_BTD


def attention_map(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    window: Any = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """softmax(q kᵀ / √C) over the tokens that each sees (Vaswani et al. 2017, section 3.2.1).

    Args:
        q_BTHC: queries.
        k_BTKC: keys; query head h uses key head `h // (H / K)`.
        window: a token sees only so many tokens back, itself included. None is all.
        segments_BT: the document of each token, which sees only its own.

    Returns:
        `[B, H, T, T]` float32. Rows sum to 1; what is to the right of the diagonal is 0.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BTKC.shape[2]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores = jnp.einsum("btkgc,bskc->bkgts", q_BTKGC, k_BTKC, preferred_element_type=jnp.float32)
    back = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    visible = (back >= 0)[None]
    if window is not None:
        visible &= back < window
    if segments_BT is not None:
        visible &= segments_BT[:, :, None] == segments_BT[:, None]
    scores = jnp.where(visible[:, None, None], scores / np.sqrt(C).astype(np.float32), -jnp.inf)
    return jax.nn.softmax(scores, axis=-1).reshape(B, H, T, T)


def logit_lens(
    params: Params, residuals: jax.Array, config: ModelConfig, *, top: int = 1
) -> LogitLens:
    """Reads next tokens off the residual stream after each block, as the last one's are read.

    The stream of every depth goes through the final norm and the output matrix (nostalgebraist
    2020, "interpreting GPT: the logit lens"). The last depth's are the model's own predictions.

    Args:
        params: as `forward` takes them.
        residuals: `[L + 1, B, T, D]`, such as `Inspection.residuals`, or some of its depths.
        config: the model.
        top: how many tokens to tell of each place.

    Returns:
        The likeliest tokens and their probabilities.

    Raises:
        UserError: if `top` is not within the vocabulary.
    """
    if not 1 <= top <= config.vocab_size:
        raise UserError(f"top is {top}; give 1 to {config.vocab_size}, the vocabulary")
    outer = {name: part for name, part in params.items() if name != "blocks"}
    # One depth at a time: the logits of all would be [L + 1, B, T, V].
    read = [jax.device_get(_likeliest(outer, x_BTD, config, top)) for x_BTD in residuals]
    probabilities, tokens = (np.stack(part) for part in zip(*read, strict=True))
    return LogitLens(tokens, probabilities)


@partial(jax.jit, static_argnames=("config", "top"))
def _likeliest(params: Params, x_BTD: jax.Array, config: ModelConfig, top: int) -> Any:
    logits_BTV = unembed(params, normalize(x_BTD, params["final_norm"], config), config)
    return jax.lax.top_k(jax.nn.softmax(logits_BTV, axis=-1), top)


def token_labels(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """A visible text for each id, for the axes of a picture.

    A space is shown as ·, a newline as ↵. Bytes that are no whole character become U+FFFD.

    Args:
        tokenizer: of the model.
        ids: `[N]` token ids.

    Returns:
        A text for each.
    """
    return [tokenizer.decode([int(i)]).translate(_SIGNS) for i in ids]


def _checked(tokens: Any, config: ModelConfig) -> jax.Array:
    rows: Sequence[Any] | np.ndarray = tokens
    try:
        array = np.asarray(rows)
    except ValueError:
        raise UserError("the rows of tokens differ in length; inspect them one by one") from None
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "iu":
        raise UserError(
            f"tokens of shape {array.shape} and dtype {array.dtype}; give [B, T] integers, for one "
            "text [ids]"
        )
    if array.shape[1] > config.context_length:
        raise UserError(
            f"sequence of {array.shape[1]} tokens, but the model's context is "
            f"{config.context_length}; shorten it"
        )
    if array.min() < 0 or array.max() >= config.vocab_size:
        raise UserError(
            f"token ids from {array.min()} to {array.max()}, but the model's run from 0 to "
            f"{config.vocab_size - 1}; is it this model's tokenizer?"
        )
    return jnp.asarray(array, jnp.int32)
