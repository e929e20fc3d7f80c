"""Texts and conversations: seams, streams, and what stands before a text."""

from typing import Any

import jax
import numpy as np
import pytest
from small_models import GPT2, random_params
from small_tokenizers import chat_like, llama_like

from gptjax.errors import UserError
from gptjax.generation import generate
from gptjax.model import Model
from gptjax.sampling import Sampling
from gptjax.text_generation import (
    chat_ids,
    generate_chat,
    generate_text,
    prompt_ids,
    stream_text,
)
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer


def model_of(tokenizer: Tokenizer, rng: np.random.Generator, **fields: Any) -> Model:
    config = GPT2.replace(vocab_size=tokenizer.vocab_size + 3, context_length=96)
    return Model(config, random_params(config, rng), tokenizer, **fields)


@pytest.mark.parametrize(
    "tokenizer",
    [chat_like(), llama_like(), llama_like(metaspace=True), ByteTokenizer()],
    ids=["byte-level", "prepend", "metaspace", "bytes"],
)
def test_streamed_is_what_comes_at_once(tokenizer: Tokenizer, rng: np.random.Generator) -> None:
    model = model_of(tokenizer, rng)
    for prompt in ("a", "hello the", ""):
        seed = int(rng.integers(2**31))
        sampling = Sampling(max_new_tokens=40, temperature=3.0, seeds=(seed,))
        whole = generate_text(model, prompt, sampling)[0]
        assert "".join(stream_text(model, prompt, sampling)) == whole


@pytest.mark.parametrize("metaspace", [False, True])
def test_a_space_at_the_seam_stays(
    metaspace: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = llama_like(metaspace=metaspace)
    model = model_of(tokenizer, rng)
    text = "hello the hello"
    whole = tokenizer.encode(text)
    start = tokenizer.encode("hello the")
    assert whole[: len(start)] == start
    from gptjax import text_generation

    rest = whole[len(start) :]
    monkeypatch.setattr(text_generation, "generate", lambda *_, **__: [rest])
    assert "hello the" + generate_text(model, "hello the", Sampling())[0] == text
    # What begins a text has none.
    monkeypatch.setattr(text_generation, "generate", lambda *_, **__: [whole])
    assert generate_text(model, "", Sampling())[0] == text


def test_several_samples_come_prompt_by_prompt(rng: np.random.Generator) -> None:
    model = model_of(ByteTokenizer(), rng)
    sampling = Sampling(max_new_tokens=5, num_samples=3, seeds=(4, 5))
    texts = generate_text(model, ["a", "b"], sampling)
    assert len(texts) == 6
    one = sampling.replace(seeds=(5,))
    assert generate_text(model, "b", one) == texts[3:]


def test_what_stands_before_a_text(rng: np.random.Generator) -> None:
    llama = llama_like()
    model = model_of(llama, rng)
    assert prompt_ids(model, "hello")[0] == llama.bos_id
    assert prompt_ids(model, "") == [llama.bos_id]
    bytes_model = model_of(ByteTokenizer(), rng)
    assert prompt_ids(bytes_model, "") == [256]
    with pytest.raises(UserError, match="not UTF-8 at character 1"):
        prompt_ids(bytes_model, "a\udcff")


def test_the_ids_that_end_a_text(rng: np.random.Generator) -> None:
    tokenizer = ByteTokenizer()
    both = model_of(tokenizer, rng, generation={"eos_token_id": [3, 7]})
    assert both.stop_ids == (3, 7, 256)
    assert model_of(tokenizer, rng, source={"eos_token_id": 5}).stop_ids == (5, 256)
    # Whatever is likeliest ends the text, if the weights' own files say so.
    greedy = Sampling(max_new_tokens=9, temperature=0)
    first = generate(both.params, [tokenizer.encode("a")], both.config, greedy)[0][0]
    stopping = Model(both.config, both.params, tokenizer, {"eos_token_id": first})
    assert generate_text(stopping, "a", greedy) == [""]
    assert list(stream_text(stopping, "a", greedy)) == []


def test_options_reach_the_template(rng: np.random.Generator) -> None:
    values = chat_like().to_dict()
    template = "{{ messages[0].content }}{% if enable_thinking is defined %}off{% endif %}"
    from gptjax.tokenizer import tokenizer_from_dict

    tokenizer = tokenizer_from_dict(values | {"chat_template": template})
    assert isinstance(tokenizer, BPETokenizer)
    model = model_of(tokenizer, rng)
    messages = [{"role": "user", "content": "hello"}]
    plain = chat_ids(model, messages)
    assert tokenizer.decode(plain) == "hello"
    assert tokenizer.decode(chat_ids(model, messages, enable_thinking=False)) == "hellooff"
    sampling = Sampling(max_new_tokens=4, temperature=0)
    answer = generate_chat(model, messages, sampling, jax.random.key(0), enable_thinking=False)
    assert isinstance(answer, str)


def test_stops_that_are_none() -> None:
    assert Sampling(stop="END").stop == ("END",)
    with pytest.raises(UserError, match="empty string"):
        Sampling(stop=("",))
