"""Evaluations by name: a local file in, figures with standard errors and a line an item out."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.caching import gptjax_version
from gptjax.errors import UserError, nearest
from gptjax.evaluation import bias
from gptjax.evaluation.calibration import Bins, calibration
from gptjax.evaluation.completions import read_tasks, score_completions, summarize_completions
from gptjax.evaluation.items import read_text, read_texts
from gptjax.evaluation.last_word import read_passages, score_last_words, summarize_last_words
from gptjax.evaluation.long_text import score_long_texts, summarize_long_texts, window_texts
from gptjax.evaluation.multiple_choice import (
    MultipleChoice,
    choice_scores,
    read_hellaswag,
    read_multiple_choice,
    score_multiple_choice,
    summarize_multiple_choice,
)
from gptjax.evaluation.results import Estimate, Record, collect, to_json
from gptjax.model import Model
from gptjax.plots import plot_reliability
from gptjax.resumable import model_settings
from gptjax.text_generation import tokenizer_of


@dataclass(frozen=True)
class Options:
    """What may be asked of a suite.

    Attributes:
        limit: how many items, the first ones; None is all.
        batch_size: the most rows that are read at once. No figure depends on it.
        context: of `perplexity`, tokens that a window reads; None is the model's context.
        stride: of `perplexity`, tokens from one window to the next; None is half the context.
        max_new_tokens: of `generation`, the most tokens of a completion.
    """

    limit: int | None = None
    batch_size: int = 8
    context: int | None = None
    stride: int | None = None
    max_new_tokens: int = 32


@dataclass(frozen=True)
class SuiteResult:
    """What a suite found.

    Attributes:
        suite: its name.
        figures: with their standard errors.
        records: of each item, as the suite's module says.
        details: what else there is to keep, as JSON has it.
        report: what is to be told beside the figures, such as what they do not say.
        reliability: of multiple choice, for each way to compare choices how sure the model was and
            how often it was right.
    """

    suite: str
    figures: dict[str, Estimate]
    records: list[Record]
    details: dict[str, Any] = field(default_factory=dict)
    report: str = ""
    reliability: dict[str, Bins] = field(default_factory=dict)


@dataclass(frozen=True)
class _Work:
    """A suite that has read its items."""

    items: Any
    """All that is asked, as JSON has it."""
    count: int
    score: Callable[[list[int]], Iterator[tuple[int, Record]]]
    """Is given indices of items, and yields the place of one among them with its record."""
    conclude: Callable[[list[Record]], dict[str, Any]]
    """Is given all records, and returns the fields of `SuiteResult`."""


def _perplexity(model: Model, path: Path, options: Options) -> _Work:
    """Texts: .jsonl with `text`, else the file is one."""
    texts = [read_text(path)]
    if path.suffix == ".jsonl":
        texts = [text for _, text in read_texts(path)]
    windowed = window_texts(
        model, texts[: options.limit], context=options.context, stride=options.stride
    )
    return _Work(
        [windowed.texts, [list(part) for part in windowed.parts]],
        len(windowed.parts),
        lambda indices: score_long_texts(model, windowed, indices, batch_size=options.batch_size),
        lambda records: {"figures": summarize_long_texts(windowed, records)},
    )


def _hellaswag(model: Model, path: Path, options: Options) -> _Work:
    return _questions(model, read_hellaswag(path), options)


def _multiple_choice(model: Model, path: Path, options: Options) -> _Work:
    return _questions(model, read_multiple_choice(path), options)


def _questions(model: Model, questions: list[MultipleChoice], options: Options) -> _Work:
    questions = questions[: options.limit]
    return _Work(
        [dataclasses.asdict(question) for question in questions],
        len(questions),
        lambda indices: score_multiple_choice(
            model, _at(questions, indices), batch_size=options.batch_size
        ),
        _conclude_questions,
    )


def _conclude_questions(records: list[Record]) -> dict[str, Any]:
    """Accuracies, and the calibration of the probabilities that go with each."""
    figures = summarize_multiple_choice(records)
    labels = np.array([record["label"] for record in records])
    most = max(len(record["logprobs"]) for record in records)
    details, reliability = {}, {}
    for name in list(figures):
        probabilities = np.zeros((len(records), most))
        for row, record in zip(probabilities, records, strict=True):
            scores = choice_scores(record)[name]
            weights = np.exp(scores - scores.max())
            row[: len(scores)] = weights / weights.sum()
        found = calibration(probabilities, labels)
        figures[name.replace("accuracy", "calibration error")] = found.ece
        details[name] = found.to_dict()
        reliability[name] = found.bins
    return {"figures": figures, "details": {"calibration": details}, "reliability": reliability}


def _lambada(model: Model, path: Path, options: Options) -> _Work:
    passages = read_passages(path)[: options.limit]
    return _Work(
        passages,
        len(passages),
        lambda indices: score_last_words(
            model, _at(passages, indices), batch_size=options.batch_size
        ),
        lambda records: {"figures": summarize_last_words(records)},
    )


def _generation(model: Model, path: Path, options: Options) -> _Work:
    tasks = read_tasks(path)[: options.limit]
    return _Work(
        [[dataclasses.asdict(task) for task in tasks], options.max_new_tokens],
        len(tasks),
        lambda indices: score_completions(
            model,
            _at(tasks, indices),
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
        ),
        lambda records: {"figures": summarize_completions(records)},
    )


def _crows_pairs(model: Model, path: Path, options: Options) -> _Work:
    return _pairs(model, bias.read_crows_pairs(path), options)


def _winogender(model: Model, path: Path, options: Options) -> _Work:
    return _pairs(model, bias.read_winogender(path), options)


def _pairs(model: Model, pairs: list[bias.Pair], options: Options) -> _Work:
    pairs = pairs[: options.limit]

    def score(indices: list[int]) -> Iterator[tuple[int, Record]]:
        # Some at a time, so that a stop loses little.
        most = 8 * options.batch_size
        for start in range(0, len(indices), most):
            part = _at(pairs, indices[start : start + most])
            found = bias.pair_likelihoods(model, part, batch_size=options.batch_size)
            for place, (more, less) in enumerate(found.tolist(), start):
                yield place, {"more": more, "less": less}

    def conclude(records: list[Record]) -> dict[str, Any]:
        differences = np.array([record["more"] - record["less"] for record in records])
        result = bias.pairs_result(pairs, differences)
        share, count = result.overall.share, result.overall.count
        stderr = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan
        figures = {
            "stereotypical sentence likelier": Estimate(share, stderr, count),
            "difference in nats": result.overall.difference,
        }
        return {"figures": figures, "details": result.to_dict(), "report": str(result)}

    return _Work([dataclasses.asdict(pair) for pair in pairs], len(pairs), score, conclude)


def _at(items: Sequence[Any], indices: list[int]) -> list[Any]:
    return [items[index] for index in indices]


SUITES: dict[str, Callable[[Model, Path, Options], _Work]] = {
    "perplexity": _perplexity,
    "hellaswag": _hellaswag,
    "multiple-choice": _multiple_choice,
    "lambada": _lambada,
    "generation": _generation,
    "crows-pairs": _crows_pairs,
    "winogender": _winogender,
}
"""What reads the items of each suite."""


def run_suite(
    model: Model,
    suite: str,
    data: str | Path,
    options: Options = Options(),
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> SuiteResult:
    """Evaluates a model on a local file.

    - `perplexity` (`long_text`): a text, or .jsonl with `text`;
    - `hellaswag` and `multiple-choice` (`multiple_choice`): as `read_hellaswag` and
      `read_multiple_choice` say; with the calibration of the probabilities;
    - `lambada` (`last_word`): a passage a line, or .jsonl with `text`;
    - `generation` (`completions`): .jsonl with `prompt` and `answers`;
    - `crows-pairs` and `winogender` (`bias`): the files or folders that they come as.

    Args:
        model: with a tokenizer.
        suite: one of these names.
        data: the file.
        options: see `Options`.
        out: a folder, made if it is not there, for a file `SUITE.jsonl` with a line an item. Where
            it holds lines of the same model, items and options, what is done is not done again.
        progress: whether a bar is shown.

    Raises:
        UserError: for an unknown suite, naming the nearest; if a file is not what the suite reads;
            if an option is out of range; or if lines in `out` were made with others.
        OSError: if a file cannot be read or written.
    """
    [result] = run_suites(model, {suite: data}, options, out=out, progress=progress)
    return result


def run_suites(
    model: Model,
    data: Mapping[str, str | Path],
    options: Options = Options(),
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> list[SuiteResult]:
    """As `run_suite` for several, name -> file; all files are read before the first is evaluated.

    Args:
        model: as in `run_suite`.
        data: suite -> file.
        options: as in `run_suite`.
        out: as in `run_suite`.
        progress: as in `run_suite`.

    Returns:
        A result for each, in the order of `data`.

    Raises:
        UserError: as `run_suite` does.
        OSError: as `run_suite` does.
    """
    for suite in data:
        if suite not in SUITES:
            raise UserError(f"unknown suite {suite!r}{nearest(suite, SUITES)}")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"limit is {options.limit}; at least 1")
    tokenizer_of(model)
    works = {
        suite: SUITES[suite](model, Path(path).expanduser(), options)
        for suite, path in data.items()
    }
    return [_run(model, suite, work, out, progress) for suite, work in works.items()]


def _run(
    model: Model, suite: str, work: _Work, out: str | Path | None, progress: bool
) -> SuiteResult:
    path = None
    settings = {}
    if out is not None:
        folder = Path(out).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{suite}.jsonl"
        items = hashlib.sha256(json.dumps(work.items).encode()).hexdigest()
        settings = {"suite": suite, "items": items, **model_settings(model)}

    def score(indices: list[int]) -> Iterator[tuple[int, Record]]:
        return ((indices[place], record) for place, record in work.score(indices))

    records = collect(
        score, work.count, path=path, settings=settings, progress=progress, task=suite
    )
    return SuiteResult(suite=suite, records=records, **work.conclude(records))


def results_to_json(results: Sequence[SuiteResult]) -> dict[str, Any]:
    """Suites with their figures, standard errors and details, as JSON has it."""
    figures = to_json({result.suite: result.figures for result in results})
    return {
        result.suite: {"figures": figures[result.suite], **result.details} for result in results
    }


def write_results(results: Sequence[SuiteResult], out: str | Path, **about: Any) -> None:
    """Writes `results.json` and, where there was multiple choice, `reliability.png`.

    Suites that the file has of the same model (by all of `about`) stay in it.

    Args:
        results: of one model.
        out: a folder.
        about: what else the file is to say, such as the model's name.

    Raises:
        OSError: if a file cannot be written.
    """
    folder = Path(out).expanduser()
    path = folder / "results.json"
    suites = results_to_json(results)
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if all(earlier.get(name) == value for name, value in about.items()):
            suites = earlier["suites"] | suites
    values = {**about, "gptjax": gptjax_version(), "suites": suites}
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
    reliability = {
        f"{result.suite}, {way}": bins
        for result in results
        for way, bins in result.reliability.items()
    }
    if reliability:
        plot_reliability(reliability, folder / "reliability.png")
