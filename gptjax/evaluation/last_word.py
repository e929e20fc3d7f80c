"""The last word of a passage, as LAMBADA asks for it (Paperno et al. 2016)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from gptjax.choice import continuation_ids
from gptjax.errors import UserError
from gptjax.evaluation.items import read_texts
from gptjax.evaluation.loglikelihood import each_group
from gptjax.evaluation.results import Estimate, Record, exponential, mean
from gptjax.model import Model
from gptjax.text_generation import prompt_ids


def read_passages(path: str | Path) -> list[tuple[str, str]]:
    """Reads passages, each divided into what comes before its last word, and that word.

    The word keeps the space before it, as in lm-evaluation-harness (`tasks/lambada`).

    Args:
        path: JSON Lines with `text`, or else a passage a line.

    Raises:
        UserError: naming the line, if a passage has fewer than two words; or if there are none.
        OSError: if the file cannot be read.
    """
    passages = []
    for place, text in read_texts(path):
        before, space, word = text.strip().rpartition(" ")
        if not before:
            raise UserError(f"{place} is {text!r}; give a passage of two words or more")
        passages.append((before, space + word))
    return passages


def score_last_words(
    model: Model, passages: Sequence[tuple[str, str]], *, batch_size: int = 8
) -> Iterator[tuple[int, Record]]:
    """What a model makes of last words.

    Args:
        model: with a tokenizer.
        passages: as `read_passages` gives them.
        batch_size: the most passages that are read at once.

    Yields:
        The index of a passage and its record: `word`, `logprob` in nats of all its tokens, and
        `is_greedy`, whether each of them is the likeliest.

    Raises:
        UserError: as `loglikelihoods` and `prompt_ids` do.
    """
    groups = [
        [(prompt_ids(model, before), continuation_ids(model, before, word))]
        for before, word in passages
    ]
    for index, [result] in each_group(model, groups, batch_size=batch_size):
        word = passages[index][1]
        yield (
            index,
            {"word": word, "logprob": result.logprob, "is_greedy": result.is_greedy},
        )


def summarize_last_words(records: Sequence[Record]) -> dict[str, Estimate]:
    """`accuracy`, how often greedy decoding gives the word, and its `perplexity`.

    Perplexity is a word's, not a token's: exp of the mean of its nats.
    """
    return {
        "accuracy": mean([float(record["is_greedy"]) for record in records]),
        "perplexity": exponential(mean([-record["logprob"] for record in records])),
    }
