"""Chat templates: the Jinja programs of model files that lay messages out as one text.

A template comes with somebody's weights, so it runs in a sandbox, and messages come from somebody
else again, so `disguise` keeps a message from spelling the tokens that end a turn.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gptjax.errors import UserError

if TYPE_CHECKING:
    import jinja2

# Longer than any indentation or rule of a chat, and short enough that a few cost nothing.
_LONGEST_REPETITION = 100_000
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    bos_token: str | None,
    eos_token: str | None,
    **extra: Any,
) -> str:
    """Lays messages out as one text.

    Args:
        template: A Jinja chat template, as in `tokenizer_config.json`.
        messages: `{"role": ..., "content": ...}` each, both strings; further keys are passed on.
        add_generation_prompt: Whether the text ends where the model's turn begins.
        bos_token: What the template writes for `bos_token`; undefined in it where None.
        eos_token: Likewise.
        extra: Further variables of the template.

    Returns:
        The text, with special tokens spelled as the template spells them.

    Raises:
        UserError: The messages are malformed, or the template is broken, refuses them (with its
            own message), or reaches for what the sandbox keeps from it.
    """
    checked = _checked_messages(messages)
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    variables = {
        # Templates ask whether these are none, so they are always there.
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **{name: token for name, token in tokens.items() if token is not None},
        **extra,
    }
    try:
        return _compiled(template).render(messages=checked, **variables)
    except Exception as error:  # A template can make Python raise anything.
        raise UserError(
            f"the chat template failed on these messages ({type(error).__name__}: {error}): give "
            "messages that it takes, or repair the template"
        ) from error


def disguise(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    special: Iterable[str],
    added: Iterable[str],
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Misspells tokens inside messages, so that after rendering only the template's own are left.

    The first character of each spelled token becomes a character that occurs nowhere else. Lengths
    and everything beside the tokens stay, so a template does with the text what it would have done.

    Args:
        messages: As for `render_chat`.
        template: The template that the messages are for.
        special: Tokens that no message may spell.
        added: Tokens outside the learned vocabulary that are not marked special. Where the template
            spells one too it may end a turn, so only the assistant's messages may spell it: there
            it is what the model wrote, and templates look for it.

    Returns:
        The messages, and the table with which `str.translate` restores a text of them; it is empty
        where no message spells a token.

    Raises:
        UserError: The messages are malformed.
    """
    checked = _checked_messages(messages)
    special = {token for token in special if token}
    turns = special | {token for token in added if token and token in template}
    taken = {c for text in (template, *_strings(checked)) for c in text}
    free = (chr(point) for point in _PRIVATE_USE if chr(point) not in taken)
    stand_ins = {first: next(free) for first in sorted({token[0] for token in turns})}
    used: set[str] = set()

    def misspelled(value: Any, tokens: set[str]) -> Any:
        if isinstance(value, Mapping):
            return {key: misspelled(item, tokens) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [misspelled(item, tokens) for item in value]
        if not isinstance(value, str):
            return value
        characters = list(value)
        for place in _spelled(value, tokens):
            used.add(characters[place])
            characters[place] = stand_ins[characters[place]]
        return "".join(characters)

    changed = [misspelled(m, special if m["role"] == "assistant" else turns) for m in checked]
    return changed, {ord(stand_ins[old]): old for old in used}


def _spelled(text: str, tokens: set[str]) -> set[int]:
    """Returns where a token begins, also one that is only begun when the text ends."""
    places = set()
    for token in tokens:
        place = text.find(token)
        while place >= 0:
            places.add(place)
            place = text.find(token, place + 1)
    # Templates trim messages and put their own text, or the next message, right after them.
    end = len(text.rstrip())
    starts = {token[:length] for token in tokens for length in range(1, len(token))}
    longest = max(map(len, tokens), default=0)
    return places | {p for p in range(max(0, end - longest), end) if text[p:end] in starts}


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    legal = 'give a list such as [{"role": "user", "content": "Hello"}]'
    if not isinstance(messages, list | tuple):
        raise UserError(f"messages are a {type(messages).__name__}: {legal}")
    if not messages:
        raise UserError(f"there are no messages: {legal}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"message {number} is a {type(message).__name__}: {legal}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = f"a {type(message[key]).__name__}" if key in message else "missing"
                raise UserError(f"the {key} of message {number} is {found}, not a string: {legal}")
    # Templates take a key that is there for one that has a value.
    return [{key: item for key, item in m.items() if item is not None} for m in messages]


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


@lru_cache(maxsize=16)
def _compiled(template: str) -> "jinja2.Template":
    import jinja2
    import jinja2.exceptions
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the model's words for training; here it is only a body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            # Jinja would go on with an empty text, and the attempt would pass unseen.
            raise jinja2.exceptions.SecurityError(
                f"attribute {attribute!r} of a {type(obj).__name__} is not for templates"
            )

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            too_large = operator == "**" and isinstance(right, int) and right > 64
            for thing, count in ((left, right), (right, left)):
                if isinstance(thing, str | list | tuple) and isinstance(count, int):
                    too_large |= len(thing) * count > _LONGEST_REPETITION
            if too_large:
                raise jinja2.exceptions.SecurityError(
                    f"the result of {operator!r} is larger than any chat needs"
                )
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own writes <, > and & as escapes, for web pages.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
