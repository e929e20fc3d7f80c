"""Constrained texts against derivatives of patterns, the full forward, and `re` and `json`."""

import itertools
import json
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2, MODERN, STYLES, random_params
from small_tokenizers import TEXTS, chat_like, llama_like, needed_smollm2, random_unicode

from gptjax import constrained as module
from gptjax.config import ModelConfig
from gptjax.constrained import ConstrainedText, JSONSchema, Regex, generate_constrained
from gptjax.errors import UserError
from gptjax.model import Model, forward
from gptjax.sampling import Sampling, split_sampling
from gptjax.text_generation import generate_text, prompt_ids
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

PADDED = 3
"""Rows of the embedding that the tokenizer has no tokens for."""
ANYTHING = Regex("(?s:.*)")
run = jax.jit(forward, static_argnames="config")


class Words:
    """A tokenizer that is none of gptjax's: several tokens spell the same, and one ends a text."""

    words = ("a", "b", "c", "ab", "bc", "abc", "aa", "cb", "<end>")
    vocab_size = len(words)
    bos_id = None
    eos_id = vocab_size - 1

    def encode(self, text: str) -> list[int]:
        return [self.words.index(letter) for letter in text]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        return "".join(self.words[i] for i in ids)

    def to_dict(self) -> dict[str, Any]:
        return {}


def model_of(tokenizer: Tokenizer, rng: np.random.Generator, context: int = 128) -> Model:
    config = GPT2.replace(vocab_size=tokenizer.vocab_size + PADDED, context_length=context)
    return Model(config, random_params(config, rng), tokenizer)


def unwanted(model: Model) -> tuple[int, ...]:
    """The ids that are no text: special tokens, and those that the tokenizer does not have."""
    tokenizer, special = model.tokenizer, set()
    assert tokenizer is not None
    if isinstance(tokenizer, BPETokenizer):
        added = tokenizer._library.get_added_tokens_decoder().items()
        special = {i for i, token in added if token.special}
    elif tokenizer.eos_id is not None:
        special = {tokenizer.eos_id}
    return (*special, *range(tokenizer.vocab_size, model.config.vocab_size))


# Patterns as trees: ("one", letters), ("cat", a, b), ("alt", a, b), ("rep", a, least, most).
# A derivative is what may follow on a letter (Brzozowski 1964).
NOTHING, EMPTY = ("alt",), ("cat",)


def random_tree(rng: np.random.Generator, depth: int) -> tuple:
    kind = "one" if depth == 0 else rng.choice(["one", "cat", "alt", "rep"])
    if kind == "one":
        return ("one", "".join(sorted(set(rng.choice(list("abc"), 2)))))
    if kind == "rep":
        least = int(rng.integers(0, 3))
        most = None if rng.random() < 0.3 else least + int(rng.integers(0, 3))
        return ("rep", random_tree(rng, depth - 1), least, most)
    return (str(kind), *(random_tree(rng, depth - 1) for _ in range(rng.integers(2, 4))))


def pattern(tree: tuple) -> str:
    kind, *parts = tree
    if kind == "one":
        return f"[{parts[0]}]"
    if kind == "rep":
        most = "" if parts[2] is None else parts[2]
        return f"(?:{pattern(parts[0])}){{{parts[1]},{most}}}"
    return "(?:" + ("|" if kind == "alt" else "").join(map(pattern, parts)) + ")"


def accepts_empty(tree: tuple) -> bool:
    kind, *parts = tree
    if kind == "rep":
        return parts[1] == 0 or accepts_empty(parts[0])
    return kind != "one" and (all if kind == "cat" else any)(map(accepts_empty, parts))


def derivative(tree: tuple, letter: str) -> tuple:
    kind, *parts = tree
    if kind == "one":
        return EMPTY if letter in parts[0] else NOTHING
    if kind == "alt":
        return join("alt", [derivative(part, letter) for part in parts])
    if kind == "rep":
        inner, least, most = parts
        if most == 0:
            return NOTHING
        rest = ("rep", inner, max(least - 1, 0), None if most is None else most - 1)
        return join("cat", [derivative(inner, letter), rest])
    if not parts:
        return NOTHING
    first = join("cat", [derivative(parts[0], letter), *parts[1:]])
    if not accepts_empty(parts[0]):
        return first
    return join("alt", [first, derivative(("cat", *parts[1:]), letter)])


def join(kind: str, parts: list[tuple]) -> tuple:
    """As a tree with `NOTHING` written for every pattern that matches no text."""
    if kind == "cat":
        return NOTHING if NOTHING in parts else ("cat", *parts)
    kept = tuple(part for part in dict.fromkeys(parts) if part != NOTHING)
    return kept[0] if len(kept) == 1 else ("alt", *kept)


def after(tree: tuple, text: str) -> tuple:
    for letter in text:
        tree = derivative(tree, letter)
    return tree


def followers(tree: tuple, text: str) -> tuple[list[int], bool]:
    """Tokens of `Words` that may follow, the end among them where the text may end."""
    rest = after(tree, text)
    ids = [i for i, word in enumerate(Words.words[:-1]) if after(rest, word) != NOTHING]
    ends = accepts_empty(rest)
    return ([*ids, Words.eos_id] if ids and ends else ids), ends


@pytest.mark.parametrize("prompt", ["", "ab"])
def test_greedy_choice_is_the_likeliest_of_what_may_follow(
    prompt: str, rng: np.random.Generator
) -> None:
    model = model_of(Words(), rng)
    ids = prompt_ids(model, prompt)
    checked = 0
    for _ in range(12):
        tree = random_tree(rng, 3)
        # An end that is far less likely lets the texts grow.
        bias = {Words.eos_id: float(rng.choice([-3.0, 0.0]))}
        sampling = Sampling(max_new_tokens=8, temperature=0, logit_bias=tuple(bias.items()))
        text, tokens, complete = "", np.zeros((1, 16), np.int32), False
        tokens[0, : len(ids)] = ids
        for place in range(len(ids), len(ids) + 9):
            allowed, complete = followers(tree, text)
            if not allowed or place == len(ids) + 8:
                break
            logits = np.asarray(run(model.params, tokens, model.config))[0, place - 1].copy()
            logits[Words.eos_id] += bias[Words.eos_id]
            best = allowed[int(logits[allowed].argmax())]
            checked += len(allowed) > 1
            if best == Words.eos_id:
                break
            tokens[0, place] = best
            text += Words.words[best]
        [got] = generate_constrained(model, prompt, Regex(pattern(tree)), sampling)
        assert got == (text, complete), pattern(tree)
        assert complete == (re.fullmatch(pattern(tree), text) is not None)
    assert checked > 5


def test_draws_have_the_probabilities_of_the_full_forward(rng: np.random.Generator) -> None:
    """Over a finite language, of all divisions into tokens, by chi-square."""
    model = model_of(Words(), rng)
    language = ["a", "ab", "abc", "aab", "cb", "b"]
    ids = prompt_ids(model, "ac")
    temperature = 2.0
    expected = dict.fromkeys(language, 0.0)

    def spread(text: str, drawn: list[int], probability: float) -> None:
        allowed = [
            i
            for i, word in enumerate(Words.words[:-1])
            if any(whole.startswith(text + word) for whole in language)
        ]
        if not allowed:
            expected[text] += probability
            return
        allowed += [Words.eos_id] * (text in language)
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(ids + drawn)] = ids + drawn
        logits = np.asarray(run(model.params, tokens, model.config), np.float64)
        weights = np.exp(logits[0, len(ids + drawn) - 1, allowed] / temperature)
        for i, share in zip(allowed, weights / weights.sum(), strict=True):
            if i == Words.eos_id:
                expected[text] += probability * share
            else:
                spread(text + Words.words[i], [*drawn, i], probability * share)

    spread("", [], 1.0)
    assert sum(expected.values()) == pytest.approx(1)
    draws = 3000
    sampling = Sampling(max_new_tokens=5, temperature=temperature, num_samples=draws)
    key = jax.random.key(int(rng.integers(2**31)))
    got = generate_constrained(model, "ac", Regex("|".join(language)), sampling, key)
    assert all(complete for _, complete in got)
    counts = np.array([sum(text == word for text, _ in got) for word in language])
    assert counts.sum() == draws
    wanted = draws * np.array([expected[word] for word in language])
    # The 99.99 % quantile of chi-square at 5 degrees of freedom is 25.7. What is expected less
    # than five times is put together.
    rare = wanted < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    assert np.sum((counts - wanted) ** 2 / np.maximum(wanted, 1)) < 25.7


PATTERNS = [
    r"(?:yes|no|the (?:cat|hat)s?)",
    r"[0-9]{4}-[01][0-9]-[0-3][0-9]",
    r"(?:[a-e]{2,4} ){1,3}\.",
    r"[日本é🙂]{2,4}",
    r"(?s:.{1,4})",
    r" the mat| the|the mat|",
    r"\n?<\|endoftext\|>|<s>|<think>",
]
TOKENIZERS = [
    ByteTokenizer(),
    chat_like(),
    llama_like(),
    METASPACE := llama_like(metaspace=True),
    CharTokenizer.from_text(
        "".join(PATTERNS) + "abcdehimnorsty0123456789" + " \n日本é🙂<|endoftext|>"
    ),
]
NAMES = ["bytes", "byte-level", "prepend", "metaspace", "characters"]
OF_ALL_KINDS = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=NAMES)


@OF_ALL_KINDS
def test_texts_match(tokenizer: Tokenizer, rng: np.random.Generator) -> None:
    model = model_of(tokenizer, rng)
    # Special tokens and rows without tokens are the likeliest of all, and still never text.
    bias = tuple((i, 30.0) for i in unwanted(model))
    prompts = ["the hat", "é", ""] if tokenizer.eos_id is not None else ["the hat", "é", "b"]
    for regex, biased in itertools.product(PATTERNS, (True, False)):
        sampling = Sampling(
            max_new_tokens=48,
            num_samples=3,
            seeds=tuple(rng.integers(2**31, size=3).tolist()),
            logit_bias=bias if biased else (),
        )
        for text, complete in generate_constrained(model, prompts, Regex(regex), sampling):
            assert complete, (regex, text)
            assert re.fullmatch(regex, text), (regex, text)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "blue", None]}, "maxItems": 2},
        "home": {
            "type": "object",
            "properties": {"flat": {"type": "boolean"}, "lat": {"enum": [1.5, -2]}},
            "required": ["lat"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS[:3], ids=NAMES[:3])
def test_json_keeps_to_its_schema(tokenizer: Tokenizer, rng: np.random.Generator) -> None:
    model = model_of(tokenizer, rng, context=1200)
    sampling = Sampling(
        # More than the longest text has, with all of the whitespace that may be.
        max_new_tokens=1100,
        num_samples=4,
        seeds=tuple(rng.integers(2**31, size=2).tolist()),
    )
    finished = generate_constrained(model, ["the hat", ""], JSONSchema(SCHEMA), sampling)
    for text, complete in finished:
        assert complete, text
        value = json.loads(text)
        assert list(value) == [key for key in SCHEMA["properties"] if key in value]
        assert set(SCHEMA["required"]) <= set(value)
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 6
        assert type(value["age"]) is int
        assert 0 <= value["age"] <= 120
        assert len(value.get("tags", [])) <= 2
        assert set(value.get("tags", [])) <= {"red", "blue", None}
        assert {"lat"} <= set(value["home"]) <= {"flat", "lat"}
        assert value["home"]["lat"] in (1.5, -2)
        assert isinstance(value["home"].get("flat", True), bool)
    # Whitespace between the parts comes to an end, however likely it is.
    spaces = tokenizer.encode("\n ")
    eager = sampling.replace(logit_bias=tuple((i, 50.0) for i in set(spaces)), max_new_tokens=400)
    flags = JSONSchema({"type": "array", "items": {"type": "boolean"}, "maxItems": 1})
    for text, complete in generate_constrained(model, ["the hat", ""], flags, eager):
        assert complete, text
        assert json.loads(text) in ([], [True], [False])
        assert re.search(r"\s", text)


def test_whitespace_is_as_the_schema_says(rng: np.random.Generator) -> None:
    model = model_of(ByteTokenizer(), rng)
    schema = {"const": [True, {"a": 1}]}
    loose, tight = schema, {**schema, "x-guidance": {"whitespace_flexible": False}}
    sampling = Sampling(max_new_tokens=90, num_samples=8, logit_bias=((32, 30.0),))
    for given, spaced in ((loose, True), (tight, False)):
        texts = [t.text for t in generate_constrained(model, "a", JSONSchema(given), sampling)]
        assert any(" " in text for text in texts) == spaced


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), llama_like()], ids=["bytes", "prepend"])
def test_batched_is_one_by_one(tokenizer: Tokenizer, rng: np.random.Generator) -> None:
    model = model_of(tokenizer, rng)
    prompts = ["the hat", "b", "", tokenizer.encode("mat the cat")]
    constraint = Regex(r"(?:[a-e ]{3}\n?){1,9}")
    seeds = tuple(rng.integers(2**31, size=len(prompts)).tolist())
    sampling = Sampling(max_new_tokens=12, num_samples=2, seeds=seeds, repetition_penalty=1.3)
    together = generate_constrained(model, prompts, constraint, sampling)
    assert len(together) == 2 * len(prompts)
    assert len({text for text, _ in together}) > 1
    for row, prompt in enumerate(prompts):
        alone = generate_constrained(
            model, [prompt], constraint, sampling.replace(seeds=(seeds[row],))
        )
        assert alone == together[2 * row : 2 * row + 2]


def test_a_constraint_that_allows_everything_changes_nothing(rng: np.random.Generator) -> None:
    tokenizer = CharTokenizer.from_text("the cat sat on a mat.\né🙂")
    config = MODERN.replace(vocab_size=tokenizer.vocab_size, context_length=48)
    model = Model(config, random_params(config, rng), tokenizer)
    prompts = ["the cat", "é", "mat. the hat".replace("h", "s")]
    stop = (tokenizer.encode("e")[0],)
    everything = {
        **{"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.2},
        **{"top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "temperature": 1.7},
        **{"banned": (1, 2), "logit_bias": {3: 1.5, 4: -2.0}},
    }
    for options in (
        {"temperature": 0.0},
        {"temperature": 0.0, "stop": stop},
        {"seeds": (3, 4, 5), "num_samples": 2, **everything},
    ):
        sampling = Sampling(max_new_tokens=20, **options)
        key = jax.random.key(int(rng.integers(2**31)))
        got = generate_constrained(model, prompts, ANYTHING, sampling, key)
        assert [text for text, _ in got] == generate_text(model, prompts, sampling, key)
        assert all(complete for _, complete in got)


def test_filters_work_on_what_the_constraint_leaves(rng: np.random.Generator) -> None:
    """The likeliest tokens of all are not allowed, and yet something is left to choose from."""
    model = model_of(ByteTokenizer(), rng)
    pushed = tuple((byte, 40.0) for byte in b"xyz")
    letters = Regex("[a-w]{9}")
    for options in ({"top_k": 3}, {"top_p": 0.9, "typical_p": 0.9, "min_p": 1e-3}):
        sampling = Sampling(
            max_new_tokens=9, num_samples=8, temperature=3.0, logit_bias=pushed, **options
        )
        got = generate_constrained(model, "a", letters, sampling)
        assert all(re.fullmatch(letters.pattern, text) for text, _ in got)
        assert len(set(got)) > 1
    [greedy] = generate_constrained(model, "a", letters, sampling.replace(top_k=1, num_samples=1))
    assert [greedy] == generate_constrained(model, "a", letters, Sampling(temperature=0))


@pytest.mark.parametrize("tokenizer", TOKENIZERS[2:4], ids=NAMES[2:4])
def test_a_space_that_begins_a_text_is_dropped_as_in_decoding(
    tokenizer: BPETokenizer, rng: np.random.Generator
) -> None:
    model = model_of(tokenizer, rng)
    the = tokenizer.encode("the")
    assert tokenizer._library.id_to_token(the[0]).startswith("▁")
    sampling = Sampling(max_new_tokens=20, temperature=0, logit_bias=tuple((i, 90.0) for i in the))
    counted: list[list[int]] = []

    def chosen(prompt: str, regex: str) -> list[int]:
        [got] = generate_constrained(model, prompt, Regex(regex), sampling)
        assert got.complete
        assert re.fullmatch(regex, got.text)
        return counted.pop()

    original = module._Row.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module._Row, "text", lambda row, t: counted.append(row.ids) or original(row, t)
        )
        assert chosen("", "the") == the
        assert chosen("a", " the") == the
        assert chosen("a", "the") != the
        assert chosen("", " the") != the
    several = sampling.replace(num_samples=2)
    got = generate_constrained(model, ["a", "", [5]], Regex(" ?the"), several)
    assert [text for text, _ in got] == [" the", " the", "the", "the", "the", "the"]


@OF_ALL_KINDS
def test_spellings_joined_are_the_text(tokenizer: Tokenizer, rng: np.random.Generator) -> None:
    for text in (*TEXTS, *(random_unicode(rng) for _ in range(20))):
        if isinstance(tokenizer, CharTokenizer):
            text = "".join(c for c in text if c in tokenizer.alphabet)
        check_spellings(tokenizer, text)


def test_spellings_of_smollm2(rng: np.random.Generator) -> None:
    tokenizer = needed_smollm2()
    inside = module._spellings(tokenizer, tokenizer.vocab_size, begins=False)
    special = [i for i, spelled in enumerate(inside) if not spelled]
    assert set(special) == set(tokenizer._special_ids)
    for text in (*TEXTS, *(random_unicode(rng) for _ in range(5))):
        # This vocabulary lacks some bytes.
        check_spellings(tokenizer, tokenizer.decode(tokenizer.encode(text)), inside)


def check_spellings(tokenizer: Tokenizer, text: str, inside: list[bytes] | None = None) -> None:
    ids = tokenizer.encode(text)
    size = tokenizer.vocab_size
    inside = inside or module._spellings(tokenizer, size, begins=False)
    first = module._spellings(tokenizer, size, begins=True)
    joined = b"".join([*(first[i] for i in ids[:1]), *(inside[i] for i in ids[1:])]).decode()
    # A text that begins with a space has the ids of one without, where the pre-tokenizer puts it.
    assert joined == (text.removeprefix(" ") if tokenizer is METASPACE else text)


def test_a_stop_token_ends_a_text_only_where_it_matches(rng: np.random.Generator) -> None:
    model = model_of(ByteTokenizer(), rng)
    letter = ord("b")
    for stop, banned, expected in (
        ((), (), "a{2}"),  # The end of a document, as the vocabulary has it.
        ((letter,), (256,), "a{2}"),
        ((letter,), (256, letter), "a{5}"),
        ((), (256,), "[ab]{5}"),
    ):
        bias = ((256, 60.0), (letter, 50.0), (ord("a"), 40.0))
        # A stop token that spells something is no text.
        sampling = Sampling(max_new_tokens=9, stop=stop, banned=banned, logit_bias=bias)
        [got] = generate_constrained(model, "x", Regex("[ab]{2,5}"), sampling)
        if stop or not banned:
            assert re.fullmatch(expected, got.text.replace("b", "" if stop else "a"))
        else:
            assert re.fullmatch(expected, got.text)
        assert got.complete
    also = Model(model.config, model.params, model.tokenizer, {"eos_token_id": [letter, 7]})
    sampling = Sampling(max_new_tokens=9, logit_bias=((letter, 60.0),))
    assert generate_constrained(also, "x", Regex("[ab]{2,5}"), sampling)[0].text == "aa"


def test_what_is_incomplete_is_told(rng: np.random.Generator) -> None:
    model = model_of(ByteTokenizer(), rng)
    four = Regex("[ab]{4}")
    for count in range(6):
        [got] = generate_constrained(model, "x", four, Sampling(max_new_tokens=count))
        assert got.complete == (count >= 4)
        assert len(got.text) == min(count, 4)
    # What matches already is complete, though more could follow.
    [got] = generate_constrained(
        model, "x", Regex("[ab]+"), Sampling(max_new_tokens=3, banned=(256,))
    )
    assert got.complete
    assert len(got.text) == 3
    empty = Regex("a{0,4}")
    nothing = Sampling(max_new_tokens=0)
    assert generate_constrained(model, "x", empty, nothing) == [ConstrainedText("", True)]
    assert generate_constrained(model, "x", Regex(""), Sampling()) == [ConstrainedText("", True)]
    assert generate_constrained(model, [], four) == []
    # In the midst of a character.
    [got] = generate_constrained(model, "x", Regex("🙂"), Sampling(max_new_tokens=3))
    assert got == ("\ufffd", False)


def test_dead_ends(rng: np.random.Generator) -> None:
    """No token is left, because of bans or of what the vocabulary lacks."""
    model = model_of(ByteTokenizer(), rng)
    a, b = b"ab"
    eager = ((a, 50.0),)
    for sampling in (
        Sampling(max_new_tokens=9, banned=(b,), logit_bias=eager),
        Sampling(max_new_tokens=9, logit_bias=(*eager, (b, -np.inf)), temperature=0),
    ):
        got = generate_constrained(model, ["x", "y"], Regex("ab|c"), sampling)
        assert got == [ConstrainedText("a", False)] * 2
        with pytest.raises(UserError, match="no text that matches can begin after prompt 0"):
            generate_constrained(model, ["x", "y"], Regex("b+"), sampling)
        # Those beside it go on.
        got = generate_constrained(model, ["x"], Regex("c|cc"), sampling.replace(num_samples=4))
        assert all(complete for _, complete in got)
    small = model_of(CharTokenizer("abx"), rng)
    sampling = Sampling(max_new_tokens=9, logit_bias=((1, 50.0),))
    got = generate_constrained(small, ["x", "a"], Regex("ab|bc"), sampling)
    assert got == [ConstrainedText("b", False)] * 2
    for regex, words in (("c", "can begin"), ("é", "can begin"), (r"a[^\s\S]", "matches no text")):
        with pytest.raises(UserError, match=words):
            generate_constrained(small, "x", Regex(regex))
    got = generate_constrained(small, "x", Regex("(?:bc)?"), Sampling(banned=(0, 1, 2)))
    assert got == [ConstrainedText("", True)]


def test_no_number_is_nan(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have ended draw from some logits all the same."""
    model = model_of(Words(), rng)
    original = module._draw

    def draw(logits_BV: jax.Array, allowed_BW: np.ndarray, *further: Any) -> Any:
        assert allowed_BW.any(axis=1).all()
        return original(logits_BV, allowed_BW, *further)

    monkeypatch.setattr(module, "_draw", draw)
    with jax.debug_nans(True):
        for options in (
            {"top_k": 3, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9},
            {"frequency_penalty": 2.0, "repetition_penalty": 1.2, "presence_penalty": 1.0},
            {"banned": (1,), "logit_bias": {0: -np.inf}},
        ):
            sampling = Sampling(max_new_tokens=10, num_samples=32, temperature=99.0, **options)
            got = generate_constrained(model, "ab", Regex("[ac]|c[abc]{4,20}"), sampling)
            assert len({len(text) for text, _ in got}) > 1


def test_the_mask_is_computed_while_the_device_works(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass over a token is sent off before the host looks at the token or asks for a mask."""
    model = model_of(ByteTokenizer(), rng)
    events: list[str] = []

    def noted(name: str, owner: Any, attribute: str) -> None:
        original = getattr(owner, attribute)

        def wrapper(*args: Any) -> Any:
            events.append(name)
            return original(*args)

        monkeypatch.setattr(owner, attribute, wrapper)

    noted("read", module, "_read")
    noted("forward", module, "_advance")
    noted("draw", module, "_draw")
    noted("push", module._Row, "push")
    noted("mask", module._Row, "allowed")
    generate_constrained(model, "x", Regex("[ab]{4}"), Sampling(max_new_tokens=4))
    turn = ["draw", "forward", "push", "mask"]
    assert events == ["read", "mask", *turn * 3, "draw", "push", "mask"]


def test_constraints_and_numbers_do_not_recompile(rng: np.random.Generator) -> None:
    model = model_of(ByteTokenizer(), rng)
    programs: list[Any] = [module._read, module._draw, module._advance]
    sampling = Sampling(max_new_tokens=5, top_p=0.9, logit_bias=((1, 1.0),))
    generate_constrained(model, ["x", "yz"], Regex("[ab]{4}"), sampling)
    before = [program._cache_size() for program in programs]
    for regex, prompt, count in (("a{2,3}", "x", 3), ("é+", "abcdef", 8), ("c|d", "y", 1)):
        changed = sampling.replace(
            max_new_tokens=count, temperature=count / 3, top_p=0.5, seeds=(1, 2), banned=(256,)
        )
        generate_constrained(model, [prompt, "bc"], Regex(regex), changed)
    generate_constrained(model, ["x", "y"], JSONSchema({"type": "null"}), sampling)
    assert [program._cache_size() for program in programs] == before


@STYLES
def test_no_rank_is_promoted(config: ModelConfig, rng: np.random.Generator) -> None:
    config = config.replace(vocab_size=260, context_length=32)
    model = Model(config, random_params(config, rng), ByteTokenizer())
    with jax.numpy_rank_promotion("raise"):
        sampling = Sampling(max_new_tokens=4, num_samples=2, repetition_penalty=1.1, top_k=9)
        generate_constrained(model, ["ab", "c"], Regex("[ab]{3}"), sampling)


def test_bits_are_tokens(rng: np.random.Generator) -> None:
    """The device reads bits as the host writes them, whatever the size of the vocabulary."""
    for size in (31, 32, 33, 100):
        may_BV = rng.random((4, size)) < 0.3
        may_BV[np.arange(4), rng.integers(size, size=4)] = True
        words_BW = np.stack([module._pack(may_V) for may_V in may_BV])
        logits_BV = rng.normal(size=(4, size)).astype(np.float32)
        filters, values = split_sampling(Sampling(temperature=0))
        keys_B = jax.random.split(jax.random.key(0), 4)
        got, _ = module._draw(
            jnp.asarray(logits_BV), words_BW, np.int32(0), keys_B, values, None, filters
        )
        assert np.asarray(got).tolist() == np.where(may_BV, logits_BV, -9.0).argmax(-1).tolist()


def test_a_model_smaller_than_its_tokenizer(rng: np.random.Generator) -> None:
    config = GPT2.replace(vocab_size=100, context_length=32)
    model = Model(config, random_params(config, rng), ByteTokenizer())
    # 'a' to 'c' are 97 to 99, and 'd' and the end of a document are beyond.
    [got] = generate_constrained(model, [[65]], Regex("[a-z]+"), Sampling(max_new_tokens=9))
    assert re.fullmatch("[a-c]{9}", got.text)
    assert got.complete
    # Where tokens are spelled in another way at the beginning of a text.
    tokenizer = llama_like()
    config = config.replace(vocab_size=tokenizer.vocab_size - 20)
    model = Model(config, random_params(config, rng), tokenizer)
    sampling = Sampling(max_new_tokens=9, num_samples=20)
    for text, complete in generate_constrained(model, "", Regex("[a-z ]+"), sampling):
        assert complete
        assert re.fullmatch("[a-z ]+", text)


def test_constraints_are_values() -> None:
    assert Regex("a") == Regex("a") != Regex("b")
    schema = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}}
    assert JSONSchema(schema) == JSONSchema(json.dumps(schema, indent=2))
    turned = {**schema, "properties": dict(reversed(schema["properties"].items()))}
    assert JSONSchema(schema) != JSONSchema(turned)
    assert len({Regex("a"), Regex("a"), JSONSchema(schema), JSONSchema(json.dumps(schema))}) == 2


@pytest.mark.parametrize(
    ("regex", "words"),
    [
        ("a(", r"'a\(' is not understood \(unclosed group\)"),
        ("(?=a)b", "look-around"),
        (r"a\b", "lookarounds"),
        (r"(a)\1", "backreferences"),
        ("a{3,2}", "repetition"),
        ("a\ud800", "not UTF-8 at character 1"),
        ("error: \n(", "unclosed group"),
    ],
)
def test_patterns_that_are_refused(regex: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Regex(regex)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "no JSON"),
        ("[1]", r"the schema is \[1\]; give an object"),
        (3, "the schema is 3; give an object"),
        ({"const": float("nan")}, "no JSON"),
        ({"const": {1, 2}}, "no JSON"),
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"not": {"type": "null"}}, r"Unimplemented keys: \[\"not\"\]"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "string", "format": "nothing"}, "Unknown format: nothing"),
        ({"minimum": 5, "maximum": 3, "type": "integer"}, "greater than maximum"),
        ({"type": "null", "x-guidance": {"lenien": True}}, "unknown field `lenien`"),
    ],
)
def test_schemas_that_are_refused(schema: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        JSONSchema(schema)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ("a", {"stop": ("END",)}, r"stop is \('END',\); under a constraint only token ids"),
        ("a", {"overflow": "slide"}, "does not slide"),
        ("a" * 120, {"max_new_tokens": 9}, "prompt 0 of 120 tokens and 9 new ones"),
        (["a", "b"], {"seeds": (1,)}, "1 seeds for 2 prompts"),
        ("a", {"banned": (260,)}, "token id 260"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [400]], {}, "prompt 1 has token id 400"),
    ],
)
def test_illegal_calls_are_refused(
    prompts: Any, options: Any, words: str, rng: np.random.Generator
) -> None:
    model = model_of(ByteTokenizer(), rng)
    with pytest.raises(UserError, match=words) as error:
        generate_constrained(model, prompts, ANYTHING, Sampling(**{"max_new_tokens": 4, **options}))
    assert "\n" not in str(error.value)


def test_models_that_spell_nothing_are_refused() -> None:
    for prompt in ("a", [1]):
        with pytest.raises(UserError, match="no tokenizer"):
            generate_constrained(Model(GPT2, {}), [prompt], ANYTHING)


def test_llguidance_is_imported_when_needed() -> None:
    import subprocess
    import sys

    code = "import sys, gptjax.constrained; sys.exit('llguidance' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_constraint_that_cannot_be_followed(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's limits are an error of the user's constraint, told as one."""
    import llguidance

    original = llguidance.LLMatcher

    def narrow(library: Any, grammar: str, **options: Any) -> Any:
        limits = llguidance.LLParserLimits(step_lexer_fuel=1)
        return original(library, grammar, limits=limits, **options)

    model = model_of(ByteTokenizer(), rng)
    hard = Regex(r"(?:\w{3,9} ){5}")
    narrow.grammar_from_regex = original.grammar_from_regex  # type: ignore[attr-defined]
    monkeypatch.setattr(llguidance, "LLMatcher", narrow)
    with pytest.raises(UserError, match=r"cannot be followed after \d+ tokens|not understood"):
        generate_constrained(model, "x", hard, Sampling(max_new_tokens=20))
