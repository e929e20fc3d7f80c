"""Training less than everything: low-rank additions and frozen parameters."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from on_devices import run_alone
from small_models import GPT2, MODERN, random_params

from gptjax.adapters import (
    LoRA,
    Only,
    Trainable,
    join_params,
    merge_params,
    split_params,
    trainable_from_dict,
    trainable_specs,
    trainable_to_dict,
)
from gptjax.config import ModelConfig
from gptjax.data import BatchLoader
from gptjax.errors import UserError
from gptjax.fitting import fit
from gptjax.generation import generate
from gptjax.layouts import LowRank, quantize
from gptjax.loss import loss_fn
from gptjax.model import Model, forward
from gptjax.optimizer import OptimizerConfig, make_optimizer
from gptjax.params import Params, count_specs, flat, param_specs
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.pretrained.loading import load
from gptjax.sampling import Sampling
from gptjax.sharding import make_mesh
from gptjax.training import init_state, make_train_step

EXPERTS = MODERN.replace(num_experts=3, experts_per_token=2, shared_experts=1)
BIASED = GPT2.replace(tie_embeddings=False)
MODELS = pytest.mark.parametrize(
    "config", [GPT2, MODERN, EXPERTS, BIASED], ids=["gpt2", "modern", "experts", "untied"]
)


def every_matrix(config: ModelConfig) -> tuple[str, ...]:
    return tuple(p for p, spec in flat(param_specs(config)).items() if spec.kind == "matrix")


def drawn(config: ModelConfig, lora: LoRA, rng: np.random.Generator) -> Params:
    """Additions of which none is zero."""
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.normal(0, 0.2, spec.shape), jnp.float32),
        trainable_specs(config, lora),
        is_leaf=lambda x: not isinstance(x, dict),
    )


def by_hand(params: Params, trained: Params, lora: LoRA, config: ModelConfig) -> Params:
    """Each kernel plus alpha / rank times the product, matrix by matrix."""
    leaves, specs = dict(flat(params)), flat(param_specs(config))
    additions = flat(trained)
    for path in {path.rpartition(".")[0] for path in additions}:
        kernel = np.array(leaves[path], np.float64)
        down, up = (np.asarray(additions[f"{path}.{name}"], np.float64) for name in ("down", "up"))
        spec = specs[path]
        inputs = int(np.prod(spec.shape[spec.stack : spec.stack + spec.fan_in]))
        for place in np.ndindex(*spec.shape[: spec.stack]):
            product = down[place].reshape(inputs, -1) @ up[place].reshape(lora.rank, -1)
            kernel[place] += lora.alpha / lora.rank * product.reshape(kernel[place].shape)
        leaves[path] = jnp.asarray(kernel, jnp.float32)
    return replaced(params, leaves)


def replaced(params: Params, leaves: dict[str, Any]) -> Params:
    """A tree with these leaves in place of its own."""
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[name(path)], params)


def batch_of(config: ModelConfig, rng: np.random.Generator, rows: int = 4) -> dict[str, Any]:
    tokens = rng.integers(0, config.vocab_size, (rows, config.context_length + 1))
    return {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}


@MODELS
def test_the_model_starts_as_it_was(config: ModelConfig, rng: np.random.Generator) -> None:
    params = random_params(config, rng)
    lora = LoRA(3, 7.0, every_matrix(config))
    trained, frozen = split_params(params, lora, config, jax.random.key(int(rng.integers(99))))
    tokens = batch_of(config, rng)["tokens"]
    joined = join_params(trained, frozen, lora)
    expected = np.asarray(forward(params, tokens, config))
    scale = np.abs(expected).max()
    # But for rounding: other programs fuse otherwise.
    np.testing.assert_allclose(forward(joined, tokens, config), expected, atol=2e-5 * scale)
    # But not because there is nothing to train.
    for path, leaf in flat(trained).items():
        assert bool((leaf != 0).all()) == path.endswith("down"), path


@MODELS
def test_unmerged_merged_and_by_hand_are_one(config: ModelConfig, rng: np.random.Generator) -> None:
    params = random_params(config, rng)
    lora = LoRA(3, 7.0, every_matrix(config))
    trained = drawn(config, lora, rng)
    joined = join_params(trained, params, lora)
    expected = by_hand(params, trained, lora, config)
    for path, leaf in flat(merge_params(joined)).items():
        np.testing.assert_allclose(leaf, flat(expected)[path], atol=1e-5, err_msg=path)
    tokens = batch_of(config, rng)["tokens"]
    wanted = forward(expected, tokens, config)
    with jax.default_matmul_precision("highest"):
        got = forward(joined, tokens, config)
    scale = float(jnp.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, atol=2e-5 * scale)
    assert float(jnp.abs(wanted - forward(params, tokens, config)).max()) > 0.05 * scale


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@MODELS
def test_gradients_are_those_of_the_formula(
    config: ModelConfig, remat: Any, rng: np.random.Generator
) -> None:
    params = random_params(config, rng)
    lora = LoRA(2, 5.0, every_matrix(config))
    trained, batch = drawn(config, lora, rng), batch_of(config, rng)

    def formula(trained: Params) -> jax.Array:
        leaves, specs, additions = dict(flat(params)), flat(param_specs(config)), flat(trained)
        for path, leaf in leaves.items():
            if f"{path}.down" in additions:
                down, up = additions[f"{path}.down"], additions[f"{path}.up"]
                stack = specs[path].shape[: specs[path].stack]
                product = jnp.einsum(
                    "...ir,...ro->...io",
                    down.reshape(*stack, -1, lora.rank),
                    up.reshape(*stack, lora.rank, -1),
                )
                leaves[path] = leaf + 2.5 * product.reshape(leaf.shape)
        return loss_fn(replaced(params, leaves), batch, config)[0]

    def through(trained: Params) -> jax.Array:
        joined = join_params(trained, params, lora)
        return loss_fn(joined, batch, config.replace(remat=remat))[0]

    with jax.default_matmul_precision("highest"):
        wanted, got = jax.grad(formula)(trained), jax.grad(through)(trained)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for path, leaf in flat(got).items():
        np.testing.assert_allclose(leaf, flat(wanted)[path], atol=2e-4 * scale, err_msg=path)


@pytest.mark.parametrize(
    "trainable",
    [LoRA(2, 4.0, ("blocks.mlp.*", "*.query")), Only(("blocks.mlp.*", "*norm*"))],
    ids=["lora", "only"],
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_what_is_trained_changes(
    trainable: Trainable, name: Any, rng: np.random.Generator
) -> None:
    params = random_params(GPT2, rng)
    if isinstance(trainable, LoRA):
        # Of what a pattern matches, the matrices.
        targets = {path.rpartition(".")[0] for path in flat(trainable_specs(GPT2, trainable))}
        assert targets == {"blocks.mlp.up", "blocks.mlp.down", "blocks.attention.query"}
    optimizer = make_optimizer(
        OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=0, schedule="constant"),
        GPT2,
        30,
        trainable,
    )
    state = init_state(GPT2, optimizer, jax.random.key(0), params=params, trainable=trainable)
    trained_before = jax.tree.map(np.asarray, state.params)
    frozen_before = jax.tree.map(np.asarray, state.frozen)
    assert count_specs(trainable_specs(GPT2, trainable)) == sum(
        leaf.size for leaf in jax.tree.leaves(state.params)
    )
    # Moments of what is trained alone.
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
    assert sum(sizes) <= 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params)) + 10
    step = make_train_step(GPT2, optimizer, trainable=trainable, accumulate=2)
    batch, losses = batch_of(GPT2, rng), []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen_before)
    for path, leaf in flat(state.params).items():
        assert (np.asarray(leaf) != flat(trained_before)[path]).any(), path
    # The step's loss is that of the model in use.
    whole = merge_params(join_params(state.params, state.frozen, trainable))
    expected = float(loss_fn(whole, batch, GPT2)[0])
    _, metrics = step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)


def test_only_has_the_gradients_of_the_whole(rng: np.random.Generator) -> None:
    """One step of plain SGD moves what is trained as it would move in the whole model."""
    params, batch = random_params(MODERN, rng), batch_of(MODERN, rng)
    ends, sgd = [], optax.sgd(0.1)
    for trainable in (None, Only(("blocks.attention.*",))):
        state = init_state(MODERN, sgd, jax.random.key(0), params=params, trainable=trainable)
        state, _ = make_train_step(MODERN, sgd, trainable=trainable)(state, batch)
        ends.append(flat(state.params))
    whole, some = ends
    assert set(some) == {path for path in whole if path.startswith("blocks.attention.")}
    for path, leaf in some.items():
        np.testing.assert_allclose(leaf, whole[path], atol=1e-6, err_msg=path)


ON_MESHES = """
import jax, numpy as np, optax
from gptjax.adapters import LoRA, Only
from gptjax.sharding import parse_mesh
from gptjax.training import init_state, make_train_step
from small_models import MODERN, random_params

rng = np.random.default_rng({seed})
config = MODERN.replace(num_heads=4, num_kv_heads=2)
params = jax.tree.map(lambda x: x / 2, random_params(config, rng))
tokens = rng.integers(0, config.vocab_size, (8, 17)).astype(np.int32)
batch = {{"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}}
matrices = ("blocks.attention.query", "blocks.attention.value", "*.out", "blocks.mlp.*")
for trainable in (LoRA(3, 6.0, matrices), Only(("blocks.mlp.*", "embed.*"))):
    ends = []
    for name in (None, "fsdp=2,tensor=2", "fsdp=4", "data=2,tensor=2", "context=2,tensor=2"):
        mesh = None if name is None else parse_mesh(name, jax.devices()[:4])
        sgd = optax.sgd(0.3)
        state = init_state(config, sgd, jax.random.key(1), mesh, params=params, trainable=trainable)
        step = make_train_step(config, sgd, mesh, trainable=trainable)
        for _ in range(3):
            state, metrics = step(state, batch)
        leaves = [np.asarray(x) for x in jax.tree.leaves(state.params)]
        ends.append((float(metrics["loss"]), np.concatenate([x.ravel() for x in leaves])))
        if name == "fsdp=4":
            # By the model width, as kernels lie.
            split = [x for x in jax.tree.leaves(state.params) if not x.is_fully_replicated]
            assert len(split) >= 3, jax.tree.map(lambda x: x.sharding, state.params)
    loss, values = ends[0]
    for other_loss, other in ends[1:]:
        error = np.linalg.norm(other - values) / np.linalg.norm(values)
        print("RESULT", abs(other_loss / loss - 1), error)
"""


def test_meshes_train_as_one_device(tmp_path: Path, rng: np.random.Generator) -> None:
    printed = run_alone(ON_MESHES.format(seed=rng.integers(2**31)), tmp_path, devices=4)
    results = [line.split()[1:] for line in printed.splitlines() if line.startswith("RESULT")]
    assert len(results) == 8
    for loss, values in results:
        assert float(loss) < 1e-5
        assert float(values) < 1e-5


def test_additions_are_used_as_they_are(rng: np.random.Generator) -> None:
    """Generation, quantization and export take parameters that are not merged."""
    params, config = random_params(MODERN, rng), MODERN
    lora = LoRA(3, 7.0, every_matrix(config))
    joined = join_params(drawn(config, lora, rng), params, lora)
    merged = merge_params(joined)
    prompts = [[1, 2, 3], [4]]
    sampling = Sampling(max_new_tokens=8, temperature=0)
    assert generate(joined, prompts, config, sampling) == generate(
        merged, prompts, config, sampling
    )
    for one, other in zip(
        jax.tree.leaves(quantize(joined, config)),
        jax.tree.leaves(quantize(merged, config)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_export_merges(tmp_path: Path, rng: np.random.Generator) -> None:
    config = GPT2
    params, lora = random_params(config, rng), LoRA(3, 7.0, every_matrix(config))
    joined = join_params(drawn(config, lora, rng), params, lora)
    save_pretrained(Model(config, joined), tmp_path)
    for path, leaf in flat(load(tmp_path).params).items():
        np.testing.assert_array_equal(leaf, flat(merge_params(joined))[path], err_msg=path)


def test_going_on_with_additions(rng: np.random.Generator) -> None:
    """Parameters that have additions are split into them, whatever their scale was."""
    params, lora = random_params(GPT2, rng), LoRA(3, 6.0)
    trained = drawn(GPT2, lora, rng)
    joined = join_params(trained, params, lora)
    other = LoRA(3, 12.0)
    found, frozen = split_params(joined, other, GPT2, jax.random.key(0))
    again = merge_params(join_params(found, frozen, other))
    for path, leaf in flat(merge_params(joined)).items():
        np.testing.assert_allclose(flat(again)[path], leaf, atol=1e-6, err_msg=path)
    with pytest.raises(UserError, match=r"blocks\.attention\.query\.down"):
        split_params(joined, LoRA(4), GPT2, jax.random.key(0))


def loader(rng: np.random.Generator, config: ModelConfig) -> BatchLoader:
    tokens = rng.integers(0, config.vocab_size, 2000)
    return BatchLoader(tokens, batch_size=4, context_length=config.context_length)


ADAMW = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)


@pytest.mark.parametrize("trainable", [LoRA(2, 4.0), Only(("blocks.mlp.*",))], ids=["lora", "only"])
def test_a_run_resumes_and_loads(
    trainable: Trainable, tmp_path: Path, rng: np.random.Generator
) -> None:
    params, data = random_params(GPT2, rng), loader(rng, GPT2)
    save_pretrained(Model(GPT2, params), tmp_path / "base")
    options: dict[str, Any] = {
        "params": params,
        "trainable": trainable,
        "base": tmp_path / "base",
        "eval_data": [data[100]],
        # Once, at the end: what loads is the best of all evaluations.
        "eval_every": 6,
        "progress": False,
    }
    straight = fit(GPT2, ADAMW, data, steps=6, out=tmp_path / "straight", **options)
    fit(GPT2, ADAMW, data, steps=3, out=tmp_path / "run", **options)
    # Schedules end with the run, so that only what does not depend on them is compared.
    constant = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant")
    whole = fit(GPT2, constant, data, steps=6, out=tmp_path / "whole", **options)
    fit(GPT2, constant, data, steps=3, out=tmp_path / "parts", **options)
    parts = fit(GPT2, constant, data, steps=6, out=tmp_path / "parts", **options)
    assert parts.summary["params_sha256"] == whole.summary["params_sha256"]
    # Checkpoints hold what is trained alone.
    held = flat(trainable_specs(GPT2, trainable))
    folder = tmp_path / "straight" / "checkpoints" / "6"
    manifest = json.loads((folder / "manifest.json").read_text())
    names = str(manifest)
    assert all(path.split(".")[-1] in names for path in held)
    assert "wte" not in names
    assert "positions" not in names
    # What the result has, what the folder gives, and what the loss says are one model.
    loaded = load(tmp_path / "straight")
    for path, leaf in flat(straight.params).items():
        np.testing.assert_array_equal(flat(loaded.params)[path], leaf, err_msg=path)
    loss = float(loss_fn(loaded.params, data[100], GPT2)[0])
    assert straight.val_loss == pytest.approx(loss, rel=1e-5)
    # By more than the line above lets pass; how much six steps on other tokens change it is chance.
    assert loss != pytest.approx(float(loss_fn(params, data[100], GPT2)[0]), rel=3e-5)

    # Another base is refused, by name where it is given and on resuming.
    other = Model(GPT2, jax.tree.map(lambda x: x + 0.01, params))
    with pytest.raises(UserError, match="not those that"):
        load(tmp_path / "straight", base=other)
    with pytest.raises(UserError, match="frozen_sha256"):
        fit(GPT2, ADAMW, data, steps=7, out=tmp_path / "run", **options | {"params": other.params})
    with pytest.raises(UserError, match="trainable"):
        fit(GPT2, ADAMW, data, steps=7, out=tmp_path / "run", **options | {"trainable": None})


def test_a_narrow_base_is_the_base(tmp_path: Path, rng: np.random.Generator) -> None:
    """Frozen parameters may be bfloat16; the base is then rounded likewise when it is loaded."""
    save_pretrained(Model(GPT2, random_params(GPT2, rng)), tmp_path / "base")
    narrow = load(tmp_path / "base", dtype="bfloat16")
    result = fit(
        GPT2, ADAMW, loader(rng, GPT2), steps=2, out=tmp_path / "run", params=narrow.params,
        trainable=LoRA(2), base=tmp_path / "base", progress=False,
    )  # fmt: skip
    assert {x.dtype for x in jax.tree.leaves(result.state.frozen)} == {jnp.dtype(jnp.bfloat16)}
    for path, leaf in flat(load(tmp_path / "run").params).items():
        # What has additions was merged in float32.
        np.testing.assert_array_equal(leaf, flat(result.params)[path].astype(leaf.dtype))


def test_kernels_may_be_quantized(rng: np.random.Generator) -> None:
    """Additions beside int8 kernels, with and without a mesh."""
    params, sgd = quantize(random_params(GPT2, rng), GPT2), optax.sgd(0.3)
    batch, ends = batch_of(GPT2, rng), []
    for mesh in (None, make_mesh(data=1, devices=jax.devices()[:1])):
        state = init_state(
            GPT2, sgd, jax.random.key(0), mesh, params=params, trainable=LoRA(2, 4.0)
        )
        step = make_train_step(GPT2, sgd, mesh, trainable=LoRA(2, 4.0))
        losses = []
        for _ in range(6):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0]
        ends.append(losses)
    np.testing.assert_allclose(*ends, rtol=1e-5)


def test_a_run_without_a_named_base_asks_for_it(tmp_path: Path, rng: np.random.Generator) -> None:
    params, data = random_params(GPT2, rng), loader(rng, GPT2)
    result = fit(
        GPT2, ADAMW, data, steps=2, out=tmp_path / "run", params=params, trainable=LoRA(2),
        progress=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="as base"):
        load(tmp_path / "run")
    model = load(tmp_path / "run", base=Model(GPT2, params), merge=False)
    assert isinstance(model.params["blocks"]["attention"]["query"], LowRank)
    for path, leaf in flat(merge_params(model.params)).items():
        np.testing.assert_array_equal(leaf, flat(result.params)[path], err_msg=path)
    with pytest.raises(UserError, match="no params to start from"):
        fit(GPT2, ADAMW, data, steps=2, out=tmp_path / "new", trainable=LoRA(2), progress=False)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LoRA(0), "rank is 0"),
        (lambda: LoRA(alpha=float("nan")), "alpha is nan"),
        (lambda: trainable_specs(GPT2, LoRA(targets=())), "no patterns"),
        (lambda: trainable_specs(GPT2, LoRA(targets="*.query")), "tuple of texts"),  # pyright: ignore
        (
            lambda: trainable_specs(GPT2, LoRA(targets=("blocks.attention.querry",))),
            "did you mean 'blocks.attention.query'",
        ),
        (lambda: trainable_specs(GPT2, LoRA(targets=("*norm*",))), r"matches '\*norm"),
        (lambda: trainable_specs(EXPERTS, LoRA(targets=("*.router",))), r"matches '\*.router"),
        (lambda: trainable_specs(GPT2, Only(("blocks.mpl.*",))), "nothing to train"),
    ],
)
def test_what_cannot_be_trained_is_refused(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


def test_settings_survive_json() -> None:
    for trainable in (None, LoRA(4, 2.0, ("a.*", "b")), Only(("x",))):
        written = json.loads(json.dumps(trainable_to_dict(trainable)))
        assert trainable_from_dict(written) == trainable
