"""Texts that match a regular expression or a JSON schema, token by token.

The device computes the logits; the host follows each text with llguidance and tells which tokens
may come next. Both work at the same time: the forward pass over a token is under way while the host
takes that token in.

Shapes are in the names: B rows (one a prompt and sample), P prompt tokens, V vocabulary, W words of
32 bits that hold one bit a token.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation import (
    DecodeState,
    _check_prompts,
    _prepare,
    decode_step,
    init_cache,
    prefill,
)
from gptjax.layouts import decoding_params
from gptjax.model import Model
from gptjax.params import Params
from gptjax.sampling import (
    Filters,
    FilterValues,
    History,
    Sampling,
    extend_history,
    sample,
    start_history,
)
from gptjax.text_generation import prompt_ids
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, StreamDecoder, Tokenizer

if TYPE_CHECKING:
    import llguidance

# Where only one text can follow, llguidance would allow one division of it into tokens. Which
# division is likely is for the model to say.
_ALL_DIVISIONS = '%llguidance {"no_forcing": true}\n'

# A model that puts whitespace between values seldom stops by itself, so there is an end to it.
_JSON_WHITESPACE = r" |\n {0,32}"


@dataclass(frozen=True)
class Regex:
    r"""A regular expression that the whole of a text must match.

    The syntax is that of Rust's regex crate, which Python's is close to: `.` is any character but a
    newline, `\d` and `\w` are Unicode's, `(?s:.)` is any character. There are no lookarounds, word
    boundaries or backreferences, and `^` and `$` only at the ends.

    Attributes:
        pattern: the expression, in the syntax of Rust's regex crate.

    Raises:
        UserError: if the pattern is not understood.
    """

    pattern: str

    def __post_init__(self) -> None:
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_regex(self.pattern)
        except UnicodeEncodeError as error:
            raise UserError(
                f"the pattern is not UTF-8 at character {error.start}; convert it to UTF-8"
            ) from error
        message = LLMatcher.validate_grammar(grammar)
        if message:
            raise UserError(
                f"the pattern {self.pattern!r} is not understood ({_reason(message)}); give a "
                "regular expression without lookarounds, word boundaries and backreferences"
            )

    def _grammar(self) -> str:
        from llguidance import LLMatcher

        grammar = json.loads(LLMatcher.grammar_from_regex(self.pattern))
        [only] = grammar["grammars"]
        only["lark_grammar"] = _ALL_DIVISIONS + only["lark_grammar"]
        return json.dumps(grammar)


@dataclass(frozen=True)
class JSONSchema:
    """A JSON schema (draft 2020-12) that a text must be valid JSON for.

    An object's properties come in the order in which the schema has them. Between the parts of the
    JSON may be one space, or a newline and up to 32 spaces; nothing stands before or after it. The
    schema's own key "x-guidance", if it has one, says otherwise (see llguidance's documentation of
    JSON schemas, which lists the keywords too).

    Args:
        schema: a mapping, or JSON. Kept as JSON.

    Raises:
        UserError: if the schema is no JSON object, or has keywords that cannot be kept to.
    """

    schema: str | Mapping[str, Any]

    def __post_init__(self) -> None:
        from llguidance import LLMatcher

        given = self.schema
        try:
            values = json.loads(given) if isinstance(given, str) else given
            if not isinstance(values, Mapping):
                raise UserError(f"the schema is {values!r}; give an object: {{'type': 'array'}}")
            text = _dumps(dict(values))
            grammar = LLMatcher.grammar_from_json_schema(text)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the schema is no JSON ({error}); give a mapping or JSON") from error
        object.__setattr__(self, "schema", text)
        message = LLMatcher.validate_grammar(grammar)
        if message:
            raise UserError(
                f"the JSON schema is not understood ({_reason(message)}); change what is named"
            )

    def _grammar(self) -> str:
        from llguidance import LLMatcher

        values = json.loads(str(self.schema))
        values.setdefault("x-guidance", {"whitespace_pattern": _JSON_WHITESPACE})
        return LLMatcher.grammar_from_lark(f"{_ALL_DIVISIONS}start: %json {_dumps(values)}")


def _dumps(values: Any) -> str:
    return json.dumps(values, allow_nan=False)


def _reason(message: str) -> str:
    """The one line of a message of llguidance that says what is wrong."""
    lines = message.splitlines()
    # A pattern that does not parse is drawn first, over several lines.
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return lines[0].rpartition("(in regex): ")[2]


class ConstrainedText(NamedTuple):
    """A text that was drawn under a constraint."""

    text: str
    """Without the prompt."""
    complete: bool
    """Whether the whole text matches. Otherwise it is the beginning of one that would, and the
    number of new tokens was too small, or no token can be drawn that would go on with it."""


def generate_constrained(
    model: Model,
    prompts: str | Sequence[str | Sequence[int]],
    constraint: Regex | JSONSchema,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
) -> list[ConstrainedText]:
    """Continues prompts by texts that match a constraint.

    At each place only those tokens can be drawn with which a text that matches can begin (Willard
    and Louf 2023); penalties, biases, temperature and filters work on what these leave, and of two
    divisions of a text into tokens both are allowed. A text ends where the constraint allows
    nothing after it, or where it matches and a stop token is drawn. So a constraint that has no end
    of its own (`[a-z]+`) ends by the model's choice, or with `max_new_tokens`.

    A prompt's text does not depend on the prompts beside it. The programs compiled are those of a
    number of rows and powers of two that the lengths fit in: a new constraint does not recompile.

    Args:
        model: with a tokenizer, of any kind. Its special tokens are never text.
        prompts: one text or several, or token ids, such as `chat_ids` gives. An empty text is begun
            as in `generate_text`.
        constraint: what the texts must match, without the prompts.
        sampling: how to draw. The model's end-of-text tokens and token ids of `stop` can be drawn
            only where the text matches, and are not part of it.
        key: random key; None is `jax.random.key(0)`.

    Returns:
        The texts, without the prompts, each with whether it is complete; with
        `sampling.num_samples` of n, n for each prompt, one after another.

    Raises:
        UserError: if `stop` holds strings, at which a text would end before it matches; if
            `overflow` is not "error"; if no token of the vocabulary that is not banned can begin a
            text that matches; if the constraint matches no text, or is more than llguidance can
            follow; and as `generate_text` does.
    """
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = [prompt_ids(model, p) if isinstance(p, str) else list(map(int, p)) for p in given]
    tokenizer, config, samples = model.tokenizer, model.config, sampling.num_samples
    if tokenizer is None:
        raise UserError("this model has no tokenizer, and a constraint is one of text; give it one")
    if any(isinstance(stop, str) for stop in sampling.stop):
        raise UserError(
            f"stop is {sampling.stop!r}; under a constraint only token ids can stop a text, so "
            "write its end into the constraint"
        )
    if sampling.overflow != "error":
        raise UserError("a constraint does not slide past the context; set overflow='error'")
    _check_prompts(ids, config, sampling)
    if not ids:
        return []
    call = _prepare(ids, config, sampling, key)
    prompts_BP, length_B, keys_B, _ = call.prompts
    filters, slots = call.static.filters, call.static.slots
    logits_BV, state, history = _read(
        model.params, prompts_BP, length_B, config, slots, samples, filters.penalties
    )
    params = decoding_params(model.params, config)
    begins = [not (isinstance(p, str) and p) for p in given for _ in range(samples)]
    rows = _rows(model, tokenizer, constraint, sampling, begins)
    allowed_BW = _allowed(rows)
    for number, row in enumerate(rows):
        if not (row.is_open or row.matches()):
            raise UserError(
                f"no text that matches can begin after prompt {number // samples}: the vocabulary "
                "has no token for it that is not banned; ban less, or change the constraint"
            )
    for index in range(sampling.max_new_tokens):
        if not any(row.is_open for row in rows):
            break
        token_B, history = _draw(
            logits_BV, allowed_BW, np.int32(index), keys_B, call.draw.values, history, filters
        )
        if index + 1 < sampling.max_new_tokens:
            # Sent off before anybody has seen the tokens. Where they end all rows, it is in vain.
            logits_BV, state = _advance(params, state, token_B, config)
        for row, token in zip(rows, np.asarray(token_B).tolist(), strict=True):
            row.push(token)
        allowed_BW = _allowed(rows)
    return [ConstrainedText(row.text(tokenizer), row.matches()) for row in rows]


@partial(jax.jit, static_argnames=("config", "slots", "samples", "penalties"))
def _read(
    params: Params,
    prompts_BP: jax.Array,
    length_B: jax.Array,
    config: ModelConfig,
    slots: int,
    samples: int,
    penalties: bool,
) -> tuple[jax.Array, DecodeState, History | None]:
    """Reads each prompt once, and gives for each of its samples the logits of the first token."""
    cache = init_cache(config, prompts_BP.shape[0], slots)
    logits_BV, cache = prefill(params, prompts_BP, length_B, cache, config)
    history = start_history(prompts_BP, length_B, config.vocab_size) if penalties else None
    state = DecodeState(cache, jnp.zeros_like(length_B), length_B)
    read = (logits_BV, state, history)
    return (
        read if samples == 1 else jax.tree.map(partial(jnp.repeat, repeats=samples, axis=0), read)
    )


@partial(jax.jit, static_argnames="filters", donate_argnames="history")
def _draw(
    logits_BV: jax.Array,
    allowed_BW: jax.Array | np.ndarray,
    index: jax.Array | np.int32,
    keys_B: jax.Array,
    values: FilterValues,
    history: History | None,
    filters: Filters,
) -> tuple[jax.Array, History | None]:
    """Draws one token a row among those allowed, with the keys that `generate` draws it with."""
    bits_BWb = allowed_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None] & 1
    allowed_BV = bits_BWb.reshape(len(keys_B), -1)[:, : logits_BV.shape[1]] == 1
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
    logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
    token_B = sample(logits_BV, step_keys_B, filters, values, history)
    return token_B, None if history is None else extend_history(history, token_B)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _advance(
    params: Params, state: DecodeState, token_B: jax.Array, config: ModelConfig
) -> tuple[jax.Array, DecodeState]:
    """Reads the drawn tokens."""
    return decode_step(params, state._replace(token_B=token_B), config)


class _Vocabulary(NamedTuple):
    """A model's tokens as llguidance takes them."""

    library: "llguidance.LLTokenizer"
    """Ids 0 to V - 1 are the model's; further ones follow."""
    first_id_V: np.ndarray | None
    """The library's id of each token where it begins a text; None where that is the token's."""


class _Choice(NamedTuple):
    """Which tokens may be drawn at all, each set as bits and without those that are banned."""

    text_W: np.ndarray
    """Tokens that are text."""
    stop_W: np.ndarray
    """Tokens that end a text."""
    stop_ids: frozenset[int]


class _Row:
    """One text as the host follows it.

    Attributes:
        is_open: whether tokens are still to be drawn for it.
        ids: the tokens that it has.
    """

    def __init__(
        self,
        matcher: "llguidance.LLMatcher",
        vocabulary: _Vocabulary,
        choice: _Choice,
        begins: bool,
    ):
        """Begins a text; `begins` says that no other text stands before it."""
        self.is_open = True
        self.ids: list[int] = []
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._choice = choice
        self._begins = begins

    def matches(self) -> bool:
        """Whether the text so far is one that the constraint accepts."""
        return self._matcher.is_accepting()

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, `[W]` uint32; all of them where the text has ended.

        It ends here where nothing may come next but the end.

        Raises:
            UserError: if the constraint is more than llguidance can follow.
        """
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        text_W, stop_W, _ = self._choice
        if self.is_open:
            words = allocate_token_bitmask(1, self._vocabulary.library.vocab_size)
            fill_next_token_bitmask(self._matcher, words)
            if self._matcher.is_error():
                raise self._error()
            first_id_V = self._first_id_V()
            if first_id_V is None:
                words_W = words[0].view(np.uint32)[: len(text_W)]
            else:
                bits = np.unpackbits(words[0].view(np.uint8), bitorder="little")
                words_W = _pack(bits[first_id_V])
            words_W = words_W & text_W
            if words_W.any():
                return words_W | stop_W if self.matches() else words_W
            self.is_open = False
        return np.full_like(text_W, 2**32 - 1)

    def push(self, token: int) -> None:
        """Goes on with a token that was allowed; with none where the text has ended.

        Raises:
            UserError: if the constraint is more than llguidance can follow.
        """
        if token in self._choice.stop_ids:
            self.is_open = False
        if not self.is_open:
            return
        first_id_V = self._first_id_V()
        if not self._matcher.consume_token(token if first_id_V is None else int(first_id_V[token])):
            raise self._error()
        self.ids.append(token)

    def text(self, tokenizer: Tokenizer) -> str:
        """The text so far."""
        decoder = StreamDecoder(tokenizer, continues=not self._begins)
        return "".join([*map(decoder.push, self.ids), decoder.finish()])

    def _first_id_V(self) -> np.ndarray | None:
        return self._vocabulary.first_id_V if self._begins and not self.ids else None

    def _error(self) -> UserError:
        return UserError(
            f"the constraint cannot be followed after {len(self.ids)} tokens "
            f"({_reason(self._matcher.get_error())}): it matches no text, or is more than "
            "llguidance can follow; change it"
        )


def _rows(
    model: Model,
    tokenizer: Tokenizer,
    constraint: Regex | JSONSchema,
    sampling: Sampling,
    begins: list[bool],
) -> list[_Row]:
    """One row for each of `begins`, which tells whether no other text stands before it."""
    from llguidance import LLMatcher

    V = model.config.vocab_size
    # Only these vocabularies are large enough to take time.
    spelled = _bpe_vocabulary if isinstance(tokenizer, BPETokenizer) else _vocabulary
    vocabulary = spelled(tokenizer, V)
    stop = {*model.stop_ids, *(stop for stop in sampling.stop if isinstance(stop, int))}
    is_stop_V = np.isin(np.arange(V), list(stop))
    banned = [*sampling.banned, *(i for i, bias in sampling.logit_bias if bias == -np.inf)]
    may_V = ~np.isin(np.arange(V), banned)
    choice = _Choice(_pack(may_V & ~is_stop_V), _pack(may_V & is_stop_V), frozenset(stop))
    matcher = LLMatcher(vocabulary.library, constraint._grammar(), log_level=0)
    if matcher.is_error():
        raise UserError(f"the constraint is not understood: {_reason(matcher.get_error())}")
    return [_Row(matcher.deep_copy(), vocabulary, choice, at_start) for at_start in begins]


def _allowed(rows: list[_Row]) -> np.ndarray:
    """What each row may go on with, `[B, W]` uint32."""
    return np.stack([row.allowed() for row in rows])


def _pack(bits_V: np.ndarray) -> np.ndarray:
    """`[W]` uint32; the bits after the V-th are 0."""
    words = np.zeros(-(-len(bits_V) // 32), np.uint32)
    packed = np.packbits(bits_V, bitorder="little")
    words.view(np.uint8)[: len(packed)] = packed
    return words


class _Spelled:
    """What llguidance's `TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, tokens: list[bytes]):
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)
        self.bos_token_id = None
        self.special_token_ids = [len(tokens)]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("only asked for where one division of a text is forced")


def _vocabulary(tokenizer: Tokenizer, size: int) -> _Vocabulary:
    """The vocabulary of a model that has `size` tokens, more or fewer than the tokenizer."""
    import llguidance

    inside = first = _spellings(tokenizer, size, begins=False)
    if isinstance(tokenizer, BPETokenizer) and not tokenizer._is_byte_level:
        first = _spellings(tokenizer, size, begins=True)
    differing = [i for i in range(size) if first[i] != inside[i]]
    # With every byte some token can always follow: that this vocabulary has none is no error then.
    tokens = [*inside, *(first[i] for i in differing), *(bytes([byte]) for byte in range(256))]
    library = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Spelled(tokens)))
    first_id_V = None
    if differing:
        first_id_V = np.arange(size)
        first_id_V[differing] = size + np.arange(len(differing))
    return _Vocabulary(library, first_id_V)


_bpe_vocabulary = lru_cache(maxsize=4)(_vocabulary)


def _spellings(tokenizer: Tokenizer, size: int, *, begins: bool) -> list[bytes]:
    """The bytes that each id adds to a text, none for what is never text."""
    special = {tokenizer.bos_id, tokenizer.eos_id}
    if isinstance(tokenizer, BPETokenizer):
        special |= tokenizer._special_ids
        spell = partial(tokenizer._bytes_of, is_first=begins)
    elif isinstance(tokenizer, ByteTokenizer):
        spell = lambda i: bytes([i])  # noqa: E731
    else:
        # A half of a surrogate pair, which no text matches, is no UTF-8.
        spell = lambda i: tokenizer.decode([i]).encode("utf-8", "surrogatepass")  # noqa: E731
    known = min(size, tokenizer.vocab_size)
    spelled = [b"" if i in special else spell(i) for i in range(known)]
    return spelled + [b""] * (size - known)
