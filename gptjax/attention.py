"""Causal attention: one function for every caller, and the backends behind it."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.config import ModelConfig
from gptjax.cudnn_attention import cudnn_attention, cudnn_refuses, is_kernel
from gptjax.devices import compute_dtype, platform
from gptjax.ring import ring_attention
from gptjax.sharding import axis_parts
from gptjax.splash import KEPT, SPLASH_BLOCK, splash_attention, splash_takes


class Backend(NamedTuple):
    """What computes attention.

    Attributes:
        name: "ring" (`ring_attention`), "splash" (`splash_attention`), "cudnn" (`cudnn_attention`)
            or "plain", XLA's products and a softmax, with the scores in memory.
        reason: one sentence: why it is taken and, of the plain one, why no kernel is.
    """

    name: Literal["ring", "splash", "cudnn", "plain"]
    reason: str


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

    `choose_backend` says by what it is computed.

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
    backend = choose_backend(
        (B, T, H, C),
        K,
        q_BTHC.dtype,
        itself=query_slots is None and S == T and key_segments is query_segments,
        windowed=window is not None,
        packed=query_segments is not None,
        dropout=dropout_key is not None and dropout > 0,
    )
    match backend.name:
        case "ring":
            return ring_attention(q_BTHC, k_BSKC, v_BSKC, window=window, segments=query_segments)
        case "splash":
            return splash_attention(q_BTHC, k_BSKC, v_BSKC, query_segments)
        case "cudnn":
            return cudnn_attention(q_BTHC, k_BSKC, v_BSKC, window=window, segments=query_segments)
        case "plain":
            pass
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


def choose_backend(
    shape: tuple[int, int, int, int],
    kv_heads: int,
    dtype: Any,
    *,
    itself: bool = True,
    windowed: bool = False,
    packed: bool = False,
    dropout: bool = False,
) -> Backend:
    """What computes attention: the one place where that is decided.

    A sequence that the mesh in force splits goes round a ring. Else a kernel of the platform that
    is compiled for, where it takes the shapes, and otherwise XLA's products.

    Args:
        shape: of the queries, (B, T, H, C).
        kv_heads: K.
        dtype: of queries, keys and values.
        itself: whether a whole sequence attends to itself, each query in its own slot.
        windowed: whether queries see only so many keys back.
        packed: whether rows hold several documents.
        dropout: whether probabilities are dropped.
    """
    B, T, H, C = shape
    on = platform()
    if itself and not dropout and axis_parts("sequence") > 1:
        return Backend("ring", "the mesh splits the sequence over its context axis")
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(on)
    if kernel is None:
        return Backend("plain", f"there is no attention kernel for a {on}")
    if not itself:
        refusal = "the queries stand in slots of a cache"
    elif dropout:
        refusal = "attention probabilities are dropped, and its random bits would not be the mesh's"
    elif (apart := _indivisible(B, H, kv_heads)) is not None:
        refusal = apart
    elif kernel == "splash":
        refusal = _splash_refuses(T, windowed)
    else:
        refusal = cudnn_refuses(T, C, dtype, masked=windowed or packed)
    if refusal is not None:
        return Backend("plain", f"{_KERNELS[kernel]} is not taken: {refusal}")
    # Written out, for the type checker to know the names.
    name: Literal["splash", "cudnn"] = "splash" if kernel == "splash" else "cudnn"
    return Backend(name, f"{_KERNELS[kernel]} takes these shapes")


_KERNELS = {"splash": "JAX's splash kernel", "cudnn": "cuDNN's flash kernel"}


kernel_results = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(KEPT), is_kernel
)
"""A rematerialization policy that keeps what the backward kernels ask of the forward ones."""


def _indivisible(B: int, H: int, K: int) -> str | None:
    """What does not divide over the mesh in force, on whose devices the kernels run apart."""
    for axis, size, what in (("batch", B, "rows"), ("heads", H, "heads"), ("kv_heads", K, "heads")):
        if size % axis_parts(axis):
            return f"{size} {what} do not divide over {axis_parts(axis)} parts of the mesh"
    return None


def _splash_refuses(T: int, windowed: bool) -> str | None:
    if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return "there are several devices and no mesh in force to split it over by hand"
    if windowed:
        return "it takes one reach for all layers, and the window is each layer's own"
    if not splash_takes(T):
        return f"it takes lengths that are multiples of {SPLASH_BLOCK}, not {T}"
    return None


def attention_backend(
    config: ModelConfig,
    length: int | None = None,
    *,
    rows: int | None = None,
    packed: bool = False,
    training: bool = True,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> Backend:
    """What computes a model's attention over whole sequences, as in training.

    Args:
        config: the model.
        length: T, tokens of a row; None is the model's context.
        rows: B; None is any that divides over the mesh.
        packed: whether rows hold several documents, by `segment_ids`.
        training: whether dropout, where the model has it, is on.
        dtype: of matrix work; None is the config's.
        mesh: what the model runs on; None is the default device, or the mesh in force.
    """
    if mesh is not None:
        with jax.set_mesh(mesh):
            return attention_backend(
                config, length, rows=rows, packed=packed, training=training, dtype=dtype
            )
    length = config.context_length if length is None else length
    window = config.sliding_window
    return choose_backend(
        (
            axis_parts("batch") if rows is None else rows,
            length,
            config.num_heads,
            config.head_width,
        ),
        config.kv_heads,
        compute_dtype(config) if dtype is None else dtype,
        windowed=window is not None and window < config.context_length,
        packed=packed,
        dropout=training and config.dropout > 0,
    )


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
