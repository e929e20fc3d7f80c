"""Time and memory from the start of a process to weights on the device, beside transformers.

python experiments/benchmarks/loading.py --model gpt2 --turns 3

The weights are random, in Hugging Face's layout (safetensors), and were written just before, so
that they are read from the system's cache and not from the disk.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import Column, Report, in_own_process, say

from gptjax.command_line import parse_flags, run_command
from gptjax.config import preset
from gptjax.errors import UserError

GPTJAX, TRANSFORMERS = "gptjax", "transformers"

END = """
import json, resource
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"imported": imported, "loaded": time.time(), "peak": peak, "ready": ready}))
"""

PROGRAMS = {
    GPTJAX: """
import sys, time
import jax, gptjax
gptjax.load
imported = time.time()
model = gptjax.load(sys.argv[1])
jax.block_until_ready(model.params)
ready = sum(x.size for x in jax.tree.leaves(model.params))
""",
    TRANSFORMERS: """
import sys, time
import torch, transformers
from transformers import AutoModelForCausalLM
imported = time.time()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
if torch.cuda.is_available():
    model = model.to("cuda")
    torch.cuda.synchronize()
ready = sum(x.numel() for x in model.parameters())
""",
}
"""What each process runs, after its interpreter has started."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Times loading.

    Attributes:
        model: A preset.
        layers: Fewer layers than the preset's.
        turns: How often each is measured, by turns.
        transformers: Whether to compare with transformers, where that is installed.
        json: A file to write the results to.
        png: A picture of the seconds.
    """

    model: str = "gpt2"
    layers: int | None = None
    turns: int = 3
    transformers: bool = True
    json: Path | None = None
    png: Path | None = None


def write_model(model: str, layers: int | None, folder: str) -> int:
    """Writes a model of random weights; its number of parameters."""
    import jax

    import gptjax

    config = preset(model)
    config = config if layers is None else config.replace(num_layers=layers)
    params = gptjax.init_params(config, jax.random.key(0))
    gptjax.save_pretrained(gptjax.Model(config, params), folder)
    return gptjax.count_params(config)


def run_program(name: str, folder: str) -> dict[str, Any]:
    """Seconds since the process was started, and its peak memory."""
    start = time.time()
    command = [sys.executable, "-c", PROGRAMS[name] + END, folder]
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise UserError(f"loading with {name} failed: {done.stderr.strip()}")
    values = json.loads(done.stdout.splitlines()[-1])
    return {
        "seconds": values["loaded"] - start,
        "import_seconds": values["imported"] - start,
        "peak_bytes": values["peak"],
        "numbers": values["ready"],
    }


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    if settings.turns < 1:
        raise UserError(f"turns is {settings.turns}; at least 1")
    both = settings.transformers and all(map(importlib.util.find_spec, ("torch", TRANSFORMERS)))
    names = [GPTJAX, TRANSFORMERS] if both else [GPTJAX]
    report = Report(f"From process start to {settings.model}'s weights on the device", settings)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        say("writing the weights")
        count = in_own_process(write_model, settings.model, settings.layers, folder)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(settings.turns):
            say(f"turn {turn + 1} of {settings.turns}")
            for name in names:
                found[name].append(run_program(name, folder))
    for name, turns in found.items():
        if turns[0]["numbers"] < count:
            raise RuntimeError(f"{name} loaded {turns[0]['numbers']} numbers of {count}")
        quantities = ("seconds", "import_seconds", "peak_bytes")
        report.add(name, **{key: [turn[key] for turn in turns] for key in quantities})
        load = [turn["seconds"] - turn["import_seconds"] for turn in turns]
        report.add(name, load_seconds=load)
    if both:
        pairs = zip(found[GPTJAX], found[TRANSFORMERS], strict=True)
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
        report.add(GPTJAX, ratio=ratios)
    report.notes.append(f"{count:,} parameters, {4 * count / 2**20:,.0f} MiB in float32")
    report.show(
        {"import_seconds": Column("of them imports", 2), "load_seconds": Column("loading", 2)}
    )
    report.save(settings.json, settings.png, "seconds")


if __name__ == "__main__":
    run_command(main)
