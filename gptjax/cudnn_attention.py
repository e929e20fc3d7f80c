"""Causal attention on an NVIDIA GPU by cuDNN's flash kernels, which never write the scores.

Both passes work on blocks of scores in the chip's own memory (Dao et al. 2022), and share key heads
among query heads. Without documents and windows nothing of size T x T exists anywhere.

Documents and windows go in as a mask: a bias of two bytes for each pair of tokens of a row,
`[B, 1, T, T]`, which all heads share and which is made again in the backward pass, so that only one
layer's is ever there. It is right for any segment ids, contiguous or not. cuDNN has another
way, which holds nothing: the offsets of each row's documents. It is not taken, because it asks for
contiguous documents and a static bound on their number, is no part of `jax.nn`, and in JAX 0.10.2
reads the wrong keys where query heads share key heads (https://github.com/jax-ml/jax/pull/39521).
Up to that version the backward kernel also writes a gradient of the mask, which is dropped.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.sharding import axis_parts, on_rows_and_heads


def cudnn_refuses(length: int, head_width: int, dtype: Any, *, masked: bool = False) -> str | None:
    """Why cuDNN does not take attention of a sequence with itself; None where it does.

    The limits are those that JAX checks (`check_is_flash_attention` in its `_src/cudnn`), so that
    what is taken here is not refused there.

    Args:
        length: T, tokens.
        head_width: C.
        dtype: of queries, keys and values.
        masked: whether there are documents or windows.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return "JAX's CUDA plugin is not installed"
    capability = _compute_capability()
    if capability is not None and capability < 8.0:
        return f"it needs compute capability 8.0 (Ampere), and this GPU has {capability}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    # The widest heads of the backward pass, too: Hopper's own kernels go further. Ahead of time
    # there is no GPU to ask, and JAX takes it for an older one.
    widest = 256 if capability is not None and capability >= 9.0 else 128
    if head_width % 8 or head_width > widest:
        return f"it takes head widths that are multiples of 8 up to {widest}, not {head_width}"
    if length % 2:
        return f"it takes even lengths, not {length}"
    if masked and axis_parts("layers") > 1:
        # Blocks are mapped over stages, and JAX's rule for that takes a mask for each head alone.
        return "a mesh with stages has no mask for all heads, which documents and windows need"
    return None


def _compute_capability() -> float | None:
    """Of the default device; None where that is not the GPU that is compiled for."""
    device = jax.devices()[0]
    return float(device.compute_capability) if device.platform == "gpu" else None


def cudnn_attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    *,
    window: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """As `attention` of a whole sequence with itself, each device on its own rows and heads.

    Args:
        q_BTHC: queries, `[B, T, H, C]`, as `cudnn_refuses` has them.
        k_BTKC: keys, `[B, T, K, C]`.
        v_BTKC: values, `[B, T, K, C]`.
        window: scalar int; a query sees only so many keys back, its own slot included.
        segments: `[B, T]` int, the document of each token.
    """
    given = [x for x in (segments, window) if x is not None]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> jax.Array:
        parts = iter(rest)
        segments_BT = None if segments is None else next(parts)
        reach = None if window is None else next(parts)
        return _attend(q, k, v, segments_BT, reach)

    return on_rows_and_heads(local, q_BTHC, k_BTKC, v_BTKC, *map(jnp.asarray, given))


def _attend(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    segments_BT: jax.Array | None,
    window: jax.Array | None,
) -> jax.Array:
    def kernel(mask_B1TT: jax.Array | None) -> jax.Array:
        return jax.nn.dot_product_attention(
            q_BTHC, k_BTKC, v_BTKC, mask=mask_B1TT, is_causal=True, implementation="cudnn"
        )

    if segments_BT is None and window is None:
        return kernel(None)

    def masked() -> jax.Array:
        return kernel(visible_pairs(q_BTHC.shape[1], segments_BT, window)[:, None])

    # Of what is in it only the kernel's own results are kept for the backward pass: a scan over the
    # layers would else stack every layer's mask.
    return jax.checkpoint(masked, policy=is_kernel, prevent_cse=False)()


def is_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """A rematerialization policy that keeps the kernel's results."""
    # Were the kernel to have another name, it would run once more: slower, as right.
    return "attention" in str(primitive)


def visible_pairs(
    length: int, segments_BT: jax.Array | None, window: jax.Array | None
) -> jax.Array:
    """Whether the query of a slot sees the key of another, causality left to the kernel.

    Args:
        length: T.
        segments_BT: `[B, T]`, the document of each token; None is one for all.
        window: scalar int, how many keys back a query sees, its own slot included; None is all.

    Returns:
        `[B or 1, T, T]` bool, queries first.
    """
    visible = jnp.ones((1, length, length), jnp.bool_)
    if segments_BT is not None:
        visible = segments_BT[:, :, None] == segments_BT[:, None, :]
    if window is not None:
        slots = jnp.arange(length)
        visible &= slots > slots[:, None] - window
    return visible
