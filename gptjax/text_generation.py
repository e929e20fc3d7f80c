"""Texts and conversations continued: from text to token ids, through `generation`, and back."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from gptjax.errors import UserError
from gptjax.generation import generate, stream
from gptjax.model import Model
from gptjax.sampling import Sampling
from gptjax.speculation import Speculation
from gptjax.tokenizer import BPETokenizer, StreamDecoder, Tokenizer, encode_start


def generate_text(
    model: Model,
    prompts: str | Sequence[str],
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    *,
    speculation: Speculation | None = None,
) -> list[str]:
    """Continues texts.

    Args:
        model: with a tokenizer.
        prompts: one text or several. An empty one starts from the tokenizer's end-of-text token.
        sampling: how to draw. The tokenizer's end-of-text token stops a row as well as
            `sampling.stop` does.
        key: random key; None is `jax.random.key(0)`.
        speculation: as in `generate`.

    Returns:
        The continuations, without the prompts, each cut before the first stop string; with
        `sampling.num_samples` of n, n for each prompt, one after another.

    Raises:
        UserError: if the model has no tokenizer, a text is empty and the tokenizer has no
            end-of-text token, and as `generate` does.
    """
    tokenizer = tokenizer_of(model)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = [prompt_ids(model, text) for text in texts]
    rows = generate(
        model.params,
        ids,
        model.config,
        stopping(model, sampling),
        key,
        speculation=speculation,
    )
    continued = [bool(text) for text in texts for _ in range(sampling.num_samples)]
    return [
        "".join(_pieces(tokenizer, row, sampling, continues))
        for row, continues in zip(rows, continued, strict=True)
    ]


def stream_text(
    model: Model,
    prompt: str | Sequence[int],
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
) -> Iterator[str]:
    """Continues one text, giving the continuation in pieces as it comes.

    Args:
        model: with a tokenizer.
        prompt: a text, or the ids of one (such as `chat_ids` gives).
        sampling: as in `generate_text`, with strings to stop at too.
        key: as in `generate`.

    Yields:
        Pieces of text, none of them empty, that end at whole characters. Joined, they are the
        continuation that `generate_text` gives.

    Raises:
        UserError: as `generate_text` does.
    """
    tokenizer = tokenizer_of(model)
    ids = prompt_ids(model, prompt) if isinstance(prompt, str) else prompt
    tokens = stream(model.params, ids, model.config, stopping(model, sampling), key)
    yield from _pieces(tokenizer, tokens, sampling, isinstance(prompt, str) and bool(prompt))


def _pieces(
    tokenizer: Tokenizer, ids: Iterable[int], sampling: Sampling, continues: bool
) -> Iterator[str]:
    """The text of ids in pieces of whole characters, up to the first stop string."""
    decoder = StoppingDecoder(tokenizer, sampling, continues=continues)
    for i in ids:
        if piece := decoder.push(i):
            yield piece
        if decoder.has_stopped:
            return
    if piece := decoder.finish():
        yield piece


class StoppingDecoder:
    """Decodes ids one by one, up to the first stop string, never half a character.

    Attributes:
        has_stopped: whether a stop string has come up; nothing more is then to be decoded.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, *, continues: bool):
        """Begins a text, or goes on with one, as `StreamDecoder` does."""
        self._decoder = StreamDecoder(tokenizer, continues=continues)
        self._vocab_size = tokenizer.vocab_size
        self._stops = [stop for stop in sampling.stop if isinstance(stop, str)]
        self._held = ""
        self.has_stopped = False

    def push(self, i: int) -> str:
        """The characters that an id completes and that cannot belong to a stop string."""
        # Without ids that the model has rows for and the tokenizer no tokens (padded vocabularies).
        if i >= self._vocab_size:
            return ""
        self._add(self._decoder.push(i))
        if self.has_stopped:
            return self._release(0)
        # What may be the beginning of a stop string waits.
        waiting = max(
            (
                n
                for stop in self._stops
                for n in range(1, len(stop))
                if self._held.endswith(stop[:n])
            ),
            default=0,
        )
        return self._release(waiting)

    def finish(self) -> str:
        """What is left."""
        self._add(self._decoder.finish())
        return self._release(0)

    def _add(self, piece: str) -> None:
        self._held += piece
        ends = [at for at in map(self._held.find, self._stops) if at >= 0]
        if ends:
            self._held = self._held[: min(ends)]
            self.has_stopped = True

    def _release(self, waiting: int) -> str:
        end = len(self._held) - waiting
        ready, self._held = self._held[:end], self._held[end:]
        return ready


def chat_ids(model: Model, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
    """The token ids of a conversation, up to where the model is to answer.

    Args:
        model: with a tokenizer that has a chat template.
        messages: `{"role": "user", "content": "..."}` and the like, in their order. A special token
            that a content spells is encoded as the text it is.
        options: further variables of the template, such as Qwen 3's `enable_thinking=False`.

    Raises:
        UserError: if the model has no chat template, or it refuses the messages.
    """
    tokenizer = tokenizer_of(model)
    if not isinstance(tokenizer, BPETokenizer) or tokenizer.chat_template is None:
        raise UserError(
            "this model has no chat template; use an instruction-tuned model, or generate_text"
        )
    return tokenizer.encode_chat(list(messages), **options)


def generate_chat(
    model: Model,
    messages: Sequence[dict[str, Any]],
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    **options: Any,
) -> str:
    """The model's answer to a conversation.

    Args:
        model: as in `chat_ids`.
        messages: as in `chat_ids`.
        sampling: as in `generate_text`.
        key: as in `generate`.
        options: as in `chat_ids`.

    Returns:
        The text, without what ends it.

    Raises:
        UserError: as `chat_ids` and `generate_text` do.
    """
    return "".join(stream_text(model, chat_ids(model, messages, **options), sampling, key))


def prompt_ids(model: Model, text: str) -> list[int]:
    """The token ids that a text is continued from.

    Those of the text, after what the tokenizer puts before every text (Llama's `<s>`). A text that
    comes to nothing starts from the token that begins a text, or that ends one.

    Raises:
        UserError: if the model has no tokenizer, or the text is no Unicode.
    """
    tokenizer = tokenizer_of(model)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not UTF-8 at character {error.start}; convert it to UTF-8"
        ) from error
    return encode_start(tokenizer, text)


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer; raises UserError where it has none.

    Raises:
        UserError: if it has none.
    """
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer; use generate() with token ids")
    return model.tokenizer


def stopping(model: Model, sampling: Sampling) -> Sampling:
    """With the tokens that end the model's texts among the stops."""
    return sampling.replace(stop=(*sampling.stop, *model.stop_ids))
