"""Generation tasks: whether greedy completions are the answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax.batching import generate_texts
from gptjax.errors import UserError
from gptjax.evaluation.items import read_objects
from gptjax.evaluation.metrics import exact_match, f1
from gptjax.evaluation.results import Estimate, Record, mean
from gptjax.model import Model
from gptjax.sampling import Sampling


@dataclass(frozen=True)
class Task:
    """A prompt, and the completions that are right.

    Attributes:
        prompt: what is continued.
        answers: the right completions, of which any will do.
    """

    prompt: str
    answers: tuple[str, ...]


def read_tasks(path: str | Path) -> list[Task]:
    """Reads tasks from JSON Lines, each `{"prompt": text, "answers": [texts]}`.

    Raises:
        UserError: naming the line, if one is something else; or if there are none.
        OSError: if the file cannot be read.
    """
    tasks = []
    for place, record in read_objects(path):
        prompt, answers = record.get("prompt"), record.get("answers")
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            answers = []
        if not (isinstance(prompt, str) and answers):
            raise UserError(
                f'{place} is no task; give {{"prompt": "2 + 2 =", "answers": ["4", "four"]}}'
            )
        tasks.append(Task(prompt, tuple(answers)))
    return tasks


def score_completions(
    model: Model,
    tasks: Sequence[Task],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    stop: tuple[str, ...] = ("\n",),
) -> Iterator[tuple[int, Record]]:
    """Completes prompts greedily.

    Args:
        model: with a tokenizer.
        tasks: what to complete.
        batch_size: how many prompts are completed at a time.
        max_new_tokens: the most tokens of a completion.
        stop: texts that end a completion, which is cut before them.

    Yields:
        The index of a task and its record: the `completion`; `is_exact`, whether it is one of the
        answers, white space around either apart; and `exact_match` and `f1` as SQuAD has them.

    Raises:
        UserError: as `generate_texts` does.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0, stop=stop)
    prompts = [task.prompt for task in tasks]
    for index, made in generate_texts(model, prompts, sampling, slots=batch_size):
        answers = tasks[index].answers
        yield (
            index,
            {
                "completion": made.text,
                "is_exact": made.text.strip() in {answer.strip() for answer in answers},
                "exact_match": exact_match(made.text, answers),
                "f1": f1(made.text, answers),
            },
        )


def summarize_completions(records: Sequence[Record]) -> dict[str, Estimate]:
    """How many completions are among their answers, and how many are as SQuAD counts."""
    return {
        "exact match": mean([float(record["is_exact"]) for record in records]),
        "SQuAD exact match": mean([record["exact_match"] for record in records]),
        "SQuAD F1": mean([record["f1"] for record in records]),
    }
