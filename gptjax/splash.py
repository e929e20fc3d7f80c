"""Causal attention on a TPU by JAX's splash kernel, which never writes the scores to memory."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.sharding import axis_parts, on_each_device

SPLASH_BLOCK = 128
"""The kernel's sequence lengths are multiples of it."""


def splash_attention(
    q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    """JAX's TPU kernel for sparse masks, forward and backward, on each device's rows and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    T, H, C = q_BTHC.shape[1:]
    heads = H // axis_parts("heads")
    # Large blocks: small ones wait for memory.
    block = next(n for n in (512, 256, SPLASH_BLOCK) if T % n == 0)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
    )

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> jax.Array:
        # The kernel does not scale, and has heads in front.
        q = q * jnp.asarray(1 / math.sqrt(C), q.dtype)
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        out: Any = jax.vmap(attend)(q, k, v, *(kernel.SegmentIds(s, s) for s in segments))
        return jnp.swapaxes(out, 1, 2)

    queries, keys = ("batch", None, "heads", "head"), ("batch", None, "kv_heads", "head")
    inputs = [q_BTHC, k_BTKC, v_BTKC]
    axes: list[tuple[str | None, ...]] = [queries, keys, keys]
    if segments_BT is not None:
        inputs.append(segments_BT)
        axes.append(("batch", None))
    mesh = jax.sharding.get_abstract_mesh()
    function = local if mesh.empty else on_each_device(local, axes, queries)
    return function(*inputs)
