"""Checkpoints: what was saved comes back bit for bit, whatever kills, damages or reshards it."""

import dataclasses
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from on_devices import xla_flags

from gptjax import checkpoint
from gptjax.checkpoint import (
    CheckpointManager,
    find_checkpoint,
    read_metadata,
    restore_params,
)
from gptjax.errors import UserError

ROOT = Path(__file__).parent.parent
STORED_V1 = Path(__file__).parent / "checkpoints" / "v1"


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    key: Any
    ema_params: Any = None


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(rng: np.random.Generator, ema: bool = False) -> State:
    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {
        "embed": array(16, 8),
        "blocks": {"w": array(2, 8, 8), "b": array(2, 8).astype(jnp.bfloat16)},
    }
    updates = jax.tree.map(lambda leaf: leaf * 0.3, params)
    _, opt_state = OPTIMIZER.update(updates, OPTIMIZER.init(params), params)
    key = jax.random.key(int(rng.integers(2**31)))
    return State(jnp.int32(7), params, opt_state, key, updates if ema else None)


def abstract(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)


def bits(tree: Any) -> list[tuple[str, str, bytes]]:
    """Every leaf's path, type and raw bytes."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kind = f"{leaf.dtype}{leaf.shape}"
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found.append((jax.tree_util.keystr(path), kind, np.array(leaf).tobytes()))
    return found


def assert_same(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert bits(got) == bits(expected)


def save_steps(directory: Path, steps: dict[int, Any]) -> None:
    with CheckpointManager(directory, keep_latest=100) as manager:
        for step, state in steps.items():
            manager.save(step, state, {"at": step})


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def run_script(script: str, *arguments: Any, devices: int = 1, check: bool = True) -> Any:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=120,
        check=check,
    )


def environment(devices: int = 1) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
    return os.environ | flags | {"PYTHONPATH": paths}


# What comes back.


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip_is_bit_identical(tmp_path: Path, rng: np.random.Generator, ema: bool) -> None:
    state = make_state(rng, ema)
    metadata = {"config": {"num_layers": 2, "rope": None}, "position": [1, 2**40], "name": "ü"}
    with CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(12, state, metadata, metric=1.5)
        restored = manager.restore(abstract(state))
    assert restored.step == 12
    assert_same(restored.state, state)
    assert isinstance(restored.state.opt_state[1][0], optax.ScaleByAdamState)
    about = restored.metadata.pop("checkpoint")
    assert restored.metadata == metadata
    assert (about["format_version"], about["step"], about["metric"]) == (1, 12, 1.5)
    assert about["versions"]["jax"] == jax.__version__
    # The key goes on where it stopped.
    draw = jax.random.normal(restored.state.key, (3,))
    assert (draw == jax.random.normal(state.key, (3,))).all()


def test_metadata_is_fixed_at_the_save(tmp_path: Path, rng: np.random.Generator) -> None:
    position = {"next_index": 3}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, make_state(rng), {"data": position})
        position["next_index"] = 4
    assert read_metadata(tmp_path)["data"] == {"next_index": 3}


def test_host_arrays_and_numpy_scalars(tmp_path: Path, rng: np.random.Generator) -> None:
    host = rng.standard_normal(5).astype(np.float32)
    state = {
        "params": {"w": host},
        "scale": np.float32(0.25),
        "list": [np.arange(3, dtype=np.int32), (np.ones(2, np.float32),)],
    }
    expected = jax.tree.map(np.array, state)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state, {})
        host += 1
        restored = manager.restore(abstract(jax.tree.map(jnp.asarray, expected)))
    assert_same(jax.tree.map(np.asarray, restored.state), jax.tree.map(jnp.asarray, expected))


def test_only_parameters_and_no_parameters(tmp_path: Path, rng: np.random.Generator) -> None:
    state = make_state(rng)
    for number, tree in enumerate(
        [{"params": state.params}, {"rest": state.opt_state}, {"params": state.params, "ema": None}]
    ):
        save_steps(tmp_path / str(number), {3: tree})
        with CheckpointManager(tmp_path / str(number)) as manager:
            assert_same(manager.restore(abstract(tree)).state, tree)


def test_donation_right_after_save(tmp_path: Path, rng: np.random.Generator) -> None:
    """The next training step reuses the buffers while the save is still being written."""

    def advance(state: State) -> State:
        params, opt_state = jax.tree.map(lambda x: x * 2 + 1, (state.params, state.opt_state))
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)

    update = jax.jit(advance, donate_argnums=0)
    state = make_state(rng)
    state = dataclasses.replace(
        state,
        params=state.params | {"big": jnp.asarray(rng.standard_normal((1000, 1000)), jnp.float32)},
    )
    unsaved, state = state, update(state)
    assert unsaved.params["big"].is_deleted(), "nothing is donated here"
    expected = {}
    with CheckpointManager(tmp_path, keep_latest=10) as manager:
        for step in range(4):
            # Looking at an array holds its buffer and so prevents the donation: look at a copy.
            expected[step] = bits(jax.tree.map(jnp.copy, state))
            manager.save(step, state, {})
            for _ in range(3):
                state = update(state)
            jax.block_until_ready(state)
        for step, saved in expected.items():
            assert bits(manager.restore(abstract(state), step).state) == saved, step


RESHARD = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
from test_checkpoint import State, abstract, bits, make_state
from gptjax.checkpoint import CheckpointManager, restore_params

assert len(jax.devices()) == 8
source, target, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
state = make_state(np.random.default_rng(seed), ema=True)

def sharded(tree, mesh, spec):
    def place(leaf):
        fits = leaf.ndim >= 2 and leaf.shape[-1] % 8 == 0
        sharding = NamedSharding(mesh, spec if fits else P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree)

def mesh(*shape):
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("a", "b"), axis_types=auto)

wide = sharded(abstract(state), mesh(2, 4), P(None, "b"))
deep = sharded(abstract(state), mesh(4, 2), P(None, ("a", "b")))
with CheckpointManager(source) as manager:
    restored = manager.restore(wide)
    assert bits(restored.state) == bits(state)
    same = jax.tree.map(lambda leaf, want: leaf.sharding == want.sharding, restored.state, wide)
    assert all(jax.tree.leaves(same)), same
with CheckpointManager(target) as manager:
    manager.save(5, restored.state, {})
    again = manager.restore(deep)
    assert bits(again.state) == bits(state)
    same = jax.tree.map(lambda leaf, want: leaf.sharding == want.sharding, again.state, deep)
    assert all(jax.tree.leaves(same)), same
params = restore_params(target, deep.params)
assert bits(params) == bits(state.params)
assert params["embed"].sharding == deep.params["embed"].sharding
"""


def test_restore_onto_other_meshes_and_silence(tmp_path: Path, rng: np.random.Generator) -> None:
    """One device to eight, eight to another mesh, eight to one; and nothing is printed."""
    seed = int(rng.integers(2**32))
    state = make_state(np.random.default_rng(seed), ema=True)
    save_steps(tmp_path / "one", {5: state})
    done = run_script(RESHARD, tmp_path / "one", tmp_path / "eight", seed, devices=8, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with CheckpointManager(tmp_path / "eight") as manager:
        assert_same(manager.restore(abstract(state)).state, state)


MESHES = """
import sys
import jax
from gptjax.checkpoint import CheckpointManager
from gptjax.config import ModelConfig
from gptjax.optimizer import OptimizerConfig, make_optimizer
from gptjax.sharding import make_mesh
from gptjax.training import abstract_state, init_state
from test_checkpoint import bits

config = ModelConfig(vocab_size=64, context_length=8, num_layers=2, embed_dim=32, num_heads=8)
optimizer = make_optimizer(OptimizerConfig(ema_decay=0.9), config, 10)
first, *others = (
    make_mesh(fsdp=8), make_mesh(data=2, fsdp=2, tensor=2), make_mesh(tensor=8), make_mesh(data=8),
    make_mesh(fsdp=2, tensor=2, devices=jax.devices()[4:]), make_mesh(devices=jax.devices()[7:]),
    None,
)
with CheckpointManager(sys.argv[1]) as manager:
    state = init_state(config, optimizer, jax.random.key(3), first, ema=True)
    manager.save(5, state, {})
    for mesh in others:
        wanted = abstract_state(config, optimizer, mesh, ema=True)
        restored = manager.restore(wanted).state
        assert bits(restored) == bits(state), mesh
        if mesh is not None:
            for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted)):
                assert got.sharding.is_equivalent_to(want.sharding, got.ndim), mesh
"""


def test_a_training_state_goes_onto_any_mesh(tmp_path: Path) -> None:
    """From eight devices to other meshes of as many, of four, of one, and to no mesh."""
    done = run_script(MESHES, tmp_path, devices=8, check=False)
    assert done.returncode == 0, done.stderr


def test_restore_params_leaves_the_rest_alone(tmp_path: Path, rng: np.random.Generator) -> None:
    states = {step: make_state(rng) for step in (1, 2, 3)}
    run = tmp_path / "run"
    with CheckpointManager(run / "checkpoints", keep_latest=5) as manager:
        for step, state in states.items():
            manager.save(step, state, {"at": step}, metric=abs(step - 2))
    shutil.rmtree(run / "checkpoints" / "2" / "state")
    wanted = abstract(states[1].params)
    for path in (run, run / "checkpoints", run / "checkpoints" / "2"):
        step = None if path.name == "2" else "best"
        assert_same(restore_params(path, wanted, step), states[2].params)
    assert_same(restore_params(run, wanted), states[3].params)
    assert_same(restore_params(run, wanted, "latest"), states[3].params)
    assert_same(restore_params(run, wanted, 1), states[1].params)
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), wanted)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), states[3].params)
    assert_same(restore_params(run, half), expected)
    # Damage in the parameters themselves counts, by default with a way round it.
    flip_bit(files_of(run / "checkpoints" / "3" / "params")[-1], rng)
    with pytest.warns(UserWarning, match="falling back to step 2"):
        assert_same(restore_params(run, wanted), states[2].params)
    with pytest.raises(UserError, match="step 3 is damaged"):
        restore_params(run, wanted, 3)


# What is refused.


def test_structure_mismatch_lists_the_leaves(tmp_path: Path, rng: np.random.Generator) -> None:
    state = make_state(rng)
    save_steps(tmp_path, {1: state})
    wider = abstract(make_state(rng, ema=True))
    wider.params["embed"] = jax.ShapeDtypeStruct((32, 8), jnp.float32)
    wider.params["blocks"]["w"] = jax.ShapeDtypeStruct((2, 8, 8), jnp.float16)
    with CheckpointManager(tmp_path) as manager, pytest.raises(UserError) as caught:
        manager.restore(wider)
    message = str(caught.value)
    assert "params.embed: checkpoint (16, 8) float32, expected (32, 8) float32" in message
    assert "params.blocks.w: checkpoint (2, 8, 8) float32, expected (2, 8, 8) float16" in message
    assert "ema_params.embed: checkpoint absent, expected (16, 8) float32" in message
    assert "\n" not in message

    many = {"params": {f"w{i}": jax.ShapeDtypeStruct((i + 1,), jnp.float32) for i in range(30)}}
    with CheckpointManager(tmp_path) as manager, pytest.raises(UserError) as caught:
        manager.restore(many)
    assert str(caught.value).count("expected") == 8
    assert "more;" in str(caught.value)
    with pytest.raises(UserError, match=r"params\.embed: checkpoint \(16, 8\)"):
        restore_params(tmp_path, wider.params)


@pytest.mark.parametrize(
    ("state", "metadata", "message"),
    [
        ({"params": {"w": 3}}, {}, r"params\.w is a int"),
        ({"params": {"w": "text"}}, {}, r"params\.w is a str"),
        ({"params": {"w": jnp.zeros((0, 3))}}, {}, r"params\.w has shape \(0, 3\)"),
        ({"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}, {}, r"both named a\.b"),
        ({"params": {"w": jnp.ones(2)}}, {"config": object()}, "JSON"),
    ],
)
def test_what_cannot_be_stored(tmp_path: Path, state: Any, metadata: Any, message: str) -> None:
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(UserError, match=message):
            manager.save(1, state, metadata)
        manager.save(2, {"params": {"w": jnp.ones(2)}}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_newer_format_is_not_guessed_at(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(rng)
    save_steps(tmp_path, {1: state})
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    save_steps(tmp_path, {2: state})
    monkeypatch.undo()
    match = r"format version 2, but this gptjax reads versions up to 1; upgrade"
    with CheckpointManager(tmp_path) as manager, pytest.raises(UserError, match=match):
        manager.restore(abstract(state))
    with pytest.raises(UserError, match=match):
        read_metadata(tmp_path)
    with pytest.raises(UserError, match=match):
        restore_params(tmp_path, abstract(state.params))
    assert read_metadata(tmp_path, 1)["at"] == 1


def test_paths_that_hold_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    state = make_state(rng)
    for call in (find_checkpoint, read_metadata):
        with pytest.raises(UserError, match="no checkpoint in"):
            call(tmp_path / "absent")
    with CheckpointManager(tmp_path / "absent") as manager:
        assert (manager.steps(), manager.latest_step(), manager.best_step()) == ([], None, None)
        with pytest.raises(UserError, match="no checkpoint in"):
            manager.restore(abstract(state))
    assert not (tmp_path / "absent").exists()
    save_steps(tmp_path, {1: state, 4: state})
    with pytest.raises(UserError, match=r"step 3 .* there are \[1, 4\]"):
        find_checkpoint(tmp_path, 3)
    with pytest.raises(UserError, match="metric"):
        find_checkpoint(tmp_path, "best")
    with CheckpointManager(tmp_path) as manager, pytest.raises(UserError, match="no checkpoint of"):
        manager.restore(abstract(state), 3)
    with pytest.raises(UserError, match="keep_latest is 0"):
        CheckpointManager(tmp_path, keep_latest=0)


def test_relative_paths_and_the_forms_of_a_path(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = make_state(rng)
    save_steps(Path("run/checkpoints"), {1: state, 11: state})
    step_folder = tmp_path / "run" / "checkpoints" / "11"
    for path in ("run", "run/checkpoints", "run/checkpoints/11", "./run/../run"):
        folder, step = find_checkpoint(path)
        assert (Path(folder), step) == (step_folder, 11)
        assert read_metadata(path)["at"] == 11
    shutil.copytree("run/checkpoints/11", "copy")
    assert_same(restore_params("copy", abstract(state.params)), state.params)
    assert find_checkpoint("copy")[1] == 11


# Damage.


def flip_bit(file: Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_noticed(tmp_path: Path, rng: np.random.Generator) -> None:
    states = {step: make_state(rng) for step in (1, 2)}
    save_steps(tmp_path, states)
    files = files_of(tmp_path / "2")
    assert len(files) > 10
    with CheckpointManager(tmp_path) as manager:
        for file in files:
            whole = file.read_bytes()
            flip_bit(file, rng)
            with pytest.warns(UserWarning, match="falling back to step 1") as caught:
                restored = manager.restore(abstract(states[1]))
            assert str(file) in str(caught[0].message)
            assert Path(caught[0].filename) == Path(__file__)
            assert restored.step == 1
            assert_same(restored.state, states[1])
            with pytest.raises(UserError, match="step 2 is damaged"):
                manager.restore(abstract(states[1]), 2)
            file.write_bytes(whole)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert manager.restore(abstract(states[1])).step == 2


def test_truncated_missing_and_unfinished(tmp_path: Path, rng: np.random.Generator) -> None:
    states = {step: make_state(rng) for step in (1, 2, 3, 4)}
    save_steps(tmp_path, states)
    longest = max(files_of(tmp_path / "4"), key=lambda file: file.stat().st_size)
    longest.write_bytes(longest.read_bytes()[:-1])
    gone = files_of(tmp_path / "3" / "params")[0]
    gone.unlink()
    (tmp_path / "2" / "manifest.json").unlink()
    with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == [1, 3, 4]
        with pytest.warns(UserWarning, match="falling back to step 1") as caught:
            assert_same(manager.restore(abstract(states[1])).state, states[1])
        text = str(caught[0].message)
        size = longest.stat().st_size
        assert f"{longest} has {size} bytes instead of {size + 1}" in text
        assert f"{gone} is missing" in text
        assert f"{tmp_path / '2' / 'manifest.json'} is missing" in text
        (tmp_path / "1" / "manifest.json").unlink()
        with pytest.raises(UserError, match="no good step is left"):
            manager.restore(abstract(states[1]))


def state_at(step: int) -> State:
    """A state that depends on the step alone, made without compiling anything."""
    rng = np.random.default_rng(step)
    arrays = [jnp.asarray(rng.standard_normal((40, 50)), jnp.float32) for _ in range(3)]
    key = jax.random.wrap_key_data(jnp.asarray(rng.integers(2**32, size=2), jnp.uint32))
    moments = optax.ScaleByAdamState(jnp.int32(step), arrays[1], arrays[2])
    return State(jnp.int32(step), {"w": arrays[0]}, (moments, optax.EmptyState()), key)


KILLED = """
import sys
from gptjax.checkpoint import CheckpointManager
from test_checkpoint import state_at

state_at(0)
with CheckpointManager(sys.argv[1], keep_latest=2) as manager:
    sys.stdin.readline()
    step = (manager.latest_step() or 0) + 1
    while True:
        manager.save(step, state_at(step), {"at": step})
        if step % 2:
            manager.wait()
            print(step, flush=True)
        step += 1
"""


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_at_any_moment(tmp_path: Path, rng: np.random.Generator, kills: int) -> None:
    directory = tmp_path / "checkpoints"
    example = state_at(0)
    unfinished, step = 0, 0

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(directory)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    # The next process imports its libraries while one saves.
    waiting = [start(), start()]
    try:
        for kill in range(kills):
            process = waiting[0]
            assert process.stdin
            assert process.stdout
            process.stdin.write("go\n")
            process.stdin.flush()
            told = [int(process.stdout.readline())]
            time.sleep(float(rng.uniform(0, 0.4)))
            process.kill()
            told += [int(line) for line in process.communicate(timeout=30)[0].split()]
            waiting.pop(0)
            if kill + 2 < kills:
                waiting.append(start())

            names = {path.name for path in directory.iterdir()}
            with CheckpointManager(directory) as manager, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "step .* is missing, the save did not finish")
                assert max(told) <= (manager.latest_step() or 0)
                unfinished += names != {str(number) for number in manager.steps()}
                restored = manager.restore(abstract(example))
                assert restored.step == manager.latest_step() == restored.metadata["at"] > step
            step = restored.step
            assert_same(restored.state, state_at(step))
    finally:
        for process in waiting:
            process.kill()
            process.communicate(timeout=30)
    assert unfinished, "no kill hit a save, so this test has shown nothing"
    with CheckpointManager(directory, keep_latest=2) as manager:
        manager.save(step + 1, example, {})
        assert_same(manager.restore(abstract(example)).state, example)
    assert {path.name for path in directory.iterdir()} == {str(step), str(step + 1)}


# Retention.


def test_latest_every_and_best_are_kept(tmp_path: Path) -> None:
    state = {"params": {"w": jnp.ones(3)}}
    metrics = [float("nan"), 3.0, 1.0, 5.0, 2.0, 4.0, None, 9.0]
    with CheckpointManager(tmp_path, keep_latest=2, keep_every=4) as manager:
        for step, metric in enumerate(metrics, 1):
            manager.save(step, state, {}, metric=metric)
        manager.wait()
        assert manager.steps() == [3, 4, 7, 8]
    # A new process knows the best.
    with CheckpointManager(tmp_path, keep_latest=1) as manager:
        assert (manager.best_step(), manager.latest_step()) == (3, 8)
        assert find_checkpoint(tmp_path, "best")[1] == 3
        manager.save(9, state, {}, metric=1.5)
        manager.wait()
        assert manager.steps() == [3, 9]
        manager.save(10, state, {}, metric=0.5)
        manager.wait()
        assert manager.steps() == [10]
    with CheckpointManager(tmp_path, keep_latest=1, keep_best=False) as manager:
        manager.save(11, state, {}, metric=2.0)
        manager.wait()
        assert manager.steps() == [11]


def test_nothing_is_deleted_before_a_newer_step_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"params": {"w": jnp.ones(3)}}
    seen = []
    write = checkpoint._write_manifest

    def spy(folder: Any, manifest: Any) -> None:
        seen.append((manifest["step"], checkpoint._complete(checkpoint._folders(folder.parent))))
        write(folder, manifest)

    monkeypatch.setattr(checkpoint, "_write_manifest", spy)
    with CheckpointManager(tmp_path, keep_latest=1) as manager:
        for step in (1, 2, 2, 3):
            manager.save(step, state, {})
    assert [(step, list(stored)) for step, stored in seen] == [
        (1, []),
        (2, [1]),
        (2, [2]),
        (3, [2]),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_a_half_removed_step_does_not_look_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"params": {"w": jnp.ones(3)}}

    def stop(*_: Any) -> None:
        raise OSError(13, "Permission denied")

    with CheckpointManager(tmp_path, keep_latest=1) as manager:
        manager.save(1, state, {})
        manager.wait()
        monkeypatch.setattr(type(manager.directory), "rmtree", stop)
        manager.save(2, state, {})
        with pytest.raises(OSError, match="Permission denied"):
            manager.wait()
        assert (tmp_path / "1").exists()
        assert manager.steps() == [2]


def test_a_step_saved_again_replaces_it(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_state(rng), make_state(rng)
    save_steps(tmp_path, {10: first})

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    # Until the new one is complete the old one is that step.
    monkeypatch.setattr(checkpoint, "_write_manifest", fail)
    with CheckpointManager(tmp_path) as manager:
        manager.save(10, second, {})
        with pytest.raises(OSError, match=r"step 10 could not be saved.*No space left"):
            manager.wait()
        assert manager.steps() == [10]
        assert_same(manager.restore(abstract(first)).state, first)
        assert_same(restore_params(tmp_path, abstract(first.params)), first.params)
    monkeypatch.undo()
    save_steps(tmp_path, {10: second})
    with CheckpointManager(tmp_path) as manager:
        assert_same(manager.restore(abstract(first)).state, second)
    assert [path.name for path in tmp_path.iterdir()] == ["10"]


def test_resuming_from_an_earlier_step_leaves_the_later_ones_behind(tmp_path: Path) -> None:
    state = {"params": {"w": jnp.ones(3)}}
    save_steps(tmp_path, {10: state, 20: state, 30: state})
    with CheckpointManager(tmp_path, keep_latest=2) as manager:
        with pytest.warns(UserWarning, match=r"step 15 .* later steps .*\[20, 30\]"):
            manager.save(15, state, {})
        manager.wait()
        assert manager.steps() == [10, 15]


def test_leftovers_are_cleaned_by_the_first_save(tmp_path: Path) -> None:
    state = {"params": {"w": jnp.ones(3)}}
    save_steps(tmp_path, {1: state, 2: state})
    (tmp_path / "2" / "manifest.json").unlink()
    shutil.copytree(tmp_path / "1", tmp_path / "1.replaced")
    (tmp_path / "3.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == [1]
        assert {path.name for path in tmp_path.iterdir()} == before
        manager.save(1, state, {})
        manager.save(4, state, {})
    assert {path.name for path in tmp_path.iterdir()} == {"1", "4", "notes.txt"}


# Failures of a save.


def test_a_failed_save_is_told(tmp_path: Path, rng: np.random.Generator) -> None:
    """A limit on file size makes the writes of Orbax itself fail, as a full disk does."""
    state = make_state(rng)
    big = dataclasses.replace(
        state, params={"w": jnp.asarray(rng.standard_normal(100_000), jnp.float32)}
    )
    save_steps(tmp_path, {1: state})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointManager(tmp_path) as manager:
        for surface in (manager.wait, lambda: manager.save(3, state, {})):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            try:
                manager.save(2, big, {})
                with pytest.raises(OSError, match="step 2 could not be saved in"):
                    surface()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert manager.steps() == [1]
        assert_same(manager.restore(abstract(state)).state, state)
        manager.save(4, state, {})
    assert {path.name for path in tmp_path.iterdir()} == {"1", "4"}


def test_leaving_tells_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", fail)
    state = {"params": {"w": jnp.ones(3)}}
    with pytest.raises(OSError, match="No space left"), CheckpointManager(tmp_path) as manager:
        manager.save(1, state, {})

    def fails_besides() -> None:
        with CheckpointManager(tmp_path) as manager:
            manager.save(1, state, {})
            raise KeyError("the body's own error")

    with pytest.raises(KeyError) as caught:
        fails_besides()
    assert "No space left" in caught.value.__notes__[0]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        CheckpointManager(tmp_path / "file" / "checkpoints") as manager,
        pytest.raises(OSError, match="step 1 could not be saved in"),
    ):
        manager.save(1, {"params": {"w": jnp.ones(3)}}, {})


def test_leaving_waits_for_the_save(tmp_path: Path) -> None:
    state = {"params": {"w": jnp.ones((300, 1000))}}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state, {})
    assert find_checkpoint(tmp_path)[1] == 1


# Configs and the lock.


def test_diff_configs() -> None:
    @dataclasses.dataclass
    class Rope:
        base: float

    stored = {"num_layers": 4, "rope": {"base": 1e4, "kind": None}, "name": "a", "dims": [1, 2]}
    given = {"num_layers": 6, "rope": dataclasses.asdict(Rope(1e4)), "name": "b", "dims": (1, 2)}
    assert sorted(checkpoint.diff_configs(stored, given | {"new": True})) == [
        "name: checkpoint 'a', given 'b'",
        "new: checkpoint absent, given True",
        "num_layers: checkpoint 4, given 6",
        "rope.kind: checkpoint None, given absent",
    ]
    assert checkpoint.diff_configs(stored, stored) == []


LOCK = """
import sys, time
from gptjax.checkpoint import lock_run

assert not any(name.split(".")[0] in ("orbax", "tensorstore") for name in sys.modules)
with lock_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


def test_lock_is_released_by_a_kill(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(run)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        start = time.monotonic()
        with pytest.raises(UserError) as caught, checkpoint.lock_run(run):
            pass
        assert time.monotonic() - start < 1
        for part in (str(run), str(holder.pid), socket.gethostname()):
            assert part in str(caught.value)
    finally:
        holder.kill()
        holder.communicate(timeout=30)
    for _ in range(2):
        with checkpoint.lock_run(run):
            with pytest.raises(UserError, match="in use"), checkpoint.lock_run(run):
                pass
            assert str(os.getpid()) in (run / ".lock.json").read_text()
    assert not (run / ".lock.json").exists()


# Many processes.

TWO_PROCESSES = """
import sys, warnings
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
port, rank, directory = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
from jax.sharding import NamedSharding, PartitionSpec as P
from gptjax import hosts
from gptjax.checkpoint import CheckpointManager, restore_params
from gptjax.errors import UserError

mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
data = {"w": np.arange(64, dtype=np.float32).reshape(8, 8), "n": np.int32(3)}
specs = {"w": P("x"), "n": P()}
def place(name, scale):
    value = np.asarray(data[name] * scale)
    sharding = NamedSharding(mesh, specs[name])
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
def state(scale):
    return {"params": {"w": place("w", scale)}, "n": place("n", scale)}
abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(1)
)
with CheckpointManager(directory, keep_latest=2) as manager:
    for step in (1, 2, 3, 3):
        manager.save(step, state(step), {"at": step}, metric=float(step))
    manager.wait()
    assert manager.steps() == [1, 2, 3], manager.steps()
    restored = manager.restore(abstract)
    assert restored.step == 3
    for shard in restored.state["params"]["w"].addressable_shards:
        assert (np.asarray(shard.data) == data["w"][shard.index] * 3).all()
    # Whoever's share a damaged file is in, all fall back together, and only process 0 warns.
    files = sorted(path for path in Path(directory, "3").rglob("*") if path.stat().st_size)
    for file in (path for path in files if path.is_file()):
        whole = file.read_bytes()
        hosts.gather(None)
        if hosts.is_main():
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        hosts.gather(None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert manager.restore(abstract).step == 2, file
        assert len(caught) == hosts.is_main()
        try:
            manager.restore(abstract, 3)
        except UserError as error:
            assert "step 3 is damaged" in str(error)
        else:
            raise AssertionError(file)
        hosts.gather(None)
        if hosts.is_main():
            file.write_bytes(whole)
"""


def test_two_processes_save_one_restores(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(port), str(rank), str(tmp_path)],
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=100)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()
    wanted = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    expected = np.arange(64, dtype=np.float32).reshape(8, 8)
    assert (restore_params(tmp_path, wanted)["w"] == expected * 3).all()
    assert (restore_params(tmp_path, wanted, "best")["w"] == expected).all()


# A checkpoint of format version 1 is readable for ever.


def write_v1(directory: str) -> None:
    """Made `tests/checkpoints/v1`, elsewhere first and then copied: Orbax notes the path."""
    with CheckpointManager(directory) as manager:
        state = {"params": {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3)}}
        manager.save(1, state, {"config": {"num_layers": 2}}, metric=0.5)


def test_format_version_1_is_read() -> None:
    params = restore_params(STORED_V1, {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)})
    assert (np.asarray(params["w"]) == np.arange(6).reshape(2, 3)).all()
    metadata = read_metadata(STORED_V1, "best")
    assert metadata["config"] == {"num_layers": 2}
    assert metadata["checkpoint"]["format_version"] == 1
