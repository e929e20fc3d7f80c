"""Pictures of runs, in one style."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptjax.evaluation.calibration import Bins


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`; a last line cut short by a kill is left out."""
    rows = []
    for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_losses(runs: Mapping[str, str | Path], png: str | Path) -> None:
    """Draws training and validation loss over steps.

    Args:
        runs: label -> run folder.
        png: the file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (label, run) in enumerate(runs.items()):
        rows = read_metrics(run)
        color = f"C{number}"
        # A skipped step's loss is not a number, which a moving average would never forget.
        train = [(r["step"], r["loss"]) for r in rows if math.isfinite(r.get("loss", math.nan))]
        if train:
            steps, losses = zip(*train, strict=True)
            axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(
                steps, _smoothed(losses), color=color, linewidth=1.4, label=f"{label} training"
            )
        validation = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
        if validation:
            steps, losses = zip(*validation, strict=True)
            axes.plot(
                steps,
                losses,
                color=color,
                linestyle="--",
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                label=f"{label} validation (last {losses[-1]:.4f})",
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(png)


def _smoothed(values: tuple[float, ...], weight: float = 0.95) -> list[float]:
    """An exponential moving average, its start corrected as Adam's moments are."""
    smooth, average, mass = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smooth.append(average / mass)
    return smooth


def plot_memory(
    bars: Mapping[str, Mapping[str, float]], limit: float | None, png: str | Path
) -> None:
    """Draws where a chip's memory goes.

    Args:
        bars: label -> what for -> bytes; each label is a bar of its parts.
        limit: the chip's memory in bytes, drawn as a line; None draws none.
        png: the file to write.
    """
    from matplotlib.figure import Figure

    gib = 2**30
    figure = Figure(figsize=(7, 1.6 + 0.6 * len(bars)), dpi=150, layout="constrained")
    axes = figure.subplots()
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    for number, part in enumerate(parts):
        starts, widths = [], []
        for bar in bars.values():
            before = parts[:number]
            starts.append(sum(bar.get(earlier, 0) for earlier in before) / gib)
            widths.append(bar.get(part, 0) / gib)
        if any(widths):
            label = f"{part} ({', '.join(f'{width:.2f}' for width in widths if width)})"
            axes.barh(list(bars), widths, left=starts, color=f"C{number}", label=label)
    if limit is not None:
        axes.axvline(limit / gib, color="black", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"the chip's {limit / gib:.2f}",
            (limit / gib, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -4),
            textcoords="offset points",
            ha="right",
            va="top",
        )
    axes.invert_yaxis()
    axes.set_xlabel("GiB a chip at the peak of a step")
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(png)


def plot_reliability(results: Mapping[str, "Bins"], png: str | Path) -> None:
    """Draws how often a model is right by how sure it is, and how many items there are of each.

    The diagonal is a calibrated model; below it, a model is surer than it is right.

    Args:
        results: label -> bins, such as `Calibration.bins`.
        png: the file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5.6), dpi=150, layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    axes.plot((0, 1), (0, 1), color="black", linestyle="--", linewidth=1, label="calibrated")
    for number, (label, bins) in enumerate(results.items()):
        axes.plot(
            bins.confidence,
            bins.accuracy,
            color=f"C{number}",
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            label=f"{label} (calibration error {bins.error:.4f})",
        )
        share = bins.count / bins.count.sum()
        below.plot(bins.confidence, share, color=f"C{number}", marker="o", markersize=3.5)
    axes.set_ylabel("share that is right")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False)
    below.set_ylabel("share of items")
    below.set_ylim(bottom=0)
    below.set_xlabel("probability of the likeliest answer")
    for part in (axes, below):
        part.grid(alpha=0.25)
        part.spines[["top", "right"]].set_visible(False)
    figure.savefig(png)
