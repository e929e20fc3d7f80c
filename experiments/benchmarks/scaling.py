"""How cost grows: tokens a second and compile time over depth, memory over batch.

    python experiments/benchmarks/scaling.py

Tokens a second times layers stays flat where a layer costs the same in any depth. Compile time does
not grow with depth where layers are a loop. Memory is what the compiled step needs by XLA's own
analysis: it grows by the same amount for each further sequence.
"""

import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Column, Report, in_own_process, say

from gptjax.command_line import configure_jax, parse_flags, run_command
from gptjax.config import ModelConfig
from gptjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measures how cost grows.

    Attributes:
        depths: Numbers of layers.
        batches: Numbers of sequences.
        width: Of the residual stream.
        context: Tokens of a sequence.
        vocab_size: Small, so that layers are what costs.
        batch_size: Sequences a step over the depths.
        layers: Of the model over the batches.
        scan_unroll: Blocks in a row for each turn of the loop.
        steps: Steps timed, after two.
        json: A file to write the results to.
        png: A picture of tokens a second times layers.
    """

    depths: tuple[int, ...] = (12, 24, 48, 96)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    width: int = 128
    context: int = 128
    vocab_size: int = 256
    batch_size: int = 4
    layers: int = 12
    scan_unroll: int = 1
    steps: int = 10
    json: Path | None = None
    png: Path | None = None

    def model(self, layers: int) -> ModelConfig:
        """The model of so many layers."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            context_length=self.context,
            num_layers=layers,
            embed_dim=self.width,
            num_heads=max(1, self.width // 64),
            scan_unroll=self.scan_unroll,
        )


def compiled_step(settings: Settings, layers: int, batch: int) -> dict[str, Any]:
    """A compiled step, its state and batch, and the seconds of tracing and compiling."""
    import jax

    import gptjax

    config = settings.model(layers)
    optimizer = gptjax.make_optimizer(gptjax.OptimizerConfig(), config, 100)
    state = gptjax.init_state(config, optimizer, jax.random.key(0))
    rows = np.random.default_rng(0).integers(config.vocab_size, size=(batch, settings.context + 1))
    rows = rows.astype(np.int32)
    inputs = {"tokens": rows[:, :-1].copy(), "targets": rows[:, 1:].copy()}
    step: Any = gptjax.make_train_step(config, optimizer)
    start = time.perf_counter()
    lowered = step.lower(state, inputs)
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - traced
    times = {"trace_seconds": traced - start, "compile_seconds": seconds}
    return {"step": compiled, "state": state, "batch": inputs} | times


def depth(settings: Settings, layers: int) -> dict[str, float]:
    """Rate and compile time of a model so deep."""
    prepare()
    import jax

    made = compiled_step(settings, layers, settings.batch_size)
    state, times = made["state"], []
    for _ in range(settings.steps + 2):
        start = time.perf_counter()
        state, _ = made["step"](state, made["batch"])
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    # The fastest, which other load on the machine changes least; the middle one beside it.
    tokens = settings.batch_size * settings.context
    rates = {name: tokens / f(times[2:]) for name, f in (("fastest", min), ("median", _median))}
    return {
        "tokens_per_second": rates["fastest"],
        "per_layer": rates["fastest"] * layers,
        "median_per_layer": rates["median"] * layers,
        "trace_seconds": made["trace_seconds"],
        "compile_seconds": made["compile_seconds"],
    }


def _median(values: list[float]) -> float:
    return statistics.median(values)


def memory(settings: Settings) -> dict[int, int]:
    """Batch -> bytes that the compiled step needs."""
    prepare()
    from gptjax.devices import program_bytes

    found = {}
    for batch in settings.batches:
        needed = program_bytes(compiled_step(settings, settings.layers, batch)["step"])
        if needed is None:
            raise UserError("this backend does not tell what a program needs")
        found[batch] = needed
    return found


def prepare() -> None:
    """Configures JAX; compiling is one of the figures, so that nothing is kept."""
    configure_jax()
    import jax

    jax.config.update("jax_enable_compilation_cache", False)


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    if min(*settings.depths, *settings.batches, settings.steps) < 1 or len(settings.batches) < 2:
        raise UserError("depths, batches and steps are at least 1, and batches two or more")
    deep = Report("Over depth", settings)
    for layers in settings.depths:
        say(f"{layers} layers")
        deep.add(f"{layers} layers", **in_own_process(depth, settings, layers))
    rows = list(deep.rows.values())
    rates = [row["per_layer"] for row in rows]
    compiles = [row["trace_seconds"] + row["compile_seconds"] for row in rows]
    deep.extra |= {"flat": min(rates) / max(rates), "compile_growth": compiles[-1] / compiles[0]}
    deep.notes.append(
        f"Tokens/s times layers: the lowest is {min(rates) / max(rates):.2f} of the highest. "
        f"Tracing and compiling the deepest takes {compiles[-1] / compiles[0]:.2f} times the "
        f"shallowest."
    )
    say("memory")
    needed = in_own_process(memory, settings)
    wide = Report(f"Over batch, {settings.layers} layers", settings)
    for batch, size in needed.items():
        wide.add(f"batch {batch}", peak_bytes=size)
    slopes = [
        (needed[b] - needed[a]) / (b - a) for a, b in itertools.pairwise(sorted(settings.batches))
    ]
    for batch, slope in zip(sorted(settings.batches)[1:], slopes, strict=True):
        wide.add(f"batch {batch}", slope=slope)
    wide.notes.append("Linear: each further sequence adds the same.")
    columns = {
        "per_layer": Column("tokens/s × layers", 0),
        "median_per_layer": Column("of the median step", 0),
        "trace_seconds": Column("trace s", 2),
        "compile_seconds": Column("compile s", 2),
        "slope": Column("MiB a further sequence", 2, 1 / 2**20),
    }
    deep.show(columns)
    wide.show(columns)
    deep.extra["memory"] = wide.rows
    deep.save(settings.json, settings.png, "per_layer")


if __name__ == "__main__":
    run_command(main)
