"""What prompt look-up gains where the continuation repeats the prompt: SmolLM2 copies a text.

python experiments/benchmarks/speculation.py --turns 5
"""

import time
from dataclasses import dataclass
from pathlib import Path

from measuring import Report

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
        json: A file to write the results to.
        png: A picture of tokens a second.
    """

    model: str = "smollm2"
    new: int = 70
    tokens: int = 8
    turns: int = 5
    json: Path | None = None
    png: Path | None = None


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
    report = Report(f"{settings.model} repeats its prompt: {len(row)} greedy tokens", settings)
    report.add("plain", tokens_per_second=[len(row) / one for one in plain], seconds=plain)
    rates = [len(row) / one for one in fast]
    report.add("prompt look-up", tokens_per_second=rates, seconds=fast, ratio=ratios)
    report.notes.append("The peer of the ratio is plain decoding.")
    report.show()
    report.save(settings.json, settings.png, "tokens_per_second")


if __name__ == "__main__":
    run_command(main)
