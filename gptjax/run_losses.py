"""What the metrics of runs tell of their losses, to draw and to compare."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gptjax.errors import UserError

XAxis = Literal["steps", "tokens", "seconds"]


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`, each step once.

    A line that a kill cut short is left out. Steps that were gone through again after a kill count
    as they were the second time.
    """
    rows: list[dict[str, float]] = []
    for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            step = row["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        while rows and rows[-1]["step"] >= step:
            rows.pop()
        rows.append(row)
    return rows


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of a run, in nats a token, at steps, tokens or seconds.

    Attributes:
        steps: the last step.
        train_x: `[N]`, where each training loss is.
        train: `[N]`, of single batches; only finite ones, as a skipped step's is not.
        validation_x: `[M]`.
        validation: `[M]`, over the whole validation data.
        best_step: the step of the lowest validation loss; None without any.
    """

    steps: int
    train_x: np.ndarray
    train: np.ndarray
    validation_x: np.ndarray
    validation: np.ndarray
    best_step: int | None


def read_losses(run: str | Path, x: XAxis = "steps") -> Losses:
    """Reads the losses of a run from its `metrics.jsonl`.

    Args:
        run: the run folder; the run may still go on.
        x: what they are told over. "tokens" are those that the loss counts. "seconds" are of
            training, without compiling, evaluating and saving: by the tokens a second that each
            line tells, and where the run has ended in the proportion that its summary's
            `train_seconds` ask for.

    Raises:
        UserError: if the folder is no run, or has no steps yet, or does not tell `x`.
    """
    run = Path(run)
    if not (run / "metrics.jsonl").is_file():
        what = "no such folder" if not run.exists() else "it has no metrics.jsonl"
        raise UserError(f"{run} is no run folder: {what}; give what a training script had as --out")
    rows = read_metrics(run)
    if not rows:
        raise UserError(f"{run} has no steps yet: its metrics.jsonl is empty; wait for the first")
    places = _places(rows, run, x)
    train = np.array([row.get("loss", math.nan) for row in rows], float)
    validation = np.array([row.get("val_loss", math.nan) for row in rows], float)
    counts, known = np.isfinite(train), np.isfinite(validation)
    best = int(np.nanargmin(np.where(known, validation, np.nan))) if known.any() else None
    return Losses(
        steps=int(rows[-1]["step"]),
        train_x=places[counts],
        train=train[counts],
        validation_x=places[known],
        validation=validation[known],
        best_step=None if best is None else int(rows[best]["step"]),
    )


def _places(rows: list[dict[str, float]], run: Path, x: XAxis) -> np.ndarray:
    """Where each line of metrics is on the x axis."""
    steps = np.array([row["step"] for row in rows], float)
    if x == "steps":
        return steps
    if x not in ("tokens", "seconds"):
        raise UserError(f"unknown x axis {x!r}; give steps, tokens or seconds")
    needed = ("tokens",) if x == "tokens" else ("tokens", "tokens_per_second")
    told = np.array([all(row.get(name, 0) > 0 for name in needed) for row in rows])
    if not told.any():
        raise UserError(f"{run} does not tell {' and '.join(needed)}; use steps as the x axis")
    amounts = np.array([row.get("tokens", 0) for row in rows], float)[told]
    if x == "seconds":
        amounts /= np.array([row.get("tokens_per_second", 1) for row in rows], float)[told]
    # A line stands for all steps since the one before it.
    sums = np.cumsum(amounts * np.diff(steps[told], prepend=0.0))
    places = np.interp(steps, np.concatenate([[0.0], steps[told]]), np.concatenate([[0.0], sums]))
    if x == "seconds":
        summary = _read_summary(run)
        end = float(np.interp(summary.get("steps", 0.0), steps, places, left=0.0))
        if end and summary.get("train_seconds"):
            places *= summary["train_seconds"] / end
    return places


def _read_summary(run: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {}


def run_labels(runs: Sequence[str | Path]) -> dict[str, Path]:
    """A short name for each run folder: its own, with as many parents as tell them apart.

    Raises:
        UserError: if a folder is given twice.
    """
    paths = [Path(run).expanduser() for run in runs]
    whole = [path.resolve() for path in paths]
    for path in whole:
        if whole.count(path) > 1:
            raise UserError(f"{path} is given twice; give each run once")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return {"/".join(place.parts[-depth:]): path for place, path in zip(whole, paths, strict=True)}


def losses_table(runs: Mapping[str, str | Path]) -> str:
    """Runs side by side, one a line: steps, the last training loss, the best validation loss.

    Raises:
        UserError: as by `read_losses`.
    """
    lines = [("run", "steps", "last training loss", "best validation loss")]
    for label, run in runs.items():
        losses = read_losses(run)
        last = f"{losses.train[-1]:.4f}" if len(losses.train) else "none"
        best = "none"
        if losses.best_step is not None:
            best = f"{losses.validation.min():.4f} at step {losses.best_step}"
        lines.append((label, str(losses.steps), last, best))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        f"{name:{widths[0]}}  {steps:>{widths[1]}}  {last:>{widths[2]}}  {best}"
        for name, steps, last, best in lines
    )
