"""Causal attention: one function for every caller, and the backends behind it."""

import math

import jax
import jax.numpy as jnp

from gptjax.devices import platform
from gptjax.ring import ring_attention
from gptjax.sharding import axis_parts
from gptjax.splash import SPLASH_BLOCK, splash_attention


def attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    window: jax.Array | None = None,
    query_slots: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q kᵀ / √C + mask) v (Vaswani et al. 2017, section 3.2.1), the softmax in float32.

    The query in slot n sees the keys in slots 0 to n and, where segments are given, only those of
    its own segment. Every query sees at least itself, so that no row of the softmax is empty.

    Whole sequences go round a ring where the mesh in force splits them (`ring_attention`), and on a
    TPU through a kernel that never writes the scores to memory (`splash_attention`), where it
    takes them: lengths of whole blocks, one reach for all, a mesh in force or one device. Dropout
    is in neither, since its bits would be the mesh's.

    Args:
        q_BTHC: queries, `[B, T, H, C]`.
        k_BSKC: keys, `[B, S, K, C]`; query head h uses key head `h // (H / K)`.
        v_BSKC: values, `[B, S, K, C]`.
        window: scalar int; a query sees only so many keys back, its own slot included. None is all.
        query_slots: `[B, T]` or `[T]`, the slot among the S keys that each query stands in. None
            means that the queries are the last T of the S slots.
        query_segments: `[B, T]` int, the document that each query belongs to.
        key_segments: `[B, S]` int, the document of each key.
        dropout: the rate at which attention probabilities are zeroed.
        dropout_key: random keys, `[B]`; None means no dropout.

    Returns:
        `[B, T, H, C]`, in the dtype of `q_BTHC`.
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    G = H // K
    itself = query_slots is None and S == T and key_segments is query_segments
    if itself and (dropout_key is None or dropout == 0):
        if axis_parts("sequence") > 1:
            return ring_attention(q_BTHC, k_BSKC, v_BSKC, window=window, segments=query_segments)
        # The kernel is never split over devices but by hand, for which a mesh must be in force.
        placed = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
        if platform() == "tpu" and placed and window is None and T % SPLASH_BLOCK == 0:
            return splash_attention(q_BTHC, k_BSKC, v_BSKC, query_segments)
    # Batch dimensions in front: the layout that batched products are fastest in on every backend.
    q_BKNC = jnp.transpose(q_BTHC.reshape(B, T, K, G, C), (0, 2, 3, 1, 4)).reshape(B, K, G * T, C)
    k_BKSC = jnp.transpose(k_BSKC, (0, 2, 1, 3))
    v_BKSC = jnp.transpose(v_BSKC, (0, 2, 1, 3))

    slots = jnp.arange(S - T, S) if query_slots is None else query_slots
    slots = slots.reshape(-1, T, 1)
    visible = jnp.arange(S)[None, None] <= slots
    if window is not None:
        visible &= jnp.arange(S)[None, None] > slots - window
    if query_segments is not None and key_segments is not None:
        visible &= query_segments[:, :, None] == key_segments[:, None, :]

    visible_BNS = jnp.tile(visible, (1, G, 1))
    visible_BKNS = visible_BNS[:, None]
    if B == 1:
        # XLA's CPU backend multiplies three dimensions twice as fast as four with one of size one.
        q_BKNC, k_BKSC, v_BKSC, visible_BKNS = (
            jnp.squeeze(x, 0) for x in (q_BKNC, k_BKSC, v_BKSC, visible_BKNS)
        )
    if dropout_key is None or dropout == 0:
        out_BKNC = _attend(q_BKNC, k_BKSC, v_BKSC, visible_BKNS)
    else:
        probs_BKNS = _probabilities(q_BKNC, k_BKSC, visible_BKNS)
        keep = row_bernoulli(dropout_key, 1 - dropout, (K, G * T, S)).reshape(probs_BKNS.shape)
        probs_BKNS = jnp.where(keep, probs_BKNS / (1 - dropout), 0).astype(v_BSKC.dtype)
        out_BKNC = jnp.einsum("...ns,...sc->...nc", probs_BKNS, v_BKSC)
    out_BTKGC = jnp.transpose(out_BKNC.reshape(B, K, G, T, C), (0, 3, 1, 2, 4))
    return out_BTKGC.reshape(B, T, H, C).astype(q_BTHC.dtype)


def row_bernoulli(keys_B: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """True at a rate: `[B, *shape]`, each row from its own key, so that no row knows of others."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, rate, shape))(keys_B)


def _probabilities(q_BKNC: jax.Array, k_BKSC: jax.Array, visible_BKNS: jax.Array) -> jax.Array:
    """Float32 softmax over the visible keys of N = G · T queries to each key head."""
    scores_BKNS = jnp.einsum(
        "...nc,...sc->...ns", q_BKNC, k_BKSC, preferred_element_type=jnp.float32
    ) * (1 / math.sqrt(q_BKNC.shape[-1]))
    scores_BKNS = jnp.where(visible_BKNS, scores_BKNS, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores_BKNS, axis=-1)


@jax.custom_vjp
def _attend(
    q_BKNC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, visible_BKNS: jax.Array
) -> jax.Array:
    return _attend_forward(q_BKNC, k_BKSC, v_BKSC, visible_BKNS)[0]


def _attend_forward(
    q_BKNC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, visible_BKNS: jax.Array
):
    probs_BKNS = _probabilities(q_BKNC, k_BKSC, visible_BKNS).astype(v_BKSC.dtype)
    out_BKNC = jnp.einsum("...ns,...sc->...nc", probs_BKNS, v_BKSC)
    return out_BKNC, (q_BKNC, k_BKSC, v_BKSC, probs_BKNS, out_BKNC)


def _attend_backward(residuals: tuple[jax.Array, ...], grad_BKNC: jax.Array):
    q_BKNC, k_BKSC, v_BKSC, probs_BKNS, out_BKNC = residuals
    grad_v = jnp.einsum("...ns,...nc->...sc", probs_BKNS, grad_BKNC)
    grad_probs = jnp.einsum(
        "...nc,...sc->...ns", grad_BKNC, v_BKSC, preferred_element_type=jnp.float32
    )
    # The softmax's inner sum over keys, Σ p · dp, equals Σ out · d out over the head's width (Dao
    # et al. 2022, section B.4), which is shorter and needs no pass over the scores.
    inner = jnp.sum((out_BKNC * grad_BKNC).astype(jnp.float32), axis=-1, keepdims=True)
    grad_scores = probs_BKNS * (grad_probs - inner) * (1 / math.sqrt(q_BKNC.shape[-1]))
    grad_scores = grad_scores.astype(q_BKNC.dtype)
    grad_q = jnp.einsum("...ns,...sc->...nc", grad_scores, k_BKSC)
    grad_k = jnp.einsum("...ns,...nc->...sc", grad_scores, q_BKNC)
    return grad_q, grad_k, grad_v, None


_attend.defvjp(_attend_forward, _attend_backward)
