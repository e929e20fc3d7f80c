"""Figures with their standard errors, and items that are written as they are done."""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.reporting import Progress
from gptjax.resumable import alone, check_settings, to_line, whole_lines

if TYPE_CHECKING:
    from rich.console import Console

Record = dict[str, Any]
"""What an evaluation found out about one item, as JSON has it."""


class Estimate(NamedTuple):
    """A figure, how far it may be off by the choice of items, and how many there were."""

    value: float
    """The figure."""
    stderr: float
    """The standard error; NaN where there are too few items to tell."""
    count: int
    """How many items it is from."""


def mean(values: Sequence[float]) -> Estimate:
    """The mean of values and its standard error, by the central limit theorem.

    The items count as drawn independently from many like them (Miller 2024, Adding Error Bars to
    Evals).
    """
    return ratio(values, [1.0] * len(values))


def ratio(amounts: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """`sum(amounts) / sum(sizes)`, such as nats a token where items have many tokens.

    Its standard error is that of a ratio of two means to first order (Cochran 1977, Sampling
    Techniques, section 2.11); with sizes of 1 that of a mean.
    """
    count = len(amounts)
    y, x = np.asarray(amounts, np.float64), np.asarray(sizes, np.float64)
    total = x.sum()
    if not total:
        return Estimate(math.nan, math.nan, count)
    value = y.sum() / total
    stderr = math.nan
    if count > 1:
        stderr = math.sqrt(((y - value * x) ** 2).sum() * count / (count - 1)) / total
    return Estimate(float(value), float(stderr), count)


def exponential(estimate: Estimate, factor: float = 1.0) -> Estimate:
    """`exp(factor * value)`, its standard error to first order (the delta method)."""
    try:
        value = math.exp(factor * estimate.value)
    except OverflowError:
        value = math.inf
    return Estimate(value, value * abs(factor) * estimate.stderr, estimate.count)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """An estimate in another unit."""
    return Estimate(factor * estimate.value, abs(factor) * estimate.stderr, estimate.count)


def accuracy_interval(correct: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The confidence interval of an accuracy, by Wilson's score.

    It holds its confidence for few items and near 0 and 1, where the standard error says too
    little. See Wilson 1927, Probable Inference; Brown, Cai and DasGupta 2001.

    Args:
        correct: how many items were right; halves count.
        count: of how many.
        confidence: how often such intervals hold the true accuracy.

    Returns:
        Its ends, from 0 to 1.

    Raises:
        UserError: if the numbers are not in order, or `confidence` is not between 0 and 1.
    """
    if not 0 <= correct <= count or count == 0:
        raise UserError(f"{correct} of {count} are no accuracy; give 0 <= correct <= count, not 0")
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}; between 0 and 1, such as 0.95")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    p = correct / count
    center = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    # At the ends exactly, where rounding would leave a little.
    return center - half if correct else 0.0, center + half if correct < count else 1.0


def collect(
    work: Callable[[list[int]], Iterator[tuple[int, Record]]],
    count: int,
    *,
    path: Path | None = None,
    settings: Mapping[str, Any] = {},
    progress: bool = False,
    task: str = "evaluating",
) -> list[Record]:
    """Evaluates items, and writes each as it is done, so that a stopped run goes on.

    A line of the file is the item's record with its `index`; lines are in the order in which items
    are done. What they were made with stands in a file of the same name with `.settings.json`
    behind it, and must be the same when the run goes on.

    Args:
        work: is given the indices of items that are left, and yields an index and its record as
            each is done.
        count: how many items there are.
        path: the file; None keeps records in memory only.
        settings: all that records depend on, as JSON has it.
        progress: whether a bar is shown.
        task: what it says.

    Returns:
        The records in the order of the items.

    Raises:
        UserError: if the file was made with other settings, holds other lines than records of such
            items, or is in use by another run; and as `work` does.
        OSError: if the file cannot be read or written.
    """
    if path is None:
        records = dict(_shown(work(list(range(count))), 0, count, progress, task))
        return [records[index] for index in range(count)]
    with alone(path):
        records: dict[int, Record] = {}
        lines, end = whole_lines(path)
        for place, record in lines:
            index = record.pop("index", None)
            if not isinstance(index, int) or not 0 <= index < count:
                raise UserError(f"{place} is no record of these {count} items; give another folder")
            records[index] = record
        check_settings(path, json.loads(json.dumps(settings)), is_begun=bool(records))
        left = [index for index in range(count) if index not in records]
        with path.open("ab") as file:
            # A line that a kill cut short.
            file.truncate(end)
            if left:
                for index, record in _shown(work(left), len(records), count, progress, task):
                    file.write(to_line({"index": index, **record}))
                    file.flush()
                    records[index] = record
    return [records[index] for index in range(count)]


def _shown(
    found: Iterator[tuple[int, Record]], done: int, count: int, progress: bool, task: str
) -> Iterator[tuple[int, Record]]:
    with Progress(count, progress, task, "item") as shown:
        shown.update(done, "")
        for number, item in enumerate(found, done + 1):
            yield item
            shown.update(number, "")


def print_estimates(
    results: Mapping[str, Mapping[str, Estimate]], console: "Console | None" = None
) -> None:
    """Prints a table of suites and their figures, each with its standard error.

    Args:
        results: suite -> figure -> estimate.
        console: where to; None is standard output.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("suite", "figure", box=None)
    for name in ("value", "± standard error", "items"):
        table.add_column(name, justify="right")
    for suite, figures in results.items():
        for name, estimate in figures.items():
            value, stderr = _rounded(estimate)
            table.add_row(suite, name, value, stderr, str(estimate.count))
            suite = ""
    (Console(highlight=False) if console is None else console).print(table)


def _rounded(estimate: Estimate) -> tuple[str, str]:
    """Value and error to two digits of the error; what is further right says nothing."""
    value, stderr, _ = estimate
    if not math.isfinite(value) or not math.isfinite(stderr) or stderr <= 0:
        return f"{value:.4g}", f"{stderr:.2g}"
    digits = min(max(1 - math.floor(math.log10(stderr)), 0), 6)
    return f"{value:.{digits}f}", f"{stderr:.{digits}f}"


def to_json(results: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, Any]]:
    """The same as JSON has it; what is not finite is null."""
    return {
        suite: {
            name: {
                key: value if math.isfinite(value) else None
                for key, value in estimate._asdict().items()
            }
            for name, estimate in figures.items()
        }
        for suite, figures in results.items()
    }
