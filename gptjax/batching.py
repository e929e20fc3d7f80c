"""Continuous batching: any number of prompts over a fixed number of rows on the device.

A row whose prompt has come to its end is given the next one, while the others go on (Yu et al.
2022, "Orca", section 3.2). Shapes are in the names: B rows, R of them that begin together.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation import (
    Continuation,
    DecodeState,
    Draw,
    Drawn,
    Progress,
    Static,
    advance,
    bucket,
    check_length,
    check_prompt,
    check_sampling,
    continuation,
    drawn_so_far,
    init_cache,
    nothing_drawn,
    pack,
    prompt_keys,
    sample_keys,
    split_draw,
    start,
)
from gptjax.layouts import decoding_params
from gptjax.model import Model
from gptjax.params import Params
from gptjax.sampling import Sampling, start_history
from gptjax.text_generation import (
    StoppingDecoder,
    chat_ids,
    prompt_ids,
    stopping,
    tokenizer_of,
)

READ_AHEAD = 4
"""How many requests for each slot are read before they are begun. Their lengths size the cache, and
the last ones are begun in the order of their lengths."""

PREFILL_TOKENS = 512
"""The most tokens of several prompts that are read at once: more would not be faster, and would be
more programs to compile."""

WATCHED_STEPS = 8
"""The most tokens that are drawn for a row before what watches it sees them."""


class Request(NamedTuple):
    """One sample of one prompt, in a queue."""

    index: int
    """Of the prompt: with `sample` it decides about the random key."""
    sample: int
    """Its number among those of the prompt, from 0."""
    tokens: list[int]
    """The ids of the prompt."""
    limit: int
    """The most tokens to add."""
    continues: bool = False
    """Whether a text goes on from the tokens, as `StoppingDecoder` needs to know."""
    origin: Any = None
    """What the caller wants to have back with the result."""


Watch = Callable[[list[int]], bool]
"""Is given a row's new tokens, some at a time, and says whether the row may end with them."""


@dataclass(frozen=True)
class Completion:
    """How a text goes on."""

    text: str
    """Cut before the first stop string."""
    continuation: Continuation
    """The tokens of it, up to the one that completes a stop string."""


def generate_queue(
    params: Params,
    prompt_tokens: Iterable[Sequence[int]],
    config: ModelConfig,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    *,
    slots: int = 16,
    max_new_tokens: Iterable[int] | None = None,
) -> Iterator[tuple[int, Continuation]]:
    """Continues any number of prompts, a fixed number of them at a time.

    Each continuation is the one that `generate_continuations` gives for all prompts as one batch,
    whatever the number of slots, and comes as soon as it is complete. Its slot is then filled
    again, while the others stay where they are. Decoding is compiled once for each bucket that the
    length of the cache is rounded up to, which grows and shrinks with what the prompts in hand
    need; reading prompts once for each power of two that their length fits in and each power of two
    of prompts that begin together.

    Prompts are begun in the order in which they come. When no more are to come, those with the
    most new tokens are begun first, so that the others fill the slots beside them to the end.

    Args:
        params: as in `generate`.
        prompt_tokens: token ids of each prompt. May be a generator, and endless: `READ_AHEAD` for
            each slot is the most that are read before they are begun.
        config: as in `generate`.
        sampling: as in `generate_continuations`; `overflow` must be "error".
        key: as in `generate`.
        slots: how many prompts are continued at a time, samples counted.
        max_new_tokens: for each prompt the most tokens to add, in place of that of `sampling`. Read
            together with the prompts.

    Yields:
        The index of a prompt and its continuation. With `sampling.num_samples` of n, each sample by
        itself, with the index that it has in the list of `generate_continuations`: for prompt i
        those from n · i to n · i + n - 1.

    Raises:
        UserError: at once, if `slots` is less than 1, `sampling` does not fit the model, or
            `overflow` is "slide". When it is reached, after the continuations of the prompts before
            it: if a prompt is illegal, as `generate` does; or if there are not as many seeds or
            numbers of new tokens as prompts. An error that `prompt_tokens` raises comes then too.
    """

    def requests() -> Iterator[Request]:
        for index, prompt, limit in _numbered(prompt_tokens, max_new_tokens, sampling):
            tokens = list(map(int, prompt))
            yield from requests_of(f"prompt {index}", index, tokens, limit, config, sampling)

    found = run_queue(params, requests(), config, sampling, key, slots=slots)
    n = sampling.num_samples
    return ((request.index * n + request.sample, made) for request, made in found)


def generate_texts(
    model: Model,
    prompts: Iterable[str | Sequence[dict[str, Any]]],
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    *,
    slots: int = 16,
    max_new_tokens: Iterable[int] | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Continues any number of texts and conversations, a fixed number of them at a time.

    Each is continued as `generate_text` and `generate_chat` do it, by the random key that it has in
    the batch of all. A text that has come to a stop string gives its slot to the next one.

    Args:
        model: with a tokenizer.
        prompts: texts, and conversations as `chat_ids` takes them; as `prompt_tokens` in
            `generate_queue`.
        sampling: as in `generate_text`; `overflow` must be "error".
        key: as in `generate`.
        slots: as in `generate_queue`.
        max_new_tokens: as in `generate_queue`.

    Yields:
        The index of a prompt and its completion, as `generate_queue` does.

    Raises:
        UserError: as `generate_queue`, `prompt_ids` and `chat_ids` do; at once if the model has no
            tokenizer.
    """

    def requests() -> Iterator[Request]:
        for index, prompt, limit in _numbered(prompts, max_new_tokens, sampling):
            yield from text_requests(f"prompt {index}", index, prompt, limit, model, sampling)

    n = sampling.num_samples
    found = complete(model, requests(), sampling, key, slots=slots)
    return ((request.index * n + request.sample, made) for request, made in found)


def complete(
    model: Model,
    requests: Iterable[Request],
    sampling: Sampling,
    key: jax.Array | None,
    *,
    slots: int,
) -> Iterator[tuple[Request, Completion]]:
    """Continues what `text_requests` makes, as `generate_texts` says.

    Args:
        model: with a tokenizer.
        requests: from `text_requests`.
        sampling: as in `generate_texts`.
        key: as in `generate`.
        slots: as in `generate_queue`.

    Yields:
        A request and its completion, as completions end.
    """
    tokenizer = tokenizer_of(model)

    def decoder(request: Request) -> StoppingDecoder:
        return StoppingDecoder(tokenizer, sampling, continues=request.continues)

    def watch(request: Request) -> Watch:
        seen = decoder(request)

        def may_end(tokens: list[int]) -> bool:
            for token in tokens:
                seen.push(token)
            return seen.has_stopped

        return may_end

    found = run_queue(
        model.params,
        requests,
        model.config,
        stopping(model, sampling),
        key,
        slots=slots,
        watch=watch if any(isinstance(stop, str) for stop in sampling.stop) else None,
    )
    return ((request, _completion(made, decoder(request))) for request, made in found)


def _completion(made: Continuation, decoder: StoppingDecoder) -> Completion:
    text, count = "", 0
    for token in made.tokens:
        text += decoder.push(token)
        count += 1
        if decoder.has_stopped:
            break
    else:
        text += decoder.finish()
    if decoder.has_stopped:
        made = Continuation(
            made.tokens[:count],
            "stop",
            made.logprobs and made.logprobs[:count],
            made.top_logprobs and made.top_logprobs[:count],
        )
    return Completion(text, made)


def _numbered(
    prompts: Iterable[Any], limits: Iterable[int] | None, sampling: Sampling
) -> Iterator[tuple[int, Any, int]]:
    """Each prompt with its index and the most tokens to add to it."""
    most = itertools.repeat(sampling.max_new_tokens) if limits is None else iter(limits)
    seeds, count = sampling.seeds, 0
    for index, prompt in enumerate(prompts):
        count = index + 1
        limit = next(most, None)
        if limit is None:
            raise UserError(f"max_new_tokens has {index} numbers and no more; give one a prompt")
        if seeds is not None and len(seeds) < count:
            raise UserError(f"{len(seeds)} seeds and more prompts; one a prompt")
        yield index, prompt, limit
    if limits is not None and next(most, None) is not None:
        raise UserError(f"max_new_tokens has more than {count} numbers, one for each prompt")
    if seeds is not None and len(seeds) > count:
        raise UserError(f"{len(seeds)} seeds for {count} prompts; one a prompt")


def text_requests(
    name: str,
    index: int,
    prompt: str | Sequence[dict[str, Any]],
    limit: int,
    model: Model,
    sampling: Sampling,
) -> Iterator[Request]:
    """What is asked for a text or a conversation, which errors call by its name.

    Args:
        name: of the prompt, for errors.
        index: of the prompt.
        prompt: a text, or messages as `chat_ids` takes them.
        limit: the most tokens to add.
        model: with a tokenizer.
        sampling: as in `generate_texts`.

    Yields:
        A request for each sample.

    Raises:
        UserError: as `prompt_ids`, `chat_ids` and `requests_of` do, with the name.
    """
    try:
        tokens = prompt_ids(model, prompt) if isinstance(prompt, str) else chat_ids(model, prompt)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    continues = isinstance(prompt, str) and bool(prompt)
    for request in requests_of(name, index, tokens, limit, model.config, sampling):
        yield request._replace(continues=continues)


def requests_of(
    name: str, index: int, tokens: list[int], limit: int, config: ModelConfig, sampling: Sampling
) -> Iterator[Request]:
    """What is asked for a prompt, which errors call by its name: each of its samples.

    Args:
        name: of the prompt, for errors.
        index: of the prompt.
        tokens: its ids.
        limit: the most tokens to add.
        config: the model.
        sampling: as in `generate_queue`.

    Yields:
        A request for each sample.

    Raises:
        UserError: if the prompt is empty, not of this model or too long, or the limit is negative.
    """
    if limit < 0:
        raise UserError(f"{name}: max_new_tokens is {limit}; at least 0")
    check_prompt(name, tokens, config)
    check_length(name, tokens, limit, config)
    for sample in range(sampling.num_samples):
        yield Request(index, sample, tokens, limit)


def run_queue(
    params: Params,
    requests: Iterable[Request],
    config: ModelConfig,
    sampling: Sampling,
    key: jax.Array | None,
    *,
    slots: int,
    watch: Callable[[Request], Watch] | None = None,
) -> Iterator[tuple[Request, Continuation]]:
    """Continues requests as `generate_queue` says.

    Args:
        params: as in `generate`.
        requests: that fit the model, of any indices in any order.
        config: the model.
        sampling: how to draw; its numbers of tokens and samples do not count here.
        key: as in `generate`.
        slots: as in `generate_queue`.
        watch: makes what watches a request. A row that may end has in the end all tokens that were
            seen, perhaps more, and "length" as its finish.

    Raises:
        UserError: as `generate_queue` does.
    """
    if slots < 1:
        raise UserError(f"slots is {slots}; at least 1")
    if sampling.overflow != "error":
        raise UserError("a queue does not slide past the context; set overflow='error'")
    check_sampling(config, sampling)
    return _Queue(params, requests, config, sampling, key, slots, watch).run()


class _Waiting:
    """Requests that have been read and not begun."""

    def __init__(self, requests: Iterable[Request], most: int):
        self.requests: deque[Request] = deque()
        self.is_last = False
        """Whether no more are to come after these."""
        self.error: Exception | None = None
        """What came instead."""
        self._source = iter(requests)
        self._most = most

    def fill(self) -> None:
        """Reads as many as may be read ahead."""
        while not self.is_last and len(self.requests) < self._most:
            try:
                self.requests.append(next(self._source))
            except StopIteration:
                self._end()
            except Exception as error:
                # Raised when what is in hand is complete, so that no work is lost.
                self.error = error
                self._end()

    def _end(self) -> None:
        self.is_last = True
        self.requests = deque(sorted(self.requests, key=lambda request: -request.limit))


class _Row:
    """A request that has been begun."""

    def __init__(self, request: Request, watch: Watch | None):
        self.request = request
        self._watch = watch
        self._seen = 0

    def may_end(self, drawn: Drawn, row: int) -> bool:
        """Whether what watches the request has seen enough."""
        if self._watch is None:
            return False
        new = drawn.out_BN[row, self._seen : drawn.count_B[row]].tolist()
        self._seen += len(new)
        return self._watch(new)


class _Queue:
    """The rows on the device, and what is in them."""

    def __init__(
        self,
        params: Params,
        requests: Iterable[Request],
        config: ModelConfig,
        sampling: Sampling,
        key: jax.Array | None,
        slots: int,
        watch: Callable[[Request], Watch] | None,
    ):
        # For prompts too: a loop over stacked blocks copies each out of the stack, which takes as
        # long on a CPU as reading a short prompt.
        self._params = decoding_params(params, config)
        self._config, self._sampling, self._key = config, sampling, key
        self._draw, self._static = split_draw(sampling, config)
        self._waiting = _Waiting(requests, READ_AHEAD * slots)
        self._new_watch = watch
        self._slots = slots
        self._rows: list[_Row | None] = []
        self._progress: Progress | None = None

    def run(self) -> Iterator[tuple[Request, Continuation]]:
        self._waiting.fill()
        rows = self._slots
        if self._waiting.is_last:
            rows = bucket(max(len(self._waiting.requests), 1), rows, least=1)
        self._rows = [None] * rows
        complete: list[tuple[Request, Continuation]] = []
        while True:
            complete += self._refill()
            drawn = self._advance() if any(self._rows) else None
            # While the device is at work:
            self._waiting.fill()
            yield from complete
            complete = []
            if drawn is not None:
                complete = list(self._collect(jax.tree.map(np.asarray, drawn)))
            elif not self._waiting.requests:
                break
        if self._waiting.error is not None:
            raise self._waiting.error

    def _refill(self) -> list[tuple[Request, Continuation]]:
        """Begins as many requests as there are free rows; returns those that ask for nothing."""
        self._resize()
        free = [row for row, used in enumerate(self._rows) if used is None]
        waiting, begun, complete = self._waiting.requests, [], []
        while waiting and len(begun) < len(free):
            request = waiting.popleft()
            if request.limit:
                begun.append(request)
            else:
                told = None if self._static.logprobs is None else []
                complete.append((request, Continuation([], "length", told, told)))
        for width, group in _groups(begun, self._config):
            rows, free = free[: len(group)], free[len(group) :]
            self._insert(width, group, rows)
        return complete

    def _resize(self) -> None:
        """Gives the rows room for all that is in hand, and not twice as much."""
        known = [used.request for used in self._rows if used] + list(self._waiting.requests)
        need = max((_slots_needed(request, self._config) for request in known), default=0)
        slots = self._static.slots
        if slots // 2 < need <= slots or not need:
            return
        slots = bucket(need, self._config.context_length, parts=2)
        self._static = self._static._replace(slots=slots, room=slots)
        if self._progress is not None:
            self._progress = _resized(self._progress, self._config, self._static)

    def _insert(self, width: int, group: list[Request], rows: list[int]) -> None:
        """Reads the prompts of a group and puts them into rows."""
        keys_R = _keys(group, self._sampling, self._key)
        prompts = pack([r.tokens for r in group], width, keys_R, [r.limit for r in group])
        static = self._static._replace(slots=width, room=1)
        new = start(self._params, prompts, self._draw, self._config, static)
        if self._progress is None:
            keys_B = jnp.repeat(keys_R[:1], len(self._rows))
            self._progress = _empty(keys_B, self._config, self._static)
        self._progress = _put(self._progress, new, np.array(rows, np.int32))
        for row, request in zip(rows, group, strict=True):
            watch = None if self._new_watch is None else self._new_watch(request)
            self._rows[row] = _Row(request, watch)

    def _advance(self) -> Drawn:
        """Draws until rows come free, and returns what has been drawn, without waiting for it."""
        is_free_B = np.array([used is None for used in self._rows])
        used = int(np.sum(~is_free_B))
        steps = self._config.context_length if self._new_watch is None else WATCHED_STEPS
        self._progress, drawn = _advance(
            self._params,
            self._progress,
            is_free_B,
            jnp.int32(steps),
            jnp.int32(used - 1),
            self._draw,
            self._config,
            self._static,
        )
        return drawn

    def _collect(self, drawn: Drawn) -> Iterator[tuple[Request, Continuation]]:
        """Takes what has come to its end out of the rows."""
        for row, used in enumerate(self._rows):
            if used is None:
                continue
            has_ended = drawn.stopped_B[row] or drawn.count_B[row] >= used.request.limit
            if has_ended or used.may_end(drawn, row):
                self._rows[row] = None
                yield used.request, continuation(drawn, row)


def _slots_needed(request: Request, config: ModelConfig) -> int:
    # The last token drawn is never read, so it needs no slot.
    width = bucket(len(request.tokens), config.context_length)
    return max(len(request.tokens) + request.limit - 1, width) if request.limit else 0


def _groups(requests: list[Request], config: ModelConfig) -> Iterator[tuple[int, list[Request]]]:
    """Requests that are read together, and the width that their tokens are filled up to.

    As many as a power of two, so that no row is filling.
    """
    same: dict[int, list[Request]] = {}
    for request in requests:
        same.setdefault(bucket(len(request.tokens), config.context_length), []).append(request)
    for width, group in same.items():
        while group:
            most = min(len(group), max(PREFILL_TOKENS // width, 1))
            size = 1 << (most.bit_length() - 1)
            yield width, group[:size]
            group = group[size:]


def _keys(group: list[Request], sampling: Sampling, key: jax.Array | None) -> jax.Array:
    keys_R = prompt_keys([request.index for request in group], sampling, key)
    samples = np.array([request.sample for request in group], np.int32)
    return sample_keys(keys_R, samples) if samples.any() else keys_R


def _no_requests(keys_B: jax.Array, config: ModelConfig, static: Static) -> Progress:
    """Rows with nothing in them; any keys."""
    none_B = jnp.zeros(len(keys_B), jnp.int32)
    history = None
    if static.filters.penalties:
        history = start_history(none_B[:, None], none_B, config.vocab_size)
    state = DecodeState(init_cache(config, len(keys_B), static.slots), none_B, none_B)
    return nothing_drawn(state, keys_B, none_B, history, static)


_empty = jax.jit(_no_requests, static_argnames=("config", "static"))


@partial(jax.jit, static_argnames=("config", "static"))
def _resized(progress: Progress, config: ModelConfig, static: Static) -> Progress:
    """The same with longer or shorter caches, and room for as many tokens."""

    def fit(new: jax.Array, old: jax.Array) -> jax.Array:
        both = tuple(slice(min(sizes)) for sizes in zip(new.shape, old.shape, strict=True))
        return new.at[both].set(old[both])

    return jax.tree.map(fit, _no_requests(progress.keys_B, config, static), progress)


@partial(jax.jit, donate_argnames="progress")
def _put(progress: Progress, new: Progress, row_R: jax.Array) -> Progress:
    """With new rows in place of some, whose caches and room may be shorter."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[(row_R, *map(slice, new.shape[1:]))].set(new)

    return jax.tree.map(put, progress, new)


@partial(jax.jit, static_argnames=("config", "static"), donate_argnames="progress")
def _advance(
    params: Params,
    progress: Progress,
    is_free_B: jax.Array,
    steps: jax.Array,
    enough: jax.Array,
    draw: Draw,
    config: ModelConfig,
    static: Static,
) -> tuple[Progress, Drawn]:
    # A row that is free may have been taken from its request before it came to its end.
    progress = progress._replace(stopped_B=progress.stopped_B | is_free_B)
    progress = advance(params, progress, steps, draw, config, static, enough=enough)
    return progress, drawn_so_far(progress)
