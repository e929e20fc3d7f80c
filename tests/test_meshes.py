"""One train step on eight devices, however they are arranged, is that of one device."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from on_devices import run_alone
from small_models import GPT2, MODERN

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.sharding import make_mesh, parse_mesh

# Four blocks for four stages; a vocabulary, 31, that no axis divides.
DENSE = GPT2.replace(num_layers=4, scan_unroll=1)
DENSE_MODERN = MODERN.replace(num_layers=4, sliding_window=5, windowed_layers=(1, 2), scan_unroll=1)
EXPERTS = MODERN.replace(
    num_layers=4,
    num_experts=4,
    shared_experts=1,
    gated_mlp=True,
    activation="silu",
    scan_unroll=1,
)
# As many heads, blocks and experts as devices.
EIGHT = GPT2.replace(num_layers=8, num_heads=8, scan_unroll=1)
EIGHT_EXPERTS = EXPERTS.replace(num_layers=2, num_experts=8)
EXPERTS_BIASED = GPT2.replace(num_layers=4, num_experts=4, normalize_gates=False, scan_unroll=1)

FEW = ["dp", "fsdp=4,tensor=2", "context=2,tensor=2,data=2", "stage=2,fsdp=2,tensor=2"]
DENSE_MESHES = [
    "dp",
    "fsdp",
    "tensor=4,data=2",
    "fsdp+tp",
    "data=2,fsdp=2,tensor=2",
    "context",
    "context=4,fsdp=2",
    "context=2,fsdp=2,tensor=2",
    "stage=2,data=4",
    "stage=4,fsdp=2",
    "stage=2,fsdp=2,tensor=2",
    "stage=2,context=2,tensor=2",
]
EXPERT_MESHES = [
    "dp",
    "fsdp",
    "fsdp+tp",
    "context=4,fsdp=2",
    "stage=4,fsdp=2",
    "expert=4,data=2",
    "expert=2,fsdp=4",
    "expert=2,fsdp=2,tensor=2",
    "expert=4,tensor=2",
    "expert=2,context=2,tensor=2",
    "stage=2,expert=2,fsdp=2",
    "stage=2,expert=2,tensor=2",
]

COMPARE = """
import jax, numpy as np, optax
import gptjax
from gptjax.config import ModelConfig
from gptjax.loss import LossOptions
from gptjax.sharding import parse_mesh
from gptjax.training import init_state, make_train_step
from small_models import random_params

compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
)
rng = np.random.default_rng({seed})
config = ModelConfig.from_dict({config!r})
accumulate, steps, T = {accumulate}, {steps}, config.context_length
optimizer = {optimizer}
# Small enough that rounding is not amplified from block to block.
params = jax.tree.map(lambda x: x / 2, random_params(config, rng))
if config.num_experts:
    # So that experts are chosen with conviction: at a tie rounding decides.
    params["blocks"]["mlp"]["router"] *= 4
batches = []
for _ in range(steps):
    tokens = rng.integers(0, config.vocab_size, (16, T + 1)).astype(np.int32)
    batches.append({{
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.sort(rng.integers(0, 3, (16, T)), axis=1).astype(np.int32),
        "positions": np.tile(np.arange(T, dtype=np.int32), (16, 1)),
        "weights": rng.uniform(0, 2, (16, T)).astype(np.float32),
    }})


def run(mesh):
    # Blocks of logits on one device and on eight.
    parts = 1 if mesh is None else 8
    options = LossOptions(logits_at_once=16 * T * config.vocab_size // 3 // parts)
    step = make_train_step(config, optimizer, mesh, accumulate=accumulate, loss_options=options)
    state = init_state(config, optimizer, jax.random.key(3), mesh, params=params)
    records = []
    for batch in batches:
        compiled = len(compilations)
        state, metrics = step(state, batch)
        assert len(compilations) == compiled or not records
        gradients = getattr(state.opt_state[0], "trace", None)
        records.append(jax.tree.map(np.asarray, (metrics, gradients)))
    return records, jax.tree.map(np.asarray, state.params)


def error(found, expected):
    # Of each array, relative to its norm; of what is zero but for rounding, to the norm of all.
    whole = float(optax.tree.norm(expected))
    norm = np.linalg.norm
    errors = jax.tree.map(lambda a, b: norm(a - b) / (norm(b) + 1e-3 * whole), found, expected)
    # The softmax is blind to the keys' bias: Adam divides what is rounding alone by its size.
    return max(
        (
            error
            for path, error in jax.tree_util.tree_leaves_with_path(errors)
            if "key_bias" not in jax.tree_util.keystr(path)
        ),
        default=0,
    )


one_records, one_params = run(None)
for name in {meshes!r}:
    records, final = run(parse_mesh(name))
    metrics = max(
        abs(float(found[key]) - float(value)) / max(abs(float(value)), 1e-6)
        for (found, _), (expected, _) in zip(records, one_records)
        for key, value in expected.items()
    )
    gradients = max(error(a, b) for (_, a), (_, b) in zip(records, one_records))
    print("RESULT", name, metrics, gradients, error(final, one_params), flush=True)
"""


def worst_errors(
    config: ModelConfig,
    meshes: list[str],
    rng: np.random.Generator,
    folder: Path,
    **options: object,
) -> dict[str, list[float]]:
    """By mesh, the worst relative errors of metrics, of gradients, of the last parameters."""
    given = {"accumulate": 1, "steps": 5, "optimizer": "optax.sgd(0.05, momentum=0.0)"} | options
    seed = int(rng.integers(2**32))
    script = COMPARE.format(seed=seed, config=config.to_dict(), meshes=meshes, **given)
    printed = run_alone(script, folder, devices=8, seconds=400)
    lines = [line.split() for line in printed.splitlines() if line.startswith("RESULT")]
    print(*lines, sep="\n")
    assert [line[1] for line in lines] == meshes
    return {name: [float(word) for word in rest] for _, name, *rest in lines}


def assert_small(errors: dict[str, list[float]]) -> None:
    for name, found in errors.items():
        assert max(found) < 1e-5, (name, found)


@pytest.mark.parametrize(
    ("config", "meshes"),
    [(DENSE, FEW), (EXPERTS, ["expert=2,fsdp=2,tensor=2", "stage=2,expert=2,fsdp=2"])],
    ids=["dense", "experts"],
)
def test_some_meshes_equal_one_device(
    config: ModelConfig, meshes: list[str], rng: np.random.Generator, tmp_path: Path
) -> None:
    assert_small(worst_errors(config, meshes, rng, tmp_path, steps=2))


@pytest.mark.slow
# Adam's first step is a gradient's sign, to which rounding is all where a gradient is near zero:
# with its own 1e-8 single elements came to 1.01e-5 in some runs.
@pytest.mark.parametrize(
    "optimizer", ["optax.sgd(0.05, momentum=0.0)", "optax.adamw(1e-3, eps=1e-6)"]
)
@pytest.mark.parametrize(
    ("config", "meshes"),
    [(DENSE, DENSE_MESHES), (EXPERTS, EXPERT_MESHES)],
    ids=["dense", "experts"],
)
def test_all_meshes_equal_one_device(
    config: ModelConfig,
    meshes: list[str],
    optimizer: str,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    assert_small(worst_errors(config, meshes, rng, tmp_path, optimizer=optimizer))


@pytest.mark.slow
def test_the_rest_of_the_model_equals_one_device(rng: np.random.Generator, tmp_path: Path) -> None:
    """Windows, dropout, biased experts, microbatches and rematerialization, over meshes too."""
    dropout = GPT2.replace(num_layers=4, dropout=0.2, scan_unroll=1)
    meshes = ["dp", "fsdp=2,tensor=2,data=2", "context=2,tensor=2,data=2", "stage=4,data=2"]
    assert_small(worst_errors(dropout, meshes, rng, tmp_path, steps=2))
    remat = DENSE_MODERN.replace(remat="full", pipeline_microbatches=2)
    meshes = ["dp", "context=4,data=2", "stage=2,context=2,tensor=2", "stage=2,fsdp=4"]
    assert_small(worst_errors(remat, meshes, rng, tmp_path, steps=2, accumulate=2))
    biased = EXPERTS_BIASED.replace(remat="full")
    # A router's balance is taken over a batch, so that microbatches are not part of this.
    meshes = ["expert=2,fsdp=2,tensor=2", "stage=2,expert=2,tensor=2"]
    assert_small(worst_errors(biased, meshes, rng, tmp_path, steps=2))
    assert_small(worst_errors(EIGHT, ["tp", "stage"], rng, tmp_path, steps=5))
    assert_small(worst_errors(EIGHT_EXPERTS, ["expert"], rng, tmp_path, steps=5))


def test_8_bit_floats_on_meshes(rng: np.random.Generator, tmp_path: Path) -> None:
    """The same sums; but where one value falls to its neighbour, others do in the blocks after."""
    meshes = ["dp", "fsdp=4,tensor=2"]
    errors = worst_errors(DENSE.replace(float8=True), meshes, rng, tmp_path, steps=1)
    for name, found in errors.items():
        assert max(found) < 5e-2, (name, found)


REPLICAS = """
import re
import jax, jax.numpy as jnp, numpy as np, optax
from gptjax.config import ModelConfig
from gptjax.loss import loss_sums
from gptjax.sharding import make_mesh
from gptjax.training import init_state, make_train_step

rng = np.random.default_rng({seed})
config = ModelConfig(num_layers=3, num_heads=2, embed_dim=32, vocab_size=64, context_length=8)
tokens = rng.integers(0, 64, (8, 9)).astype(np.int32)
batch = {{"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}}
optimizer, mesh = optax.sgd(0.1), make_mesh(data=2)


def of_the_batch(params, batch, config, **options):
    total, sums = loss_sums(params, batch, config, **options)
    return total * jnp.max(batch["tokens"][0]), sums


for name, model in ("EXCHANGED", config), ("OF-FLOAT8", config.replace(float8=True)):
    step = make_train_step(model, optimizer, mesh, accumulate=2)
    program = step.lower(init_state(model, optimizer, jax.random.key(0), mesh), batch).compile()
    print(name, re.findall(r" = (.*) all-reduce\\(", program.as_text()))
norms = []
for mesh in None, mesh:
    step = make_train_step(config, optimizer, mesh, objective=of_the_batch)
    state = init_state(config, optimizer, jax.random.key(0), mesh)
    norms.append(float(step(state, batch)[1]["grad_norm"]))
print("NORMS", *norms)
"""


def test_replicas_on_a_cpu_exchange_one_array(rng: np.random.Generator, tmp_path: Path) -> None:
    script = REPLICAS.format(seed=int(rng.integers(2**32)))
    printed = run_alone(script, tmp_path, devices=2, seconds=200).splitlines()
    found = dict(line.split(maxsplit=1) for line in printed if line.startswith(("EX", "OF", "NO")))
    one_array = r"\['f32\[\d+\](\{0\})?'\]"
    assert re.fullmatch(one_array, found["EXCHANGED"]), found
    # What is scaled by the largest value of all rows.
    assert not re.fullmatch(one_array, found["OF-FLOAT8"]), found
    one, two = map(float, found["NORMS"].split())
    assert two == pytest.approx(one, rel=1e-5)


FORWARD = """
import jax, jax.numpy as jnp, numpy as np
from gptjax.errors import UserError
from gptjax.generation import generate
from gptjax.model import forward
from gptjax.params import param_shardings
from gptjax.sampling import Sampling
from gptjax.sharding import parse_mesh
from small_models import random_params
from test_meshes import DENSE, EXPERTS

rng = np.random.default_rng({seed})
sampling = Sampling(max_new_tokens=4, temperature=0)
for config, name in (
    (DENSE, "fsdp=2,tensor=4"), (EXPERTS, "expert=4,tensor=2"), (EXPERTS, "stage=4,fsdp=2")
):
    mesh = parse_mesh(name)
    params = random_params(config, rng)
    split = jax.device_put(params, param_shardings(config, mesh))
    # Neither rows nor tokens divide over devices.
    tokens = jnp.asarray(rng.integers(0, 31, (3, 7)), jnp.int32)
    prompts = [[1, 2, 3], [4], [5, 6]]
    expected = forward(params, tokens, config), generate(params, prompts, config, sampling)
    with jax.set_mesh(mesh):
        logits = jax.jit(forward, static_argnames="config")(split, tokens, config)
        found = generate(split, prompts, config, sampling)
    assert logits.shape == (3, 7, 31)
    np.testing.assert_allclose(logits, expected[0], atol=2e-5, rtol=2e-5)
    assert [list(row) for row in found] == [list(row) for row in expected[1]]
    print("same")
with jax.set_mesh(parse_mesh("context")):
    try:
        forward(random_params(DENSE, rng), jnp.zeros((1, 7), jnp.int32), DENSE)
    except UserError as error:
        print(error)
"""


def test_what_does_not_divide_is_computed_all_the_same(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """In forward passes and generation; but for a sequence that goes round a ring."""
    script = FORWARD.format(seed=int(rng.integers(2**32)))
    *same, refused = run_alone(script, tmp_path, devices=8, seconds=300).splitlines()
    assert same == ["same"] * 3
    assert "sequence of size 7 does not divide over the mesh's context = 8" in refused


EXCHANGES = """
import re
import jax, numpy as np, optax
from gptjax.sharding import parse_mesh, place_batch
from gptjax.training import init_state, make_train_step
from small_models import GPT2

mesh, optimizer = parse_mesh("dp"), optax.sgd(0.1)
kinds = r" (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\\("
# A table's gradient is a product for few tokens, and a scatter for many.
for vocab_size in (31, 1500):
    config = GPT2.replace(vocab_size=vocab_size)
    step = make_train_step(config, optimizer, mesh)
    state = init_state(config, optimizer, jax.random.key(0), mesh)
    batch = {name: np.zeros((4, 16), np.int32) for name in ("tokens", "targets")}
    compiled = step.lower(state, batch).compile()
    print(*re.findall(kinds, compiled.as_text()))
    metrics = None
    for _ in range(300):
        before, (state, metrics) = metrics, compiled(state, place_batch(batch, mesh))
        float(0 if before is None else before["loss"])
"""


def test_replicas_exchange_gradients_once(tmp_path: Path) -> None:
    """With no more threads than devices a second exchange can keep the first from ending."""
    printed = run_alone(EXCHANGES, tmp_path, devices=2, seconds=200).splitlines()
    assert printed == ["all-reduce"] * 2


SHAPES = """
import jax
from gptjax.sharding import parse_mesh
for name in ("dp", "fsdp", "tp", "fsdp+tp", "context", "expert", "stage", "stage=2, fsdp=-1"):
    shape = parse_mesh(name).shape
    print(name.replace(" ", ""), *(f"{axis}={size}" for axis, size in shape.items() if size > 1))
"""


def test_presets_on_eight_devices(tmp_path: Path) -> None:
    printed = dict(
        line.split(" ", 1) for line in run_alone(SHAPES, tmp_path, devices=8).splitlines()
    )
    assert printed == {
        "dp": "data=8",
        "fsdp": "fsdp=8",
        "tp": "tensor=8",
        "fsdp+tp": "fsdp=4 tensor=2",
        "context": "context=8",
        "expert": "expert=8",
        "stage": "stage=8",
        "stage=2,fsdp=-1": "fsdp=4 stage=2",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fdsp", r"'fdsp' is no mesh axis; did you mean 'fsdp'"),
        ("fsdp=2,tensr=2", r"'tensr' is no mesh axis; did you mean 'tensor'"),
        ("fsdp=two", r"give each axis one whole number"),
        ("fsdp=1,fsdp=1", r"give each axis one whole number"),
        ("data=3", r"makes 3 devices, but there are 1"),
    ],
)
def test_meshes_that_say_nothing_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_mesh(text, jax.devices()[:1])


BATCHES = """
import numpy as np, optax, jax
from gptjax.errors import UserError
from gptjax.sharding import parse_mesh
from gptjax.training import init_state, make_train_step
from small_models import GPT2

optimizer = optax.sgd(0.1)
for mesh, shape, accumulate in (
    ("fsdp=4,tensor=2", (6, 16), 1),
    ("dp", (8, 16), 2),
    ("context", (8, 12), 1),
    ("stage=2,data=4", (12, 16), 1),
):
    mesh = parse_mesh(mesh)
    config = GPT2.replace(pipeline_microbatches=2)
    step = make_train_step(config, optimizer, mesh, accumulate=accumulate)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets")}
    for call in (step, step.lower):
        try:
            call(init_state(config, optimizer, jax.random.key(0), mesh), batch)
        except UserError as error:
            print(error)
"""


def test_batches_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    printed = run_alone(BATCHES, tmp_path, devices=8).splitlines()
    assert len(printed) == 8
    for line, words in zip(
        printed[::2],
        (
            ["batch of 6 rows", "data × fsdp × expert", "[4, 8]"],
            ["batch of 8 rows", "2 microbatches", "[16]"],
            ["sequence of 12 tokens", "context", "[8, 16]"],
            ["pipeline_microbatches is 2", "3 rows", "[1, 3]"],
        ),
        strict=True,
    ):
        for word in words:
            assert word in line
    assert printed[::2] == printed[1::2]


def test_slices_are_joined_by_data() -> None:
    class Device:
        """As a TPU tells of itself."""

        platform, device_kind = "tpu", "TPU v5 lite"

        def __init__(self, number: int):
            self.id, self.slice_index, self.process_index = number, number // 4, number // 4
            self.core_on_chip = 0
            place = number % 4
            self.coords = (place % 2, place // 2, 0)

    devices = [Device(number) for number in range(8)]
    mesh = make_mesh(data=4, fsdp=2, devices=devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(4, 2)
    assert (slices == slices[:, :1]).all()
    assert slices[:, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"data axis is 1, but the devices are 2 slices"):
        make_mesh(fsdp=8, devices=devices)
    # A GPU's number is its host's.
    Device.platform, Device.device_kind = "gpu", "NVIDIA H100"
    assert make_mesh(fsdp=8, devices=devices).shape["fsdp"] == 8
