"""The fine-tuning scripts as people start them, and what keeps their figures honest."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from commands import Command
from small_models import MODERN, random_params
from small_tokenizers import chat_like

from gptjax import finetuning
from gptjax.config import preset
from gptjax.data.examples import Record
from gptjax.errors import UserError
from gptjax.evaluation.results import mean
from gptjax.finetuning import FineTuning, ask, encode_item, measure
from gptjax.model import Model, forward
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.tasks import (
    Item,
    Task,
    conversation,
    hold_out,
    preference,
    question_answering,
    read_sides,
    sentiment,
    translation,
)
from gptjax.tokenizer import CharTokenizer

TINY = (
    *("--scratch.num-layers", "1", "--scratch.embed-dim", "16", "--scratch.num-heads", "2"),
    *("--tokenizer", "characters", "--batch-size", "4", "--few-shot", "2", "--show", "2"),
    *("--lora-rank", "0", "--eval-batch-size", "4", "--model", "scratch"),
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = preset("llama2-7b").replace(
    context_length=256, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32
)
WAYS = ["zero-shot", "few-shot", "fine-tuned"]


def words(rng: np.random.Generator, most: int = 4) -> str:
    return " ".join(rng.choice(["ab", "ba", "cab", "dad"], rng.integers(1, most)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the four shapes."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    (folder / "sst").mkdir()
    for name, count in (("train", 150), ("dev", 12)):
        labels = rng.integers(2, size=count)
        lines = [f"{words(rng)} {'no' if not y else 'yes'}\t{y}\n" for y in labels]
        long = f"{'ab ' * 40}no\t0\n" if name == "dev" else ""
        (folder / "sst" / f"{name}.tsv").write_text("".join(lines) + long)
    pairs = [(words(rng, 6), words(rng, 6)) for _ in range(60)]
    (folder / "pairs.txt").write_text("".join(f"{a}\t{b}\tfrom X\n" for a, b in pairs))
    paragraphs = [
        {
            "context": f"{n} {words(rng)}",
            "qas": [
                {
                    "id": f"{n}{q}",
                    "question": f"{q}?",
                    "answers": [{"text": "ab", "answer_start": 0}],
                }
                for q in range(2)
            ],
        }
        for n in range(20)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    instructions = [
        {
            "instruction": f"Say {n}",
            "input": words(rng) if n % 2 else "",
            "output": f"{words(rng)}.",
        }
        for n in range(30)
    ]
    (folder / "instruct.json").write_text(json.dumps(instructions))
    return folder


def run(command: Command, name: str, data: Path, out: Path, *args: object) -> tuple[str, Any, Any]:
    """What a script prints, its figures, and its items."""
    status, printed, error = command(name, "--data", data, "--out", out, *TINY, *args)
    assert (status, error) == (0, "")
    results = json.loads((out / "results.json").read_text())
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    return printed, results, items


def losses(out: Path) -> list[float]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


# Scripts


def test_sentiment_is_learned(tmp_path: Path, data: Path, command: Command):
    out = tmp_path / "run"
    args = (
        *("--tokenizer", "bpe", "--bpe-vocab-size", 320, "--context-length", 32, "--dropout", 0),
        *("--steps", 250, "--optimizer.learning-rate", 0.02, "--optimizer.warmup-steps", 5),
        *("--prompt-weight", 0),
    )
    printed, results, items = run(command, "finetune_sentiment", data / "sst", out, *args)
    figures = results["results"]
    assert [name for name in figures if name in WAYS] == WAYS
    assert figures["fine-tuned"]["accuracy"]["value"] > 0.9
    assert figures["fine-tuned"]["loss"]["value"] < 0.3 < figures["zero-shot"]["loss"]["value"]
    [majority] = [name for name in figures if name.startswith("always")]
    for text in (*WAYS, majority, "accuracy", "loss", "95 % intervals", "right"):
        assert text in printed
    # One is longer than the model's context.
    assert "12 test items (1 more are longer than the model's context)" in printed
    assert (results["items"], results["left_out"], len(items)) == (12, 1, 12)
    right = [item["fine-tuned"]["answer"] in item["answers"] for item in items]
    assert figures["fine-tuned"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert np.mean(losses(out)[-10:]) < 0.7 * losses(out)[0]
    # Started again it trains no further, and finds the same.
    printed, again, _ = run(command, "finetune_sentiment", data / "sst", out, *args)
    assert "is finished" in printed
    assert again == results


@pytest.mark.slow
def test_translations_are_generated(tmp_path: Path, data: Path, command: Command):
    out = tmp_path / "run"
    args = ("--preset", "gpu", "--steps", 2, "--context-length", 128, "--eval-items", 5)
    printed, results, items = run(command, "finetune_translation", data / "pairs.txt", out, *args)
    assert list(results["results"]) == WAYS
    assert list(results["results"]["few-shot"]) == ["BLEU", "chrF", "loss"]
    assert results["items"] == 5
    assert all(isinstance(item[way]["answer"], str) for item in items for way in WAYS)
    assert "Chinese: " in printed


@pytest.mark.slow
def test_questions_are_answered(tmp_path: Path, data: Path, command: Command):
    out = tmp_path / "run"
    args = ("--preset", "gpu", "--steps", 2, "--context-length", 128, "--eval-items", 5)
    _, results, items = run(command, "finetune_qa", data / "squad.json", out, *args)
    assert list(results["results"]["fine-tuned"]) == ["exact match", "F1", "loss"]
    # Whole paragraphs are held out, of two questions each.
    assert len(items) == 6


def test_chat_goes_by_the_models_template(tmp_path: Path, data: Path, command: Command):
    tokenizer = chat_like()
    tokenizer.chat_template = CHATML
    config = LLAMA.replace(vocab_size=tokenizer.vocab_size)
    params = random_params(config, np.random.default_rng(0))
    save_pretrained(Model(config, params, tokenizer), tmp_path / "model")
    out = tmp_path / "run"
    args = ("--model", tmp_path / "model", "--lora-rank", 2, "--steps", 8, "--eval-items", 4)
    printed, results, items = run(
        command, "finetune_chat", data / "instruct.json", out, *args, "--context-length", 128
    )
    figures = results["results"]
    assert figures["fine-tuned"]["loss"]["value"] < figures["zero-shot"]["loss"]["value"]
    # Answers are shown, and those that are not shown are not generated.
    assert [item["fine-tuned"]["answer"] is None for item in items] == [False, False, True, True]
    assert "User: Say" in printed


def test_preferences_are_learned(tmp_path: Path, rng: np.random.Generator, command: Command):
    """In all three shapes of records."""
    records: list[Record] = []
    for number in range(60):
        asked, good, bad = f"{number} {words(rng)}", f"yes {words(rng, 2)}", f"no {words(rng, 2)}"
        user = {"role": "user", "content": asked}
        said = [[user, {"role": "assistant", "content": text}] for text in (good, bad)]
        records.append(
            [
                {"instruction": asked, "input": "", "output": good, "rejected": bad},
                {"prompt": asked, "chosen": good, "rejected": bad},
                {"chosen": said[0], "rejected": said[1]},
            ][number % 3]
        )
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    status, out, error = command(
        "finetune_preferences", "--data", tmp_path / "pairs.json", "--out", tmp_path / "run",
        "--steps", "60", "--context-length", "256", "--eval-items", "8", "--validation-items", "6",
        "--eval-every", "30", "--optimizer.learning-rate", "1e-2", *TINY,
    )  # fmt: skip
    assert (status, error) == (0, "")
    assert "pairs of answers" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert list(results) == WAYS
    assert results["fine-tuned"]["accuracy"]["value"] == 1.0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_loss"] < 0.5  # below ln 2, with which it starts
    with pytest.raises(UserError, match="'rejected'"):
        preference([{"prompt": "a", "chosen": "b"}] * 3)
    # Of instructions with both, "output" may be a third.
    both = {"instruction": "i", "input": "x", "output": "o", "chosen": "c", "rejected": "r"}
    other = {**both, "instruction": "another"}
    [item] = preference([other], [both]).test
    assert item.answers == ("c", "r")
    assert item.prompt == ({"role": "user", "content": "i\nx"},)


def test_mistakes_are_told_in_one_line(tmp_path: Path, data: Path, command: Command):
    (tmp_path / "bad.tsv").write_text("fine\t1\nsad\t2\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "train.tsv").write_text("fine\t1\n")
    for name, args, part in [
        ("sentiment", ("--data", tmp_path / "bad.tsv"), "label '2' is none of 0 (negative)"),
        ("sentiment", ("--data", tmp_path / "none.tsv"), "none.tsv"),
        ("sentiment", ("--data", tmp_path / "empty"), "no file train"),
        ("sentiment", ("--data", tmp_path), "no file dev or validation or val or test"),
        ("translation", ("--data", data / "pairs.txt", "--source", "de"), "no field 'de'"),
        ("translation", ("--data", data / "pairs.txt", "--eval-items", 60), "cannot be held out"),
        ("qa", ("--data", data / "instruct.json"), "'answers' of a question"),
        ("chat", ("--data", data / "pairs.txt"), "no field 'instruction'"),
        (
            "chat",
            ("--data", data / "instruct.json", "--eval-items", 2, "--few-shot", -1),
            "few_shot is -1",
        ),
    ]:
        status, _, error = command(f"finetune_{name}", "--out", tmp_path / "out", *args)
        assert status == 2, (name, args)
        assert part in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["sentiment", "translation", "qa", "chat", "preferences"])
def test_help_lists_the_common_flags(name: str, command: Command):
    status, out, _ = command(f"finetune_{name}", "--help")
    assert status == 0
    for flag in ("--out", "--steps", "--seed", "--data", "--preset", "--checkpoint-every"):
        assert f"{flag} " in out
    assert "Presets: cpu, gpu." in " ".join(out.split())


# What is held out


def records(rng: np.random.Generator, count: int) -> list[Record]:
    """Records of all tasks at once, with few different texts."""
    texts = [f"t{n}" for n in range(count // 2)]

    def draw() -> str:
        return str(rng.choice(texts))

    return [
        {
            **{"text": draw(), "label": str(rng.integers(2))},
            **{"en": draw() + "e", "zh": draw() + "z"},
            **{"context": draw(), "question": draw(), "answers": [draw()]},
            **{"instruction": draw(), "output": draw()},
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("make", [sentiment, translation, question_answering, conversation])
def test_no_group_is_on_both_sides(make: Any, rng: np.random.Generator):
    given = records(rng, 60)
    for task in (make(given, held_out=9), make(given[:40], given[40:])):
        groups = {item.group for item in task.test}
        assert groups
        assert not groups & {item.group for item in task.train}
        prompts = {str(item.prompt) for item in task.test}
        assert not prompts & {str(item.prompt) for item in task.train}


def test_sides_are_told_apart_by_what_is_read():
    """Not by spaces around it, nor by a system message before it."""
    texts = [{"text": text, "label": 1} for text in ("good film ", "a bad one")]
    learned = sentiment(texts, [{"text": "good film", "label": 1}]).train
    assert [item.group for item in learned] == ["a bad one"]
    system = {"role": "system", "content": "s"}
    talk = [{"role": role, "content": role * 2} for role in ("user", "assistant")]
    more = [{"role": role, "content": role * 3} for role in ("user", "assistant")]
    for start in ([], [system]):
        short, long = ({"messages": [*start, *turns]} for turns in (talk, [*talk, *more]))
        other = {"messages": [*start, *more]}
        task = conversation([short, other], [long])
        assert [item.group for item in task.test] == ["useruser"]
        assert [item.group for item in task.train] == ["useruseruser"]


def test_of_sorted_test_data_not_the_first_are_measured():
    test = [{"text": f"t{n}", "label": n // 50} for n in range(100)]
    task = sentiment([{"text": "a", "label": 0}], test, held_out=20)
    assert len(task.test) == 20
    assert len({item.answers for item in task.test}) == 2


@pytest.mark.parametrize(
    ("messages", "says"),
    [(["x"], "a message is a str"), ([{"role": "user"}], "'content'"), ([], "at least one")],
)
def test_messages_that_are_none_are_refused(messages: Any, says: str):
    with pytest.raises(UserError, match=says):
        conversation([{"messages": messages}])
    with pytest.raises(UserError, match=says):
        preference([{"prompt": messages, "chosen": "a", "rejected": "b"}])


def test_another_task_in_the_same_folder_is_refused(tmp_path: Path, data: Path, command: Command):
    arguments = (
        "--data", data / "pairs.txt", "--out", tmp_path / "run", "--steps", "1", "--context-length",
        "96", "--eval-items", "2", "--validation-items", "2", *TINY,
    )  # fmt: skip
    command("finetune_translation", *arguments, "--source", "zh", "--target", "en")
    status, _, error = command(
        "finetune_translation", *arguments, "--source", "en", "--target", "zh"
    )
    assert status == 2
    assert "task_sha256" in error


def test_no_sentence_of_either_language_is_on_both_sides(rng: np.random.Generator):
    given = records(rng, 80)
    task = translation(given, held_out=9)
    assert len(task.test) == 9
    targets = {answer for item in task.test for answer in item.answers}
    assert not targets & {item.answers[0] for item in task.train}
    # All translations of a sentence count, and each is learned by itself.
    for item in task.test:
        assert set(item.answers) == {r["en"] for r in given if r["zh"] == item.group}
    assert {(i.group, *i.answers) for i in task.train} == {
        (r["zh"], r["en"])
        for r in given
        if r["en"] not in targets and r["zh"] not in {item.group for item in task.test}
    }


def test_what_is_held_out_is_settled_by_the_groups_alone(rng: np.random.Generator):
    items = [Item(f"p{n}", ("x",), f"g{n % 30}") for n in range(60)]
    train, test = hold_out(items, 10)
    assert len(test) == 10
    assert sorted(train + test, key=items.index) == items
    shuffled = [items[n] for n in rng.permutation(60)]
    more = [*shuffled, Item("new", ("y",), test[0].group)]
    assert {i.prompt for i in hold_out(more, 10)[1]} >= {i.prompt for i in test[:9]}
    assert {i.group for i in hold_out(shuffled, 10)[1]} == {i.group for i in test}
    assert len(hold_out(items, None)[1]) == 6
    for count in (0, 60):
        with pytest.raises(UserError, match="cannot be held out; 1 to 59"):
            hold_out(items, count)


def test_a_folder_has_its_sides(tmp_path: Path):
    for name in ("train.csv", "validation.csv", "test.csv"):
        (tmp_path / name).write_text(f"{name},1\n")
    train, test = read_sides(str(tmp_path), None, ("text", "label"))
    assert (train[0]["text"], test and test[0]["text"]) == ("train.csv", "validation.csv")
    _, test = read_sides(str(tmp_path), str(tmp_path / "test.csv"), ("text", "label"))
    assert test is not None
    assert test[0]["text"] == "test.csv"


def test_records_of_tfds_are_taken(rng: np.random.Generator):
    talks = [
        {"translations": {"language": ["en", "zh-cn"], "translation": [f"e{n}", f"z{n}"]}}
        for n in range(9)
    ] + [{"translations": {"language": ["en", "fr"], "translation": ["e", "f"]}}]
    task = translation(talks, source="zh-cn", target="en")
    assert len(task.train) + len(task.test) == 9
    assert task.train[0].prompt == f"Chinese: {task.train[0].group}\nEnglish:"
    asked = {"context": "c", "question": "q", "answers": {"text": ["a", "a", "b"]}}
    unanswerable = {"context": "d", "question": "q", "answers": {"text": []}}
    task = question_answering([asked], [{**asked, "context": "e"}, unanswerable])
    assert [item.answers for item in task.test] == [("a", "b")]
    task = sentiment([{"sentence": "s", "label": 1}], [{"text": "t", "label": 0}])
    assert (task.train[0].answers, task.test[0].answers) == (("positive",), ("negative",))


def made_up(shots: int = 0) -> finetuning.Measured:
    """Figures of twelve items that nothing was measured for."""
    return finetuning.Measured({"accuracy": mean([1.0, 0.0])}, [1.0] * 12, ["x"] * 12, [shots] * 12)


def fitted(*_: Any, out: str, params: Any, **__: Any) -> Any:
    """In place of `fit`: the parameters as they were."""
    Path(out).mkdir()
    return SimpleNamespace(finished=True, params=params)


def test_only_the_training_items_are_learned_and_shown(
    tmp_path: Path, data: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, list[Any]] = {"measured": [], "shots": [], "encoded": []}

    def measured(model: Model, task: Task, items: Any, shots: Any, settings: Any) -> Any:
        seen["measured"] += items
        seen["shots"].append(list(shots))
        return made_up(len(shots))

    def encoded(tokenizer: Any, task: Task, item: Item, *args: Any, **kwargs: Any) -> Any:
        seen["encoded"].append(item)
        return encode_item(tokenizer, task, item, *args, **kwargs)

    monkeypatch.setattr(finetuning, "measure", measured)
    monkeypatch.setattr(finetuning, "encode_item", encoded)
    monkeypatch.setattr(finetuning, "fit", fitted)
    monkeypatch.setattr(finetuning, "_fits", lambda model, task, item, _: len(item.group) < 99)
    run(command, "finetune_sentiment", data / "sst", tmp_path / "run", "--few-shot", 5)
    test = {item.group for item in seen["measured"]}
    learned = {item.group for item in seen["encoded"]}
    assert [len(shots) for shots in seen["shots"]] == [0, 5, 0]
    shown = {item.group for item in seen["shots"][1]}
    assert learned
    assert not test & learned
    assert shown <= learned


def test_devices_are_chosen_by_what_is_trained(
    tmp_path: Path, data: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[int, int, int]] = []
    whole: list[int] = []

    def counted(*args: Any, params: Any, **options: Any) -> Any:
        whole.append(sum(x.size for x in jax.tree.leaves(params)))
        return fitted(*args, params=params, **options)

    monkeypatch.setattr(finetuning, "measure", lambda *_: made_up())
    monkeypatch.setattr(finetuning, "fit", counted)
    monkeypatch.setattr(finetuning, "data_mesh", lambda *sizes: asked.append(sizes))
    for rank in 0, 2:
        sizes = ("--lora-rank", rank, "--context-length", 64, "--accumulate", 2)
        run(command, "finetune_sentiment", data / "sst", tmp_path / f"{rank}", *sizes)
    # Of one block 16 wide: queries, keys, values and outputs, and the two of the hidden layer.
    low_rank = 2 * (4 * (16 + 16) + 2 * (16 + 64))
    assert asked == [(2, 128, whole[0]), (2, 128, low_rank)]


# What is measured

ALPHABET = CharTokenizer("abcdefghij :\n?")
FORWARD = jax.jit(forward, static_argnames="config")
SETTINGS = FineTuning(preset="", out="", data="", eval_batch_size=3, show=1)


def small_model(rng: np.random.Generator) -> Model:
    config = MODERN.replace(vocab_size=ALPHABET.vocab_size, context_length=64)
    return Model(config, random_params(config, rng), ALPHABET)


def draw(rng: np.random.Generator, most: int = 8) -> str:
    return "".join(rng.choice(list("abcdefghij"), rng.integers(1, most)))


def make_items(rng: np.random.Generator, answers: Sequence[str] = ()) -> list[Item]:
    return [
        Item(f"{draw(rng)}:", (str(rng.choice(answers)) if answers else draw(rng),), draw(rng))
        for _ in range(5)
    ]


def logprob(model: Model, prompt: str, completion: str) -> float:
    """By one plain forward pass."""
    ids = np.zeros((1, 64), np.int32)
    both = ALPHABET.encode(prompt + completion)
    ids[0, : len(both)] = both
    found = np.asarray(jax.nn.log_softmax(FORWARD(model.params, ids, model.config)[0]))
    return float(sum(found[n - 1, both[n]] for n in range(len(prompt), len(both))))


def test_losses_and_labels_are_those_of_the_likelihoods(rng: np.random.Generator):
    model, labels = small_model(rng), ("abc", "de", "f")
    items, shots = make_items(rng, labels), make_items(rng, labels)[:2]

    def metrics(answers: Sequence[str], items: Sequence[Item]) -> Any:
        return {"right": mean([float(a in i.answers) for a, i in zip(answers, items, strict=True)])}

    task = Task("t", items, items, metrics, labels)
    for given in ([], shots):
        found = measure(model, task, items, given, SETTINGS)
        before = "".join(f"{shot.prompt} {shot.answers[0]}\n\n" for shot in given)
        total, tokens = 0.0, 0
        for item, loss, answer in zip(items, found.losses, found.answers, strict=True):
            prompt = before + str(item.prompt)
            # Without an end-of-text token an answer ends with what stops generation.
            written = f" {item.answers[0]}\n"
            nll = -logprob(model, prompt, written)
            assert loss == pytest.approx(nll / len(written), rel=1e-4)
            total, tokens = total + nll, tokens + len(written)
            scores = [logprob(model, prompt, f" {label}") for label in labels]
            assert answer == labels[int(np.argmax(scores))]
        assert found.estimates["loss"].value == pytest.approx(total / tokens, rel=1e-4)
        right = [a in i.answers for a, i in zip(found.answers, items, strict=True)]
        assert found.estimates["right"].value == pytest.approx(np.mean(right))


def test_answers_are_greedy_and_end_where_they_should(rng: np.random.Generator):
    model, items = small_model(rng), make_items(rng)
    texts = []
    for item in items:
        ids = ALPHABET.encode(str(item.prompt))
        for _ in range(6):
            row = np.zeros((1, 64), np.int32)
            row[0, : len(ids)] = ids
            ids.append(int(FORWARD(model.params, row, model.config)[0, len(ids) - 1].argmax()))
        texts.append(ALPHABET.decode(ids)[len(str(item.prompt)) :])
    stop = texts[0][2]
    task = Task("t", items, items, lambda *_: {}, stop=stop, max_new_tokens=6)
    found = measure(model, task, items, [], SETTINGS)
    assert found.answers == [text.split(stop)[0].strip() for text in texts]


def test_examples_are_left_out_where_they_do_not_fit(rng: np.random.Generator):
    model = small_model(rng)
    items = [Item("a" * 20 + ":", ("b",), "1"), Item("a" * 50 + ":", ("b",), "2")]
    shots = [Item("c" * 8 + ":", ("d",), str(n)) for n in range(3)]
    task = Task("t", items, items, None, ("b", "d"))
    read: list[Any] = []

    def watched(model: Model, requests: Any, **kwargs: Any) -> Any:
        read.extend(requests)
        return likelihoods(model, requests, **kwargs)

    likelihoods = finetuning.loglikelihoods
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "loglikelihoods", watched)
        measure(model, task, items, shots, SETTINGS)
    lengths = {len(context) for context, _ in read}
    # 21 + 3 * (9 + 2 + 2), and 51 with none.
    assert lengths == {60, 51}


def test_of_a_chat_with_examples_only_its_own_answers_count():
    tokenizer = chat_like()
    tokenizer.chat_template = CHATML

    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    turns = (said("user", "one"), said("assistant", "two"), said("user", "three"))
    item = Item((said("system", "brief"), *turns), ("four",), "")
    shot = Item((said("system", "long"), said("user", "five")), ("six",), "")
    task = Task("t", [shot], [item])
    assert ask(tokenizer, item, [shot]) == [
        said("system", "brief"),
        *(said("user", "five"), said("assistant", "six")),
        *turns,
    ]
    for shots in ([], [shot]):
        example = encode_item(tokenizer, task, item, shots)
        counted = example.tokens[example.weights > 0].tolist()
        assert tokenizer.decode(counted) == "two<|im_end|>four<|im_end|>"


def test_items_of_chats_are_spelled_where_there_is_no_template():
    item = Item(({"role": "user", "content": "a?"},), ("b",), "")
    shot = Item(({"role": "user", "content": "c?"},), ("d",), "")
    expected = "User: c?\n\nAssistant: d\n\nUser: a?\n\nAssistant:"
    assert ask(ALPHABET, item, [shot]) == expected
    assert ask(chat_like(), item, [shot]) == expected
