"""The TPU's attention kernel: against plain attention, interpreted; and compiled for TPUs."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import splash
from gptjax.attention import attention
from gptjax.splash import splash_attention, splash_sizes, splash_takes


def inputs(
    rng: np.random.Generator, B: int, T: int, H: int, K: int, C: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Queries, keys, values and what the output is multiplied with."""
    shapes = ((B, T, H, C), (B, T, K, C), (B, T, K, C), (B, T, H, C))
    q, k, v, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return q, k, v, g


@pytest.mark.parametrize(
    ("T", "H", "K", "C", "packed"),
    [
        (256, 2, 2, 64, False),
        (128, 4, 2, 128, True),
        (256, 4, 1, 32, True),
        (384, 2, 1, 80, False),
        (128, 2, 2, 256, False),
    ],
)
def test_is_attention(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, T: int, H: int, K: int, C: int,
    packed: bool,
) -> None:  # fmt: skip
    """Values and gradients, over several blocks, with shared key heads and documents."""
    # Blocks of the least size, so that there are several, and parts of them.
    blocks = splash.Blocks(128, 256, 128)
    for fused in (True, False):
        sizes = splash.Sizes(blocks, blocks, fused)
        monkeypatch.setattr(splash, "_TABLE", ((2**31, 2**31, sizes),))
        q, k, v, g = inputs(rng, 2, T, H, K, C)
        segments = None
        if packed:
            starts = np.sort(rng.integers(1, T, (2, 2)), axis=1)
            segments = jnp.asarray(
                np.sum(np.arange(T)[None, None] >= starts[..., None], axis=1), jnp.int32
            )

        def kernel(q: jax.Array, k: jax.Array, v: jax.Array, segments=segments, g=g) -> jax.Array:
            out = splash_attention(q, k, v, segments, interpret=True)
            return jnp.sum(out * g), out  # pyright: ignore[reportReturnType]

        def plain(q: jax.Array, k: jax.Array, v: jax.Array, segments=segments, g=g) -> jax.Array:
            out = attention(q, k, v, query_segments=segments, key_segments=segments)
            return jnp.sum(out * g), out  # pyright: ignore[reportReturnType]

        found, out = jax.grad(kernel, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        expected, reference = jax.grad(plain, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        np.testing.assert_allclose(out, reference, atol=2e-5)
        for grad, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(grad, wanted, atol=5e-5 * float(jnp.max(jnp.abs(wanted))))


def test_blocks_divide_the_sequence() -> None:
    """For every length and width that the kernel takes, in tokens that it can cut."""
    for length in [128 * n for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 24, 64, 127, 128, 129, 256)]:
        assert splash_takes(length)
        for width in (32, 64, 80, 96, 128, 192, 256):
            sizes = splash_sizes(length, width)
            for blocks in (sizes.forward, sizes.backward):
                assert length % blocks.queries == 0
                assert length % blocks.keys == 0
                assert blocks.keys % blocks.keys_at_once == 0
                assert min(blocks) >= 128
            # Sums to be added after a fused kernel are at most eight times the queries.
            assert not sizes.fused or length // sizes.backward.keys <= 8
    for length in (1, 64, 100, 130, 1000):
        assert not splash_takes(length)


def test_long_sequences_have_long_blocks() -> None:
    assert splash_sizes(1024, 64).forward.keys == 512
    assert splash_sizes(8192, 128).forward.keys == 1024
    # A length that few blocks divide gets the largest that do.
    assert splash_sizes(1280, 64).forward.queries == 256
    assert splash_sizes(1920, 64).forward.queries == 384


def test_kept_for_the_backward_pass(rng: np.random.Generator) -> None:
    """What rematerialization may keep by name is the output and a number for each query."""
    q, k, v, g = inputs(rng, 1, 128, 2, 2, 64)
    policy = jax.checkpoint_policies.save_only_these_names(splash.KEPT)

    def total(q: jax.Array) -> jax.Array:
        return jnp.sum(splash_attention(q, k, v, None, interpret=True) * g)

    from jax._src.ad_checkpoint import saved_residuals

    saved: Any = saved_residuals(jax.checkpoint(total, policy=policy), q)
    kept = [aval.shape for aval, source in saved if "argument" not in source]
    assert (1, 2, 128, 64) in kept
    assert (1, 2, 128) in kept


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize(
    ("T", "C"), [(512, 64), (1024, 64), (2048, 128), (8192, 128), (16384, 128), (32768, 128)]
)
def test_compiles_for(chip: str, T: int, C: int) -> None:
    """Forward and backward, documents and shared key heads, within a chip's fast memory."""
    compile_kernel(chip, T, C)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(("T", "C"), [(1024, 80), (2048, 256), (8192, 256), (32768, 256)])
def test_compiles_for_other_heads(T: int, C: int) -> None:
    compile_kernel("v5e", T, C)


def compile_kernel(chip: str, T: int, C: int) -> int:
    """Bytes of temporaries of values and gradients on one chip."""
    from gptjax.planning.topology import compile_mesh, parse_topology, prepare_compiler
    from gptjax.sharding import MESH_AXES, named_sharding

    target = parse_topology(f"{chip}:{'x'.join(['1'] * (3 if chip == 'v5p' else 2))}")
    prepare_compiler(target)
    mesh = compile_mesh(target, dict.fromkeys(MESH_AXES, 1))

    def shaped(shape: tuple[int, ...], dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        place = named_sharding(mesh, ["batch"] + ["head"] * (len(shape) - 1), shape, "input")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def total(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        out = splash_attention(q, k, v, segments).astype(jnp.float32)
        return jnp.sum(jnp.square(out))

    q, k = shaped((1, T, 2, C)), shaped((1, T, 1, C))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
        compiled: Any = step.lower(q, k, k, shaped((1, T), jnp.int32)).compile()
    assert "splash" in compiled.as_text()
    return compiled.memory_analysis().temp_size_in_bytes
