"""Fixtures of all tests."""

import collections
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from commands import Command, script

from gptjax import cli, command_line


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-case", action="store_true", help="of each parametrized test run the first case alone"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first; with --one-case, one case of each test.

    Of workers that take whole files, in this order, none has a long one left when the others are
    done.
    """
    if config.getoption("one_case"):
        first: dict[str, pytest.Item] = {}
        for item in items:
            first.setdefault(item.nodeid.partition("[")[0], item)
        kept = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = first.values()
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random inputs; a failing test shows their seed."""
    seed = int(np.random.default_rng().integers(2**32))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Drops compiled programs after each file.

    On a CPU each keeps memory maps of its own, and Linux ends a process by a segmentation fault in
    the compiler when it has 65530 of them (`vm.max_map_count`).
    """
    yield
    jax.clear_caches()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a script, or `gptjax`, in this process: status, standard output, standard error."""
    monkeypatch.setattr(command_line, "configure_jax", lambda: None)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")

    def run(name: str, *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main() if name == "gptjax" else command_line.run_command(script(name).main)
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run
