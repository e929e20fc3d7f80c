"""What the README says can be run is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from hub_cache import lay_out_cache
from small_models import random_params

from gptjax.config import ModelConfig
from gptjax.model import Model
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.tokenizer import BPETokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


PRETRAINED, EXAMPLE, FINETUNING, MESHES, CORES = re.findall(
    r"^```python\n(.*?)^```", README, re.M | re.S
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_cores_become_a_mesh():
    found = run(CORES + "\nimport jax\nprint(jax.device_count(), mesh and mesh.size)")
    devices, size = found.stdout.split()
    assert size == ("None" if devices == "1" else str(min(int(devices), 3)))


def test_a_mesh_by_its_name():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    found = run(MESHES + "\nprint(mesh.shape['data'], config.num_experts)", **flags)
    assert found.stdout.split() == ["8", "8"]


def hub(tmp_path: Path, rng: np.random.Generator) -> dict[str, str]:
    """Puts a small model of random weights in GPT-2's place, in the hub's cache."""
    tokenizer = BPETokenizer.train(["I love programming, and programming loves me"], 280)
    config = ModelConfig(vocab_size=280, num_layers=1, embed_dim=16, num_heads=2)
    model = Model(config, random_params(config, rng), tokenizer)
    save_pretrained(model, tmp_path / "model")
    lay_out_cache("openai-community/gpt2", tmp_path / "model", tmp_path / "home")
    return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}


def test_three_lines_with_a_model_of_the_hub(tmp_path: Path, rng: np.random.Generator):
    run(PRETRAINED, **hub(tmp_path, rng))


def test_a_model_of_the_hub_is_fine_tuned(tmp_path: Path, rng: np.random.Generator):
    out = str(tmp_path / "run")
    load = f"\nprint(gptjax.load({out!r}).config.num_layers, result.summary['steps'])"
    found = run(FINETUNING.replace("runs/mine", out) + load, **hub(tmp_path, rng))
    assert found.stdout.split()[-2:] == ["1", "20"]


def test_the_example_runs():
    result = run(EXAMPLE)
    loss, shape = re.match(r"([\d.]+) (\(.*?\))", result.stdout).groups()
    assert float(loss) < 4.2  # below ln 65, with which it starts
    assert shape == "(8, 64, 65)"


def test_what_it_names_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?:experiments|gptjax)/[\w/.]+\.(?:py|png)", README):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"python (experiments/\w+\.py)", README):
        assert (ROOT / script).exists(), script
