"""Seconds from the start of a process to its first train step, or to an answer.

    python experiments/benchmarks/start_up.py
    python experiments/benchmarks/start_up.py --answer smollm2

Each is a process of its own: with nothing kept, and again with what the process before left in the
cache of compiled programs. `--answer` also times `gptjax generate MODEL PROMPT`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import Column, Report, say

from gptjax.command_line import parse_flags, run_command
from gptjax.config import preset
from gptjax.errors import UserError

GOAL = 10.0
"""Seconds to the first step of a 124M model on a CPU, with a warm cache."""

PROGRAM = """
import json, sys, time
import numpy as np
from gptjax.command_line import configure_jax
import gptjax, jax
configure_jax()
jax.devices()
imported = time.time()
name, layers, batch, context = sys.argv[1], *map(int, sys.argv[2:])
config = gptjax.preset(name)
config = config.replace(context_length=context, num_layers=layers or config.num_layers)
optimizer = gptjax.make_optimizer(gptjax.OptimizerConfig(), config, 100)
state = gptjax.init_state(config, optimizer, jax.random.key(0))
jax.block_until_ready(state)
made = time.time()
step = gptjax.make_train_step(config, optimizer)
tokens = np.zeros((batch, context), np.int32)
state, metrics = step(state, {"tokens": tokens, "targets": tokens})
jax.block_until_ready(state)
loss = float(metrics["loss"])
stepped = time.time()
state, metrics = step(state, {"tokens": tokens, "targets": tokens})
jax.block_until_ready(state)
times = {"imported": imported, "made": made, "stepped": stepped, "again": time.time(), "loss": loss}
print(json.dumps(times))
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Times starting up.

    Attributes:
        model: A preset, whose first train step is timed; None leaves that out.
        layers: Fewer layers than the preset's.
        batch_size: Sequences of the step.
        context: Tokens of each.
        answer: As for `gptjax generate`, whose answer is timed; None leaves that out.
        prompt: The text to continue.
        max_new_tokens: Tokens to add.
        turns: How often each is measured, with nothing kept and again.
        json: A file to write the results to.
        png: A picture of the seconds.
    """

    model: str | None = "gpt2"
    layers: int | None = None
    batch_size: int = 1
    context: int = 64
    answer: str | None = None
    prompt: str = "The capital of France is"
    max_new_tokens: int = 32
    turns: int = 3
    json: Path | None = None
    png: Path | None = None


def run(command: list[str], cache: str) -> tuple[float, float, str]:
    """Runs a process with its own folder for compiled programs and conversions.

    Returns:
        When it was started, how long it took, and what it printed.
    """
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"GPTJAX_CACHE": cache}
    start, clock = time.time(), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    taken = time.perf_counter() - clock
    if done.returncode:
        raise UserError(f"{' '.join(command[1:3])} failed: {done.stderr.strip()}")
    return start, taken, done.stdout


def first_step(settings: Settings, cache: str) -> dict[str, float]:
    """Seconds from the process's start to the end of its first step, and of the parts of it."""
    numbers = (settings.layers or 0, settings.batch_size, settings.context)
    command = [sys.executable, "-c", PROGRAM, str(settings.model), *map(str, numbers)]
    start, _, out = run(command, cache)
    at: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {
        "seconds": at["stepped"] - start,
        "import_seconds": at["imported"] - start,
        "init_seconds": at["made"] - at["imported"],
        "step_seconds": at["stepped"] - at["made"],
        "second_step": at["again"] - at["stepped"],
    }


def first_answer(settings: Settings, cache: str) -> dict[str, float]:
    """Seconds that the command takes."""
    command = [sys.executable, "-m", "gptjax.cli", "generate", str(settings.answer)]
    command += [settings.prompt, "--max-new-tokens", str(settings.max_new_tokens)]
    return {"seconds": run([*command, "--temperature", "0"], cache)[1]}


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    if settings.turns < 1:
        raise UserError(f"turns is {settings.turns}; at least 1")
    if settings.model is not None:
        preset(settings.model)
    tasks = {}
    if settings.model is not None:
        tasks[f"first step of {settings.model}"] = first_step
    if settings.answer is not None:
        tasks[f"{settings.max_new_tokens} tokens of {settings.answer}"] = first_answer
    report = Report("From the start of a process", settings)
    for turn in range(settings.turns):
        for label, measure in tasks.items():
            with tempfile.TemporaryDirectory() as cache:
                for kept in ("nothing kept", "again"):
                    say(f"turn {turn + 1} of {settings.turns}: {label}, {kept}")
                    row = report.rows.setdefault(f"{label}, {kept}", {})
                    for name, value in measure(settings, cache).items():
                        row.setdefault(name, []).append(value)
    warm = report.rows.get(f"first step of {settings.model}, again")
    if warm is not None:
        best, whole = min(warm["seconds"]), preset(str(settings.model)).num_layers
        report.extra["under_goal"] = best < GOAL
        size = "" if settings.layers is None else f", {settings.layers} of {whole} layers,"
        report.notes.append(
            f"The first step{size} with a warm cache takes {best:.1f} s: "
            f"{'under' if best < GOAL else 'not under'} {GOAL:.0f} s."
        )
    report.show(
        {
            "import_seconds": Column("imports", 2),
            "init_seconds": Column("parameters", 2),
            "step_seconds": Column("step", 2),
            "second_step": Column("second step", 2),
        }
    )
    report.save(settings.json, settings.png, "seconds")


if __name__ == "__main__":
    run_command(main)
