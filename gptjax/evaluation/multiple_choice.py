"""Multiple choice by likelihood: which of some continuations a model finds likeliest.

Brown et al. 2020 (GPT-3), section 2.4; Gao 2021, Multiple Choice Normalization in LM Evaluation.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.choice import continuation_ids
from gptjax.errors import UserError
from gptjax.evaluation.items import read_lines, read_objects
from gptjax.evaluation.loglikelihood import each_group
from gptjax.evaluation.results import Estimate, Record, mean
from gptjax.model import Model
from gptjax.text_generation import prompt_ids

UNCONDITIONAL = "Answer:"
"""The context that likelihoods are divided by that do not depend on the question."""


@dataclass(frozen=True)
class MultipleChoice:
    """A question: a context, texts that may follow it, and which of them is right.

    Attributes:
        context: what comes before. A space is put between it and a choice.
        choices: at least two texts, without the space before them.
        label: the place of the right one.
    """

    context: str
    choices: tuple[str, ...]
    label: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not all(self.choices):
            raise UserError(f"choices are {list(self.choices)}; give at least two, none empty")
        if not 0 <= self.label < len(self.choices):
            raise UserError(
                f"label is {self.label}, but there are {len(self.choices)} choices; give the place "
                f"of the right one, from 0 to {len(self.choices) - 1}"
            )


def read_multiple_choice(path: str | Path) -> list[MultipleChoice]:
    """Reads questions from JSON Lines, each `{"context": text, "choices": [texts], "label": n}`.

    Raises:
        UserError: naming the line, if one is something else; or if there are none.
        OSError: if the file cannot be read.
    """
    return [_question(place, record) for place, record in read_objects(path)]


def read_hellaswag(path: str | Path, *, clean: bool = True) -> list[MultipleChoice]:
    """Reads HellaSwag (Zellers et al. 2019) in either of its two shapes.

    A .jsonl file has its original fields `activity_label`, `ctx_a`, `ctx_b`, `endings` and `label`;
    of them the context is made as lm-evaluation-harness does it (`tasks/hellaswag/utils.py`): the
    label, a colon, and both parts, the second with a capital letter. Any other file has six lines a
    question: such a context, the label, and four endings.

    Args:
        path: the file.
        clean: whether what extraction from WikiHow left behind is taken out, as
            lm-evaluation-harness does: " [title]" becomes ". ", other words in brackets go, and of
            two spaces one.

    Raises:
        UserError: naming the line, if one is something else; or if there are none.
        OSError: if the file cannot be read.
    """
    tidy = clean_hellaswag if clean else str.strip
    if Path(path).suffix == ".jsonl":
        return [_hellaswag(place, record, tidy) for place, record in read_objects(path)]
    lines = read_lines(path)
    if len(lines) % 6:
        raise UserError(
            f"{path} has {len(lines)} lines; give six a question (context, label, four endings), "
            "or a .jsonl file"
        )
    questions = []
    for start in range(0, len(lines), 6):
        context, label, *endings = lines[start : start + 6]
        record = {"context": tidy(context), "choices": list(map(tidy, endings)), "label": label}
        questions.append(_question(f"{path}:{start + 1}", record))
    return questions


def clean_hellaswag(text: str) -> str:
    """What lm-evaluation-harness makes of a text of HellaSwag (`tasks/hellaswag/utils.py`)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(place: str, record: dict[str, Any], tidy: Any) -> MultipleChoice:
    names = ("activity_label", "ctx_a", "ctx_b")
    endings = record.get("endings")
    parts = [record.get(name) for name in names] + (
        endings if isinstance(endings, list) else [None]
    )
    if not all(isinstance(part, str) for part in parts):
        raise UserError(
            f"{place} has not the texts {', '.join(names)} and endings; is it HellaSwag?"
        )
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    choices = list(map(tidy, record["endings"]))
    return _question(
        place, {"context": tidy(context), "choices": choices, "label": record.get("label")}
    )


def _question(place: str, record: dict[str, Any]) -> MultipleChoice:
    context, choices, label = (record.get(name) for name in ("context", "choices", "label"))
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)
    has_texts = isinstance(choices, list) and all(isinstance(text, str) for text in choices)
    if not (isinstance(context, str) and has_texts and type(label) is int):
        raise UserError(
            f'{place} is no question; give {{"context": "...", "choices": ["...", "..."], '
            '"label": 0}'
        )
    assert isinstance(choices, list)
    try:
        return MultipleChoice(context, tuple(choices), label)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def score_multiple_choice(
    model: Model,
    questions: Sequence[MultipleChoice],
    *,
    batch_size: int = 8,
    unconditional: str | None = UNCONDITIONAL,
) -> Iterator[tuple[int, Record]]:
    """What a model makes of the choices of questions.

    Args:
        model: with a tokenizer.
        questions: a choice's tokens are those of `continuation_ids` after its context.
        batch_size: the most choices that are read at once.
        unconditional: the context of the likelihood that a choice's own is divided by; None leaves
            that out, and with it the time that it takes.

    Yields:
        The index of a question and its record, as they are complete: `label`; of each choice
        `logprobs` in nats, `unconditional` the same after that context (empty without), `bytes` of
        UTF-8 and `tokens`; and `probabilities`, the softmax over the choices of `logprobs`.

    Raises:
        UserError: as `loglikelihoods` and `prompt_ids` do.
    """
    groups = []
    for question in questions:
        contexts = [question.context] + ([] if unconditional is None else [unconditional])
        groups.append(
            [
                (prompt_ids(model, context), continuation_ids(model, context, f" {choice}"))
                for context in contexts
                for choice in question.choices
            ]
        )
    for index, results in each_group(model, groups, batch_size=batch_size):
        question, logprobs = questions[index], [result.logprob for result in results]
        N = len(question.choices)
        record = {
            "label": question.label,
            "logprobs": logprobs[:N],
            "unconditional": logprobs[N:],
            "bytes": [len(choice.encode()) for choice in question.choices],
            "tokens": [result.tokens for result in results[:N]],
            "probabilities": _softmax(logprobs[:N]),
        }
        yield index, record


def _softmax(logprobs: list[float]) -> list[float]:
    weights = np.exp(np.array(logprobs) - max(logprobs))
    return (weights / weights.sum()).tolist()


def choice_scores(record: Record) -> dict[str, np.ndarray]:
    """What choices are compared by, each under the name of the accuracy that it gives."""
    logprobs = np.array(record["logprobs"])
    scores = {"accuracy": logprobs, "accuracy per byte": logprobs / np.array(record["bytes"])}
    if record["unconditional"]:
        scores["accuracy unconditional-normalized"] = logprobs - np.array(record["unconditional"])
    return scores


def summarize_multiple_choice(records: Sequence[Record]) -> dict[str, Estimate]:
    """How often the likeliest choice is the right one, by each way to compare them.

    - `accuracy`: by log-probability;
    - `accuracy per byte`: divided by the bytes of a choice in UTF-8;
    - `accuracy unconditional-normalized`: less the log-probability of the choice after a context
      that says nothing.
    """
    right: dict[str, list[float]] = {}
    for record in records:
        for name, scores in choice_scores(record).items():
            right.setdefault(name, []).append(float(scores.argmax() == record["label"]))
    return {name: mean(values) for name, values in right.items()}
