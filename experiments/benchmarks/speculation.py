"""What prompt look-up gains where the continuation repeats the prompt: SmolLM2 copies a text.

python experiments/benchmarks/speculation.py --turns 5
"""

import statistics
import time
from dataclasses import dataclass

from measuring import machine

from gptjax.command_line import configure_jax, parse_flags, run_command

TEXT = (
    "The harbour opens at six. Boats from the north moor at the long pier, boats from the south at "
    "the short one, and the ferry keeps the middle. Fees are paid at the white house: four coins "
    "for a day, twenty for a week. Nets are dried on the wall, never on the pier. When the bell "
    "rings twice, fog is coming, and all boats wait until it rings once more."
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Times greedy generation of SmolLM2 without and with prompt look-up.

    Attributes:
        model: As for `gptjax generate`.
        new: Tokens to add.
        tokens: How many are proposed at once.
        turns: How often each is measured, by turns, after one call that compiles.
    """

    model: str = "smollm2"
    new: int = 70
    tokens: int = 8
    turns: int = 5


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    configure_jax()
    import gptjax
    from gptjax.layouts import decoding_params
    from gptjax.text_generation import prompt_ids

    model = gptjax.load(settings.model)
    params = decoding_params(model.params, model.config)
    # The text twice, and its beginning once more.
    ids = prompt_ids(model, f"{TEXT}\n\n{TEXT}\n\n{TEXT[:60]}")
    sampling = gptjax.Sampling(max_new_tokens=settings.new, temperature=0)
    lookup = gptjax.PromptLookup(tokens=settings.tokens)

    def seconds(speculation: gptjax.PromptLookup | None) -> tuple[float, list[int]]:
        start = time.perf_counter()
        [row] = gptjax.generate(params, [ids], model.config, sampling, speculation=speculation)
        return time.perf_counter() - start, row

    for speculation in (None, lookup):
        seconds(speculation)
    plain, fast = [], []
    row: list[int] = []
    for _ in range(settings.turns):
        one, row = seconds(None)
        other, same = seconds(lookup)
        if row != same:
            raise RuntimeError("prompt look-up gave other tokens")
        plain.append(one)
        fast.append(other)
    ratios = [one / other for one, other in zip(plain, fast, strict=True)]
    print(f"{len(row)} tokens: plain {statistics.median(plain):.2f} s, ", end="")
    print(f"with look-up {statistics.median(fast):.2f} s, ", end="")
    print(f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))


if __name__ == "__main__":
    run_command(main)
