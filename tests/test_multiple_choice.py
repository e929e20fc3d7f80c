"""Multiple choice: what is read, what is compared, and which choice is right."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small_models import GPT2, random_params
from small_tokenizers import TEXTS

from gptjax.choice import choose
from gptjax.errors import UserError
from gptjax.evaluation.multiple_choice import (
    MultipleChoice,
    choice_scores,
    clean_hellaswag,
    read_hellaswag,
    read_multiple_choice,
    score_multiple_choice,
    summarize_multiple_choice,
)
from gptjax.model import Model, forward
from gptjax.tokenizer import BPETokenizer

HELLASWAG = Path(__file__).resolve().parents[2] / "shared/assets/tasks/hellaswag"
QUESTIONS = [
    MultipleChoice("the cat sat on", ("the mat.", "a hat, it's 12", "日本"), 0),
    MultipleChoice("user said:", ("don't", "système they're"), 1),
    MultipleChoice("The hat,", ("the bat!", "the cat", "cats", "é"), 2),
]
run = jax.jit(forward, static_argnames="config")


@pytest.fixture
def model(rng: np.random.Generator) -> Model:
    tokenizer = BPETokenizer.train(TEXTS * 3, 320)
    config = GPT2.replace(vocab_size=tokenizer.vocab_size, context_length=64)
    return Model(config, random_params(config, rng), tokenizer)


def expected_logprob(model: Model, context: str, choice: str) -> float:
    """From the full forward of the encoding of both."""
    assert model.tokenizer is not None
    before, whole = model.tokenizer.encode(context), model.tokenizer.encode(f"{context} {choice}")
    assert whole[: len(before)] == before
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(whole)] = whole
    logits = np.asarray(run(model.params, padded, model.config), np.float64)[0]
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    places = np.arange(len(before), len(whole))
    return float(logprobs[places - 1, whole[len(before) :]].sum())


def test_choices_are_scored_after_their_contexts(model: Model) -> None:
    found = dict(score_multiple_choice(model, QUESTIONS, batch_size=4))
    assert sorted(found) == [0, 1, 2]
    for index, question in enumerate(QUESTIONS):
        record = found[index]
        wanted = [expected_logprob(model, question.context, text) for text in question.choices]
        free = [expected_logprob(model, "Answer:", text) for text in question.choices]
        assert record["logprobs"] == pytest.approx(wanted, abs=2e-4)
        assert record["unconditional"] == pytest.approx(free, abs=2e-4)
        # Bytes of UTF-8, not characters; and without the space before a choice.
        sizes = [len(text.encode("utf-8")) for text in question.choices]
        assert record["bytes"] == sizes
        assert record["label"] == question.label
        weights = np.exp(np.array(wanted) - max(wanted))
        np.testing.assert_allclose(record["probabilities"], weights / weights.sum(), atol=1e-4)
        # The same as where one chooses by hand.
        texts = [f" {text}" for text in question.choices]
        chosen = choose(model, question.context, texts, normalize="none")
        assert record["logprobs"] == pytest.approx(list(chosen.logprobs), abs=2e-4)
        scores = choice_scores(record)
        np.testing.assert_allclose(scores["accuracy"], wanted, atol=2e-4)
        np.testing.assert_allclose(scores["accuracy per byte"], np.array(wanted) / sizes, atol=2e-4)
        np.testing.assert_allclose(
            scores["accuracy unconditional-normalized"], np.subtract(wanted, free), atol=4e-4
        )


def test_without_the_unconditional_likelihood(model: Model) -> None:
    found = dict(score_multiple_choice(model, QUESTIONS, unconditional=None))
    assert found[1]["unconditional"] == []
    figures = summarize_multiple_choice([found[index] for index in range(3)])
    assert list(figures) == ["accuracy", "accuracy per byte"]


def test_each_way_to_compare_has_its_accuracy() -> None:
    # Right by log-probability alone, by byte alone, and by what the question adds alone.
    ways = (
        {"logprobs": [-1.0, -2.0], "bytes": [2, 10], "unconditional": [-0.5, -4.0]},
        {"logprobs": [-2.0, -1.0], "bytes": [10, 2], "unconditional": [-0.5, -4.0]},
        {"logprobs": [-2.0, -1.0], "bytes": [2, 10], "unconditional": [-4.0, -0.5]},
        {"logprobs": [-2.0, -1.0], "bytes": [2, 10], "unconditional": [-0.5, -0.6]},
    )
    figures = summarize_multiple_choice([{**way, "label": 0} for way in ways])
    assert [estimate.value for estimate in figures.values()] == [0.25, 0.25, 0.25]
    error = np.std([1, 0, 0, 0], ddof=1) / 2
    assert figures["accuracy"].stderr == pytest.approx(error)
    assert figures["accuracy"].count == 4


def test_plain_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [
        {"context": q.context, "choices": q.choices, "label": q.label, "id": 7} for q in QUESTIONS
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert read_multiple_choice(path) == QUESTIONS
    for line, words in (
        ({"context": "a", "choices": ["b"], "label": 0}, r"jsonl:1: choices are \['b'\]"),
        ({"context": "a", "choices": ["b", ""], "label": 0}, "none empty"),
        ({"context": "a", "choices": ["b", "c"], "label": 2}, "label is 2.*2 choices.*0 to 1"),
        ({"context": "a", "choices": ["b", "c"], "label": -1}, "label is -1"),
        ({"context": "a", "choices": ["b", "c"], "label": "b"}, "jsonl:1 is no question"),
        ({"context": "a", "choices": ["b", "c"], "label": True}, "is no question"),
        ({"context": "a", "choices": "bc", "label": 0}, "is no question"),
        ({"choices": ["b", "c"], "label": 0}, "is no question"),
    ):
        path.write_text(json.dumps(line))
        with pytest.raises(UserError, match=words) as error:
            read_multiple_choice(path)
        assert "\n" not in str(error.value)


def test_hellaswag_is_read_in_both_shapes(tmp_path: Path) -> None:
    original = {
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he [substeps] Then",
        "ctx": "A man is sitting on a roof. he",
        "endings": ["is [title] up.", " pulls  up.", "sits [step] down.", "jumps."],
        "label": "3",
    }
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text(json.dumps(original))
    cleaned = ("is. up.", "pulls up.", "sits down.", "jumps.")
    context = "Roof shingle removal: A man is sitting on a roof. He then"
    assert read_hellaswag(path) == [MultipleChoice(context, cleaned, 3)]
    [raw] = read_hellaswag(path, clean=False)
    assert raw.choices[2] == "sits [step] down."
    six = tmp_path / "hellaswag.txt"
    lines = ["Roof: he", "1", *original["endings"]]
    # A line may have characters that some take for the end of one.
    lines += ["Next:\u2028she", "0", "a", "b", "c", "d"]
    six.write_text("\n".join(lines) + "\n", encoding="utf-8")
    first, second = read_hellaswag(six)
    assert first == MultipleChoice("Roof: he", cleaned, 1)
    assert second == MultipleChoice("Next:\u2028she", ("a", "b", "c", "d"), 0)
    six.write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="has 11 lines; give six a question"):
        read_hellaswag(six)
    six.write_text("\n".join(["Roof", "4", "a", "b", "c", "d"]))
    with pytest.raises(UserError, match=r"hellaswag\.txt:1: label is 4"):
        read_hellaswag(six)
    for changes in ({"ctx_b": None}, {"endings": "abcd"}, {"endings": ["a", 2]}):
        path.write_text(json.dumps({**original, **changes}))
        with pytest.raises(UserError, match="jsonl:1 has not the texts activity_label"):
            read_hellaswag(path)
    path.write_text(json.dumps({**original, "endings": ["a", "b", "c", "\ud800"]}))
    with pytest.raises(UserError, match="jsonl:1 has half a character"):
        read_hellaswag(path)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is missing")
def test_hellaswag_is_cleaned_as_by_lm_eval(rng: np.random.Generator) -> None:
    from lm_eval.tasks.hellaswag import utils

    parts = [" [title]", "[title] ", "[a b]", "  ", " ", "x", "]", "[", ".", "\n", "é"]
    for _ in range(200):
        text = "".join(rng.choice(parts, rng.integers(0, 12)))
        assert clean_hellaswag(text) == utils.preprocess(text)


@pytest.mark.skipif(not HELLASWAG.is_dir(), reason="HellaSwag is not in ../shared")
def test_all_of_hellaswag_is_read() -> None:
    questions = read_hellaswag(HELLASWAG / "hellaswag_val_full.txt")
    assert len(questions) == 10042
    assert {len(question.choices) for question in questions} == {4}
    assert questions[0].context == "Roof shingle removal: A man is sitting on a roof. he"
    assert questions[0].choices[questions[0].label] == "starts pulling up roofing on a roof."
    counts: Any = np.bincount([question.label for question in questions])
    assert (counts > 2400).all()
