"""Seconds from pressing return to an answer: `gptjax generate` as a process of its own.

python experiments/benchmarks/first_answer.py --model smollm2
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from gptjax.command_line import parse_flags, run_command
from gptjax.errors import UserError


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        model: As for `gptjax generate`.
        prompt: The text to continue.
        max_new_tokens: Tokens to add.
        turns: How often each of the two is measured.
    """

    model: str = "smollm2"
    prompt: str = "The capital of France is"
    max_new_tokens: int = 32
    turns: int = 3


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    first, again = [], []
    for _ in range(settings.turns):
        with tempfile.TemporaryDirectory() as cache:
            first.append(seconds(settings, cache))
            again.append(seconds(settings, cache))
            print(f"first {first[-1]:.1f} s, again {again[-1]:.1f} s", flush=True)
    print(
        f"{settings.model}, {settings.max_new_tokens} tokens, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}: median first {statistics.median(first):.1f} s "
        f"(nothing kept), again {statistics.median(again):.1f} s"
    )


def seconds(settings: Settings, cache: str) -> float:
    """Runs the command once, with its own folder for compiled programs and conversions."""
    command = [sys.executable, "-m", "gptjax.cli", "generate", settings.model, settings.prompt]
    command += ["--max-new-tokens", str(settings.max_new_tokens), "--temperature", "0"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    start = time.perf_counter()
    done = subprocess.run(
        command,
        env=environment | {"GPTJAX_CACHE": cache},
        capture_output=True,
        text=True,
        timeout=600,
    )
    taken = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"gptjax generate failed: {done.stderr.strip()}")
    return taken


if __name__ == "__main__":
    run_command(main)
