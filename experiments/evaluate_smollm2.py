"""SmolLM2-135M through gptjax's evaluation and, on the same weights, through transformers.

python experiments/evaluate_smollm2.py --wikitext valid.txt --hellaswag hellaswag_val_full.txt \
    --crows-pairs crows_pairs_anonymized.csv
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine

from gptjax.command_line import configure_jax, parse_flags, run_command
from gptjax.errors import UserError
from gptjax.evaluation import suites
from gptjax.evaluation.bias import read_crows_pairs
from gptjax.evaluation.multiple_choice import UNCONDITIONAL, read_hellaswag
from gptjax.token_scores import windows

# Text ids and how many of the last ones count -> their log-probability.
Logprob = Callable[[list[int], int], float]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Evaluates SmolLM2-135M-Instruct by gptjax and by transformers, and compares the figures.

    Attributes:
        wikitext: The validation text of WikiText-2.
        hellaswag: HellaSwag's validation questions.
        crows_pairs: The CSV file of CrowS-Pairs.
        model: As for `gptjax generate`.
        characters: How much of the text is read, from its beginning; 0 is all.
        context: Tokens that a window reads; the next begins half of them later.
        items: How many questions and pairs, the first ones.
        compare: Whether transformers computes the same.
        out: A folder for a line an item, where a stopped run goes on.
        json: A file to write the figures to.
    """

    wikitext: Path | None = None
    hellaswag: Path | None = None
    crows_pairs: Path | None = None
    model: str = "smollm2"
    characters: int = 0
    context: int = 1024
    items: int = 200
    compare: bool = True
    out: Path | None = None
    json: Path | None = None


def evaluate(model: Any, settings: Settings, text: Path) -> dict[str, float]:
    """The figures by gptjax."""
    options = suites.Options(limit=settings.items, context=settings.context, batch_size=4)
    asked = {
        "perplexity": settings.wikitext and text,
        "hellaswag": settings.hellaswag,
        "crows-pairs": settings.crows_pairs,
    }
    figures = {}
    for suite, data in asked.items():
        if data is not None:
            start = time.perf_counter()
            result = suites.run_suite(model, suite, data, options, out=settings.out, progress=True)
            seconds = time.perf_counter() - start
            print(f"gptjax, {suite}: {seconds:.0f} s", flush=True)
            for name, estimate in result.figures.items():
                print(f"  {name}: {estimate.value:.6g} ± {estimate.stderr:.2g}", flush=True)
                figures[f"{suite}: {name}"] = estimate.value
    return figures


def transformers_logprob(folder: Path) -> tuple[Any, Logprob]:
    """A tokenizer, and what tells log-probabilities a text at a time, in float32."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()

    def logprob(ids: list[int], count: int) -> float:
        with torch.inference_mode():
            logits = model(torch.tensor([ids[:-1]]), logits_to_keep=count).logits[0]
            logprobs = torch.log_softmax(logits, -1)
            targets = torch.tensor(ids[-count:])[:, None]
            return logprobs.gather(-1, targets).double().sum().item()

    return tokenizer, logprob


def evaluate_by_transformers(
    folder: Path, begins: Sequence[int], settings: Settings, text: Path
) -> dict[str, float]:
    """The same figures, from token ids and logits of transformers."""
    tokenizer, logprob = transformers_logprob(folder)

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    figures = {}
    start = time.perf_counter()
    if settings.wikitext is not None:
        words = text.read_text(encoding="utf-8")
        ids = [*begins, *encode(words)]
        nats = 0.0
        for window in windows(0, len(ids), settings.context, settings.context // 2):
            read = ids[window.start : window.end + 1]
            nats -= logprob(read, window.end + 1 - window.first)
        figures["perplexity: perplexity"] = math.exp(nats / (len(ids) - 1))
        figures["perplexity: bits per byte"] = nats / math.log(2) / len(words.encode())
    if settings.hellaswag is not None:
        right = {"accuracy": 0, "accuracy per byte": 0, "accuracy unconditional-normalized": 0}
        questions = read_hellaswag(settings.hellaswag)[: settings.items]
        for question in questions:
            own, free = [], []
            for choice in question.choices:
                for context, found in ((question.context, own), (UNCONDITIONAL, free)):
                    whole = encode(f"{context} {choice}")
                    found.append(logprob(whole, len(whole) - len(encode(context))))
            bytes_ = [len(choice.encode()) for choice in question.choices]
            ways = (
                own,
                [value / size for value, size in zip(own, bytes_, strict=True)],
                [value - other for value, other in zip(own, free, strict=True)],
            )
            for name, scores in zip(right, ways, strict=True):
                right[name] += scores.index(max(scores)) == question.label
        figures |= {f"hellaswag: {name}": n / len(questions) for name, n in right.items()}
    if settings.crows_pairs is not None:
        pairs = read_crows_pairs(settings.crows_pairs)[: settings.items]
        differences = []
        for pair in pairs:
            more, less = (
                logprob([*begins, *ids], len(ids)) for ids in map(encode, (pair.more, pair.less))
            )
            differences.append(more - less)
        share = sum(difference > 0 for difference in differences) / len(pairs)
        figures["crows-pairs: stereotypical sentence likelier"] = share
        figures["crows-pairs: difference in nats"] = sum(differences) / len(pairs)
    print(f"transformers: {time.perf_counter() - start:.0f} s", flush=True)
    return figures


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    if not (settings.wikitext or settings.hellaswag or settings.crows_pairs):
        raise UserError("nothing to evaluate; give --wikitext, --hellaswag or --crows-pairs")
    configure_jax()
    import gptjax
    from gptjax.text_generation import prompt_ids

    model = gptjax.load(settings.model)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        if settings.wikitext is not None:
            words = settings.wikitext.read_text(encoding="utf-8")
            text.write_text(words[: settings.characters or None], encoding="utf-8")
        figures = evaluate(model, settings, text)
        theirs: dict[str, float] = {}
        if settings.compare:
            gptjax.save_pretrained(model, Path(folder) / "model", dtype="float32")
            begins = prompt_ids(model, "")
            del model
            theirs = evaluate_by_transformers(Path(folder) / "model", begins, settings, text)
    print("| figure | gptjax | transformers | relative difference |\n| --- | --- | --- | --- |")
    for name, other in theirs.items():
        own = figures[name]
        difference = abs(own - other) / abs(other) if other else abs(own)
        print(f"| {name} | {own:.6g} | {other:.6g} | {difference:.1e} |")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if settings.json is not None:
        values = {"gptjax": figures, "transformers": theirs, "machine": machine()}
        settings.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
