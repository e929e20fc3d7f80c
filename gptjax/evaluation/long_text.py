"""Perplexity and bits per byte of long texts, read in windows that overlap."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.errors import UserError
from gptjax.evaluation.results import Estimate, Record, exponential, ratio, scaled
from gptjax.generation import check_prompt
from gptjax.model import Model
from gptjax.text_generation import prompt_ids, tokenizer_of
from gptjax.token_scores import Window, score_windows, windows


@dataclass(frozen=True, eq=False)
class WindowedTexts:
    """Texts as token ids, and the windows that they are read in.

    Attributes:
        texts: the texts.
        rows: for each its token ids, after those that begin a text (`prompt_ids`).
        scored: what of each text is predicted: without the first token where nothing comes before.
        parts: the windows of all.
    """

    texts: list[str]
    scored: list[str]
    rows: list[np.ndarray]
    parts: list[Window]


def window_texts(
    model: Model, texts: Sequence[str], *, context: int | None = None, stride: int | None = None
) -> WindowedTexts:
    """Divides texts into windows.

    Each window reads `context` tokens and begins `stride` tokens after the one before. Every token
    is scored once, by at least `context - stride` tokens before it or all there are. The smaller
    the stride, the more a token is scored by and the longer it takes: `context / stride` passes
    over a text. The scheme is that of "Perplexity of fixed-length models" in the documentation of
    transformers.

    Args:
        model: with a tokenizer.
        texts: each read from its beginning.
        context: tokens that a window reads; None is the model's context, which is the most.
        stride: from 1 to `context`; None is half of it.

    Raises:
        UserError: if an argument is out of range, the model has no tokenizer, a text has ids
            outside the vocabulary, or there is nothing to score.
    """
    most = model.config.context_length
    context = most if context is None else context
    if not 1 <= context <= most:
        raise UserError(f"context is {context}; from 1 to the model's {most}")
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"stride is {stride}; from 1 to the context of {context}")
    begins, tokenizer = prompt_ids(model, ""), tokenizer_of(model)
    rows, scored, parts = [], [], []
    for number, text in enumerate(texts):
        ids = [*begins, *tokenizer.encode(text)]
        first = "" if begins else tokenizer.decode(ids[:1])
        scored.append(text[len(first) :] if len(ids) > 1 else "")
        if ids:
            check_prompt(f"text {number}", ids, model.config)
        rows.append(np.array(ids, np.int32))
        parts += windows(number, len(ids), context, stride)
    if not parts:
        raise UserError("the texts have no token to predict; give longer ones")
    return WindowedTexts(list(texts), scored, rows, parts)


def score_long_texts(
    model: Model, windowed: WindowedTexts, indices: Sequence[int], *, batch_size: int = 8
) -> Iterator[tuple[int, Record]]:
    """Scores windows.

    Args:
        model: as in `window_texts`.
        windowed: from there.
        indices: which windows.
        batch_size: the most that are read at once.

    Yields:
        The place of a window among `indices` and its record, as batches are complete: `text`, the
        number of its text, `tokens` that are scored, and `nats`, their negative log-likelihood.

    Raises:
        UserError: if logits are not finite, or `batch_size` is below 1.
    """
    parts = [windowed.parts[index] for index in indices]
    found = score_windows(model.params, model.config, windowed.rows, parts, batch_size=batch_size)
    for place, scores in found:
        nats = -float(scores.logprobs.sum(dtype=np.float64))
        if not math.isfinite(nats):
            raise UserError(
                f"the logits for text {parts[place].row} are not finite; gptjax verify tells which "
                "parameters are not"
            )
        yield place, {"text": parts[place].row, "tokens": len(scores.logprobs), "nats": nats}


def summarize_long_texts(windowed: WindowedTexts, records: Sequence[Record]) -> dict[str, Estimate]:
    """Perplexity, and what compares models of any tokenizers.

    - `perplexity`: exp of the mean of nats a token;
    - `word perplexity`: of nats a word, what white space divides;
    - `bits per byte` of UTF-8 and `bits per character`.

    Standard errors are over texts; over windows where there is one text. Windows of one text are
    not independent, as the formula takes them to be, so that the latter are somewhat too small.

    Args:
        windowed: from `window_texts`.
        records: of all its windows.
    """
    sizes = np.array(
        [[len(text.encode()), len(text), len(text.split())] for text in windowed.scored]
    )
    nats, tokens = np.zeros((2, len(windowed.texts)))
    for record in records:
        nats[record["text"]] += record["nats"]
        tokens[record["text"]] += record["tokens"]
    if np.count_nonzero(tokens) > 1:
        per_byte, per_character, per_word = (
            ratio(nats.tolist(), size) for size in sizes.T.tolist()
        )
        per_token = ratio(nats.tolist(), tokens.tolist())
    else:
        per_token = ratio(
            [record["nats"] for record in records], [record["tokens"] for record in records]
        )
        per_byte, per_character, per_word = (
            scaled(per_token, tokens.sum() / size if size else math.nan) for size in sizes.sum(0)
        )
    return {
        "perplexity": exponential(per_token),
        "word perplexity": exponential(per_word),
        "bits per byte": scaled(per_byte, 1 / math.log(2)),
        "bits per character": scaled(per_character, 1 / math.log(2)),
    }
