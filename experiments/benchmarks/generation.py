"""Tokens a second of greedy generation, against transformers' `generate` where that is installed.

python experiments/benchmarks/generation.py --turns 3
"""

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import (
    Column,
    MeasurementError,
    Report,
    Worker,
    in_turns,
    peak_memory,
    run_benchmark,
    say,
    transformers_gpt2,
)

from gptjax.command_line import configure_jax, parse_flags
from gptjax.config import ComputeDtype
from gptjax.errors import UserError
from gptjax.planning.inputs import read_model

GPTJAX, TRANSFORMERS = "gptjax", "transformers"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Times greedy generation of a model with random weights.

    Attributes:
        model: A preset in GPT-2's shape, or a folder with such a config.json.
        batches: Prompts at once, one measurement each.
        prompt: Tokens of each prompt.
        new: Tokens to add to each.
        queue: Prompts in a further measurement, each with up to twice as many tokens as `prompt`
            and up to `new` to add: gptjax as a queue, transformers in padded batches; 0 for none.
        slots: Of the queue, and rows of the padded batches.
        dtype: Of weights and matrix work.
        transformers: Whether to compare with transformers, where that is installed.
        turns: How often each engine is measured, by turns.
        repeats: Calls timed in a turn; one before all turns compiles.
        json: A file to write the results to.
        png: A picture of tokens a second.
    """

    model: str = "gpt2"
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 32
    new: int = 100
    queue: int = 64
    slots: int = 8
    dtype: ComputeDtype = "float32"
    transformers: bool = True
    turns: int = 3
    repeats: int = 3
    json: Path | None = None
    png: Path | None = None


def gptjax_engine(settings: Settings, batch: int | None) -> Callable[[], int]:
    """A function that generates, and returns how many tokens it made."""
    configure_jax()
    import jax
    import jax.numpy as jnp

    from gptjax.batching import generate_queue
    from gptjax.devices import compute_dtype
    from gptjax.generation import generate
    from gptjax.layouts import decoding_params
    from gptjax.params import init_params
    from gptjax.sampling import Sampling

    config = read_model(settings.model).replace(compute_dtype=settings.dtype)
    params = init_params(config, jax.random.key(0))
    if compute_dtype(config) != jnp.float32:
        # Weights are stored in the dtype that they are used in, as the peer's are.
        params = jax.tree.map(lambda x: x.astype(compute_dtype(config)), params)
    params = decoding_params(params, config)
    sampling = Sampling(max_new_tokens=settings.new, temperature=0)
    if batch is None:
        queue, limits = ragged_prompts(settings)

        def run() -> int:
            rows = generate_queue(
                params, queue, config, sampling, slots=settings.slots, max_new_tokens=limits
            )
            return sum(len(row.tokens) for _, row in rows)

        return run
    prompts = random_prompts(settings, batch).tolist()
    return lambda: sum(map(len, generate(params, prompts, config, sampling)))


def transformers_engine(settings: Settings, batch: int | None) -> Callable[[], int]:
    """The same by transformers' `generate`, on a GPU where there is one."""
    import torch  # pyright: ignore[reportMissingImports]

    model = transformers_gpt2(read_model(settings.model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and device == "cuda")
    model = model.eval().to(device, torch.bfloat16 if half else torch.float32)

    def made(prompts: Any, mask: Any, new: int) -> None:
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new}
        options |= {"min_new_tokens": new, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(prompts.to(device), attention_mask=mask.to(device), **options)
        # Fetched, as gptjax's are.
        out.tolist()

    def run_batch() -> int:
        prompts = torch.from_numpy(random_prompts(settings, batch or 0))
        made(prompts, torch.ones_like(prompts), settings.new)
        return len(prompts) * settings.new

    def run_queue() -> int:
        queue, limits = ragged_prompts(settings)
        for start in range(0, len(queue), settings.slots):
            rows = queue[start : start + settings.slots]
            width = max(map(len, rows))
            padded = torch.tensor([[0] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            # A batch goes on until its last row is complete.
            made(padded, mask, max(limits[start : start + settings.slots]))
        return sum(limits)

    return run_queue if batch is None else run_batch


def random_prompts(settings: Settings, batch: int) -> np.ndarray:
    """`[batch, prompt]` token ids; the time depends on no values."""
    shape = (batch, settings.prompt)
    return np.random.default_rng(0).integers(0, read_model(settings.model).vocab_size, shape)


def ragged_prompts(settings: Settings) -> tuple[list[list[int]], list[int]]:
    """The prompts of the queue, and how many tokens are to be added to each."""
    rng, vocabulary = np.random.default_rng(0), read_model(settings.model).vocab_size
    lengths = rng.integers(1, 2 * settings.prompt + 1, settings.queue)
    limits = rng.integers(1, settings.new + 1, settings.queue)
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths], limits.tolist()


ENGINES = {GPTJAX: gptjax_engine, TRANSFORMERS: transformers_engine}


def build(name: str, settings: Settings, batch: int | None) -> Callable[[], dict[str, float]]:
    """A measurement of an engine, which has made its first tokens."""
    run = ENGINES[name](settings, batch)
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    due = sum(ragged_prompts(settings)[1]) if batch is None else batch * settings.new

    def measure() -> dict[str, float]:
        rates = []
        for _ in range(settings.repeats):
            start = time.perf_counter()
            made = run()
            rates.append(made / (time.perf_counter() - start))
            if made != due:
                raise RuntimeError(f"{made} tokens were made, not {due}")
        return {"rate": statistics.median(rates), "first": first, "peak": device_memory(name)}

    return measure


def measure(
    names: list[str], settings: Settings, batch: int | None
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """What each engine measured, by turn, and why a peer failed, by name.

    Raises:
        MeasurementError: if gptjax fails.
    """
    workers: dict[str, Worker] = {}
    failures: dict[str, str] = {}
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with contextlib.ExitStack() as stack:
        for name in names:
            worker = Worker(build, name, settings, batch, environment=environment)
            stack.enter_context(worker)
            try:
                worker.wait()
            except MeasurementError as error:
                if name == GPTJAX:
                    raise
                say(f"{name}: {error}")
                failures[name] = error.reason
                continue
            workers[name] = worker
        peers = set(workers) - {GPTJAX}
        found = in_turns(workers, settings.turns, may_fail=peers, failures=failures)
    return found, failures


def device_memory(name: str) -> int:
    """The most memory that the engine has held: a GPU's own, or this process's."""
    if name == GPTJAX:
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use") or peak_memory()
    import torch  # pyright: ignore[reportMissingImports]

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    if min(settings.turns, settings.repeats, settings.slots, *settings.batches) < 1:
        raise UserError("turns, repeats, slots and batches are at least 1")
    both = settings.transformers and all(map(importlib.util.find_spec, ("torch", TRANSFORMERS)))
    names = [GPTJAX, TRANSFORMERS] if both else [GPTJAX]
    lengths = f"prompts of {settings.prompt}, {settings.new} new tokens"
    report = Report(f"Greedy generation, {settings.model}, {settings.dtype}, {lengths}", settings)
    for batch in [*settings.batches, *([None] if settings.queue else [])]:
        task = f"queue of {settings.queue}" if batch is None else f"batch {batch}"
        found, failures = measure(names, settings, batch)
        for name, turns in found.items():
            rates = [turn["rate"] for turn in turns]
            times = {"first_seconds": turns[0]["first"], "peak_bytes": turns[-1]["peak"]}
            report.add(f"{task}, {name}", tokens_per_second=rates, **times)
        for name, reason in failures.items():
            report.add(f"{task}, {name}", tokens_per_second="failed", note=reason)
            report.notes.append(f"{task}: {name} failed, and is not compared with: {reason}")
        if TRANSFORMERS in found:
            pairs = zip(found[GPTJAX], found[TRANSFORMERS], strict=True)
            ratios = [ours["rate"] / theirs["rate"] for ours, theirs in pairs]
            report.add(f"{task}, {GPTJAX}", ratio=ratios)
        # After each: what follows may take long.
        report.save(settings.json, settings.png, "tokens_per_second")
    report.show({"first_seconds": Column("first call s", 2)})


if __name__ == "__main__":
    run_benchmark(main)
