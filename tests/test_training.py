"""The train step: exact under accumulation and on meshes, compiled once, its state donated."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from on_devices import run_alone
from small_models import GPT2, STYLES, random_params

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.loss import loss_fn
from gptjax.optimizer import OptimizerConfig, make_optimizer
from gptjax.sharding import make_mesh
from gptjax.training import TrainState, abstract_state, init_state, make_train_step


def random_batch(config: ModelConfig, rng: np.random.Generator, rows: int = 4) -> dict[str, Any]:
    tokens = rng.integers(0, config.vocab_size, (rows, config.context_length + 1)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:].copy()}


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def host(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def run_steps(step: Any, state: TrainState, batches: list[Any]) -> tuple[TrainState, list[Any]]:
    metrics = []
    for batch in batches:
        state, more = step(state, batch)
        metrics.append(host(more))
    return state, metrics


@STYLES
def test_microbatches_equal_the_whole_batch(config: ModelConfig, rng: np.random.Generator) -> None:
    params, batch = random_params(config, rng), random_batch(config, rng, rows=6)
    batch["weights"] = rng.uniform(0, 2, batch["tokens"].shape).astype(np.float32)
    batch["targets"][rng.random(batch["tokens"].shape) < 0.3] = -100
    # Whichever way rows are dealt out, microbatches differ much; the last row counts nothing.
    batch["weights"] *= np.arange(6)[::-1, None].astype(np.float32)
    optimizer = optax.sgd(0.5)
    expected = None
    for accumulate in (1, 2, 6):
        step = make_train_step(config, optimizer, accumulate=accumulate)
        state = init_state(config, optimizer, jax.random.key(0), params=params)
        state, metrics = step(state, batch)
        result = host((state.params, metrics))
        if expected is None:
            expected = result
            moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), result[0], host(params))
            # All but the keys' bias, to which the softmax is blind.
            moved["blocks"]["attention"].pop("key_bias", None)
            assert min(jax.tree.leaves(moved)) > 1e-7
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6, rtol=2e-6), result, expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_update_is_the_gradient_of_the_mean_loss(
    accumulate: int, rng: np.random.Generator
) -> None:
    batch = random_batch(GPT2, rng)
    shape = batch["targets"].shape
    batch["targets"][rng.random(shape) < 0.4] = -100
    batch["weights"] = rng.uniform(0, 2, shape).astype(np.float32)
    optimizer = optax.sgd(1.0)
    state = init_state(GPT2, optimizer, jax.random.key(1), params=random_params(GPT2, rng))
    before = host(state.params)
    found: Any = jax.value_and_grad(loss_fn, has_aux=True)(before, batch, GPT2)
    (loss, _), expected = found
    state, metrics = make_train_step(GPT2, optimizer, accumulate=accumulate)(state, batch)
    moved = jax.tree.map(lambda old, new: old - new, before, host(state.params))
    norm = float(optax.tree.norm(expected))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * norm), moved, expected)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def test_a_batch_that_does_not_divide_is_refused(rng: np.random.Generator) -> None:
    optimizer = optax.sgd(0.1)
    step = make_train_step(GPT2, optimizer, accumulate=3)
    state = init_state(GPT2, optimizer, jax.random.key(0), params=random_params(GPT2, rng))
    with pytest.raises(UserError, match=r"4 rows.*3 microbatches.*\[1, 2, 4\]"):
        step(state, random_batch(GPT2, rng))


@STYLES
def test_one_compilation_donation_and_a_mesh_of_one(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    batches = [random_batch(config, rng) for _ in range(3)]
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), config, steps=3)
    params = random_params(config, rng)
    results = []
    for mesh in (None, make_mesh(devices=jax.devices()[:1])):
        step: Any = make_train_step(config, optimizer, mesh)
        state = init_state(config, optimizer, jax.random.key(1), mesh, params=params)
        passed = state
        state, metrics = run_steps(step, state, batches)
        assert (step if mesh is None else step.jitted)._cache_size() == 1
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(passed))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, params)))
        assert int(state.step) == 3
        results.append(host((state.params, state.opt_state, metrics)))
        assert metrics[0]["skipped"] == 0
        assert metrics[0]["tokens"] == 64
    same(*results)


def test_a_seed_gives_one_run_on_any_mesh_and_states_are_copies() -> None:
    optimizer = optax.sgd(0.1)
    mesh = make_mesh(devices=jax.devices()[:1])
    a = init_state(GPT2, optimizer, jax.random.key(1))
    b = init_state(GPT2, optimizer, jax.random.key(1), mesh, ema=True)
    same(host(a.params), host(b.params))
    same(host(b.params), host(b.ema_params))
    step = make_train_step(GPT2, optimizer)
    given = init_state(GPT2, optimizer, jax.random.key(0), params=a.params)
    step(given, {"tokens": np.zeros((1, 4), np.int32), "targets": np.zeros((1, 4), np.int32)})
    assert not a.params["embed"]["tokens"].is_deleted()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_skip_leaves_everything_as_it_was(accumulate: int, rng: np.random.Generator) -> None:
    config, optimizer = GPT2, optax.adam(0.1)
    params, good = random_params(config, rng), random_batch(config, rng)
    good["weights"] = np.ones(good["tokens"].shape, np.float32)
    bad = good | {"weights": good["weights"].copy()}
    bad["weights"][1, 3] = np.inf
    options: Any = {"ema_decay": 0.9, "accumulate": accumulate}
    step = make_train_step(config, optimizer, nonfinite="skip", **options)
    state = init_state(config, optimizer, jax.random.key(0), params=params, ema=True)
    before = host((state.params, state.opt_state, state.ema_params))
    state, metrics = step(state, bad)
    same(host((state.params, state.opt_state, state.ema_params)), before)
    assert (float(metrics["skipped"]), int(state.step)) == (1.0, 1)
    state, metrics = step(state, good)
    assert float(metrics["skipped"]) == 0.0
    moved = host(state.params)
    assert np.abs(moved["embed"]["tokens"] - before[0]["embed"]["tokens"]).max() > 0.01
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    if accumulate == 1:
        keep = make_train_step(config, optimizer, **options)
        state = init_state(config, optimizer, jax.random.key(0), params=params, ema=True)
        state, metrics = keep(state, bad)
        assert float(metrics["skipped"]) == 0.0
        assert not np.isfinite(host(state.params)["embed"]["tokens"]).all()


def test_the_average_follows_its_formula_and_metrics_are_those_before(
    rng: np.random.Generator,
) -> None:
    params, batch = random_params(GPT2, rng), random_batch(GPT2, rng)
    optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    step = make_train_step(GPT2, optimizer, ema_decay=0.8)
    state = init_state(GPT2, optimizer, jax.random.key(0), params=params, ema=True)
    average = host(params)
    for number in range(2):
        before = host(state.params)
        state, metrics = step(state, batch)
        after = host(state.params)
        average = jax.tree.map(lambda e, p: 0.8 * e + 0.2 * p, average, after)
        jax.tree.map(
            partial(np.testing.assert_allclose, atol=1e-6), host(state.ema_params), average
        )
        if number == 0:
            loss, _ = loss_fn(before, batch, GPT2)
            grads = jax.jit(jax.grad(lambda p: loss_fn(p, batch, GPT2)[0]))(params)
            assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
            norm = float(optax.tree.norm(grads))
            assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)


def test_dropout_differs_by_step_and_key_and_repeats(rng: np.random.Generator) -> None:
    config = GPT2.replace(dropout=0.3)
    params, batch = random_params(config, rng), random_batch(config, rng)
    # Without learning, what differs between steps is dropout.
    optimizer = optax.sgd(0.0)
    step = make_train_step(config, optimizer)
    start = lambda seed: init_state(config, optimizer, jax.random.key(seed), params=params)
    losses = lambda seed: [float(m["loss"]) for m in run_steps(step, start(seed), [batch] * 2)[1]]
    first = losses(0)
    assert first == losses(0)
    assert len({*first, *losses(1)}) == 4


def test_microbatches_have_dropout_of_their_own(rng: np.random.Generator) -> None:
    config = GPT2.replace(dropout=0.3)
    params, batch = random_params(config, rng), random_batch(config, rng, rows=1)
    optimizer = optax.sgd(0.0)

    def norm(rows: int) -> float:
        wide = {key: np.repeat(value, rows, 0) for key, value in batch.items()}
        step = make_train_step(config, optimizer, accumulate=rows)
        state = init_state(config, optimizer, jax.random.key(0), params=params)
        return float(step(state, wide)[1]["loss"])

    # Equal rows under equal keys would have the loss of one.
    one, two = norm(2), norm(3)
    assert abs(one - two) > 1e-5


@pytest.mark.parametrize("accumulate", [1, 2])
@STYLES
def test_no_rank_is_promoted(
    config: ModelConfig, accumulate: int, rng: np.random.Generator
) -> None:
    config = config.replace(dropout=0.1)
    optimizer = optax.adam(0.1)
    batch = random_batch(config, rng)
    batch["weights"] = np.ones(batch["tokens"].shape, np.float32)
    step: Any = make_train_step(
        config, optimizer, accumulate=accumulate, ema_decay=0.9, nonfinite="skip"
    )
    with jax.numpy_rank_promotion("raise"):
        state = abstract_state(config, optimizer, ema=True)
        jax.eval_shape(step, state, batch)


CORES = """
import jax
from gptjax.devices import cores_as_devices
from gptjax.sharding import data_mesh, mesh_devices

cores_as_devices(int("{most}"))
print(jax.device_count(), *(len(mesh_devices(data_mesh(*case))) for case in {cases}))
"""


def test_a_batch_is_split_over_the_cores_that_divide_it(tmp_path: Path) -> None:
    cases: list[tuple[int, ...]]
    cases = [(12, 768), (12, 255), (12, 512), (7, 10_000), (5, 10_000), (1, 10_000)]
    # A large model on few tokens stays on one device.
    cases += [(12, 768, 7_680_000), (12, 768, 7_680_001)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for flag, most, devices in ((6, 16, 6), (6, 2, 6), (None, 2, min(cores or 1, 2))):
        printed = run_alone(CORES.format(most=most, cases=cases), tmp_path, devices=flag)
        found = [int(word) for word in printed.split()]
        assert found[0] == devices
        if devices == 6:
            assert found[1:] == [3, 1, 2, 1, 5, 1, 3, 1]
