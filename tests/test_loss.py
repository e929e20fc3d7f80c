"""The loss against a plain computation, in one block or many."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2, STYLES, random_params

import gptjax.loss
from gptjax.config import ModelConfig
from gptjax.loss import LossOptions, loss_fn
from gptjax.model import forward
from gptjax.params import Params, init_params


def random_batch(
    config: ModelConfig, rng: np.random.Generator, B: int = 3, T: int = 13
) -> dict[str, Any]:
    tokens = rng.integers(0, config.vocab_size, (B, T + 1)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[rng.random((B, T)) < 0.3] = -100
    weights = rng.uniform(0, 2, (B, T)).astype(np.float32)
    weights[rng.random((B, T)) < 0.2] = 0
    return {"tokens": tokens[:, :-1], "targets": targets, "weights": weights}


@partial(jax.jit, static_argnames=("config", "options"))
def value_and_grad(params: Params, batch: Any, config: ModelConfig, options: LossOptions) -> Any:
    loss = lambda params: loss_fn(params, batch, config, options=options)
    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("keys", [("weights",), ()], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@STYLES
def test_loss_is_the_weighted_mean_of_cross_entropies(
    config: ModelConfig, z_loss: float, keys: tuple[str, ...], rng: np.random.Generator
) -> None:
    params, batch = random_params(config, rng), random_batch(config, rng)
    batch = {key: batch[key] for key in ("tokens", "targets", *keys)}
    loss, metrics = loss_fn(params, batch, config, options=LossOptions(z_loss=z_loss))
    logits = np.asarray(forward(params, batch["tokens"], config), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll, z, count = 0.0, 0.0, 0.0
    for b, t in np.ndindex(*batch["targets"].shape):
        if batch["targets"][b, t] >= 0:
            weight = float(batch["weights"][b, t]) if keys else 1.0
            nll += weight * (log_z[b, t] - logits[b, t, batch["targets"][b, t]])
            z += weight * log_z[b, t] ** 2
            count += weight
    assert float(metrics["tokens"]) == pytest.approx(count, rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(nll / count, rel=1e-5)
    assert float(loss) == pytest.approx((nll + z_loss * z) / count, rel=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tokens_at_once", [3, 4])
@STYLES
def test_blocks_change_neither_value_nor_gradient(
    config: ModelConfig, tokens_at_once: int, recompute: bool, rng: np.random.Generator
) -> None:
    params, batch = random_params(config, rng), random_batch(config, rng)
    (loss, metrics), grads = value_and_grad(params, batch, config, LossOptions(z_loss=0.01))
    options = LossOptions(
        z_loss=0.01, recompute=recompute, logits_at_once=3 * tokens_at_once * config.vocab_size
    )
    (other_loss, other_metrics), other = value_and_grad(params, batch, config, options)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for name in ("loss", "tokens"):
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5), grads, other)
    # Where a factor follows, as in a sum of losses, the stored gradient takes it too.
    tripled = jax.jit(jax.grad(lambda p: 3 * loss_fn(p, batch, config, options=options)[0]))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 3 * b, atol=3e-6, rtol=1e-5), tripled, other
    )


@pytest.mark.parametrize("logits_at_once", [2**26, 200])
@pytest.mark.parametrize("how", ["targets", "weights"])
def test_where_nothing_counts_the_loss_is_zero(
    how: str, logits_at_once: int, rng: np.random.Generator
) -> None:
    params, batch = random_params(GPT2, rng), random_batch(GPT2, rng)
    if how == "targets":
        batch["targets"] = np.full_like(batch["targets"], -100)
    else:
        batch["weights"] = np.zeros_like(batch["weights"])
    options = LossOptions(z_loss=0.1, logits_at_once=logits_at_once)
    (loss, metrics), grads = value_and_grad(params, batch, GPT2, options)
    assert float(loss) == float(metrics["loss"]) == float(metrics["tokens"]) == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(grads))


def largest(jaxpr: Any) -> int:
    """Elements of the largest array in a program, loops' insides included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [var.aval.size for var in equation.outvars if hasattr(var.aval, "size")]
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        for part in inner:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                sizes.append(largest(part))
    return max(sizes)


@pytest.mark.parametrize("recompute", [False, True])
def test_with_blocks_no_array_holds_all_logits(recompute: bool) -> None:
    B, T, V = 8, 16, 5000
    config = GPT2.replace(vocab_size=V)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens}

    def size(options: LossOptions, train: bool) -> int:
        loss = lambda params, batch: loss_fn(params, batch, config, options=options)
        program = jax.grad(loss, has_aux=True) if train else loss
        return largest(jax.make_jaxpr(program)(params, batch).jaxpr)

    for train in (True, False):
        assert size(LossOptions(), train) >= B * T * V
        blocked = LossOptions(recompute=recompute, logits_at_once=B * 4 * V)
        assert size(blocked, train) <= B * 4 * V


def test_documents_in_the_batch_reach_the_model(rng: np.random.Generator) -> None:
    params, batch = random_params(GPT2, rng), random_batch(GPT2, rng)
    segments = np.zeros_like(batch["tokens"])
    segments[:, 6:] = 1
    places = np.broadcast_to(np.arange(13, dtype=np.int32), segments.shape) - 6 * segments
    packed, _ = loss_fn(params, batch | {"segment_ids": segments, "positions": places}, GPT2)
    total = 0.0
    for part in (slice(0, 6), slice(6, 13)):
        piece = {key: value[:, part] for key, value in batch.items()}
        loss, metrics = loss_fn(params, piece, GPT2)
        total += float(loss * metrics["tokens"])
    count = float((batch["weights"] * (batch["targets"] >= 0)).sum())
    assert float(packed) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("logits_at_once", [2**26, 200])
@pytest.mark.parametrize("recompute", [False, True])
@STYLES
def test_no_rank_is_promoted(
    config: ModelConfig, recompute: bool, logits_at_once: int, rng: np.random.Generator
) -> None:
    params, batch = random_params(config, rng), random_batch(config, rng)
    batch = jax.tree.map(jnp.asarray, batch)
    options = LossOptions(z_loss=0.1, recompute=recompute, logits_at_once=logits_at_once)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.grad(lambda p: loss_fn(p, batch, config, options=options)[0]), params)


@pytest.mark.parametrize("logits_at_once", [None, 200])
@STYLES
def test_what_is_padded_for_an_accelerator_counts_nowhere(
    config: ModelConfig,
    logits_at_once: int | None,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, batch = random_params(config, rng), random_batch(config, rng)
    options = LossOptions(z_loss=0.1, logits_at_once=logits_at_once)
    value = lambda params: loss_fn(params, batch, config, options=options)[0]
    expected = jax.value_and_grad(value)(params)
    monkeypatch.setattr(gptjax.loss, "platform", lambda: "gpu")
    padded = gptjax.loss._split(jnp.ones((config.vocab_size, 2)), jnp.float32)
    assert padded.shape[0] % 128 == 0 != config.vocab_size % 128
    got = jax.value_and_grad(value)(params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-5), got, expected)


def test_a_cpu_does_not_turn_the_gradient_of_many_logits(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, kernel = (rng.normal(size=size).astype(np.float32) for size in ((2, 9, 16), (50, 16)))
    upstream = rng.normal(size=(2, 9, 50)).astype(np.float32)
    # Few logits have forward-mode derivatives.
    _, tangent = jax.jvp(gptjax.loss._logits, (x, kernel), (x, np.zeros_like(kernel)))
    np.testing.assert_allclose(tangent, x @ kernel.T, rtol=1e-5, atol=1e-5)
    for most in (2 * 9 * 50, 2 * 9 * 50 + 1):
        monkeypatch.setattr(gptjax.loss, "_WORTH_TURNING", most)
        # Made anew, since JAX keeps what it traced.
        pull_back = lambda x, kernel: jax.vjp(gptjax.loss._logits, x, kernel)[1](upstream)
        grad_x, grad_kernel = pull_back(x, kernel)
        np.testing.assert_allclose(grad_x, upstream @ kernel, rtol=1e-5, atol=1e-5)
        expected = np.einsum("btv,btd->vd", upstream, x)
        np.testing.assert_allclose(grad_kernel, expected, rtol=1e-5, atol=1e-5)
        made = [eqn.outvars[0].aval for eqn in jax.make_jaxpr(pull_back)(x, kernel).eqns]
        assert ((16, 50) in [array.shape for array in made]) is (most == 2 * 9 * 50)


def test_gradients_of_low_precision_logits_are_of_low_precision(rng: np.random.Generator) -> None:
    """Near those of float32, and of the dtype that the products are fast in."""
    x = jnp.asarray(rng.normal(size=(2, 9, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(50, 16)), jnp.bfloat16)
    upstream = jnp.asarray(rng.normal(size=(2, 9, 50)), jnp.float32)

    def objective(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(gptjax.loss._logits(x, kernel) * upstream)

    half = jax.grad(objective, argnums=(0, 1))(x, kernel)
    full = jax.grad(objective, argnums=(0, 1))(x.astype(jnp.float32), kernel.astype(jnp.float32))
    for got, expected in zip(half, full, strict=True):
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(got, np.float32) - expected) / np.linalg.norm(expected)
        assert error < 0.01
    pulled_back = jax.make_jaxpr(lambda x, k: jax.vjp(gptjax.loss._logits, x, k)[1](upstream))
    equations = pulled_back(x, kernel).eqns
    operands = [
        str(operand.aval.dtype)
        for equation in equations
        if equation.primitive.name == "dot_general"
        for operand in equation.invars
    ]
    assert len(operands) >= 4
    assert set(operands) == {"bfloat16"}
