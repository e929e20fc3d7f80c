"""Scripts in processes of their own, on simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

import gptjax


def xla_flags(devices: int) -> str:
    """The environment's `XLA_FLAGS`, with so many CPU devices."""
    given = os.environ.get("XLA_FLAGS", "")
    return f"{given} --xla_force_host_platform_device_count={devices}".strip()


def run_alone(script: str, folder: Path, *, devices: int | None = None, seconds: int = 120) -> str:
    """What a script prints, on so many CPU devices; None leaves their number to JAX."""
    root, tests = Path(gptjax.__file__).parents[1], Path(__file__).parent
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{root}{os.pathsep}{tests}"}
    if devices:
        env["XLA_FLAGS"] = xla_flags(devices)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
