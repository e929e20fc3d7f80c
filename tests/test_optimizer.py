"""Schedules against formulas, and which update each parameter gets."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models
from small_models import GPT2

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.optimizer import OptimizerConfig, make_optimizer, make_schedule
from gptjax.params import Params, param_specs

MODERN = small_models.MODERN.replace(norm_gain=True)
STYLES = pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])


def normal(config: ModelConfig, rng: np.random.Generator) -> Params:
    shapes = jax.tree.map(lambda spec: spec.shape, param_specs(config), is_leaf=is_spec)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def is_spec(node: object) -> bool:
    return hasattr(node, "axes")


def first_update(
    options: OptimizerConfig, model: ModelConfig, grads: Params, params: Params
) -> dict[str, np.ndarray]:
    """The first step's change of every parameter, by path."""
    optimizer = make_optimizer(options, model, steps=10)
    step = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])
    leaves = jax.tree_util.tree_leaves_with_path(step(grads, params))
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {name(path): np.asarray(leaf) for path, leaf in leaves}


def by_path(tree: Params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {name(path): np.asarray(leaf) for path, leaf in leaves}


def is_vector(name: str) -> bool:
    return name.endswith(("bias", "scale"))


def is_embedding(name: str) -> bool:
    return name.startswith(("embed", "head"))


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_schedules(schedule: str, warmup: int, rng: np.random.Generator) -> None:
    steps, peak, final = 50, float(rng.uniform(0.1, 1)), 0.25
    options = OptimizerConfig(
        schedule=schedule,  # pyright: ignore[reportArgumentType]
        warmup_steps=warmup,
        final_fraction=final,
        decay_fraction=0.3,
    )
    got = make_schedule(options, peak, steps)
    for made in range(steps + 5):
        if made < warmup:
            expected = (made + 1) / (warmup + 1)
        elif schedule == "constant":
            expected = 1.0
        elif schedule == "cosine":
            progress = min((made - warmup) / (steps - warmup), 1)
            expected = final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
        else:
            progress = min(max((made - 35) / 15, 0), 1)
            expected = 1 - (1 - final) * progress
        assert float(got(made)) == pytest.approx(peak * expected, rel=1e-5), made


def test_a_schedule_shorter_than_its_warm_up_stays_finite() -> None:
    for schedule in ("constant", "cosine", "wsd"):
        got = make_schedule(OptimizerConfig(schedule=schedule, warmup_steps=20), 1.0, 5)  # pyright: ignore[reportArgumentType]
        assert all(0 < float(got(made)) <= 1 for made in range(6))


@STYLES
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_acts_on_embeddings_and_matrices_alone(
    name: str, config: ModelConfig, rng: np.random.Generator
) -> None:
    options = OptimizerConfig(
        name=name,  # pyright: ignore[reportArgumentType]
        learning_rate=0.01,
        matrix_learning_rate=0.03,
        weight_decay=0.2,
        warmup_steps=0,
        schedule="constant",
    )
    params = normal(config, rng)
    updates = first_update(options, config, jax.tree.map(jnp.zeros_like, params), params)
    before = by_path(params)
    assert any(is_vector(path) for path in updates)
    for path, update in updates.items():
        muon = name == "muon" and not is_embedding(path)
        rate = 0.0 if is_vector(path) else 0.2 * (0.03 if muon else 0.01)
        np.testing.assert_allclose(update, -rate * before[path], rtol=1e-5, err_msg=path)


@STYLES
def test_muon_orthogonalizes_each_layers_matrices(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    options = OptimizerConfig(
        name="muon",
        learning_rate=0.01,
        matrix_learning_rate=0.03,
        weight_decay=0.0,
        warmup_steps=0,
        schedule="constant",
        clip_norm=None,
    )

    def matrices(spec: object) -> tuple[int, int] | None:
        # Outputs are what "embed" is turned into, or "embed" itself where it stands last.
        shape = spec.shape[1:]  # pyright: ignore[reportAttributeAccessIssue]
        if spec.axes[0] != "layers" or len(shape) < 2 or spec.kind == "vector":  # pyright: ignore[reportAttributeAccessIssue]
            return None
        inputs = shape[0] if spec.axes[1] == "embed" else math.prod(shape[:-1])  # pyright: ignore[reportAttributeAccessIssue]
        return inputs, math.prod(shape) // inputs

    grads = normal(config, rng)
    sizes = dict.fromkeys(by_path(grads))
    specs = jax.tree_util.tree_leaves_with_path(param_specs(config), is_leaf=is_spec)
    for path, spec in specs:
        sizes[jax.tree_util.keystr(path, simple=True, separator=".")] = matrices(spec)

    def conditioned(path: tuple, grad: jax.Array) -> jax.Array:
        # Singular values of one order within a layer, and of different orders between layers.
        size = sizes[jax.tree_util.keystr(path, simple=True, separator=".")]
        if size is None:
            return grad
        layers = []
        for layer in range(config.num_layers):
            u, s, v = np.linalg.svd(np.asarray(grad[layer]).reshape(size), full_matrices=False)
            values = rng.uniform(0.5, 2, s.shape) * 100.0**layer
            layers.append((u * values @ v).reshape(grad.shape[1:]))
        return jnp.asarray(np.stack(layers), jnp.float32)

    grads = jax.tree_util.tree_map_with_path(conditioned, grads)
    updates = first_update(options, config, grads, normal(config, rng))
    for path, update in updates.items():
        size = sizes[path]
        if size is None:
            # The first step of Adam is the sign of the gradient, but for its epsilon.
            assert is_vector(path) or is_embedding(path)
            grad = np.asarray(by_path(grads)[path])
            expected = -0.01 * grad / (np.abs(grad) + options.epsilon)
            np.testing.assert_allclose(update, expected, rtol=1e-3, err_msg=path)
            continue
        scale = 0.03 * math.sqrt(max(1, size[1] / size[0]))
        for layer in range(config.num_layers):
            values = np.linalg.svd(update[layer].reshape(size) / scale, compute_uv=False)
            assert 0.5 < values.min() <= values.max() < 1.5, (path, layer)
            downhill = np.sum(update[layer] * by_path(grads)[path][layer])
            assert downhill < 0, path


@pytest.mark.parametrize("ratio", [0.2, 3.0])
def test_clipping_is_by_the_global_norm(ratio: float, rng: np.random.Generator) -> None:
    grads = normal(GPT2, rng)
    norm = math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in by_path(grads).values()))
    # With so large an epsilon Adam's first step is the gradient itself.
    options = OptimizerConfig(
        learning_rate=1e8,
        epsilon=1e8,
        weight_decay=0.0,
        warmup_steps=0,
        schedule="constant",
        clip_norm=ratio * norm,
    )
    updates = first_update(options, GPT2, grads, grads)
    for path, grad in by_path(grads).items():
        np.testing.assert_allclose(updates[path], -min(ratio, 1) * grad, rtol=1e-4, atol=1e-6)


def test_the_schedule_is_counted_in_updates(rng: np.random.Generator) -> None:
    options = OptimizerConfig(learning_rate=0.1, warmup_steps=3, final_fraction=0.0)
    optimizer = make_optimizer(options, GPT2, steps=6)
    params = normal(GPT2, rng)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    schedule = make_schedule(options, 0.1, 6)
    for made in range(7):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        # Of constant gradients Adam makes steps of the learning rate.
        step = float(optax.tree.norm(updates["final_norm"]["bias"])) / math.sqrt(32)
        assert step == pytest.approx(float(schedule(made)), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"final_fraction": 1.5},
        {"decay_fraction": -0.1},
        {"learning_rate": -1.0},
        {"weight_decay": float("nan")},
        {"warmup_steps": -1},
    ],
)
def test_illegal_settings_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        OptimizerConfig(**options)


@STYLES
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_no_rank_is_promoted(name: str, config: ModelConfig, rng: np.random.Generator) -> None:
    options = OptimizerConfig(name=name)  # pyright: ignore[reportArgumentType]
    params = normal(config, rng)
    optimizer = make_optimizer(options, config, steps=10)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
