"""Suites by name and on the command line: figures, files, and runs that go on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from small_models import GPT2, random_params
from small_tokenizers import TEXTS

from gptjax.errors import UserError
from gptjax.evaluation import suites
from gptjax.evaluation.bias import evaluate_pairs, read_crows_pairs, read_winogender
from gptjax.evaluation.calibration import calibration
from gptjax.evaluation.suites import SUITES, Options, run_suite, run_suites, write_results
from gptjax.model import Model
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.scoring import score
from gptjax.tokenizer import BPETokenizer

WORDS = ["cat", "bat", "hat", "mat", "dog"]


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer = BPETokenizer.train(TEXTS * 3, 320)
    config = GPT2.replace(vocab_size=tokenizer.vocab_size, context_length=64)
    return Model(config, random_params(config, np.random.default_rng(5)), tokenizer)


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for each suite."""
    folder = tmp_path_factory.mktemp("data")
    text, six, passages = (folder / name for name in ("text.txt", "six.txt", "passages.txt"))
    text.write_text(" ".join(TEXTS * 3), encoding="utf-8")
    lines = [
        line
        for n, word in enumerate(WORDS)
        for line in (f"Sitting: the {word}", str(n % 4), "sat.", "ran away.", "is 12.", "hid.")
    ]
    six.write_text("\n".join(lines), encoding="utf-8")
    passages.write_text("\n".join(f"the {word} sat on the mat" for word in WORDS))
    pairs = folder / "pairs.csv"
    rows = [
        f"the {word} sat,the {word} ran,{'one' if n % 2 else 'two'}" for n, word in enumerate(WORDS)
    ]
    pairs.write_text("\n".join(["sent_more,sent_less,bias_type", *rows]))
    winogender = folder / "all_sentences.tsv"
    sentences = [
        f"{word}.customer.{answer}.{gender}.txt\tthe {word} said {pronoun} sat"
        for word in WORDS
        for answer in (0, 1)
        for gender, pronoun in (("male", "he"), ("female", "she"))
    ]
    winogender.write_text("\n".join(["sentid\tsentence", *sentences]))
    shares = [f"{word}\t{10 + 20 * n}" for n, word in enumerate(WORDS)]
    stats = ["occupation\tbls_pct_female", *shares]
    (folder / "occupations-stats.tsv").write_text("\n".join(stats))
    questions = [
        {"context": f"the {word}", "choices": ["sat", "ran", "hid"][: 2 + n % 2], "label": n % 2}
        for n, word in enumerate(WORDS)
    ]
    tasks = [{"prompt": f"the {word}", "answers": [" sat"]} for word in WORDS]
    return {
        "perplexity": text,
        "hellaswag": six,
        "multiple-choice": jsonl(folder / "questions.jsonl", questions),
        "lambada": passages,
        "generation": jsonl(folder / "tasks.jsonl", tasks),
        "crows-pairs": pairs,
        "winogender": winogender,
    }


def test_every_suite_has_figures(model: Model, data: dict[str, Path]) -> None:
    assert set(data) == set(SUITES)
    for suite, path in data.items():
        result = run_suite(model, suite, path, Options(max_new_tokens=4, stride=16))
        assert result.suite == suite
        assert result.figures
        for estimate in result.figures.values():
            assert np.isfinite(estimate.value)
            assert estimate.stderr >= 0
            assert estimate.count > 1
        if suite != "perplexity":
            assert len(result.records) == 5


def test_perplexity_is_that_of_scores(model: Model, data: dict[str, Path]) -> None:
    """Windows half a context apart are what `score` reads."""
    result = run_suite(model, "perplexity", data["perplexity"])
    [scored] = score(model, data["perplexity"].read_text(encoding="utf-8"))
    assert result.figures["perplexity"].value == pytest.approx(scored.perplexity, rel=1e-4)
    assert result.figures["bits per byte"].value == pytest.approx(scored.bits_per_byte, rel=1e-4)


def test_texts_of_json_lines_and_a_limit(model: Model, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in (*TEXTS, "the cat")])
    result = run_suite(model, "perplexity", path)
    assert {record["text"] for record in result.records} == {0, 1, 2}
    some = run_suite(model, "perplexity", path, Options(limit=2))
    assert {record["text"] for record in some.records} == {0, 1}
    both = score(model, TEXTS)
    nats = -sum(float(found.logprobs.sum()) for found in both)
    tokens = sum(len(found.tokens) for found in both)
    assert some.figures["perplexity"].value == pytest.approx(np.exp(nats / tokens), rel=1e-4)


@pytest.mark.parametrize("suite", ["crows-pairs", "winogender"])
def test_pairs_are_those_of_the_bias_probe(suite: str, model: Model, data: dict[str, Path]) -> None:
    read = {"crows-pairs": read_crows_pairs, "winogender": read_winogender}[suite]
    wanted = evaluate_pairs(model, read(data[suite]))
    result = run_suite(model, suite, data[suite])
    differences = [record["more"] - record["less"] for record in result.records]
    np.testing.assert_allclose(differences, wanted.differences, atol=2e-4)
    share = result.figures["stereotypical sentence likelier"]
    assert share.value == wanted.overall.share
    assert result.figures["difference in nats"].stderr == pytest.approx(
        wanted.overall.difference.stderr, abs=1e-3
    )
    assert result.details["caveats"] == list(wanted.caveats)
    assert all(caveat in result.report for caveat in wanted.caveats)


def test_multiple_choice_tells_its_calibration(model: Model, data: dict[str, Path]) -> None:
    """Also of questions with different numbers of choices."""
    result = run_suite(model, "multiple-choice", data["multiple-choice"])
    records = result.records
    probabilities = [[*record["probabilities"], 0.0][:3] for record in records]
    assert {len(record["logprobs"]) for record in records} == {2, 3}
    wanted = calibration(np.array(probabilities), np.array([r["label"] for r in records]))
    assert result.figures["calibration error"].value == pytest.approx(wanted.ece.value)
    assert result.details["calibration"]["accuracy"]["brier"] == pytest.approx(wanted.brier.value)
    assert set(result.reliability) == {
        "accuracy",
        "accuracy per byte",
        "accuracy unconditional-normalized",
    }
    per_byte = result.details["calibration"]["accuracy per byte"]["confidence"]
    weights = [np.exp(np.array(r["logprobs"]) / r["bytes"]) for r in records]
    assert per_byte == pytest.approx(np.mean([max(w / w.sum()) for w in weights]))


@pytest.mark.parametrize("suite", ["perplexity", "hellaswag", "generation", "crows-pairs"])
def test_a_stopped_suite_goes_on(
    suite: str, model: Model, data: dict[str, Path], tmp_path: Path
) -> None:
    options = Options(stride=16, batch_size=2, max_new_tokens=4)
    whole = run_suite(model, suite, data[suite], options, out=tmp_path)
    path = tmp_path / f"{suite}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:-3])
    again = run_suite(model, suite, data[suite], options, out=tmp_path)
    for name, estimate in whole.figures.items():
        assert again.figures[name] == pytest.approx(estimate, rel=1e-4, abs=1e-5)
    assert len(path.read_bytes().splitlines()) == len(lines)
    for changes, words in (({"limit": 2}, "other items|no record"), ({}, "another model")):
        other = model
        if not changes:
            params = random_params(model.config, np.random.default_rng(6))
            other = dataclasses.replace(model, params=params)
        elif suite == "perplexity":
            changes, words = {"stride": 32}, "other items|no record"
        with pytest.raises(UserError, match=words):
            run_suite(
                other, suite, data[suite], dataclasses.replace(options, **changes), out=tmp_path
            )


def test_batches_change_no_figure(model: Model, data: dict[str, Path]) -> None:
    for suite in ("hellaswag", "lambada", "perplexity"):
        one, other = (
            run_suite(model, suite, data[suite], Options(batch_size=size)) for size in (1, 7)
        )
        for name, estimate in one.figures.items():
            assert other.figures[name] == pytest.approx(estimate, rel=1e-4, abs=1e-5)


def test_the_command(model: Model, data: dict[str, Path], tmp_path: Path, command: Command) -> None:
    save_pretrained(model, tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["evaluate", tmp_path / "model", "--suite", "hellaswag,crows-pairs"]
    arguments += ["--data", data["hellaswag"], data["crows-pairs"], "--limit", "4", "--out", out]
    status, printed, errors = command("gptjax", *arguments)
    assert (status, errors) == (0, "")
    wanted = run_suite(model, "hellaswag", data["hellaswag"], Options(limit=4))
    accuracy = wanted.figures["accuracy per byte"]
    rows = [line.split() for line in printed.splitlines()]
    assert [f"{accuracy.value:.2f}", f"{accuracy.stderr:.2f}", "4"] in [row[-3:] for row in rows]
    assert "note: 50 % does not mean unbiased" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["model"] == str(tmp_path / "model")
    assert list(results["suites"]) == ["hellaswag", "crows-pairs"]
    figure = results["suites"]["hellaswag"]["figures"]["accuracy per byte"]
    assert figure == pytest.approx(accuracy._asdict())
    assert len((out / "hellaswag.jsonl").read_text().splitlines()) == 4
    assert (out / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    # JSON alone, and nothing done twice.
    status, printed, errors = command("gptjax", *arguments, "--json")
    assert (status, errors) == (0, "")
    assert json.loads(printed) == results["suites"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "helaswag", "--data", "x"], "unknown suite 'helaswag'; did you mean 'hella"),
        (["--suite", "lambada,hellaswag", "--data", "x"], "2 suites and 1 files; give --data one"),
        (["--suite", "lambada", "--data", "none.txt"], "no file none.txt"),
        (["--suite", "lambada,lambada", "--data", "x", "y"], "has a suite twice"),
        (["--suite", "lambada"], "--data"),
    ],
)
def test_illegal_commands_are_refused(arguments: list[str], words: str, command: Command) -> None:
    status, printed, errors = command("gptjax", "evaluate", "model", *arguments)
    assert status == 2
    assert printed == ""
    assert words in errors
    assert len(errors.splitlines()) == 1


def test_all_files_are_read_before_the_first_is_evaluated(
    model: Model, data: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.txt"
    broken.write_text("word")
    files = {"hellaswag": data["hellaswag"], "lambada": broken}
    with pytest.raises(UserError, match=r"broken\.txt:1 is 'word'"):
        run_suites(model, files, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    files["lambada"] = data["lambada"]
    results = run_suites(model, files, Options(limit=2))
    assert [result.suite for result in results] == ["hellaswag", "lambada"]


def test_what_cannot_be_run_is_refused(model: Model, data: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="unknown suite 'x'; known: crows-pairs"):
        run_suite(model, "x", data["lambada"])
    with pytest.raises(UserError, match="limit is 0; at least 1"):
        run_suite(model, "lambada", data["lambada"], Options(limit=0))
    with pytest.raises(UserError, match="no tokenizer"):
        run_suite(dataclasses.replace(model, tokenizer=None), "lambada", data["lambada"])
    with pytest.raises(UserError, match="batch_size is 0"):
        run_suite(model, "lambada", data["lambada"], Options(batch_size=0))


def test_results_without_choices_have_no_picture(
    model: Model, data: dict[str, Path], tmp_path: Path
) -> None:
    result = run_suite(model, "lambada", data["lambada"])
    write_results([result], tmp_path, model="m")
    assert json.loads((tmp_path / "results.json").read_text())["model"] == "m"
    assert not (tmp_path / "reliability.png").exists()
    assert suites.results_to_json([result])["lambada"]["figures"]["accuracy"]["count"] == 5


def test_a_folder_keeps_the_suites_of_its_model(
    model: Model, data: dict[str, Path], tmp_path: Path
) -> None:
    def written(suite: str, **about: Any) -> set[str]:
        result = run_suite(model, suite, data[suite], Options(limit=2))
        write_results([result], tmp_path, **about)
        return set(json.loads((tmp_path / "results.json").read_text())["suites"])

    assert written("lambada", params="a") == {"lambada"}
    assert written("crows-pairs", params="a") == {"lambada", "crows-pairs"}
    assert written("crows-pairs", params="b") == {"crows-pairs"}


def test_a_long_sentence_is_read_in_windows(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    rows = ["the cat,the dog,x", f"{'the cat ' * 80},{'the dog ' * 80},x"]
    path.write_text("\n".join(["sent_more,sent_less,bias_type", *rows]))
    [_, found] = run_suite(model, "crows-pairs", path).records
    result = evaluate_pairs(model, read_crows_pairs(path))
    assert found["more"] - found["less"] == pytest.approx(result.differences[1], rel=1e-4)
