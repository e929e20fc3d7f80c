"""Everything that is measured on one NVIDIA GPU, by one command.

    python experiments/benchmarks/gpu.py --nanogpt PATH_TO_NANOGPT_CLONE --data input.txt --out gpu

Each part is one of the other scripts here, in a process of its own with a limit on its time. The
most important come first: attention, the matrix rate, GPT-2 124M and 1.5B fit into `--seconds`
whatever they take, the others have what is left. After each the results so far are written:
`report.md`, `report.json`, and `results.tar.gz` with the JSON, picture and log of each part; these
three are all that needs to be copied. Started again with the same folder it goes on with the parts
that are not done. Without `--all True` or `--only` it stops after the essential parts.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import machine, say

from gptjax.command_line import parse_flags, run_command
from gptjax.errors import UserError, nearest

HERE = Path(__file__).parent
NANOGPT_LOSS, MODERN_LOSS = 1.4697, 1.44
"""nanoGPT's README says that its recipe reaches the first; the modern one is to go below the second
within the same tokens."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measures on one GPU.

    Attributes:
        out: The folder of the results.
        nanogpt: A clone of nanoGPT, to compare with.
        data: tiny Shakespeare, for the parts that train on it.
        only: Parts to run, whether they are essential or not.
        all: Whether to run the parts that are not essential, too.
        seconds: The most that all parts may take together; those that no time is left for are
            named in the report.
        small: Whether to shrink everything so that it runs on a CPU in minutes, to try it.
    """

    out: Path
    nanogpt: Path | None = None
    data: Path | None = None
    only: tuple[str, ...] = ()
    all: bool = False
    seconds: float = 540.0
    small: bool = False


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        name: of it and of its files.
        script: that is run.
        flags: what it is given.
        limit: seconds that it may take.
        essential: whether it runs without being asked for.
        needs: what has to be there, by its name in `Settings`.
        xla_flags: to add to `XLA_FLAGS`.
    """

    name: str
    script: str
    flags: tuple[str, ...]
    limit: float
    essential: bool = True
    needs: str | None = None
    xla_flags: str = ""


def parts(settings: Settings) -> list[Part]:
    """All parts, in the order in which they run."""
    small, clone = settings.small, settings.nanogpt
    model = str(settings.out / "small-model")
    peer = () if clone is None else ("--nanogpt", str(clone.resolve()))
    # nanoGPT's model in training has no biases, and a vocabulary filled up to a multiple of 128.
    shape = ("--vocab-size", "50304", "--use-bias", "False", "--dtype", "bfloat16")
    if small:
        shape = ("--vocab-size", "64", "--use-bias", "False", "--dtype", "float32")
    turns = ("--turns", "3", "--warmup", "2", "--steps", "4")
    if small:
        turns = ("--turns", "1", "--warmup", "0", "--steps", "2")

    def training(preset: str, rows: int, accumulate: str, *more: str) -> tuple[str, ...]:
        """Flags of `training.py`: the first of the microbatches that fits counts."""
        name, rows, accumulate = (model, 4, "2 1") if small else (preset, rows, accumulate)
        sizes = ("--batch-size", str(rows), "--accumulate", *accumulate.split())
        return ("--model", name, *sizes, *shape, *turns, *more)

    first = ("--first-that-fits", "True")
    trace = ("--profile", str(settings.out / "trace-gpt2"))
    remat = ("--remat", "none", "full") if small else ("--remat", "none", "dots", "full")
    unroll = ("--scan-unroll", "1", "2") if small else ("--scan-unroll", "1", "4", "12")
    data = () if settings.data is None else ("--data", str(settings.data.resolve()))
    goal = ("--target", str(NANOGPT_LOSS))
    tiny = ("--tiny", "True", "--steps", "4", "--eval-every", "2") if small else ()
    wide = tiny or ("--width", "2048", "--steps", "1000", "--eval-every", "100")
    policy = "none" if small else "dots"
    float8 = training("gpt2-xl", 64, "8", "--float8", "False", "True", "--remat", policy)
    cublas_alone = "--xla_gpu_enable_triton_gemm=false"
    tokens = ("--prompt", "4", "--new", "4") if small else ("--prompt", "32", "--new", "100")
    decoded = (
        "--model",
        model if small else "gpt2",
        *tokens,
        "--batches",
        "1",
        "8",
        "--queue",
        "0",
    )
    decoded += ("--dtype", "float32" if small else "bfloat16", "--turns", "1" if small else "3")
    matrix = ("--width", "128", "--seconds", "0.01") if small else ("--width", "8192")
    few = ("--layers", "1") if small else ()
    once = ("--turns", "1") if small else ("--turns", "3")
    return [
        Part("backends", "attention_backends.py", ("--turns", "5"), 60),
        Part("matrix-rate", "matrix_rate.py", matrix, 30),
        # Each with the most rows that fit; 40 microbatches of 12 rows are nanoGPT's own recipe.
        Part(
            "gpt2",
            "training.py",
            training("gpt2", 480, "15 20 30 40", *first, *peer, *trace),
            240,
        ),
        Part("gpt2-xl", "training.py", training("gpt2-xl", 64, "4 8", *first, *remat), 200),
        Part(
            "shakespeare",
            "shakespeare.py",
            (*data, "--recipe", "gpu", *goal, *peer, *tiny),
            240,
            needs="data",
        ),
        Part("gpt2-medium", "training.py", training("gpt2-medium", 256, "16 32", *first), 120),
        Part("generation", "generation.py", decoded, 150),
        Part(
            "shakespeare-modern",
            "shakespeare.py",
            (*data, "--recipe", "gpu-modern", "--target", str(MODERN_LOSS), *tiny),
            150,
            needs="data",
        ),
        Part(
            "unroll",
            "training.py",
            training("gpt2", 480, "30", *unroll),
            400,
            essential=False,
        ),
        Part("remat", "training.py", training("gpt2", 480, "30", *remat), 300, essential=False),
        Part(
            "gpt2-same-microbatches",
            "training.py",
            training("gpt2", 480, "15", *peer),
            260,
            essential=False,
            needs="nanogpt",
        ),
        # XLA finds out on the GPU whether cuBLAS's products or Triton's are faster; without the
        # latter all are in 8-bit floats.
        Part("float8", "training.py", float8, 200, essential=False),
        Part("float8-cublas", "training.py", float8, 200, essential=False, xla_flags=cublas_alone),
        Part(
            "float8-loss",
            "shakespeare.py",
            (*data, "--recipe", "gpu", "--float8", "True", "--target", "None", *wide),
            300,
            essential=False,
            needs="data",
            xla_flags=cublas_alone,
        ),
        Part("start-up", "start_up.py", (*few, *once), 300, essential=False),
        Part("loading", "loading.py", (*few, *once), 200, essential=False),
    ]


def chosen(settings: Settings) -> list[Part]:
    """The parts to run.

    Raises:
        UserError: for a name that no part has.
    """
    every = {part.name: part for part in parts(settings)}
    for name in settings.only:
        if name not in every:
            raise UserError(f"there is no part {name!r}{nearest(name, every)}")
    if settings.only:
        return [every[name] for name in every if name in settings.only]
    return [part for part in every.values() if part.essential or settings.all]


def run_part(part: Part, settings: Settings, limit: float) -> str:
    """Runs a part: "done", or what happened instead."""
    out = settings.out.resolve()
    if part.needs is not None and getattr(settings, part.needs) is None:
        return f"left out: it needs --{part.needs.replace('_', '-')}"
    if not (HERE / part.script).exists():
        return f"left out: there is no {part.script}"
    command = [sys.executable, str(HERE / part.script), *part.flags]
    # What an earlier try left is not this one's.
    for ending in ("json", "png", "log"):
        (out / f"{part.name}.{ending}").unlink(missing_ok=True)
    command += ["--json", str(out / f"{part.name}.json")]
    if part.script != "attention_backends.py":
        command += ["--png", str(out / f"{part.name}.png")]
    rate = read(settings, "matrix-rate").get("matrix_rate")
    if part.script == "training.py" and rate is not None:
        command += ["--matrix-rate", str(rate)]
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as log:
        environment = dict(os.environ)
        if part.xla_flags:
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {part.xla_flags}".strip()
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"ended after {limit:.0f} s"
        finally:
            # With everything that it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "done" if status == 0 else f"failed with status {status}: see {part.name}.log"


def read(settings: Settings, name: str) -> Any:
    """A part's results; an empty dict where there are none."""
    path = settings.out / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


@dataclass(frozen=True)
class Goal:
    """What is to be reached.

    Attributes:
        text: in words.
        bar: the number.
        part: whose results tell.
        find: takes the number from these; None where it is not in them.
        below: whether less is better.
    """

    text: str
    bar: float
    part: str
    find: Callable[[Any], float | None]
    below: bool = False


def ours(quantity: str) -> Callable[[dict[str, Any]], float | None]:
    """The middle of what the fastest of gptjax's rows has."""

    def find(values: dict[str, Any]) -> float | None:
        rows = [values["rows"][label] for label in values.get("fitted", [])]
        found = [statistics.median(row[quantity]) for row in rows if row.get(quantity)]
        return max(found, default=None)

    return find


def row_value(label: str, quantity: str) -> Callable[[dict[str, Any]], float | None]:
    """What one row has."""

    def find(values: dict[str, Any]) -> float | None:
        value = values.get("rows", {}).get(label, {}).get(quantity)
        return statistics.median(value) if isinstance(value, list) else value

    return find


def float8_rate(values: dict[str, Any]) -> float | None:
    """Tokens a second of the row in 8-bit floats over those of the row without."""
    near, other = (
        row_value(label, "tokens_per_second")(values) for label in ("gptjax, float8", "gptjax")
    )
    # A row that did not fit says so instead.
    if not isinstance(near, float) or not isinstance(other, float):
        return None
    return near / other


def agreeing(cases: Any) -> float | None:
    """The share of a kernel's cases that agree, of those that could be compared; 0 without any.

    A case that fell to plain attention was compared with itself.
    """
    if not cases:
        return None
    kernels = [case for case in cases if case["backend"] != "plain" and case["ok"] is not None]
    return statistics.mean(case["ok"] for case in kernels) if kernels else 0.0


GOALS = [
    Goal(
        "Attention: share of kernels' cases that agree with plain ones", 1.0, "backends", agreeing
    ),
    Goal("GPT-2 124M: times nanoGPT's tokens/s", 1.15, "gpt2", ours("ratio_nanoGPT")),
    Goal("GPT-2 124M: of the measured matrix rate", 0.50, "gpt2", ours("of_matrix_rate")),
    Goal("GPT-2 350M: of the measured matrix rate", 0.55, "gpt2-medium", ours("of_matrix_rate")),
    Goal("GPT-2 1.5B: of the measured matrix rate", 0.60, "gpt2-xl", ours("of_matrix_rate")),
    Goal(
        "GPT-2 124M: share of a step's time that its trace explains",
        0.95,
        "gpt2",
        lambda values: min(values.get("profile", {}).get("explained", []), default=None),
    ),
    Goal(
        f"Shakespeare: time to {NANOGPT_LOSS} over nanoGPT's",
        0.5,
        "shakespeare",
        lambda values: values.get("time_ratio"),
        below=True,
    ),
    Goal(
        "Shakespeare, modern recipe: best validation loss",
        MODERN_LOSS,
        "shakespeare-modern",
        row_value("gptjax gpu-modern", "best"),
        below=True,
    ),
    Goal("GPT-2 1.5B in 8-bit floats: times bfloat16's tokens/s", 1.0, "float8", float8_rate),
    Goal(
        "GPT-2 1.5B in 8-bit floats, all products by cuBLAS: times bfloat16's tokens/s",
        1.0,
        "float8-cublas",
        float8_rate,
    ),
    Goal(
        "8-bit floats, 2,048 wide: time to bfloat16's loss over bfloat16's",
        1.0,
        "float8-loss",
        lambda values: values.get("float8_time_ratio"),
        below=True,
    ),
    Goal(
        "Generation, batch 1: times transformers' tokens/s",
        1.0,
        "generation",
        row_value("batch 1, gptjax", "ratio"),
    ),
    Goal(
        "Generation, batch 8: times transformers' tokens/s",
        1.0,
        "generation",
        row_value("batch 8, gptjax", "ratio"),
    ),
]


def write_report(settings: Settings, states: dict[str, dict[str, Any]]) -> None:
    """Writes report.json and report.md from the files of the parts."""
    results = {name: read(settings, name) for name in states}
    goals = []
    for goal in GOALS:
        found = goal.find(results.get(goal.part, {}))
        reached = (
            None if found is None else (found <= goal.bar if goal.below else found >= goal.bar)
        )
        goals.append({"goal": goal.text, "bar": goal.bar, "found": found, "reached": reached})
    facts = machine()
    whole = {"machine": facts, "small": settings.small, "goals": goals, "parts": states}
    write(settings.out / "report.json", json.dumps(whole | {"results": results}, indent=2) + "\n")
    lines = ["# One GPU", "", ", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    if settings.small:
        lines += ["Everything is shrunk, to try the scripts: these figures mean nothing.", ""]
    lines += ["| goal | bar | found | reached |", "| --- | --- | --- | --- |"]
    for goal, row in zip(GOALS, goals, strict=True):
        found = "not measured" if row["found"] is None else f"{row['found']:.4g}"
        verdict = {None: "", True: "yes", False: "no"}[row["reached"]]
        sign = "≤" if goal.below else "≥"
        lines.append(f"| {row['goal']} | {sign} {row['bar']} | {found} | {verdict} |")
    lines += ["", "| part | what became of it | s |", "| --- | --- | --- |"]
    lines += [f"| {name} | {s['state']} | {s['seconds']:.0f} |" for name, s in states.items()]
    for name in states:
        log = settings.out / f"{name}.log"
        if log.exists():
            text = log.read_text(encoding="utf-8", errors="replace").strip()
            lines += ["", f"## {name}", "", "```", text[-6000:], "```"]
    write(settings.out / "report.md", "\n".join(lines) + "\n")
    archive(settings, states)


def archive(settings: Settings, names: Iterable[str]) -> None:
    """Writes results.tar.gz: the reports, and each part's JSON, picture and log; no trace."""
    path = settings.out / "results.tar.gz"
    new = path.with_name(path.name + ".new")
    files = [f"{name}.{ending}" for name in names for ending in ("json", "png", "log")]
    with tarfile.open(new, "w:gz") as whole:
        for name in ("report.md", "report.json", *files):
            if (settings.out / name).exists():
                whole.add(settings.out / name, arcname=name)
    os.replace(new, path)


def states_before(settings: Settings) -> dict[str, dict[str, Any]]:
    """What became of the parts in earlier calls with this folder.

    Raises:
        UserError: if they had other settings, whose results are not to be mixed with these.
    """
    path = settings.out / "parts.json"
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    before, now = stored.get("settings"), settings_kept(settings)
    if before != now:
        raise UserError(
            f"{settings.out} was begun with {before}, not {now}; give these, or another --out"
        )
    return stored["parts"]


def settings_kept(settings: Settings) -> dict[str, Any]:
    """Those settings that change what the parts measure, JSON-serializable."""
    named = {"nanogpt": settings.nanogpt, "data": settings.data}
    paths = {name: None if path is None else str(path.resolve()) for name, path in named.items()}
    return {"small": settings.small} | paths


def write(path: Path, text: str) -> None:
    """Replaces a file at once."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def write_small_model(folder: Path) -> None:
    """A configuration of a GPT-2 of almost no size."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | shape))


def main() -> None:
    settings = parse_flags(Settings, None, str(__doc__))
    if settings.nanogpt is not None and not (settings.nanogpt / "model.py").is_file():
        raise UserError(f"{settings.nanogpt} holds no model.py; --nanogpt is a clone of nanoGPT")
    if settings.data is not None and not settings.data.is_file():
        raise UserError(f"{settings.data} is not there; --data is a text file")
    chosen_parts, states = chosen(settings), states_before(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.small:
        write_small_model(settings.out / "small-model")
    begin = time.monotonic()
    for part in chosen_parts:
        if states.get(part.name, {}).get("state") == "done":
            say(f"{part.name}: done before")
            continue
        left = settings.seconds - (time.monotonic() - begin)
        start = time.monotonic()
        # What takes less has no result.
        state = "no time was left"
        if left > 10:
            say(f"{part.name}: at most {min(part.limit, left):.0f} s of {left:.0f} s left")
            state = run_part(part, settings, min(part.limit, left))
        states[part.name] = {"state": state, "seconds": time.monotonic() - start}
        say(f"{part.name}: {state}")
        kept = {"settings": settings_kept(settings), "parts": states}
        write(settings.out / "parts.json", json.dumps(kept, indent=2))
        write_report(settings, states)
    write_report(settings, states)
    text = (settings.out / "report.md").read_text(encoding="utf-8")
    print(text.partition("\n## ")[0].rstrip())


if __name__ == "__main__":
    run_command(main)
