"""The package as others get it: built, installed elsewhere, typed; and its lowest versions."""

import email
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from small_models import GPT2, random_params

import gptjax
from gptjax.model import Model
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.tokenizer import CharTokenizer

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def lowest_module() -> Any:
    path = ROOT / ".ci" / "lowest.py"
    if not path.is_file():
        pytest.skip(".ci is not part of a source distribution")
    specification = importlib.util.spec_from_file_location("lowest", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# Versions


def test_the_version_is_said_in_one_place() -> None:
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", gptjax.__version__)
    said = re.compile(rf"(?<![\d.]){re.escape(gptjax.__version__)}(?![\d.])")
    elsewhere = [
        path.name
        for path in [*(ROOT / "gptjax").rglob("*.py"), ROOT / "pyproject.toml"]
        if said.search(path.read_text(encoding="utf-8")) and path.name != "version.py"
    ]
    assert elsewhere == []


def test_the_command_tells_it(command: Command) -> None:
    assert command("gptjax", "--version") == (0, f"gptjax {gptjax.__version__}\n", "")


def test_the_lowest_versions() -> None:
    module = lowest_module()
    found = module.lowest(PROJECT, ["test", "parity", "plan"])
    bounds = dict(text.split(">=") for text in EXTRAS["parity"])
    assert bounds.items() <= found.items()
    assert found["etils"] == "1.15"
    assert "notebook" not in found
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "lowest.py", "test", "parity", "plan"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [f"{name}=={version}" for name, version in found.items()]


@pytest.mark.parametrize("wrong", ["numpy", "numpy==2.4", "numpy>=2.4,<3", "jax>=0.11"])
def test_a_bound_that_cannot_be_tested_is_refused(wrong: str) -> None:
    project = PROJECT | {"dependencies": [*PROJECT["dependencies"], wrong]}
    with pytest.raises(SystemExit, match=r"numpy|jax"):
        lowest_module().lowest(project, [])


def test_dependencies_of_several_extras_agree() -> None:
    lowest_module().lowest(PROJECT, [name for name in EXTRAS if name != "docs"])


# What is built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python -m build`: the source distribution, and of that the wheel."""
    pytest.importorskip("build", reason="build, which the extra test brings, is missing")
    folder = tmp_path_factory.mktemp("built")
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    has_backend = importlib.util.find_spec("hatchling") is not None
    options = ["--no-isolation"] if has_backend else []
    done = subprocess.run(
        [sys.executable, "-m", "build", *options, "--outdir", folder, ROOT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode and not has_backend and re.search("Could not find|Connection", done.stdout):
        pytest.skip("hatchling cannot be downloaded")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_wheel_and_the_source_hold_what_they_should(built: Path) -> None:
    name = f"gptjax-{gptjax.__version__}"
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    inside = set(wheel.namelist())
    own = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gptjax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert own <= inside
    assert "gptjax/py.typed" in inside
    others = {entry.partition("/")[0] for entry in inside - own}
    assert others == {f"{name}.dist-info"}
    metadata = email.message_from_bytes(wheel.read(f"{name}.dist-info/METADATA"))
    assert metadata["Version"] == gptjax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert set(metadata.get_all("Provides-Extra") or ()) == set(EXTRAS)
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or ())
    described = metadata.get_payload(decode=True)
    assert isinstance(described, bytes)
    assert described.decode().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert f"{name}.dist-info/licenses/LICENSE" in inside
    with tarfile.open(next(built.glob("*.tar.gz"))) as source:
        names = {entry.removeprefix(f"{name}/") for entry in source.getnames()}
    wanted = {"LICENSE", "README.md", "README.zh.md", "pyproject.toml", "tests/test_packaging.py"}
    assert own | wanted <= names
    assert "experiments/quickstart.py" in names
    assert not {entry for entry in names if "__pycache__" in entry or entry.startswith("runs")}


OUTSIDE = """
import sys
from importlib.metadata import version
from pathlib import Path

import gptjax

assert Path(gptjax.__file__).is_relative_to(sys.prefix), gptjax.__file__
assert version("gptjax") == gptjax.__version__
model = gptjax.load(sys.argv[1])
print(gptjax.generate_text(model, "ab", gptjax.Sampling(max_new_tokens=3, temperature=0))[0])
"""
TYPED = """
import gptjax

config: int = gptjax.preset("gpt2")
"""


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(
    built: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """In a fresh environment, which sees this one's dependencies behind its own package."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    wheel = next(built.glob("*.whl"))
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True
    )
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    # Not by a .pth file: this environment's own would bring the checkout along.
    others = [path for path in sys.path if path.endswith("site-packages")]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(site), *others]),
    }

    def run(*command: Any, status: int = 0) -> str:
        done = subprocess.run(
            [*map(str, command)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    letters = CharTokenizer("abcdefghijklmnopqrstuvwxyz \n.,!")
    save_pretrained(Model(GPT2, random_params(GPT2, rng), letters), tmp_path / "model")
    text = run(python, "-c", OUTSIDE, tmp_path / "model").rstrip("\n")
    command = tmp_path / "venv" / "bin" / "gptjax"
    assert "generate" in run(command, "--help")
    shown = run(
        *(command, "generate", tmp_path / "model", "ab", "--max-new-tokens", "3"),
        *("--temperature", "0"),
    )
    assert text in shown
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "pyrightconfig.json").write_text("{}")
    told = run(sys.executable, "-m", "pyright", "--pythonpath", python, "typed.py", status=1)
    assert '"ModelConfig" is not assignable to "int"' in told
