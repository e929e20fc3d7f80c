"""The log-likelihood of continuations after contexts: what most evaluations are made of."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.generation import check_prompt
from gptjax.model import Model
from gptjax.reporting import Progress
from gptjax.text_generation import prompt_ids
from gptjax.token_scores import Window, score_windows

Request = tuple[Sequence[int], Sequence[int]]
"""The token ids of a context and of a continuation."""


class Loglikelihood(NamedTuple):
    """What a model makes of a continuation."""

    logprob: float
    """The natural logarithm of its probability: the sum over its tokens."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest, so that greedy decoding gives it."""
    tokens: int
    """How many it has."""


def loglikelihoods(
    model: Model,
    requests: Sequence[Request],
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> list[Loglikelihood]:
    """The log-likelihoods of continuations, each after its context.

    Requests of like lengths share a batch, the longest first; see `score_windows`. Of a context
    that is too long with its continuation the right end is kept, so that all of the model's context
    is used.

    Args:
        model: needs a tokenizer only where a context is empty, which then is what begins a text
            (`prompt_ids`).
        requests: token ids of contexts and of continuations. A continuation may be empty, whose
            likelihood is 1.
        batch_size: the most requests that are read at once.
        progress: whether a bar is shown, and elsewhere than on a terminal a line now and then.

    Returns:
        In the order of the requests.

    Raises:
        UserError: if a continuation is longer than the model's context, an id is outside the
            vocabulary, a context is empty and nothing begins a text, logits are not finite, or
            `batch_size` is below 1.
    """
    results = [Loglikelihood(0.0, True, 0)] * len(requests)
    found = each_loglikelihood(model, requests, batch_size=batch_size)
    with Progress(len(requests), progress, "scoring", "request") as shown:
        for done, (index, result) in enumerate(found, 1):
            results[index] = result
            shown.update(done, "")
    return results


def each_group(
    model: Model, groups: Sequence[Sequence[Request]], *, batch_size: int = 8
) -> Iterator[tuple[int, list[Loglikelihood]]]:
    """As `loglikelihoods` for groups of requests, each with its index when all of it is done."""
    owners = [(index, place) for index, group in enumerate(groups) for place in range(len(group))]
    results: list[dict[int, Loglikelihood]] = [{} for _ in groups]
    requests = [request for group in groups for request in group]
    for number, result in each_loglikelihood(model, requests, batch_size=batch_size):
        index, place = owners[number]
        results[index][place] = result
        if len(results[index]) == len(groups[index]):
            yield index, [results[index][place] for place in range(len(groups[index]))]


def each_loglikelihood(
    model: Model, requests: Sequence[Request], *, batch_size: int = 8
) -> Iterator[tuple[int, Loglikelihood]]:
    """As `loglikelihoods`, but gives the index of a request and its result as batches end.

    Raises:
        UserError: as `loglikelihoods` does.
    """
    context = model.config.context_length
    begins: list[int] | None = None
    rows, parts = [], []
    for number, (before, continuation) in enumerate(requests):
        if len(continuation) > context:
            raise UserError(
                f"the continuation of request {number} has {len(continuation)} tokens, but the "
                f"model's context is {context}; shorten it"
            )
        if not before:
            begins = prompt_ids(model, "") if begins is None else begins
            if not begins:
                raise UserError(
                    f"the context of request {number} is empty, and the tokenizer has no token "
                    "that begins or ends a text; give a context"
                )
            before = begins
        ids = [*before, *continuation]
        check_prompt(f"request {number}", ids, model.config)
        # The last token is only predicted, never read.
        rows.append(np.array(ids[-(context + 1) :], np.int32))
        length = len(rows[-1])
        parts.append(Window(number, 0, length - 1, length - len(continuation)))
    found = score_windows(model.params, model.config, rows, parts, batch_size=batch_size)
    for index, scores in found:
        if not np.isfinite(scores.logprobs).all():
            raise UserError(
                f"the logits of request {index} are not finite; gptjax verify tells which "
                "parameters are not"
            )
        yield (
            index,
            Loglikelihood(
                float(scores.logprobs.sum(dtype=np.float64)),
                bool((scores.ranks == 0).all()),
                len(scores.logprobs),
            ),
        )
