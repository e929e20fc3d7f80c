"""Seconds from process start to a validation loss on tiny Shakespeare, for gptjax and nanoGPT.

    python experiments/benchmarks/shakespeare.py --recipe gpu --data input.txt --nanogpt nanoGPT

Runs `experiments/shakespeare_char.py`, and nanoGPT's `train.py config/train_shakespeare_char.py` on
the same split of the same text, one after the other as people start them: imports, compiling,
evaluations and checkpoints are in the time, nothing compiled is kept from before. A run is ended as
soon as its validation loss is there; without `--target` it goes on to its last step. nanoGPT
estimates its loss on 200 random batches, gptjax takes it over the whole validation text. Beside
these times stand those of the train steps alone, without evaluations: the steps to the target times
the median step by each side's own log.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from measuring import Column, Report, say

from gptjax.command_line import parse_flags, run_command
from gptjax.devices import has_nvidia
from gptjax.errors import UserError

GPTJAX, NANOGPT = "gptjax", "nanoGPT"

Point = tuple[float, float, int]
"""An evaluation: seconds from the start of the process, validation loss, step."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Times a training run to a validation loss.

    Attributes:
        data: The text.
        recipe: A preset of `experiments/shakespeare_char.py`.
        target: The validation loss to reach, in nats a character; None runs to the last step.
        nanogpt: A clone of nanoGPT, to compare with.
        only_nanogpt: Whether to leave gptjax out.
        float8: Whether to run gptjax again with products in 8-bit floats, and compare the times to
            the best loss that both reach.
        width: Of gptjax's model, other than the recipe's: a multiple of 64, which heads are wide.
        seconds: The most that one run may take.
        steps: Other than the recipe's.
        eval_every: Steps between evaluations, other than 250.
        tiny: Whether to shrink the model to almost nothing, to try the script.
        json: A file to write the results to.
        png: A picture of the seconds.
    """

    data: Path
    recipe: Literal["cpu", "gpu", "cpu-modern", "gpu-modern"] = "gpu"
    target: float | None = 1.4697
    nanogpt: Path | None = None
    only_nanogpt: bool = False
    float8: bool = False
    width: int | None = None
    seconds: float = 900.0
    steps: int | None = None
    eval_every: int | None = None
    tiny: bool = False
    json: Path | None = None
    png: Path | None = None


def run_gptjax(settings: Settings, folder: Path, *, float8: bool = False) -> dict[str, Any]:
    """A run of the training script."""
    out = folder / "run"
    script = Path(__file__).parents[1] / "shakespeare_char.py"
    command = [sys.executable, str(script), "--preset", settings.recipe]
    command += ["--data", str(settings.data.resolve()), "--out", str(out)]
    for flag, value in (("--steps", settings.steps), ("--eval-every", settings.eval_every)):
        command += [] if value is None else [flag, str(value)]
    if float8:
        command += ["--model.float8", "True"]
    if settings.width is not None:
        command += ["--model.embed-dim", str(settings.width)]
        command += ["--model.num-heads", str(settings.width // 64)]
    if settings.tiny:
        command += ["--model.num-layers", "1", "--model.embed-dim", "16", "--model.num-heads", "2"]
        command += ["--model.context-length", "8", "--batch-size", "2"]
    # Nothing that was compiled before.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"GPTJAX_CACHE": str(folder / "cache")}
    log, seen = out / "metrics.jsonl", {}

    def rows() -> Iterator[dict[str, Any]]:
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)

    def losses(start: float) -> list[Point]:
        for row in rows():
            if "val_loss" in row and row["step"] not in seen:
                seen[row["step"]] = (time.perf_counter() - start, row["val_loss"], row["step"])
        return list(seen.values())

    def step_times() -> list[float]:
        # The rate leaves out evaluations and checkpoints.
        return [
            row["tokens"] / row["tokens_per_second"] for row in rows() if "tokens_per_second" in row
        ]

    return follow(settings, command, environment, folder, folder / "gptjax.log", losses, step_times)


def run_nanogpt(settings: Settings, folder: Path) -> dict[str, Any]:
    """A run of nanoGPT's script, in a copy of the clone."""
    assert settings.nanogpt is not None
    clone = folder / "nanoGPT"
    ignored = shutil.ignore_patterns(".git", "assets", "*.ipynb", "data")
    shutil.copytree(settings.nanogpt, clone, ignore=ignored)
    write_data(settings.data, clone / "data" / "shakespeare_char")
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py"]
    if not has_nvidia():
        command += ["--device=cpu", "--compile=False", "--dtype=float32"]
    if settings.recipe.startswith("cpu"):
        # Of nanoGPT's README, for a CPU.
        command += ["--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4"]
        command += ["--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"]
    if settings.steps is not None:
        command += [f"--max_iters={settings.steps}", f"--lr_decay_iters={settings.steps}"]
    if settings.eval_every is not None:
        command += [f"--eval_interval={settings.eval_every}"]
    if settings.tiny:
        command += ["--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=8"]
        command += ["--batch_size=2", "--eval_iters=2"]
    found: list[Point] = []
    log = folder / "nanogpt.log"
    read = 0

    def losses(start: float) -> list[Point]:
        nonlocal read
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        # Only whole lines.
        lines = text.splitlines()[: text.count("\n")]
        for line in lines[read:]:
            if match := re.match(r"step (\d+): .*val loss ([\d.]+)", line):
                found.append((time.perf_counter() - start, float(match[2]), int(match[1])))
        read = len(lines)
        return found

    def step_times() -> list[float]:
        # Those of steps after an evaluation have it in them; the median is of the others.
        text = log.read_text(encoding="utf-8", errors="replace")
        return [float(ms) / 1e3 for ms in re.findall(r"iter \d+: .*time ([\d.]+)ms", text)]

    environment = dict(os.environ) | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    return follow(settings, command, environment, clone, log, losses, step_times)


def write_data(text: Path, folder: Path) -> None:
    """What nanoGPT's data/shakespeare_char/prepare.py writes, of a text that is here."""
    characters = text.read_text(encoding="utf-8")
    ids = {character: number for number, character in enumerate(sorted(set(characters)))}
    numbers = np.array([ids[character] for character in characters], np.uint16)
    folder.mkdir(parents=True)
    cut = int(len(numbers) * 0.9)
    numbers[:cut].tofile(folder / "train.bin")
    numbers[cut:].tofile(folder / "val.bin")
    names = {number: character for character, number in ids.items()}
    with (folder / "meta.pkl").open("wb") as file:
        pickle.dump({"vocab_size": len(ids), "itos": names, "stoi": ids}, file)


def follow(
    settings: Settings,
    command: list[str],
    environment: dict[str, str],
    folder: Path,
    log: Path,
    losses: Callable[[float], list[Point]],
    step_times: Callable[[], list[float]],
) -> dict[str, Any]:
    """Runs a command to the target, or to its end.

    Args:
        settings: with the target.
        command: what to run.
        environment: of the process.
        folder: in which it runs.
        log: takes what it prints.
        losses: the evaluations that are done, given when the process started.
        step_times: the seconds of single train steps, as the process logged them.
    """
    with log.open("w", encoding="utf-8") as out, started() as start_process:
        start = time.perf_counter()
        process = start_process(command, environment, folder, out)
        reached = None
        while reached is None:
            ended = process.poll() is not None
            curve = losses(start)
            goal = settings.target if settings.target is not None else -float("inf")
            reached = next((when for when, loss, _ in curve if loss <= goal), None)
            if ended or time.perf_counter() - start > settings.seconds:
                break
            time.sleep(0.05)
        seconds = time.perf_counter() - start
    if process.returncode not in (0, None) and reached is None and not curve:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise UserError(f"{' '.join(command[1:3])} failed: {' '.join(last)}")
    times = step_times()
    step_seconds = statistics.median(times) if times else None
    steps = curve[-1][2] if curve else None
    if reached is not None:
        steps = next(step for when, _, step in curve if when == reached)
    trained = None if steps is None or step_seconds is None else steps * step_seconds
    return {
        "seconds": reached,
        "run_seconds": seconds,
        "steps": steps,
        "step_seconds": step_seconds,
        "train_seconds": trained,
        "best": min((loss for _, loss, _ in curve), default=None),
        "evaluations": len(curve),
        "curve": list(curve),
    }


@contextlib.contextmanager
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes, and ends them with all that they started."""
    processes: list[subprocess.Popen[str]] = []

    def start(command: list[str], environment: dict[str, str], folder: Path, out: Any):
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    try:
        yield start
    finally:
        for process in processes:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                    break


def time_to_same_loss(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float] | None:
    """The lowest loss that both reached, and the other's time of train steps to it over the one's.

    None where a run has no evaluation after a step, or no step's time.
    """
    curves = [[(step, loss) for _, loss, step in run["curve"] if step] for run in (one, other)]
    if not all(curves) or not one["step_seconds"] or not other["step_seconds"]:
        return None
    shared = max(min(loss for _, loss in curve) for curve in curves)
    steps = [next(step for step, loss in curve if loss <= shared) for curve in curves]
    return shared, steps[1] * other["step_seconds"] / (steps[0] * one["step_seconds"])


def main() -> None:
    settings = parse_flags(Settings, None, str(__doc__))
    if not settings.data.is_file():
        raise UserError(f"{settings.data} is not there; --data is a text file")
    if settings.nanogpt is not None and not (settings.nanogpt / "train.py").is_file():
        raise UserError(f"{settings.nanogpt} holds no train.py; --nanogpt is a clone of nanoGPT")
    if settings.only_nanogpt and settings.nanogpt is None:
        raise UserError("only_nanogpt needs --nanogpt, a clone of nanoGPT")
    if settings.float8 and settings.only_nanogpt:
        raise UserError("--float8 is for gptjax, which --only-nanogpt leaves out")
    if settings.width is not None and (settings.width < 64 or settings.width % 64):
        raise UserError(f"--width is {settings.width}; a multiple of 64")
    if settings.width is not None and (settings.tiny or settings.nanogpt is not None):
        raise UserError("--width is for gptjax alone, and not with --tiny")
    goal = "the last step" if settings.target is None else f"a validation loss of {settings.target}"
    report = Report(f"From process start to {goal}, recipe {settings.recipe}", settings)
    ours = f"{GPTJAX} {settings.recipe}"
    contestants: dict[str, Any] = {} if settings.only_nanogpt else {ours: run_gptjax}
    if settings.float8 and not settings.only_nanogpt:
        contestants[f"{ours}, float8"] = partial(run_gptjax, float8=True)
    if settings.nanogpt is not None:
        contestants[NANOGPT] = run_nanogpt
    for label, run in contestants.items():
        say(label)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            report.add(label, **run(settings, Path(folder)))
        report.save(settings.json, None, "seconds")
    peer, own = (report.rows.get(name, {}) for name in (NANOGPT, ours))
    if own.get("seconds") and peer.get("seconds"):
        ratio = own["seconds"] / peer["seconds"]
        report.extra["time_ratio"] = ratio
        report.notes.append(f"gptjax takes {ratio:.2f} of nanoGPT's time.")
        trained = [row["train_seconds"] for row in (own, peer)]
        if all(trained):
            ratio = trained[0] / trained[1]
            report.extra["train_time_ratio"] = ratio
            report.notes.append(
                "Of train steps alone, without start, compiling and evaluations, "
                f"{ratio:.2f}: {trained[0]:.1f} s and {trained[1]:.1f} s."
            )
    near = report.rows.get(f"{ours}, float8")
    if near is not None and (compared := time_to_same_loss(own, near)) is not None:
        loss, ratio = compared
        report.extra |= {"float8_loss": loss, "float8_time_ratio": ratio}
        report.notes.append(
            f"Train steps to a validation loss of {loss:.4f} take with 8-bit floats {ratio:.2f} of "
            "the time without."
        )
    report.show(
        {
            "seconds": Column("s to the target", 1),
            "run_seconds": Column("s of the run", 1),
            "train_seconds": Column("s of train steps alone", 1),
            "steps": Column("steps", 0),
            "best": Column("best validation loss", 4),
            "evaluations": Column("evaluations", 0),
        }
    )
    report.save(settings.json, settings.png, "run_seconds")


if __name__ == "__main__":
    run_command(main)
