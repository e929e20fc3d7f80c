"""Choices against the full forward, and where a prompt's tokens end and a choice's begin."""

from typing import Any

import jax
import numpy as np
import pytest
from small_models import GPT2, STYLES, random_params
from small_tokenizers import TEXTS, llama_like

from gptjax import choice as module
from gptjax.choice import choose, choose_ids
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import Model, forward
from gptjax.params import Params
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

run = jax.jit(forward, static_argnames="config")


def expected_logprob(
    params: Params, prompt: list[int], choice: list[int], config: ModelConfig
) -> float:
    tokens = np.zeros((1, config.context_length), np.int32)
    tokens[0, : len(prompt + choice)] = prompt + choice
    logits = np.asarray(run(params, tokens, config), np.float64)[0, len(prompt) - 1 :]
    logits = logits[: len(choice)]
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return float(logprobs[np.arange(len(choice)), choice].sum())


def softmax(scores: list[float]) -> np.ndarray:
    weights = np.exp(np.array(scores) - max(scores))
    return weights / weights.sum()


def model_of(tokenizer: Tokenizer, rng: np.random.Generator, context: int = 64) -> Model:
    config = GPT2.replace(vocab_size=tokenizer.vocab_size, context_length=context)
    return Model(config, random_params(config, rng), tokenizer)


@STYLES
@pytest.mark.parametrize("prompt_length", [1, 2, 7])
def test_logprobs_are_those_of_the_full_forward(
    config: ModelConfig, prompt_length: int, rng: np.random.Generator
) -> None:
    params = random_params(config, rng)
    prompt = rng.integers(0, 31, prompt_length).tolist()
    # The longest fills the context to its end.
    lengths = (1, 3, 2, 16 - prompt_length)
    choices = [rng.integers(0, 31, length).tolist() for length in lengths]
    expected = [expected_logprob(params, prompt, choice, config) for choice in choices]
    for normalize, sizes in (("none", [1] * 4), ("tokens", lengths)):
        got = choose_ids(params, prompt, choices, config, normalize=normalize)
        scores = [logprob / size for logprob, size in zip(expected, sizes, strict=True)]
        np.testing.assert_allclose(got.logprobs, expected, atol=2e-4)
        np.testing.assert_allclose(got.probabilities, softmax(scores), atol=1e-4)
        assert got.index == int(np.argmax(got.probabilities))
        assert got.text is None
    # None is changed by those beside it.
    for choice, logprob in zip(choices, got.logprobs, strict=True):
        alone = choose_ids(params, prompt, [choice], config)
        assert alone.logprobs[0] == pytest.approx(logprob, abs=2e-4)
        assert alone.probabilities == (1.0,)


def test_normalization_decides(rng: np.random.Generator) -> None:
    model = model_of(ByteTokenizer(), rng)
    choices = ["a", "ééé", "long and longer"]
    sums = np.array(choose(model, "b", choices, normalize="none").logprobs)
    for normalize, sizes in (("none", [1, 1, 1]), ("tokens", [1, 6, 15]), ("bytes", [1, 6, 15])):
        got = choose(model, "b", choices, normalize=normalize)
        np.testing.assert_allclose(got.probabilities, softmax(list(sums / sizes)), rtol=1e-5)
        assert got.index == int(np.argmax(sums / sizes))
        assert got.text == choices[got.index]
        assert got.logprobs == tuple(sums)
    # A token of several bytes, where the two differ.
    model = model_of(BPETokenizer.train(TEXTS * 3, 320), rng)
    assert model.tokenizer is not None
    choices = [" cat", " zq"]
    tokens = [len(model.tokenizer.encode(text)) for text in choices]
    assert tokens != [4, 3]
    sums = np.array(choose(model, "the", choices).logprobs)
    for normalize, sizes in (("tokens", tokens), ("bytes", [4, 3])):
        got = choose(model, "the", choices, normalize=normalize)
        np.testing.assert_allclose(got.probabilities, softmax(list(sums / sizes)), rtol=1e-5)


def test_the_likeliest_is_chosen(rng: np.random.Generator) -> None:
    """Greedy decoding's token is chosen before every other."""
    params = random_params(GPT2, rng)
    prompt = rng.integers(0, 31, 5).tolist()
    logits = np.asarray(run(params, np.array([prompt]), GPT2))[0, -1]
    got = choose_ids(params, prompt, [[token] for token in range(31)], GPT2)
    np.testing.assert_allclose(got.probabilities, softmax(logits.tolist()), atol=1e-5)
    assert got.index == int(logits.argmax()) or np.diff(np.sort(logits)[-2:]) < 1e-4
    # The first of equals.
    assert choose_ids(params, prompt, [[3], [3], [3]], GPT2).index == 0


def test_a_choice_is_the_end_of_the_whole_encoding(rng: np.random.Generator) -> None:
    tokenizer = BPETokenizer.train(TEXTS * 3, 320)
    model = model_of(tokenizer, rng)
    encode = tokenizer.encode
    prompt, choice = "the cat sat", " on the mat"
    assert encode(prompt + choice)[: len(encode(prompt))] == encode(prompt)
    got = choose(model, prompt, [choice])
    own = encode(prompt + choice)[len(encode(prompt)) :]
    expected = expected_logprob(model.params, encode(prompt), own, model.config)
    assert got.logprobs[0] == pytest.approx(expected, abs=2e-4)
    # One token reaches over the boundary, so the choice is encoded by itself.
    prompt, choice = "the c", "at"
    assert encode(prompt + choice)[: len(encode(prompt))] != encode(prompt)
    got = choose(model, prompt, [choice])
    expected = expected_logprob(model.params, encode(prompt), encode(choice), model.config)
    assert got.logprobs[0] == pytest.approx(expected, abs=2e-4)
    # The whole is not a choice's encoding by itself where that would begin with a space.
    tokenizer = llama_like()
    model = model_of(tokenizer, rng)
    prompt, choice = "the cat sat on the mat.", "\n"
    before, whole = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(prompt + choice)
    assert whole[: len(before)] == before
    assert whole[len(before) :] != tokenizer.encode(choice)
    got = choose(model, prompt, [choice])
    expected = expected_logprob(model.params, before, whole[len(before) :], model.config)
    assert got.logprobs[0] == pytest.approx(expected, abs=2e-4)


def test_an_empty_prompt_begins_as_in_generation(rng: np.random.Generator) -> None:
    model = model_of(ByteTokenizer(), rng)
    got = choose(model, "", ["yes", "no"])
    for text, logprob in zip(["yes", "no"], got.logprobs, strict=True):
        expected = expected_logprob(model.params, [256], list(text.encode()), model.config)
        assert logprob == pytest.approx(expected, abs=2e-4)
    llama = llama_like()
    model = model_of(llama, rng)
    got = choose(model, "", ["the cat"])
    bos, *rest = llama.encode_prompt("the cat")
    expected = expected_logprob(model.params, [bos], rest, model.config)
    assert got.logprobs[0] == pytest.approx(expected, abs=2e-4)


def test_lengths_do_not_recompile(rng: np.random.Generator) -> None:
    config = GPT2.replace(context_length=64)
    params = random_params(config, rng)
    compiled: Any = module._score
    choose_ids(params, [1], [[2], [3]], config)
    before = compiled._cache_size()
    for length in range(1, 14):
        choose_ids(params, [1] * length, [[2], [3] * (length % 3 + 1)], config, normalize="none")
    assert compiled._cache_size() == before


@STYLES
def test_no_rank_is_promoted(config: ModelConfig, rng: np.random.Generator) -> None:
    params = random_params(config, rng)
    with jax.numpy_rank_promotion("raise"):
        choose_ids(params, [1, 2, 3], [[4], [5, 6]], config)


@pytest.mark.parametrize(
    ("prompt", "choices", "options", "words"),
    [
        ([1], [], {}, "no choices"),
        ([], [[1]], {}, "prompt is empty"),
        ([1], [[1], []], {}, "choice 1 is empty"),
        ([1], [[1], [2, 31]], {}, "choice 1 has token id 31.*0 to 30"),
        ([-1], [[1]], {}, "prompt has token id -1"),
        ([1] * 10, [[1], [1] * 7], {}, "choice 1 of 7 tokens after a prompt of 10.*16.*by 1 "),
        ([1] * 16, [[1]], {}, "choice 0 of 1 tokens after a prompt of 16"),
        ([1], [[1]], {"normalize": "bytes"}, "unknown normalize 'bytes'.*none, tokens"),
    ],
)
def test_illegal_ids_are_refused(prompt: Any, choices: Any, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        choose_ids({}, prompt, choices, GPT2, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "choices", "options", "words"),
    [
        ("a", [], {}, "no choices"),
        ("a", ["b", ""], {}, "choice 1 is '', which has no tokens"),
        ("a", "yes", {}, "choices is the text 'yes'; give a list"),
        ("a" * 60, ["b", "c" * 5], {}, "choice 1 of 5 tokens after a prompt of 60"),
        ("a", ["b"], {"normalize": "token"}, "unknown normalize 'token'; did you mean 'tokens'"),
    ],
)
def test_illegal_texts_are_refused(
    prompt: str, choices: Any, options: dict, words: str, rng: np.random.Generator
) -> None:
    model = model_of(ByteTokenizer(), rng)
    with pytest.raises(UserError, match=words) as error:
        choose(model, prompt, choices, **options)
    assert "\n" not in str(error.value)


def test_models_that_cannot_begin_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        choose(Model(GPT2, {}), "a", ["b"])
    with pytest.raises(UserError, match="prompt is empty"):
        choose(model_of(CharTokenizer("ab"), rng), "", ["b"])
