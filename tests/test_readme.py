"""What the README says can be run is run."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


EXAMPLE, CORES = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def run(code: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result


def test_cores_become_a_mesh():
    found = run(CORES + "\nimport jax\nprint(jax.device_count(), mesh and mesh.size)")
    devices, size = found.stdout.split()
    assert size == ("None" if devices == "1" else str(min(int(devices), 3)))


def test_the_example_runs():
    result = run(EXAMPLE)
    loss, shape = re.match(r"([\d.]+) (\(.*?\))", result.stdout).groups()
    assert float(loss) < 4.2  # below ln 65, with which it starts
    assert shape == "(8, 64, 65)"


def test_what_it_names_exists():
    for path in re.findall(r"(?:experiments|gptjax)/[\w/.]+\.(?:py|png)", README):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"python (experiments/\w+\.py)", README):
        assert (ROOT / script).exists(), script
