"""Times the train step of nanoGPT's CPU Shakespeare recipe, in gptjax and in nanoGPT.

    python experiments/benchmarks/train_step.py --nanogpt PATH_TO_NANOGPT_CLONE

A step is forward, backward, clipping, update, and fetching the loss. Each measurement has a process
of its own, and they take turns, since other load on a machine comes and goes: compare within a
turn. nanoGPT needs PyTorch (`pip install -e ".[parity]"`); without --nanogpt only gptjax is timed.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import in_own_process, machine

from gptjax.command_line import configure_jax, parse_flags, run_command
from gptjax.errors import UserError
from gptjax.experiment import Experiment, replicas

GPTJAX, NANOGPT, MODERN = "gptjax", "nanoGPT", "gptjax, modern recipe with Muon"
BATCHES = 16

Step = Callable[[int], float]
"""Makes a step and returns its loss, given the step's number."""
MakeStep = Callable[[Experiment, Path | None], Step]
"""Makes that function for an experiment, given the clone of nanoGPT."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Times a train step in gptjax and in nanoGPT.

    Attributes:
        nanogpt: A clone of nanoGPT, to compare with.
        turns: How often each is measured.
        warmup: Steps of a measurement before its clock runs.
        steps: Steps timed in a measurement.
        json: A file to write the results to.
    """

    nanogpt: Path | None = None
    turns: int = 5
    warmup: int = 20
    steps: int = 60
    json: Path | None = None

    def check(self) -> None:
        """Raises a UserError where something is out of range or absent."""
        for name in ("turns", "warmup", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; at least 1")
        if self.nanogpt is not None and not (self.nanogpt / "model.py").is_file():
            raise UserError(f"{self.nanogpt} holds no model.py; --nanogpt is a clone of nanoGPT")
        if self.nanogpt is not None and importlib.util.find_spec("torch") is None:
            raise UserError('nanoGPT needs PyTorch, which is absent; pip install -e ".[parity]"')


def recipes() -> dict[str, Experiment]:
    """The experiments timed in gptjax, by the name of their row."""
    script = Path(__file__).parents[1] / "shakespeare_char.py"
    presets = runpy.run_path(str(script))["PRESETS"]
    vocab_size = 65

    def recipe(preset: str, **changes: Any) -> Experiment:
        experiment = presets[preset]
        model = experiment.model.replace(vocab_size=vocab_size, **changes)
        return Experiment(
            preset=preset,
            out="",
            steps=experiment.steps,
            batch_size=experiment.batch_size,
            model=model,
            optimizer=experiment.optimizer,
        )

    # nanoGPT's own default has no biases.
    return {GPTJAX: recipe("cpu", use_bias=False), MODERN: recipe("cpu-modern")}


def random_batches(experiment: Experiment) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of tokens and targets, each `[B, T]`, int32; a step's time depends on no values."""
    model = experiment.model
    shape = (BATCHES, experiment.batch_size, model.context_length + 1)
    rows = np.random.default_rng(0).integers(model.vocab_size, size=shape, dtype=np.int32)
    return [(row[:, :-1].copy(), row[:, 1:].copy()) for row in rows]


def gptjax_step(experiment: Experiment, _: Path | None) -> Step:
    """The experiment's step in gptjax."""
    import jax

    from gptjax.optimizer import make_optimizer
    from gptjax.sharding import place_batch
    from gptjax.training import init_state, make_train_step

    optimizer = make_optimizer(experiment.optimizer, experiment.model, experiment.steps)
    configure_jax()
    mesh = replicas(experiment)
    state = init_state(experiment.model, optimizer, jax.random.key(0), mesh)
    train_step = make_train_step(experiment.model, optimizer, mesh)
    batches: list[Any] = [
        place_batch({"tokens": tokens, "targets": targets}, mesh)
        for tokens, targets in random_batches(experiment)
    ]

    def step(number: int) -> float:
        nonlocal state
        state, metrics = train_step(state, batches[number % BATCHES])
        # The loss could be there before the update is.
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def nanogpt_step(experiment: Experiment, clone: Path | None) -> Step:
    """The experiment's step in nanoGPT."""
    import torch  # pyright: ignore[reportMissingImports]

    sys.path.insert(0, str(clone))
    nanogpt = importlib.import_module("model")
    torch.manual_seed(0)
    shape, optim = experiment.model, experiment.optimizer
    max_norm = float("inf") if optim.clip_norm is None else optim.clip_norm
    # It prints as it builds; the table is what belongs on the standard output.
    with contextlib.redirect_stdout(sys.stderr):
        model = nanogpt.GPT(
            nanogpt.GPTConfig(
                block_size=shape.context_length,
                vocab_size=shape.vocab_size,
                n_layer=shape.num_layers,
                n_head=shape.num_heads,
                n_embd=shape.embed_dim,
                dropout=shape.dropout,
                bias=shape.use_bias,
            )
        )
        optimizer = model.configure_optimizers(
            optim.weight_decay, optim.learning_rate, (optim.beta1, optim.beta2), "cpu"
        )
    batches = [
        (torch.from_numpy(tokens).long(), torch.from_numpy(targets).long())
        for tokens, targets in random_batches(experiment)
    ]

    def step(number: int) -> float:
        _, loss = model(*batches[number % BATCHES])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(make_step: MakeStep, experiment: Experiment, settings: Settings) -> list[float]:
    """Milliseconds of single steps, after the warm-up."""
    step = make_step(experiment, settings.nanogpt)
    milliseconds = []
    for number in range(settings.warmup + settings.steps):
        start = time.perf_counter()
        loss = step(number)
        milliseconds.append((time.perf_counter() - start) * 1e3)
        if not np.isfinite(loss):
            raise RuntimeError(f"the loss of step {number} is {loss}")
    return milliseconds[settings.warmup :]


def summarize(turns: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Minima and medians in milliseconds, and gptjax's over nanoGPT's, all by turn."""
    summaries = {"min": min, "median": statistics.median}
    times = {
        row: {name: [summary(turn[row]) for turn in turns] for name, summary in summaries.items()}
        for row in turns[0]
    }
    result: dict[str, Any] = {"milliseconds": times}
    if NANOGPT in times:
        ratios = {
            name: [
                ours / theirs
                for ours, theirs in zip(times[GPTJAX][name], times[NANOGPT][name], strict=True)
            ]
            for name in summaries
        }
        result["ratio"] = ratios
        result["ratio_median"] = {name: statistics.median(by) for name, by in ratios.items()}
    return result


def print_table(result: dict[str, Any]) -> None:
    """Prints one row for each thing timed, one column a turn."""
    from rich.console import Console
    from rich.table import Table

    facts = result["machine"]
    versions = [f"{name} {facts[name]}" for name in ("jax", "torch", "python") if name in facts]
    caption = f"{facts['cpu']}, {facts['cores']} cores; {', '.join(versions)}"
    table = Table(title="Train step, ms: min / median", caption=caption)
    table.add_column("")
    turns = len(result["milliseconds"][GPTJAX]["min"])
    for turn in range(turns):
        table.add_column(f"turn {turn + 1}", justify="right")
    table.add_column("median", justify="right")

    def add(row: str, by: dict[str, list[float]], digits: int) -> None:
        columns = [*zip(by["min"], by["median"], strict=True)]
        columns.append((statistics.median(by["min"]), statistics.median(by["median"])))
        table.add_row(row, *(f"{low:.{digits}f} / {mid:.{digits}f}" for low, mid in columns))

    for row, by in result["milliseconds"].items():
        add(row, by, 1)
    if "ratio" in result:
        add(f"{GPTJAX} / {NANOGPT}", result["ratio"], 2)
    Console().print(table)


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    settings.check()
    experiments = recipes()
    jobs: dict[str, tuple[MakeStep, Experiment]] = {GPTJAX: (gptjax_step, experiments[GPTJAX])}
    if settings.nanogpt is not None:
        jobs[NANOGPT] = (nanogpt_step, experiments[GPTJAX])
    jobs[MODERN] = (gptjax_step, experiments[MODERN])
    turns = []
    for turn in range(settings.turns):
        print(f"turn {turn + 1} of {settings.turns}", file=sys.stderr)
        turns.append({row: in_own_process(measure, *job, settings) for row, job in jobs.items()})
    result = {"machine": machine(), **summarize(turns)}
    print_table(result)
    if settings.json is not None:
        settings.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
