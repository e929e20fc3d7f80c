"""Products in 8-bit floats are those of rounded arrays, and a model trained with them learns."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from small_models import GPT2, STYLES, random_params

from gptjax.adapters import LoRA
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.evaluation.perplexity import make_eval_step
from gptjax.fitting import fit
from gptjax.float8 import matmul_float8, to_float8
from gptjax.generation import generate
from gptjax.loss import loss_fn
from gptjax.pretrained.loading import load
from gptjax.sampling import Sampling
from gptjax.training import init_state, make_train_step

TYPES = {jnp.float8_e4m3fn: ml_dtypes.float8_e4m3fn, jnp.float8_e5m2: ml_dtypes.float8_e5m2}


def rounded(x: np.ndarray, dtype: type) -> np.ndarray:
    """By numpy, with the power of two that brings the largest below that of the type's largest."""
    top = 2.0 ** np.floor(np.log2(float(ml_dtypes.finfo(dtype).max)))
    scale = 2.0 ** (np.floor(np.log2(np.abs(x).max())) + 1) / top
    return (x / scale).astype(dtype).astype(np.float64) * scale


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1e-20, 3e-4, 1.0, 1e5])
def test_values_are_rounded_as_numpy_does(
    dtype: type, size: float, rng: np.random.Generator
) -> None:
    x = (rng.normal(size=(7, 40)) * size).astype(np.float32)
    values, scale = jax.jit(to_float8, static_argnums=1)(x, dtype)
    assert values.dtype == dtype
    assert np.frexp(float(scale))[0] == 0.5
    found = np.asarray(values).astype(np.float64) * float(scale)
    np.testing.assert_array_equal(found, rounded(x, TYPES[dtype]))


def test_nothing_and_what_is_not_finite() -> None:
    values, scale = to_float8(jnp.zeros((2, 3)), jnp.float8_e4m3fn)
    assert np.isfinite(scale)
    assert not np.asarray(values).astype(np.float32).any()
    # Below what scales reach all is rounded to zero.
    values, scale = to_float8(jnp.full(3, 1e-37), jnp.float8_e5m2)
    assert np.isfinite(np.asarray(values).astype(np.float32)).all()
    for bad in (np.inf, np.nan):
        for dtype in TYPES:
            values, _ = to_float8(jnp.array([1.0, bad]), dtype)
            assert not np.isfinite(np.asarray(values).astype(np.float32)[1])


def test_a_product_and_its_gradients_are_those_of_rounded_arrays(
    rng: np.random.Generator,
) -> None:
    x, kernel, grad = (
        rng.normal(size=shape).astype(np.float32) for shape in [(2, 5, 24), (24, 9), (2, 5, 9)]
    )
    grad *= 1e-6
    out, pull_back = jax.vjp(matmul_float8, jnp.asarray(x), jnp.asarray(kernel))
    grad_x, grad_kernel = pull_back(jnp.asarray(grad))
    x8, kernel8 = (rounded(array, ml_dtypes.float8_e4m3fn) for array in (x, kernel))
    grad8 = rounded(grad, ml_dtypes.float8_e5m2)
    close = {"rtol": 1e-5, "atol": 1e-11}
    np.testing.assert_allclose(out, x8 @ kernel8, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad_x, grad8 @ kernel8.T, **close)
    np.testing.assert_allclose(grad_kernel, np.einsum("bti,bto->io", x8, grad8), **close)


def batch_of(config: ModelConfig, rng: np.random.Generator, rows: int = 8) -> dict[str, np.ndarray]:
    shape = (rows, config.context_length + 1)
    tokens = rng.integers(config.vocab_size, size=shape, dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


@STYLES
def test_a_models_loss_and_gradients_are_near(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params, batch = random_params(config, rng), batch_of(config, rng)

    def loss_and_grads(config: ModelConfig):
        value = jax.value_and_grad(lambda params: loss_fn(params, batch, config)[0])
        loss, grads = jax.jit(value)(params)
        return float(loss), grads

    loss, grads = loss_and_grads(config)
    near, near_grads = loss_and_grads(config.replace(float8=True))
    assert 0 < abs(near - loss) < 0.05 * loss
    for part in ("attention", "mlp"):
        for name, grad in near_grads["blocks"][part].items():
            exact = grads["blocks"][part][name]
            if "key_bias" in name:
                continue  # Zero but for rounding.
            alike = np.vdot(grad, exact) / np.linalg.norm(grad) / np.linalg.norm(exact)
            assert alike > 0.97, (part, name)


def count_rounded(function, *arguments) -> int:
    return str(jax.make_jaxpr(function)(*arguments)).count("new_dtype=float8_e4m3fn")


@STYLES
def test_all_kernels_of_a_block_are_multiplied_with_so(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    """Queries', keys' and values' as one, out, up and down, and their inputs; nothing else."""
    params, batch = random_params(config, rng), batch_of(config, rng)
    config = config.replace(float8=True, scan_unroll=1)
    assert count_rounded(lambda p: loss_fn(p, batch, config)[0], params) == 2 * 4


@pytest.mark.parametrize("lora", [None, LoRA(4, targets=("blocks.*",))], ids=["all", "lora"])
def test_it_learns_as_fast(lora: LoRA | None, rng: np.random.Generator) -> None:
    batch = batch_of(GPT2, rng, rows=4)
    key = jax.random.key(int(rng.integers(2**31)))

    def train(config: ModelConfig) -> list[float]:
        optimizer = optax.adam(1e-2)
        state = init_state(config, optimizer, key, trainable=lora)
        step = make_train_step(config, optimizer, trainable=lora)
        losses = []
        for _ in range(40):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        return losses

    exact, near = train(GPT2), train(GPT2.replace(float8=True))
    learned = exact[0] - exact[-1]
    assert learned > 0.2
    assert near[0] - near[-1] == pytest.approx(learned, rel=0.1)
    assert near != exact


def test_only_training_is_in_8_bit_floats(rng: np.random.Generator, tmp_path: Path) -> None:
    config = GPT2.replace(float8=True)
    params, batch = random_params(config, rng), batch_of(config, rng)
    assert "float8" in str(jax.make_jaxpr(lambda p: loss_fn(p, batch, config)[0])(params))
    # As numpy arrays, too.
    arrays = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(loss_fn(arrays, batch, config)[0], loss_fn(params, batch, config)[0])
    exact, found = (make_eval_step(c)(params, batch) for c in (GPT2, config))
    assert found == exact
    prompts = [row[:5].tolist() for row in batch["tokens"][:3]]
    sampling = Sampling(max_new_tokens=4, temperature=0.0)
    exact, found = (generate(params, prompts, c, sampling) for c in (GPT2, config))
    assert found == exact
    fit(
        config,
        optax.sgd(0.1),
        [batch],
        steps=1,
        out=tmp_path / "run",
        mesh=None,
        checkpoint_every=1,
    )
    assert load(tmp_path / "run").config == GPT2


def test_experts_are_refused() -> None:
    with pytest.raises(UserError, match=r"float8 is for the kernels of dense blocks"):
        GPT2.replace(num_experts=4, float8=True)
