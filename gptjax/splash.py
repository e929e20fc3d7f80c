"""Causal attention on a TPU by JAX's splash kernel, which never writes the scores to memory."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.sharding import axis_parts, on_rows_and_heads

SPLASH_BLOCK = 128
"""The kernel's sequence lengths are multiples of it: the lanes of a TPU's registers."""

KEPT = "attention"
"""The name under which rematerialization may keep what the backward kernel asks of the forward
one: the output and the logarithm of each row's sum."""


class Blocks(NamedTuple):
    """How the kernel cuts the scores of a head, in tokens.

    Attributes:
        queries: of a block.
        keys: of a block, which is read at once.
        keys_at_once: of a block's part that is worked on at once.
    """

    queries: int
    keys: int
    keys_at_once: int


class Sizes(NamedTuple):
    """The blocks of both passes.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass.
        fused: whether one kernel makes all three gradients, from scores that it computes once. It
            writes the queries' gradient once for every block of keys, to be summed after it.
    """

    forward: Blocks
    backward: Blocks
    fused: bool


# By the longest sequence and the widest head that a row is for. What counts against large blocks is
# the diagonal, on which half of each is computed in vain; against small ones, that a block takes
# some 0.35 µs beside its work (JAX's guide to Pallas on TPUs), and that every block of queries
# reads the keys again. Up to 2,048 tokens 512 is the best compromise, from there on 1,024; narrower
# parts of a block keep the float32 scores within the 16 MiB of fast memory that a kernel has. The
# fused kernel does five products where two kernels do seven. Its blocks of keys are twice as long,
# since it writes the queries' gradient for each, to be summed by an operation that the compiler
# takes for dearer than what a shorter block saves; it is left where these would be more than
# `_MOST_SUMS` times the queries. Reckoned, and compiled for v5e, v5p and v6e; not measured.
_TABLE: tuple[tuple[int, int, Sizes], ...] = (
    (2048, 128, Sizes(Blocks(512, 512, 512), Blocks(512, 1024, 512), True)),
    (16384, 128, Sizes(Blocks(1024, 1024, 512), Blocks(1024, 2048, 512), True)),
    (2**31, 128, Sizes(Blocks(1024, 2048, 512), Blocks(1024, 1024, 512), False)),
    (2048, 256, Sizes(Blocks(512, 512, 512), Blocks(512, 1024, 512), True)),
    (16384, 256, Sizes(Blocks(512, 1024, 512), Blocks(512, 2048, 512), True)),
    (2**31, 2**31, Sizes(Blocks(512, 512, 256), Blocks(512, 512, 256), False)),
)


_MOST_SUMS = 8


def splash_takes(length: int) -> bool:
    """Whether the kernel takes sequences of this length, whatever the heads are.

    Args:
        length: T, tokens.
    """
    return length % SPLASH_BLOCK == 0


def splash_sizes(length: int, head_width: int) -> Sizes:
    """The blocks for a length and a head width, each the largest that divides the length.

    Args:
        length: T, tokens, a multiple of `SPLASH_BLOCK`.
        head_width: C.
    """
    wanted = next(sizes for long, wide, sizes in _TABLE if length <= long and head_width <= wide)

    def fitted(blocks: Blocks) -> Blocks:
        keys = _divisor(length, blocks.keys)
        return Blocks(_divisor(length, blocks.queries), keys, _divisor(keys, blocks.keys_at_once))

    backward = fitted(wanted.backward)
    fused = wanted.fused and length <= _MOST_SUMS * backward.keys
    return Sizes(fitted(wanted.forward), backward, fused)


def splash_attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    segments_BT: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """JAX's TPU kernel for sparse masks, forward and backward, on each device's rows and heads.

    Blocks of scores above the diagonal are not computed. Key heads are not repeated for the query
    heads that share them.

    Args:
        q_BTHC: queries, `[B, T, H, C]`, not scaled; T as `splash_takes` has it.
        k_BTKC: keys, `[B, T, K, C]`; query head h uses key head `h // (H / K)`.
        v_BTKC: values, `[B, T, K, C]`.
        segments_BT: `[B, T]` int32, the document of each token, or None.
        interpret: whether to run it without a TPU, slowly, for tests.

    Returns:
        `[B, T, H, C]`, in the dtype of `q_BTHC`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    T, H, C = q_BTHC.shape[1:]
    heads = H // axis_parts("heads")
    sizes = splash_sizes(T, C)
    forward, backward = sizes.forward, sizes.backward
    # A head that does not fill the lanes lies with its tokens along them: as the last dimension it
    # would be padded to 128, in the kernel and in all that is kept for the backward pass.
    layout = kernel.QKVLayout.HEAD_DIM_MINOR if C % 128 == 0 else kernel.QKVLayout.SEQ_MINOR
    block_sizes = kernel.BlockSizes(
        block_q=forward.queries,
        block_kv=forward.keys,
        block_kv_compute=forward.keys_at_once,
        block_q_dkv=backward.queries,
        block_kv_dkv=backward.keys,
        block_kv_dkv_compute=backward.keys_at_once,
        block_q_dq=None if sizes.fused else backward.queries,
        block_kv_dq=None if sizes.fused else backward.keys,
        use_fused_bwd_kernel=sizes.fused,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * heads),
        block_sizes=block_sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> jax.Array:
        # The kernel does not scale, and has heads in front.
        q = q * jnp.asarray(1 / math.sqrt(C), q.dtype)
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        out: Any = jax.vmap(attend)(q, k, v, *(kernel.SegmentIds(s, s) for s in segments))
        return jnp.swapaxes(out, 1, 2)

    segments = () if segments_BT is None else (segments_BT,)
    return on_rows_and_heads(local, q_BTHC, k_BTKC, v_BTKC, *segments)


def _divisor(number: int, most: int) -> int:
    """The largest multiple of `SPLASH_BLOCK` up to `most` that divides the number."""
    candidates = range(SPLASH_BLOCK, min(number, most) + 1, SPLASH_BLOCK)
    return max(n for n in candidates if number % n == 0)
