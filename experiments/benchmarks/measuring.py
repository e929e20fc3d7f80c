"""What the benchmarks share: processes of their own, and the machine that numbers belong to."""

import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

MEASUREMENT_SECONDS = 900
Result = TypeVar("Result")


def in_own_process(function: Callable[..., Result], *args: object) -> Result:
    """Calls a function where no other library's threads are."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(function, args).get(timeout=MEASUREMENT_SECONDS)


def machine() -> dict[str, Any]:
    """The CPU, its cores and the versions that a step's time depends on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = models[0] if models else cpu
    packages = [name for name in ("jax", "torch", "transformers") if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **versions}
