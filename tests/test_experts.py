"""Mixture of experts: against a loop over tokens, and what its losses say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import GPT2, MODERN, random_params

from gptjax import experts, model
from gptjax.config import ModelConfig
from gptjax.experts import mixture, route, routing_losses
from gptjax.generation import generate
from gptjax.layouts import decoding_params, quantize, unstack_blocks
from gptjax.loss import LossOptions, loss_fn
from gptjax.model import forward
from gptjax.params import count_params, flops_per_token, init_params
from gptjax.sampling import Sampling
from gptjax.training import init_state, make_train_step

GATED = MODERN.replace(num_experts=5, experts_per_token=3, gated_mlp=True, activation="silu")
BIASED = GPT2.replace(num_experts=4, experts_per_token=2, normalize_gates=False)
SHARED = GATED.replace(shared_experts=2)
CONFIGS = pytest.mark.parametrize(
    "config", [GATED, BIASED, SHARED], ids=["gated", "biased", "shared"]
)


def one_block(config: ModelConfig, rng: np.random.Generator) -> dict[str, Any]:
    return jax.tree.map(lambda w: w[0], random_params(config, rng)["blocks"]["mlp"])


@pytest.mark.parametrize("config", [GATED, BIASED], ids=["gated", "biased"])
def test_every_choice_of_every_token_is_computed(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params = one_block(config, rng)
    x = rng.normal(size=(3, 7, config.embed_dim)).astype(np.float32)
    # All tokens alike in one row: their experts get many, others none.
    x[1] = x[1, :1]
    out, routing = mixture(params, jnp.asarray(x), config)
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    activate: Any = jax.nn.silu if config.gated_mlp else jax.nn.gelu
    load = np.zeros(config.num_experts or 0)
    total = np.zeros_like(load)
    for row in np.ndindex(3, 7):
        logits = x[row] @ p["router"]
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        total += probs
        chosen = np.argsort(-probs)[: config.experts_per_token]
        load[chosen] += 1
        gates = probs[chosen]
        if config.normalize_gates:
            gates = gates / gates.sum()
        expected = np.zeros(config.embed_dim)
        for gate, e in zip(gates, chosen, strict=True):
            bias = lambda name, e=e: p[name][e] if name in p else 0
            h = x[row] @ p["up"][e] + bias("up_bias")
            if config.gated_mlp:
                h = np.asarray(activate(x[row] @ p["gate"][e])) * h
            else:
                h = np.asarray(activate(h))
            expected += gate * (h @ p["down"][e] + bias("down_bias"))
        np.testing.assert_allclose(out[row], expected, atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(routing.load_E, load)
    np.testing.assert_allclose(routing.probability_E, total, rtol=1e-5)
    assert float(routing.tokens) == 21


@pytest.mark.parametrize("config", [GATED, BIASED], ids=["gated", "biased"])
def test_rows_of_no_group_count_for_nothing(
    config: ModelConfig, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some chips a grouped product leaves anything in them, and its gradients too."""
    E, k = config.num_experts or 0, config.experts_per_token
    params = one_block(config, rng)
    here = {name: w[:2] for name, w in params.items() if name not in ("router", "shared")}
    x = jnp.asarray(rng.normal(size=(2, 6, 32)), jnp.float32)
    chosen = jnp.asarray(rng.permuted(np.tile(np.arange(E), (12, 1)), axis=1)[:, :k])
    gates = jnp.asarray(rng.uniform(0.1, 1, (2, 6, k)), jnp.float32)

    def objective(here: Any, x: jax.Array, gates: jax.Array) -> jax.Array:
        out = experts._compute(x, gates, chosen.reshape(2, 6, k), here, config, 0)
        return jnp.sum(jnp.sin(out))

    gradients = jax.grad(objective, argnums=(0, 1, 2))
    expected = gradients(here, x, gates)
    plain = jax.lax.ragged_dot

    def beyond(x: jax.Array, sizes: jax.Array) -> jax.Array:
        return (jnp.arange(x.shape[0]) >= jnp.sum(sizes))[:, None]

    @jax.custom_vjp
    def littered(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return jnp.where(beyond(x, sizes), 7.0, plain(x, w, sizes))

    def forwards(x: jax.Array, w: jax.Array, sizes: jax.Array) -> Any:
        return littered(x, w, sizes), (x, w, sizes)

    def backwards(saved: Any, grad: jax.Array) -> Any:
        x, w, sizes = saved
        grad_x, grad_w = jax.vjp(lambda x, w: plain(x, w, sizes), x, w)[1](grad)
        return jnp.where(beyond(x, sizes), 7.0, grad_x), grad_w, None

    littered.defvjp(forwards, backwards)
    monkeypatch.setattr(jax.lax, "ragged_dot", littered)
    found = gradients(here, x, gates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected
    )


def test_experts_are_chosen_in_float32(rng: np.random.Generator) -> None:
    """In every form of the parameters, whatever the products are computed in."""
    config = GATED.replace(compute_dtype="bfloat16")
    params = random_params(config, rng)
    tokens = jnp.asarray(rng.integers(0, 31, (2, 16)), jnp.int32)
    kernels: list[Any] = []
    watched = experts.route

    def route_and_tell(kernel: Any, x: jax.Array, config: ModelConfig) -> Any:
        kernels.append(kernel.dtype)
        return watched(kernel, x, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "route", route_and_tell)
        for form in (params, unstack_blocks(params, config), decoding_params(params, config)):
            jax.make_jaxpr(lambda form=form: forward(form, tokens, config))()
        jax.make_jaxpr(lambda: forward(quantize(params, config), tokens, config))()
    assert len(kernels) >= 4
    assert set(kernels) == {jnp.dtype(jnp.float32)}


def test_the_losses_of_a_router(rng: np.random.Generator) -> None:
    E, D = 4, 8
    config = GPT2.replace(embed_dim=D, num_experts=E, experts_per_token=2)
    x = jnp.asarray(rng.normal(size=(2, 50, D)), jnp.float32)
    kernel = rng.normal(size=(D, E)).astype(np.float32)
    *_, routing = route(jnp.asarray(kernel), x, config)
    logits = np.asarray(x, np.float64).reshape(-1, D) @ kernel
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    share = np.bincount(np.argsort(-probs, axis=-1)[:, :2].ravel(), minlength=E) / 200
    balance, z = routing_losses(routing)
    np.testing.assert_allclose(balance, E * np.sum(share * probs.mean(axis=0)), rtol=1e-5)
    log_z = np.log(np.exp(logits).sum(axis=-1))
    np.testing.assert_allclose(z, np.mean(log_z**2), rtol=1e-5)
    # All experts alike is the best there is, all on one pair the worst.
    *_, even = route(jnp.zeros((D, E)), x, config)
    np.testing.assert_allclose(routing_losses(even)[0], 1, rtol=1e-6)
    one_pair = jnp.zeros((D, E)).at[0, :2].set(50.0)
    *_, worst = route(one_pair, jnp.ones_like(x), config)
    np.testing.assert_allclose(routing_losses(worst)[0], E / 2, rtol=1e-5)


def test_losses_are_added_with_their_weights(rng: np.random.Generator) -> None:
    params = random_params(GATED, rng)
    tokens = rng.integers(0, 31, (2, 17)).astype(np.int32)
    weights = rng.uniform(0, 2, (2, 16)).astype(np.float32)
    batch: Any = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    bare, metrics = loss_fn(
        params, batch, GATED, options=LossOptions(balance_loss=0, router_z_loss=0)
    )
    np.testing.assert_allclose(bare, metrics["loss"], rtol=1e-6)
    assert metrics["balance_loss"] >= 1 - 1e-3
    loss, again = loss_fn(
        params, batch, GATED, options=LossOptions(balance_loss=0.3, router_z_loss=0.02)
    )
    expected = bare + 0.3 * metrics["balance_loss"] + 0.02 * metrics["router_z_loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-6)


@CONFIGS
def test_the_forms_of_the_parameters_agree(config: ModelConfig, rng: np.random.Generator) -> None:
    params = random_params(config, rng)
    tokens = jnp.asarray(rng.integers(0, 31, (2, 9)), jnp.int32)
    expected = np.asarray(forward(params, tokens, config))
    for form in (unstack_blocks, decoding_params):
        found = forward(form(params, config), tokens, config)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    rounded = np.asarray(forward(quantize(params, config), tokens, config))
    # On average: where two experts are nearly as likely, rounding may choose the other.
    assert 0 < np.abs(rounded - expected).mean() < 0.1 * np.abs(expected).mean()


@CONFIGS
def test_generation_equals_the_whole_forward_pass(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params = random_params(config, rng)
    prompts = [rng.integers(0, 31, n).tolist() for n in (2, 5)]
    found = generate(params, prompts, config, Sampling(max_new_tokens=4, temperature=0))
    for prompt, new in zip(prompts, found, strict=True):
        row = list(prompt)
        for _ in range(4):
            logits = forward(params, jnp.asarray([row]), config)
            row.append(int(jnp.argmax(logits[0, -1])))
        assert list(new) == row[len(prompt) :]


def test_a_model_of_experts_learns(rng: np.random.Generator) -> None:
    config = SHARED
    optimizer = optax.adam(3e-3)
    step = make_train_step(config, optimizer)
    state = init_state(config, optimizer, jax.random.key(int(rng.integers(2**31))))
    tokens = np.tile(rng.integers(0, 31, 16), (4, 2))[:, :17].astype(np.int32)
    batch: Any = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    losses, balances = [], []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        balances.append(float(metrics["balance_loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert np.isfinite(balances).all()


def test_sizes_count_all_experts_and_work_only_the_chosen() -> None:
    dense = GPT2.replace(use_bias=False)
    sparse = dense.replace(num_experts=8, experts_per_token=2)
    assert count_params(sparse) == sum(
        leaf.size for leaf in jax.tree.leaves(init_params(sparse, jax.random.key(0)))
    )
    mlp = 2 * 2 * 32 * 128
    router = 2 * 32 * 8
    assert count_params(sparse) - count_params(dense) == 7 * mlp + router
    work = flops_per_token(sparse) - flops_per_token(dense)
    assert work == 6 * (mlp + router)


def test_shared_experts_are_for_every_token(rng: np.random.Generator) -> None:
    params = one_block(SHARED, rng)
    x = rng.normal(size=(2, 5, 32)).astype(np.float32)
    found, _ = model.expert_mlp(params, jnp.asarray(x), SHARED)
    routed, _ = mixture(params, jnp.asarray(x), SHARED)
    shared = jax.tree.map(np.asarray, params["shared"])
    assert shared["up"].shape == (32, 2 * 128)
    hidden = np.asarray(jax.nn.silu(x @ shared["gate"])) * (x @ shared["up"])
    np.testing.assert_allclose(found - routed, hidden @ shared["down"], atol=1e-4, rtol=1e-4)
