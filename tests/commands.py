"""Scripts and the `gptjax` command, run in the tests' own process."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).parents[1]

Command = Callable[..., tuple[int, str, str]]


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        name, REPOSITORY / "experiments" / f"{name}.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
