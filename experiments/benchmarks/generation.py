"""Tokens a second of greedy generation, against transformers' `generate` where that is installed.

python experiments/benchmarks/generation.py --turns 3
"""

import importlib.util
import json
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
from gptjax.config import preset
from gptjax.errors import UserError

GPTJAX, TRANSFORMERS = "gptjax", "transformers"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Times greedy generation of a model with random weights.

    Attributes:
        model: A preset in GPT-2's shape.
        batches: Prompts at once, one measurement each.
        prompt: Tokens of each prompt.
        new: Tokens to add to each.
        queue: Prompts in a further measurement, each with up to twice as many tokens as `prompt`
            and up to `new` to add: gptjax as a queue, transformers in padded batches; 0 for none.
        slots: Of the queue, and rows of the padded batches.
        turns: How often each engine is measured, by turns.
        repeats: Calls timed in a measurement, after one that compiles.
        json: A file to write the results to.
    """

    model: str = "gpt2"
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 32
    new: int = 100
    queue: int = 64
    slots: int = 8
    turns: int = 3
    repeats: int = 3
    json: Path | None = None


def gptjax_engine(settings: Settings, batch: int | None) -> Callable[[], int]:
    """A function that generates, and returns how many tokens it made."""
    configure_jax()
    import jax

    from gptjax.batching import generate_queue
    from gptjax.generation import generate
    from gptjax.layouts import decoding_params
    from gptjax.params import init_params
    from gptjax.sampling import Sampling

    config = preset(settings.model).replace(compute_dtype="float32")
    params = decoding_params(init_params(config, jax.random.key(0)), config)
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
    """The same by transformers, as its documentation has it for a CPU."""
    import torch
    import transformers

    config = preset(settings.model)
    model: Any = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.embed_dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
        )
    )
    model.eval()

    def made(prompts: Any, mask: Any, new: int) -> None:
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new}
        options |= {"min_new_tokens": new, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(prompts, attention_mask=mask, **options)

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
    return np.random.default_rng(0).integers(0, preset(settings.model).vocab_size, shape)


def ragged_prompts(settings: Settings) -> tuple[list[list[int]], list[int]]:
    """The prompts of the queue, and how many tokens are to be added to each."""
    rng, vocabulary = np.random.default_rng(0), preset(settings.model).vocab_size
    lengths = rng.integers(1, 2 * settings.prompt + 1, settings.queue)
    limits = rng.integers(1, settings.new + 1, settings.queue)
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths], limits.tolist()


ENGINES = {GPTJAX: gptjax_engine, TRANSFORMERS: transformers_engine}


def measure(name: str, settings: Settings, batch: int | None) -> dict[str, float]:
    """Tokens a second, median of the repeats, and the seconds of the first call."""
    run = ENGINES[name](settings, batch)
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    rates = []
    for _ in range(settings.repeats):
        start = time.perf_counter()
        made = run()
        rates.append(made / (time.perf_counter() - start))
    due = sum(ragged_prompts(settings)[1]) if batch is None else batch * settings.new
    if made != due:
        raise RuntimeError(f"{made} tokens were made, not {due}")
    return {"rate": statistics.median(rates), "first": first}


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    if min(settings.turns, settings.repeats, settings.slots, *settings.batches) < 1:
        raise UserError("turns, repeats, slots and batches are at least 1")
    both = all(importlib.util.find_spec(name) for name in ("torch", TRANSFORMERS))
    names = [GPTJAX, TRANSFORMERS] if both else [GPTJAX]
    results = []
    for batch in [*settings.batches, *([None] if settings.queue else [])]:
        title = f"queue of {settings.queue}" if batch is None else f"batch {batch}"
        turns = []
        for turn in range(settings.turns):
            print(f"{title}: turn {turn + 1} of {settings.turns}", file=sys.stderr)
            turns.append({name: in_own_process(measure, name, settings, batch) for name in names})
        rates = {name: statistics.median(turn[name]["rate"] for turn in turns) for name in names}
        line = ", ".join(f"{name} {rate:.1f} tokens/s" for name, rate in rates.items())
        result: dict[str, Any] = {"task": title, "rates": rates, "turns": turns}
        if both:
            ratios = [turn[GPTJAX]["rate"] / turn[TRANSFORMERS]["rate"] for turn in turns]
            result["ratio"] = statistics.median(ratios)
            line += f"; {result['ratio']:.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{title}: {line}", flush=True)
        results.append(result)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if settings.json is not None:
        text = json.dumps({"machine": facts, "results": results}, indent=2)
        settings.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
