"""XLA's flags: who sets them, whose value wins, and that an installed XLA knows them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from gptjax import command_line, xla_flags


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flags are set before a test, nor after it those that the test sets."""
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Libraries that know all flags but the first one of the GPU's and of the TPU's."""
    names = [*list(xla_flags.GPU)[1:], *list(xla_flags.TPU)[1:]]
    file = tmp_path / "library.so"
    file.write_bytes(b"\0".join([b"code", *(name[2:].encode() for name in names), b"code"]))
    monkeypatch.setattr(xla_flags, "_library", lambda package, name: file)
    return file


def test_flags_are_added_to_what_the_user_set(
    libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown, first, *others = xla_flags.GPU
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/some/where {first}=mine")
    xla_flags.set_flags("gpu")
    words = os.environ["XLA_FLAGS"].split()
    assert words[:2] == ["--xla_dump_to=/some/where", f"{first}=mine"]
    assert words[2:] == [f"{name}={xla_flags.GPU[name]}" for name in others]
    # What an XLA does not know would end the process.
    assert unknown not in os.environ["XLA_FLAGS"]
    assert os.environ["LIBTPU_INIT_ARGS"] == ""

    xla_flags.set_flags("gpu")
    assert os.environ["XLA_FLAGS"].split() == words


def test_a_flag_without_a_value_is_the_users_too(
    libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = list(xla_flags.TPU)[1]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", name)
    xla_flags.set_flags("tpu")
    assert os.environ["LIBTPU_INIT_ARGS"].split().count(name) == 1
    assert f"{name}=" not in os.environ["LIBTPU_INIT_ARGS"]
    assert os.environ["XLA_FLAGS"] == ""


@pytest.mark.parametrize("here", [(), ("gpu",), ("tpu",), ("gpu", "tpu")])
def test_commands_set_those_of_what_is_here(
    here: tuple[str, ...], libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xla_flags, "has_nvidia", lambda: "gpu" in here)
    monkeypatch.setattr(xla_flags, "has_tpu", lambda: "tpu" in here)
    # The rest of what commands configure cannot be taken back.
    monkeypatch.setattr(command_line, "cores_as_devices", lambda: None)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    command_line.configure_jax()
    assert bool(os.environ["XLA_FLAGS"]) == ("gpu" in here)
    assert bool(os.environ["LIBTPU_INIT_ARGS"]) == ("tpu" in here)


def test_without_a_library_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_flags, "_library", lambda package, name: None)
    xla_flags.set_flags("gpu", "tpu")
    assert os.environ["XLA_FLAGS"] == os.environ["LIBTPU_INIT_ARGS"] == ""


def test_importing_sets_nothing() -> None:
    code = (
        "import os; before = dict(os.environ); import gptjax.command_line, gptjax.xla_flags; "
        "gptjax.preset; assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_jaxlib_is_found_to_know_it_takes() -> None:
    library = xla_flags._library("jaxlib", "libjax_common")
    assert library is not None, "jaxlib has moved its library; no flag would be set"
    made_up = {"--xla_gpu_enable_latency_hiding": "true", "--xla_no_such_flag": "1"}
    known = xla_flags.known_flags(xla_flags.GPU | made_up, library)
    assert known == xla_flags.GPU
    words = [f"{name}={value}" for name, value in known.items()]
    code = "import jax; jax.numpy.zeros(3).block_until_ready()"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(words)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
    environment["XLA_FLAGS"] = "--xla_gpu_enable_latency_hiding=true"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=120, env=environment
    )
    assert ended.returncode != 0, "XLA takes a flag that it does not know"


@pytest.mark.parametrize(
    ("platform", "package", "variable", "flags"),
    [
        ("gpu", "jax_plugins.xla_cuda13", "XLA_FLAGS", xla_flags.GPU),
        ("tpu", "libtpu", "LIBTPU_INIT_ARGS", xla_flags.TPU),
    ],
)
def test_the_installed_plugin_knows_all(
    platform: str, package: str, variable: str, flags: dict[str, str]
) -> None:
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{package} is not installed")
    xla_flags.set_flags(platform)  # pyright: ignore[reportArgumentType]
    assert os.environ[variable] == " ".join(f"{name}={value}" for name, value in flags.items())
