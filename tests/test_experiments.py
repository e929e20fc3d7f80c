"""Scripts and commands as people start them: runs, samples, and one line for every mistake."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import REPOSITORY, Command, script
from on_devices import run_alone

import gptjax
from gptjax import fitting
from gptjax.checkpoint import lock_run

SCRIPTS = ("quickstart", "shakespeare_char")
COMMON_FLAGS = ("--out", "--steps", "--seed", "--data", "--preset", "--checkpoint-every")
PRESETS = ("cpu", "gpu", "cpu-modern", "gpu-modern")
TINY = (
    *("--model.num-layers", "1", "--model.embed-dim", "16", "--model.num-heads", "2"),
    *("--model.context-length", "8", "--batch-size", "2"),
    *("--eval-every", "5", "--checkpoint-every", "5"),
)
LIMIT_SECONDS = 240


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("the mistake should be found before anything is compiled")

    for name in ("init_state", "make_train_step"):
        monkeypatch.setattr(fitting, name, too_late)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    letters = np.random.default_rng(5).choice(list("abcde \n"), 600)
    path.write_text("".join(letters))
    return path


def subprocess_environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(Path(gptjax.__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "NO_COLOR": "1",
        "COLUMNS": "80",
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A run of the script as people start it."""
    folder = tmp_path_factory.mktemp("run")
    out = folder / "run"
    args = ("--preset", "cpu", "--data", text, "--out", out, "--steps", "5", *TINY)
    found = subprocess.run(
        [sys.executable, REPOSITORY / "experiments" / "shakespeare_char.py", *args],
        env=subprocess_environment(folder),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert "validation loss" in found.stdout
    assert f"gptjax generate {out}" in found.stdout
    return out


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


def refused(found: tuple[int, str, str], *parts: str) -> None:
    status, out, error = found
    assert status == 2, found
    assert error.startswith("error: "), found
    assert error.count("\n") == 1, found
    for part in parts:
        assert part in error, (part, error)
    assert "compiling" not in out


def test_a_script_leaves_a_finished_run(run: Path):
    values = json.loads((run / "summary.json").read_text())
    assert values["steps"] == 5
    stored = json.loads((run / "config.json").read_text())
    assert stored["model"]["vocab_size"] == 7


def test_a_finished_run_started_again_says_so(run: Path, text: Path, command: Command):
    before = files(run)
    again = ("--data", text, "--out", run, "--steps", 5, *TINY)
    status, out, error = command("shakespeare_char", *again)
    assert (status, error) == (0, "")
    assert "is finished: 5 steps" in " ".join(out.split())
    assert files(run) == before


@pytest.mark.usefixtures("nothing_compiles")
def test_another_run_or_one_in_use_is_refused(run: Path, text: Path, command: Command):
    before = files(run)
    given = ("--data", text, "--out", run, "--steps", 9, *TINY)
    changed = (*given, "--seed", 1, "--optimizer.learning-rate", 0.5, "--model.num-heads", 4)
    parts = ("run.seed", "optimizer.learning_rate", "model.num_heads", "given 4")
    refused(command("shakespeare_char", *changed), *parts)
    with lock_run(run):
        refused(command("shakespeare_char", *given), "in use by another run")
    assert files(run) == before


def test_generate_continues_a_text(run: Path, command: Command):
    args = (run, "ab", "--max-new-tokens", 12, "--num-samples", 2)
    status, out, error = command("gptjax", "generate", *args)
    assert (status, error) == (0, "")
    first, second = out.split("--------\n")
    assert first.startswith("ab")
    assert second.startswith("ab")
    assert len(first) == len("ab") + 12 + len("\n")
    assert command("sample", *args) == (0, out, "")


def test_the_module_is_a_command(tmp_path: Path):
    found = subprocess.run(
        [sys.executable, "-m", "gptjax.cli", "generat"],
        env=subprocess_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    line = "error: unknown command 'generat'; did you mean 'generate'?\n"
    assert (found.returncode, found.stdout, found.stderr) == (2, "", line)


def test_samples_of_what_is_not_there_are_refused(tmp_path: Path, run: Path, command: Command):
    for name in ("sample", "gptjax"):
        first = ("generate",) if name == "gptjax" else ()
        refused(command(name, *first, tmp_path / "none", "a"), "does not exist", "none")
        refused(command(name, *first, tmp_path, "a"), "no checkpoint in")
        refused(command(name, *first, run, "a", "--top-q", "1"), "--top-q", "did you mean --top-")
        refused(command(name, *first, run, "XYZ"), "'X'")


@pytest.mark.usefixtures("nothing_compiles")
def test_mistakes_in_flags_are_one_line(tmp_path: Path, text: Path, command: Command):
    out = tmp_path / "out"
    for args, parts in [
        (["--stepz", "3"], ("unknown flag --stepz", "did you mean --steps?")),
        (["--model.embd-dim", "3"], ("did you mean --model.embed-dim?",)),
        (["--preset", "cpu-moderm"], ("unknown preset 'cpu-moderm'", "'cpu-modern'")),
        (["--preset=gpuu"], ("unknown preset 'gpuu'", "did you mean 'gpu'")),
        (["--model.num-heads", "3"], ("embed_dim 128", "num_heads 3", "choose num_heads from")),
        (["--steps", "many"], ("--steps", "'many'")),
        (["--steps"], ("--steps",)),
        (["--steps", "0"], ("steps is 0",)),
        (["--nonfinite", "ignore"], ("'ignore'", "'stop'", "'skip'")),
        (["--model.context-length", "100000"], ("540 tokens", "context_length of 100000")),
        (["--validation-fraction", "2"], ("validation_fraction is 2",)),
        (["--tokenizer", "charcters"], ("did you mean 'characters'",)),
        (["--prompt", "Ω"], ("Ω",)),
        (["--accumulate", "5"], ("12 rows", "accumulate one of")),
    ]:
        found = command("shakespeare_char", "--data", text, "--out", out, *args)
        refused(found, *parts)
        left = {path.name for path in out.iterdir()} if out.exists() else set()
        assert left <= {".lock"}, args


@pytest.mark.usefixtures("nothing_compiles")
def test_mistakes_in_data_are_one_line(tmp_path: Path, command: Command):
    out = tmp_path / "out"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abcabcabca")
    (tmp_path / "latin.txt").write_bytes(b"abcd\xe9fgh" * 100)
    for name, parts in [
        ("missing.txt", ("missing.txt",)),
        ("empty.txt", ("empty.txt",)),
        ("short.txt", ("9 tokens", "context_length of 64", "65")),
        ("latin.txt", ("latin.txt", "UTF-8", "4")),
    ]:
        found = command("shakespeare_char", "--data", tmp_path / name, "--out", out)
        refused(found, *parts)
        assert not out.exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.usefixtures("nothing_compiles")
def test_wandb_asked_for_but_not_installed(tmp_path: Path, text: Path, command: Command):
    args = ("--data", text, "--out", tmp_path / "out", "--wandb", "project")
    refused(command("shakespeare_char", *args), "not installed", "pip install wandb")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_the_common_flags(name: str, command: Command):
    status, out, error = command(name, "--help")
    assert (status, error) == (0, "")
    for flag in COMMON_FLAGS:
        assert f"{flag} " in out
    assert "\x1b" not in out


@pytest.mark.parametrize("args", [["sample", "--help"], ["gptjax", "--help"]])
def test_the_other_commands_have_help(args: list[str], command: Command):
    status, out, _ = command(*args)
    assert status == 0
    assert "usage" in out


def test_all_four_recipes_exist(command: Command):
    presets = script("shakespeare_char").PRESETS
    assert tuple(presets) == PRESETS
    for name, settings in presets.items():
        assert settings.preset == name
    tokens = {
        name: settings.steps * settings.batch_size * settings.model.context_length
        for name, settings in presets.items()
    }
    assert tokens["cpu"] == tokens["cpu-modern"]
    assert tokens["gpu"] == tokens["gpu-modern"]
    _, out, _ = command("shakespeare_char", "--help")
    assert "Presets: cpu, gpu, cpu-modern, gpu-modern." in " ".join(out.split())


def test_every_public_name_resolves():
    assert gptjax.__all__
    for name in gptjax.__all__:
        assert getattr(gptjax, name) is not None
    assert set(gptjax.__all__) <= set(dir(gptjax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gptjax.nothing


def fresh(program: str, tmp_path: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=subprocess_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=True,
    ).stdout


def test_importing_loads_nothing_heavy(tmp_path: Path):
    heavy = (
        *("tensorflow", "torch", "optax", "orbax", "grain", "tokenizers", "matplotlib", "rich"),
        *("tyro", "flax", "pyarrow", "tensorboardX", "tensorflow_datasets", "wandb"),
    )
    program = f"import sys, gptjax; print([m for m in {heavy} if m in sys.modules])"
    assert fresh(program, tmp_path).strip() == "[]"


def test_importing_costs_little_more_than_jax(tmp_path: Path):
    def seconds(name: str) -> float:
        # Processor time, which other people's work on the machine changes least.
        program = (
            f"import time; t = time.process_time(); import {name}; print(time.process_time() - t)"
        )
        return float(fresh(program, tmp_path))

    rounds = [(seconds("jax"), seconds("jax, gptjax")) for _ in range(4)]
    of_jax, of_both = (min(column) for column in zip(*rounds, strict=True))
    assert of_both <= 1.3 * of_jax, rounds


REPLICAS = """
from gptjax.config import preset
from gptjax.experiment import Experiment, replicas
from gptjax.sharding import mesh_devices

model = preset("gpt2")
for rows, accumulate in (12, 1), (16, 1), (16, 2):
    sizes = {"batch_size": rows, "accumulate": accumulate}
    mesh = replicas(Experiment(preset="", out="", model=model, **sizes))
    print(len(mesh_devices(mesh)))
"""


def test_a_model_that_is_large_for_its_batch_stays_on_one_core(tmp_path: Path) -> None:
    # 124 million parameters, and 12 or 16 thousand tokens at once.
    assert run_alone(REPLICAS, tmp_path, devices=2).split() == ["1", "2", "1"]
