"""Causal attention: one function for every caller, and the backends behind it."""

import math

import jax
import jax.numpy as jnp


def attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    query_slots: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q kᵀ / √C + mask) v (Vaswani et al. 2017, section 3.2.1), the softmax in float32.

    The query in slot n sees the keys in slots 0 to n and, where segments are given, only those of
    its own segment. Every query sees at least itself, so that no row of the softmax is empty.

    Args:
        q_BTHC: queries, `[B, T, H, C]`.
        k_BSKC: keys, `[B, S, K, C]`; query head h uses key head `h // (H / K)`.
        v_BSKC: values, `[B, S, K, C]`.
        query_slots: `[B, T]` or `[T]`, the slot among the S keys that each query stands in. None
            means that the queries are the last T of the S slots.
        query_segments: `[B, T]` int, the document that each query belongs to.
        key_segments: `[B, S]` int, the document of each key.
        dropout: the rate at which attention probabilities are zeroed.
        dropout_key: random key; None means no dropout.

    Returns:
        `[B, T, H, C]`, in the dtype of `q_BTHC`.
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    G = H // K
    # Batch dimensions in front: the layout that batched products are fastest in on every backend.
    q_BKGTC = jnp.transpose(q_BTHC.reshape(B, T, K, G, C), (0, 2, 3, 1, 4)).reshape(B, K, G * T, C)
    k_BKSC = jnp.transpose(k_BSKC, (0, 2, 1, 3))
    v_BKSC = jnp.transpose(v_BSKC, (0, 2, 1, 3))

    slots = jnp.arange(S - T, S) if query_slots is None else query_slots
    slots = slots.reshape(-1, T, 1)
    visible = jnp.arange(S)[None, None] <= slots
    if query_segments is not None and key_segments is not None:
        visible &= query_segments[:, :, None] == key_segments[:, None, :]

    scores = jnp.einsum(
        "bktc,bksc->bkts", q_BKGTC, k_BKSC, preferred_element_type=jnp.float32
    ).reshape(B, K, G, T, S) * (1 / math.sqrt(C))
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1)
    if dropout_key is not None and dropout > 0:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout, probs.shape)
        probs = jnp.where(keep, probs / (1 - dropout), 0)
    probs = probs.astype(v_BKSC.dtype).reshape(B, K, G * T, S)
    out_BKGTC = jnp.einsum("bkts,bksc->bktc", probs, v_BKSC).reshape(B, K, G, T, C)
    return jnp.transpose(out_BKGTC, (0, 3, 1, 2, 4)).reshape(B, T, H, C).astype(q_BTHC.dtype)
