"""The loop: what a run leaves, and that however it is stopped it ends as if it never was."""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gptjax import checkpoint, command_line, fitting
from gptjax.checkpoint import CheckpointManager, find_checkpoint
from gptjax.config import ModelConfig
from gptjax.data import BatchLoader, evaluation_batches
from gptjax.devices import cores_as_devices
from gptjax.errors import UserError
from gptjax.fitting import NonFiniteLossError, fit, params_sha256
from gptjax.model import forward
from gptjax.optimizer import OptimizerConfig
from gptjax.params import count_params, init_params
from gptjax.plots import read_metrics
from gptjax.pretrained.loading import load
from gptjax.sampling import Sampling
from gptjax.sharding import TOKENS_PER_CORE, data_mesh
from gptjax.text_generation import generate_text
from gptjax.tokenizer import ByteTokenizer, CharTokenizer
from gptjax.training import abstract_state

LIMIT_SECONDS = 240
STEPS, CHECKPOINT_EVERY, EVAL_EVERY = 60, 7, 20
CONFIG = ModelConfig(
    vocab_size=257, context_length=16, num_layers=1, embed_dim=32, num_heads=2, dropout=0.1
)
OPTIMIZER = OptimizerConfig(warmup_steps=5, ema_decay=0.9)
TOKENS = np.random.default_rng(7).integers(97, 123, 700)


def arguments(steps: int = STEPS) -> dict:
    """What the child process and the tests in this one give to `fit`."""
    return {
        "steps": steps,
        "eval_data": list(evaluation_batches(TOKENS[600:], batch_size=4, context_length=16)),
        "tokenizer": ByteTokenizer(),
        "eval_every": EVAL_EVERY,
        "checkpoint_every": CHECKPOINT_EVERY,
        "sampling": Sampling(max_new_tokens=5, overflow="slide"),
        "settings": {"data": "noise"},
    }


class SlowLoader(BatchLoader):
    """So slow that a signal meets the run before its end."""

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        time.sleep(0.03)
        return super().__getitem__(position)


def loader(kind: type[BatchLoader] = BatchLoader) -> BatchLoader:
    return kind(TOKENS[:600], batch_size=4, context_length=16, seed=3)


if __name__ == "__main__":
    # The child process of the tests below, on two devices as scripts are on two cores.
    cores_as_devices(2)
    mesh = data_mesh(rows=4, tokens=2 * TOKENS_PER_CORE)
    fit(CONFIG, OPTIMIZER, loader(SlowLoader), out=sys.argv[1], mesh=mesh, **arguments())
    sys.exit(0)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One store of compiled programs, for many runs here are of one shape."""
    path = tmp_path_factory.mktemp("compiled")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(path), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield path
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@dataclass(frozen=True)
class Child:
    """This file as a script in a process of its own, what it prints in a file."""

    process: subprocess.Popen[bytes]
    printed: Path

    @staticmethod
    def start(out: Path, compiled_programs: Path) -> "Child":
        # Where pytest found the package the child shall find it too.
        environment = os.environ | {
            "PYTHONPATH": str(Path(fitting.__file__).parents[1]),
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compiled_programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        printed = out.with_name(out.name + ".txt")
        with printed.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, __file__, str(out)], env=environment, stdout=file, stderr=file
            )
        return Child(process, printed)

    def wait_for_training(self) -> None:
        """Waits until the step is compiled."""
        end = time.monotonic() + LIMIT_SECONDS
        while not re.search(r"train step … [\d.]+ s", self.printed.read_text()):
            assert time.monotonic() < end, self.printed.read_text()
            assert self.process.poll() is None, self.printed.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT_SECONDS)

    def end(self) -> tuple[int, str]:
        """Waits for the end; status and what was printed."""
        try:
            status = self.process.wait(LIMIT_SECONDS)
        finally:
            self.kill()
        return status, self.printed.read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, compiled_programs: Path) -> Path:
    """A run never stopped, in a process of its own. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    status, text = Child.start(out, compiled_programs).end()
    assert status == 0, text
    assert str(out / "loss.png") in text
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def test_a_run_folder_holds_what_it_should_and_nothing_else(finished: Path):
    assert {path.name for path in finished.iterdir()} - {".lock"} == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "loss.png",
        "samples.txt",
        "tensorboard",
        "checkpoints",
    }
    values = summary(finished)
    assert values["steps"] == STEPS
    assert values["tokens"] == STEPS * 4 * 16
    assert values["params"] == count_params(CONFIG)
    assert values["best_val_loss"] <= values["val_loss"]
    assert len(values["params_sha256"]) == 64
    for name in ("compile_seconds", "train_seconds", "peak_bytes"):
        assert values[name] > 0, name
    stored = json.loads((finished / "config.json").read_text())
    assert ModelConfig.from_dict(stored["model"]) == CONFIG
    assert OptimizerConfig(**stored["optimizer"]) == OPTIMIZER
    samples = (finished / "samples.txt").read_text()
    assert [line for line in samples.splitlines() if line.startswith("===")] == [
        f"=== step {step} ===" for step in range(EVAL_EVERY, STEPS + 1, EVAL_EVERY)
    ]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def assert_each_step_once(out: Path) -> None:
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert {"loss", "grad_norm", "learning_rate", "tokens"} <= set(row)
        assert ("val_loss" in row) == (row["step"] % EVAL_EVERY == 0)


def test_metrics_hold_each_step_once(finished: Path):
    assert_each_step_once(finished)
    values = summary(finished)
    losses = [row["val_loss"] for row in read_metrics(finished) if "val_loss" in row]
    assert values["val_loss"] == losses[-1]
    assert values["best_val_loss"] == min(losses)


def test_the_validation_loss_is_that_of_numpy_over_the_whole_split(finished: Path):
    folder, _ = find_checkpoint(finished)
    model = load(folder)
    held_out, nll = TOKENS[600:], []
    for begin in range(0, len(held_out) - 1, 16):
        window = held_out[begin : begin + 17]
        logits = np.asarray(forward(model.params, window[None, :-1], CONFIG)[0], np.float64)
        normalizer = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nll.extend(normalizer - logits[np.arange(len(logits)), window[1:]])
    assert len(nll) == len(held_out) - 1
    np.testing.assert_allclose(summary(finished)["val_loss"], np.mean(nll), rtol=2e-6)


def test_tensorboard_shows_the_same_numbers(finished: Path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    shown: dict[tuple[str, int], float] = {}
    for path in (finished / "tensorboard").iterdir():
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
            shown |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            place += length + 16
    for row in read_metrics(finished):
        for name, value in row.items():
            if name != "step":
                np.testing.assert_allclose(shown[name, int(row["step"])], value, rtol=1e-6)


def kill_and_finish(
    finished: Path, out: Path, compiled_programs: Path, kills: int, seed: int
) -> None:
    chance = random.Random(seed)
    for _ in range(kills):
        child = Child.start(out, compiled_programs)
        try:
            child.wait_for_training()
            time.sleep(chance.uniform(0, 1.5))
        finally:
            child.kill()
    status, text = Child.start(out, compiled_programs).end()
    assert status == 0, (seed, text)
    assert summary(out)["params_sha256"] == summary(finished)["params_sha256"], seed
    assert summary(out)["val_loss"] == summary(finished)["val_loss"], seed
    assert summary(out)["tokens"] == summary(finished)["tokens"], seed
    assert_each_step_once(out)
    assert (out / "samples.txt").read_text() == (finished / "samples.txt").read_text()


def test_a_killed_run_ends_bit_for_bit_like_one_never_stopped(
    finished: Path, tmp_path: Path, compiled_programs: Path
):
    seed = int(np.random.default_rng().integers(2**31))
    kill_and_finish(finished, tmp_path / "run", compiled_programs, 1, seed)


@pytest.mark.slow
def test_a_run_killed_many_times_ends_bit_for_bit_like_one_never_stopped(
    finished: Path, tmp_path: Path, compiled_programs: Path
):
    seed = int(np.random.default_rng().integers(2**31))
    kill_and_finish(finished, tmp_path / "run", compiled_programs, 12, seed)


def test_signals_stop_well_and_a_second_run_in_the_folder_is_refused(
    finished: Path, tmp_path: Path, compiled_programs: Path
):
    out = tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGINT):
        child = Child.start(out, compiled_programs)
        try:
            child.wait_for_training()
            held = rf"in use by another run \(process {child.process.pid}"
            with pytest.raises(UserError, match=held):
                fit(CONFIG, OPTIMIZER, loader(), out=out, **arguments())
            time.sleep(0.3)
            child.process.send_signal(number)
            status, text = child.end()
        finally:
            child.kill()
        assert status == 0, text
        assert "Traceback" not in text
        assert f"stopped by {number.name} after step " in text
        assert "run the same command again to continue" in text
        assert not (out / "summary.json").exists()
    status, text = Child.start(out, compiled_programs).end()
    assert status == 0, text
    assert summary(out)["params_sha256"] == summary(finished)["params_sha256"]
    assert_each_step_once(out)


@pytest.mark.parametrize("moment", ["compile", "evaluate", "save"])
def test_a_signal_at_any_moment_stops_well(moment: str, tmp_path: Path, monkeypatch, capsys):
    """While compiling, evaluating or saving, none of which is left half done."""

    given = arguments(6) | PLAIN | {"checkpoint_every": 2, "eval_every": 3, "progress": True}
    given["eval_data"] = arguments()["eval_data"]
    # What is called right after compiling, and to save.
    owner, name = {
        "compile": (fitting.devices, "peak_bytes"),
        "evaluate": (fitting, "evaluate_loss"),
        "save": (CheckpointManager, "save"),
    }[moment]
    original = getattr(owner, name)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        stopped = fit(CONFIG, OPTIMIZER, loader(), out=tmp_path / "run", **given)
    step = {"compile": 0, "evaluate": 3, "save": 2}[moment]
    assert not stopped.finished
    assert f"stopped by SIGTERM after step {step} and saved" in capsys.readouterr().out
    assert find_checkpoint(tmp_path / "run")[1] == step
    resumed = fit(CONFIG, OPTIMIZER, loader(), out=tmp_path / "run", **given)
    straight = fit(CONFIG, OPTIMIZER, loader(), out=tmp_path / "straight", **given)
    assert resumed.summary["params_sha256"] == straight.summary["params_sha256"]


def test_a_full_disk_ends_the_run_and_leaves_the_step_before(tmp_path: Path, monkeypatch, capsys):
    given = arguments(6) | PLAIN | {"checkpoint_every": 2}
    write = checkpoint._write_manifest

    def full(folder, manifest) -> None:
        if manifest["step"] == 4:
            raise OSError(28, "No space left on device")
        write(folder, manifest)

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    monkeypatch.setattr(command_line, "configure_jax", lambda: None)
    run = partial(fit, CONFIG, OPTIMIZER, loader(), out=tmp_path / "run", **given)
    with pytest.raises(SystemExit) as end:
        command_line.run_command(run)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert re.match(r"error: step 4 could not be saved in .*No space left on device; the", error)
    assert error.count("\n") == 1
    assert find_checkpoint(tmp_path / "run")[1] == 2
    monkeypatch.undo()
    straight = fit(CONFIG, OPTIMIZER, loader(), out=tmp_path / "straight", **given)
    assert run().summary["params_sha256"] == straight.summary["params_sha256"]


def test_a_finished_run_says_so_and_stays_as_it_is(copied: Path, capsys):
    before = contents(copied)
    result = fit(CONFIG, OPTIMIZER, loader(), out=copied, **arguments())
    assert contents(copied) == before
    assert result.finished
    assert result.summary == summary(copied)
    assert params_sha256(result.state.params) == result.summary["params_sha256"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"is finished: {STEPS} steps" in printed
    assert "raise steps" in printed


def test_a_kill_before_the_summary_loses_nothing(copied: Path):
    expected = summary(copied)
    (copied / "summary.json").unlink()
    (copied / "loss.png").unlink()
    fit(CONFIG, OPTIMIZER, loader(), out=copied, progress=False, **arguments())
    found = summary(copied)
    # The save of the last checkpoint came before the very end.
    expected.pop("train_seconds"), found.pop("train_seconds")
    assert found == expected
    assert (copied / "loss.png").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": CONFIG.replace(embed_dim=64, num_heads=4)}, "model.embed_dim: .*32.* 64.*; .*"),
        ({"optimizer": OptimizerConfig(learning_rate=0.5)}, "optimizer.learning_rate: .*0.5"),
        ({"optimizer": optax.sgd(0.1)}, "optimizer.learning_rate: .*absent"),
        ({"seed": 1}, "run.seed: checkpoint 0, given 1"),
        ({"accumulate": 2}, "run.accumulate: checkpoint 1, given 2"),
        ({"settings": {"data": "other"}}, "run.data: checkpoint 'noise', given 'other'"),
        (
            {"tokenizer": CharTokenizer("\nabcxyz")},
            r"tokenizer\.kind: checkpoint 'bytes', given 'characters'; tokenizer\.alphabet: .*abs",
        ),
    ],
)
def test_another_run_in_the_folder_is_refused_field_by_field(finished: Path, change, named):
    before = contents(finished)
    given = {"config": CONFIG, "optimizer": OPTIMIZER, "train_data": loader()}
    with pytest.raises(UserError, match=named) as caught:
        fit(**given | arguments(STEPS + 1) | {"out": finished} | change)
    assert "\n" not in str(caught.value)
    assert contents(finished) == before


def test_execution_fields_may_change_and_more_steps_continue(copied: Path):
    config = CONFIG.replace(remat="full", scan_unroll=1)
    # Begun before these settings were there.
    stored = json.loads((copied / "config.json").read_text())
    del stored["model"]["num_experts"], stored["run"]["loss"]["balance_loss"]
    # And with the number that was this one's default once.
    stored["run"]["loss"]["logits_at_once"] = 2**26
    (copied / "config.json").write_text(json.dumps(stored))
    result = fit(config, OPTIMIZER, loader(), out=copied, progress=False, **arguments(STEPS + 3))
    assert int(result.state.step) == STEPS + 3
    assert summary(copied)["steps"] == STEPS + 3
    assert summary(copied)["tokens"] == (STEPS + 3) * 4 * 16
    assert [row["step"] for row in read_metrics(copied)] == list(range(1, STEPS + 4))


def test_a_mesh_may_be_left_to_be_chosen(tmp_path: Path):
    """Of all devices, and the evaluation's batches divide over it too."""
    given = arguments(2) | {"out": tmp_path / "run", "progress": False}
    result = fit(CONFIG, OPTIMIZER, loader(), mesh="auto", **given)
    place = result.state.params["embed"]["tokens"].sharding
    assert place.device_set == set(jax.devices())
    assert result.val_loss is not None


def test_load_gives_the_averaged_parameters_and_generates(copied: Path):
    result = fit(CONFIG, OPTIMIZER, loader(), out=copied, progress=False, **arguments())
    folder, step = find_checkpoint(copied)
    assert step == STEPS
    model = load(folder)
    assert same(model.params, result.params)
    assert same(model.params, result.state.ema_params)
    assert not same(model.params, result.state.params)
    best = load(copied)
    assert best.config == CONFIG
    texts = generate_text(best, ["ab"], Sampling(max_new_tokens=4), jax.random.key(0))
    assert len(texts) == 1
    assert isinstance(texts[0], str)


PLAIN = {"eval_data": None, "tokenizer": None, "settings": None, "progress": False}


def test_a_loss_that_is_not_finite_stops_with_what_is_needed(tmp_path: Path):
    optimizer = OptimizerConfig(
        learning_rate=1e30, warmup_steps=0, schedule="constant", clip_norm=None
    )
    given = arguments(6) | PLAIN | {"checkpoint_every": 1}
    with pytest.raises(NonFiniteLossError, match="last good checkpoint is step") as caught:
        fit(CONFIG, optimizer, loader(), out=tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
    found = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert found["batch_position"] == found["step"] - 1
    assert found["learning_rate"] == pytest.approx(1e30)
    assert not np.isfinite(float(found["loss"])) or not np.isfinite(float(found["grad_norm"]))
    assert found["last_good_checkpoint"] == found["step"] - 1
    transformation, *_ = fitting._resolve(optimizer, CONFIG, 6)
    with CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        restored = manager.restore(abstract_state(CONFIG, transformation))
    assert restored.step == found["last_good_checkpoint"]
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_an_infinite_parameter_stops_or_is_skipped(tmp_path: Path, nonfinite):
    params = init_params(CONFIG, jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    params = structure.unflatten([leaves[0].at[0].set(np.inf), *leaves[1:]])
    given = arguments(3) | PLAIN | {"params": params, "nonfinite": nonfinite}
    if nonfinite == "stop":
        with pytest.raises(NonFiniteLossError, match=r"at step 1 .*checkpoint is none"):
            fit(CONFIG, OPTIMIZER, loader(), out=tmp_path, **given)
        found = json.loads((tmp_path / "nonfinite.json").read_text())
        assert found["last_good_checkpoint"] is None
        # With nothing to resume, the folder takes a run with other settings.
        calmer = dataclasses.replace(OPTIMIZER, learning_rate=1e-4)
        again = fit(CONFIG, calmer, loader(), out=tmp_path, **(given | {"params": None}))
        assert again.finished
        assert not (tmp_path / "nonfinite.json").exists()
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
        return
    result = fit(CONFIG, OPTIMIZER, loader(), out=tmp_path, **given)
    assert result.finished
    assert same(result.state.params, params)


def source(kind: str):
    import grain

    batches = [loader()[position] for position in range(8)]
    if kind == "list":
        return batches
    dataset = grain.MapDataset.source(batches).shuffle(seed=1).repeat()
    return dataset if kind == "map" else iter(dataset.to_iter_dataset())


@pytest.mark.parametrize("kind", ["list", "map", "iterator"])
def test_any_optax_transformation_and_any_data_resume_exactly(tmp_path: Path, kind):
    def run(name: str, steps: int):
        given = arguments(steps) | PLAIN
        return fit(CONFIG, optax.adam(1e-3), source(kind), out=tmp_path / name, **given)

    straight = run("straight", 6)
    assert run("stopped", 3).summary != straight.summary
    resumed = run("stopped", 6)
    assert same(resumed.state.params, straight.state.params)
    assert resumed.summary["params_sha256"] == straight.summary["params_sha256"]
    assert straight.val_loss is None


def test_data_that_cannot_serve_is_refused_before_anything_is_compiled(tmp_path: Path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("too late")

    monkeypatch.setattr(fitting, "init_state", never)
    batch = loader()[0]
    cases = [
        (iter([batch]), {}, "without get_state"),
        (3, {}, "train_data is a int"),
        ([batch], {}, "1 batches, but 60 steps"),
        ([{"tokens": batch["tokens"]}] * STEPS, {}, "need 'targets'"),
        ([batch | {"tokens": batch["tokens"] + 999}] * STEPS, {}, "vocab_size is 257"),
        ([{name: np.tile(x, 2) for name, x in batch.items()}] * STEPS, {}, "32 tokens a row"),
        (loader(), {"accumulate": 3}, r"accumulate one of \[1, 2, 4\]"),
        (loader(), {"steps": 0}, "steps is 0"),
    ]
    for data, change, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            fit(CONFIG, OPTIMIZER, data, out=tmp_path, **arguments() | change)
        assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}
