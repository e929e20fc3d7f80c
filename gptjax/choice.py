"""Choice among given continuations: which of some texts a model finds likeliest after a prompt.

Shapes are in the names: N choices, P prompt tokens, T tokens of a choice, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError, nearest
from gptjax.generation import bucket, init_cache, prefill, slot_bucket
from gptjax.model import Model, hidden_states, unembed
from gptjax.params import Params
from gptjax.text_generation import prompt_ids, tokenizer_of
from gptjax.tokenizer import encode_pair

Normalize = Literal["tokens", "none", "bytes"]


class Choice(NamedTuple):
    """What a model makes of some continuations of a prompt."""

    index: int
    """The place of the likeliest; the first of equals."""
    text: str | None
    """The likeliest itself; None where ids were given."""
    logprobs: tuple[float, ...]
    """The log-probability of each continuation, in nats: the sum over its tokens."""
    probabilities: tuple[float, ...]
    """Softmax over the choices of the log-probabilities as they were normalized."""


def choose(
    model: Model, prompt: str, choices: Sequence[str], *, normalize: Normalize = "tokens"
) -> Choice:
    """Chooses among texts by their log-probability after a prompt, all scored in one batch.

    Nothing is put between prompt and choice: begin a choice with the space that belongs there. For
    its tokens see `continuation_ids`.

    Args:
        model: with a tokenizer.
        prompt: the text before. An empty one is begun as in `prompt_ids`.
        choices: the texts to choose among, at least one, none of them empty.
        normalize: what log-probabilities are divided by before they are compared, so that short
            choices have no advantage: the number of "tokens" or of UTF-8 "bytes", or "none". See
            Gao 2021, Multiple Choice Normalization in LM Evaluation.

    Returns:
        Which one, and the log-probabilities of all.

    Raises:
        UserError: if the model has no tokenizer, there are no choices or an empty one, `normalize`
            is unknown, or prompt and choice are longer than the model's context.
    """
    if isinstance(choices, str):
        raise UserError(f"choices is the text {choices!r}; give a list of texts")
    _check_normalize(normalize, get_args(Normalize))
    before = prompt_ids(model, prompt)
    rows = [continuation_ids(model, prompt, text) for text in choices]
    for index, row in enumerate(rows):
        if not row:
            text = choices[index]
            raise UserError(f"choice {index} is {text!r}, which has no tokens; give some text")
    logprobs_N = _logprobs(model.params, before, rows, model.config)
    sizes = [len(text.encode()) for text in choices] if normalize == "bytes" else map(len, rows)
    choice = _chosen(logprobs_N, None if normalize == "none" else list(sizes))
    return choice._replace(text=choices[choice.index])


def continuation_ids(model: Model, prompt: str, text: str) -> list[int]:
    """The tokens of a text that goes on from a prompt, see `tokenizer.encode_pair`."""
    return encode_pair(tokenizer_of(model), prompt, text)[1]


def choose_ids(
    params: Params,
    prompt_ids: Sequence[int],
    choices_ids: Sequence[Sequence[int]],
    config: ModelConfig,
    *,
    normalize: Literal["tokens", "none"] = "tokens",
) -> Choice:
    """Chooses among continuations as `choose` does, all of them given as token ids.

    Compiled once for a number of choices and powers of two that the lengths fit in.

    Args:
        params: as `init_params` makes them.
        prompt_ids: token ids of the prompt, at least one.
        choices_ids: token ids of each choice, of any lengths but 0.
        config: the model.
        normalize: as in `choose`.

    Raises:
        UserError: if there are no choices, the prompt or a choice is empty or has an id outside the
            vocabulary, both together are longer than the model's context, or `normalize` is
            unknown.
    """
    _check_normalize(normalize, ("tokens", "none"))
    rows = [list(map(int, row)) for row in choices_ids]
    logprobs_N = _logprobs(params, list(map(int, prompt_ids)), rows, config)
    return _chosen(logprobs_N, None if normalize == "none" else list(map(len, rows)))


def _chosen(logprobs_N: np.ndarray, sizes: list[int] | None) -> Choice:
    scores_N = logprobs_N if sizes is None else logprobs_N / np.array(sizes)
    weights_N = np.exp(scores_N - scores_N.max())
    return Choice(
        index=int(scores_N.argmax()),
        text=None,
        logprobs=tuple(logprobs_N.tolist()),
        probabilities=tuple((weights_N / weights_N.sum()).tolist()),
    )


def _logprobs(
    params: Params, prompt: list[int], rows: list[list[int]], config: ModelConfig
) -> np.ndarray:
    """The log-probability of each row after the prompt, `[N]` float64."""
    _check_ids(prompt, rows, config)
    longest = max(map(len, rows))
    P = bucket(len(prompt), config.context_length)
    T = bucket(longest, config.context_length, least=4)
    padded_P = np.zeros(P, np.int32)
    padded_P[: len(prompt)] = prompt
    choices_NT = np.zeros((len(rows), T), np.int32)
    for index, row in enumerate(rows):
        choices_NT[index, : len(row)] = row
    # The last token of a choice is never read, so it needs no slot.
    slots = slot_bucket(max(len(prompt) + longest - 1, P), config)
    logprobs_NT = np.asarray(
        _score(params, padded_P, jnp.int32(len(prompt)), choices_NT, config, slots), np.float64
    )
    return np.array([logprobs_NT[index, : len(row)].sum() for index, row in enumerate(rows)])


@partial(jax.jit, static_argnames=("config", "slots"))
def _score(
    params: Params,
    prompt_P: jax.Array,
    length: jax.Array,
    choices_NT: jax.Array,
    config: ModelConfig,
    slots: int,
) -> jax.Array:
    """The log-probability of each token of the choices, `[N, T]` float32; any after their ends."""
    N, T = choices_NT.shape
    # The prompt is read once for all choices.
    logits_1V, cache = prefill(
        params, prompt_P[None], length[None], init_cache(config, 1, slots), config
    )
    cache = jax.tree.map(lambda x: jnp.repeat(x, N, axis=0), cache)
    # Each choice is read up to its last token. Slots past the last one are filling, and dropped.
    slots_NT = jnp.broadcast_to(length + jnp.arange(T - 1), (N, T - 1))
    x_NTD, *_ = hidden_states(params, choices_NT[:, :-1], config, cache=cache, slots=slots_NT)
    first_N1V = jnp.broadcast_to(logits_1V[:, None], (N, 1, logits_1V.shape[-1]))
    logits_NTV = jnp.concatenate([first_N1V, unembed(params, x_NTD, config)], axis=1)
    picked_NT1 = jnp.take_along_axis(logits_NTV, choices_NT[:, :, None], axis=-1)
    return picked_NT1[:, :, 0] - jax.nn.logsumexp(logits_NTV, axis=-1)


def _check_normalize(normalize: str, known: Sequence[str]) -> None:
    if normalize not in known:
        raise UserError(f"unknown normalize {normalize!r}{nearest(str(normalize), known)}")


def _check_ids(prompt: list[int], rows: list[list[int]], config: ModelConfig) -> None:
    if not rows:
        raise UserError("there are no choices; give at least one")
    for name, ids in [("prompt", prompt), *((f"choice {i}", row) for i, row in enumerate(rows))]:
        if not ids:
            raise UserError(f"{name} is empty; give at least one token")
        for token in (min(ids), max(ids)):
            if not 0 <= token < config.vocab_size:
                raise UserError(
                    f"{name} has token id {token}, but ids run from 0 to {config.vocab_size - 1}; "
                    "is it this model's tokenizer?"
                )
        total = len(prompt) + len(ids)
        if ids is not prompt and total > config.context_length:
            raise UserError(
                f"{name} of {len(ids)} tokens after a prompt of {len(prompt)} exceeds the model's "
                f"context of {config.context_length}; shorten one of them by "
                f"{total - config.context_length} tokens"
            )
