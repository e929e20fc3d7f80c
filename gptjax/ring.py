"""Attention over a sequence that lies split over devices (Liu et al. 2023).

Keys and values go round a ring of the mesh's `context` axis, a part at a time, while each device
keeps its queries and adds up the softmax as the parts come by (Dao et al. 2022, section 3.1). In
the backward pass they go round again, and their gradients with them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.sharding import on_each_device

_AXIS = "context"
_QUERIES = ("batch", "sequence", "heads", "head")
_KEYS = ("batch", "sequence", "kv_heads", "head")
_TOKENS = ("batch", "sequence")
_INPUTS = (_QUERIES, _KEYS, _KEYS, (), _TOKENS)
_LOG_Z = ("batch", "kv_heads", None, "sequence")


def ring_attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    *,
    window: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """As `attention` of a whole sequence with itself, under a mesh with a `context` axis.

    A device holds its own part of each array and one part more of keys and values; the products of
    queries and keys are there for two parts at a time.

    Args:
        q_BTHC: queries, `[B, T, H, C]`.
        k_BTKC: keys, `[B, T, K, C]`.
        v_BTKC: values, `[B, T, K, C]`.
        window: as in `attention`.
        segments: `[B, T]` int, the document of each token.
    """
    B, T = q_BTHC.shape[:2]
    reach = jnp.int32(T) if window is None else jnp.asarray(window, jnp.int32)
    segments_BT = jnp.zeros((B, T), jnp.int32) if segments is None else segments
    return _ring(q_BTHC, k_BTKC, v_BTKC, reach, segments_BT)


@jax.custom_vjp
def _ring(q: jax.Array, k: jax.Array, v: jax.Array, reach: jax.Array, segments: jax.Array):
    return _ring_forward(q, k, v, reach, segments)[0]


def _ring_forward(q: jax.Array, k: jax.Array, v: jax.Array, reach: jax.Array, segments: jax.Array):
    inputs = (q, k, v, reach, segments)
    out, log_z = on_each_device(_forward, _INPUTS, (_QUERIES, _LOG_Z))(*inputs)
    return out, (inputs, out, log_z)


def _ring_backward(residuals: Any, grad: jax.Array):
    inputs, out, log_z = residuals
    backward = on_each_device(
        _backward, (*_INPUTS, _QUERIES, _LOG_Z, _QUERIES), (_QUERIES, _KEYS, _KEYS)
    )
    return *backward(*inputs, out, log_z, grad), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _forward(q_BtHC: jax.Array, k: jax.Array, v: jax.Array, reach: jax.Array, segments: jax.Array):
    """One device's queries through the whole ring: the output, and log Σ exp of their scores."""
    q_BKGtC = _by_key_head(q_BtHC, k.shape[2])
    mine = segments

    def turn(carry: tuple[Any, ...], distance: jax.Array):
        out, largest, total, k, v, theirs = carry
        scores = _scores(q_BKGtC, k, _visible(distance, reach, mine, theirs))
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
        # No key of this part may be visible, and none of those before.
        safe = jnp.where(jnp.isfinite(new_largest), new_largest, 0)
        p = jnp.exp(scores - safe[..., None])
        kept = jnp.exp(largest - safe)
        total = total * kept + jnp.sum(p, axis=-1)
        new = jnp.einsum(
            "bkgts,bskc->bkgtc", p.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return (out * kept[..., None] + new, new_largest, total, *_pass_on(k, v, theirs)), None

    out = jnp.zeros(q_BKGtC.shape, jnp.float32)
    largest = jnp.full(out.shape[:-1], -jnp.inf)
    start = (out, largest, jnp.zeros_like(largest), k, v, segments)
    (out, largest, total, *_), _ = jax.lax.scan(turn, start, jnp.arange(_parts()))
    out = (out / total[..., None]).astype(q_BtHC.dtype)
    return _by_query_head(out), largest + jnp.log(total)


def _backward(
    q_BtHC: jax.Array,
    k: jax.Array,
    v: jax.Array,
    reach: jax.Array,
    segments: jax.Array,
    out_BtHC: jax.Array,
    log_z: jax.Array,
    grad_BtHC: jax.Array,
):
    """The gradients of queries, which stay, and of keys and values, which go round."""
    q, out, grad = (_by_key_head(x, k.shape[2]) for x in (q_BtHC, out_BtHC, grad_BtHC))
    inner = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1, keepdims=True)
    scale = 1 / math.sqrt(q.shape[-1])
    mine = segments

    def turn(carry: tuple[Any, ...], distance: jax.Array):
        grad_q, grad_k, grad_v, k, v, theirs = carry
        scores = _scores(q, k, _visible(distance, reach, mine, theirs))
        p = jnp.exp(scores - log_z[..., None])
        grad_v += _sum("bkgts,bkgtc->bskc", p.astype(v.dtype), grad)
        grad_p = _sum("bkgtc,bskc->bkgts", grad, v)
        grad_scores = (p * (grad_p - inner) * scale).astype(q.dtype)
        grad_q += _sum("bkgts,bskc->bkgtc", grad_scores, k)
        grad_k += _sum("bkgts,bkgtc->bskc", grad_scores, q)
        k, v, theirs, grad_k, grad_v = _pass_on(k, v, theirs, grad_k, grad_v)
        return (grad_q, grad_k, grad_v, k, v, theirs), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    start = (*zeros, k, v, segments)
    (grad_q, grad_k, grad_v, *_), _ = jax.lax.scan(turn, start, jnp.arange(_parts()))
    return _by_query_head(grad_q).astype(q.dtype), grad_k.astype(k.dtype), grad_v.astype(v.dtype)


def _sum(terms: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(terms, x, y, preferred_element_type=jnp.float32)


def _parts() -> int:
    return jax.sharding.get_abstract_mesh().shape[_AXIS]


def _pass_on(*parts: jax.Array) -> Any:
    """To the next device of the ring, so that after n turns a part comes from n devices before."""
    ring = [(n, (n + 1) % _parts()) for n in range(_parts())]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, _AXIS, ring), parts)


def _visible(
    distance: jax.Array, reach: jax.Array, mine_Bt: jax.Array, theirs_Bs: jax.Array
) -> jax.Array:
    """Which keys of the part from `distance` devices before this one are seen, `[B, t, s]`."""
    length = mine_Bt.shape[1]
    here = jax.lax.axis_index(_AXIS)
    there = (here - distance) % _parts()
    slots = jnp.arange(length)
    back = (here * length + slots)[:, None] - (there * length + slots)[None]
    seen = (back >= 0) & (back < reach)
    return seen[None] & (mine_Bt[:, :, None] == theirs_Bs[:, None, :])


def _scores(q_BKGtC: jax.Array, k_BsKC: jax.Array, visible_Bts: jax.Array) -> jax.Array:
    scores = _sum("bkgtc,bskc->bkgts", q_BKGtC, k_BsKC) * (1 / math.sqrt(q_BKGtC.shape[-1]))
    return jnp.where(visible_Bts[:, None, None], scores, -jnp.inf)


def _by_key_head(x_BtHC: jax.Array, K: int) -> jax.Array:
    B, t, H, C = x_BtHC.shape
    return jnp.transpose(x_BtHC.reshape(B, t, K, H // K, C), (0, 2, 3, 1, 4))


def _by_query_head(x_BKGtC: jax.Array) -> jax.Array:
    B, K, G, t, C = x_BKGtC.shape
    return jnp.transpose(x_BKGtC, (0, 3, 1, 2, 4)).reshape(B, t, K * G, C)
