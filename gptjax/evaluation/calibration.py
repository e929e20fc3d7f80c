"""Whether a model's probabilities are how often it is right."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.evaluation.results import Estimate, mean

CALIBRATION_CAVEATS = (
    "The calibration errors of few items are too large: a calibrated model's is above 0 by chance.",
    "They are about the likeliest choice alone, and depend on the number of bins.",
)

# Probabilities in float16 or bfloat16 sum to 1 only so far.
_SUM_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Bins:
    """Items put together by how sure the model was of its choice; only bins with items.

    Attributes:
        confidence: `[M]` float64, mean probability of the chosen answers.
        accuracy: `[M]` float64, share of them that are right.
        count: `[M]` int64, how many.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def error(self) -> float:
        """The mean distance of confidence and accuracy, by items."""
        distance = np.abs(self.confidence - self.accuracy)
        return float(np.average(distance, weights=self.count))


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibration` finds; every figure with its standard error.

    Attributes:
        accuracy: share of items whose likeliest answer is right.
        confidence: mean probability of the likeliest answer; above the accuracy where a model is
            overconfident.
        ece: expected calibration error over bins of equal width.
        adaptive_ece: the same over bins of equally many items.
        brier: Brier score, from 0 to 2.
        bins: of equal width.
        adaptive_bins: of equally many items.
    """

    accuracy: Estimate
    confidence: Estimate
    ece: Estimate
    adaptive_ece: Estimate
    brier: Estimate
    bins: Bins
    adaptive_bins: Bins

    def to_dict(self) -> dict[str, Any]:
        """What a results file and the model card hold."""
        names = ("accuracy", "confidence", "ece", "adaptive_ece", "brier")
        values: dict[str, Any] = {"items": self.accuracy.count}
        for name in names:
            value, stderr, _ = getattr(self, name)
            values |= {name: value, f"{name}_stderr": stderr if np.isfinite(stderr) else None}
        return values | {"caveats": list(CALIBRATION_CAVEATS)}

    def __str__(self) -> str:
        values = self.to_dict()
        told = {
            "accuracy": self.accuracy,
            "confidence": self.confidence,
            "expected calibration error": self.ece,
            "the same, bins of equal size": self.adaptive_ece,
            "Brier score": self.brier,
        }
        lines = [f"{name:30}{e.value:.4f} ± {e.stderr:.4f}" for name, e in told.items()]
        return "\n".join([*lines, *(f"note: {caveat}" for caveat in values["caveats"])])


def calibration(
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    bins: int = 15,
    resamples: int = 1000,
    seed: int = 0,
) -> Calibration:
    """Compares the probabilities that a model gives answers with how often they are right.

    The expected calibration error (Guo et al. 2017, section 2) puts items into bins by the
    probability of their likeliest answer, and is the mean distance of that and the share of right
    ones, by items. Bins are of equal width, or of equal size (Nguyen and O'Connor 2015, section
    4.1); items of equal probability are never divided between two of those. The Brier score (Brier
    1950) is the mean of `sum_k (p_k - y_k)²`, y_k being 1 for the right answer and 0 otherwise.

    Standard errors of the calibration errors are from bootstrap samples of the items, which keep
    their bins; the others are of a mean. `plots.plot_reliability` draws the bins.

    Args:
        probabilities: `[N, K]`, each row of items summing to 1. For multiple choice: the softmax of
            the log-likelihoods (by byte or by token, if so chosen) of the K answers.
        labels: `[N]` integers from 0 to K - 1, the right answer of each.
        bins: how many.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        UserError: if shapes, probabilities or labels are not as above, or a number is below 1.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    _check(probabilities, labels, bins, resamples)
    confidence = probabilities.max(axis=1)
    correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    inner = np.arange(1, bins) / bins
    # An item on an edge is in the bin below it.
    width = np.searchsorted(inner, confidence)
    size = np.searchsorted(np.quantile(confidence, inner), confidence)
    truth = np.zeros_like(probabilities)
    truth[np.arange(len(labels)), labels] = 1
    equal_width, equal_size = (_binned(place, confidence, correct) for place in (width, size))
    rng = np.random.default_rng(seed)
    errors = np.empty((resamples, 2))
    for number in range(resamples):
        drawn = rng.integers(len(labels), size=len(labels))
        for column, place in enumerate((width, size)):
            errors[number, column] = _binned(place[drawn], confidence[drawn], correct[drawn]).error
    deviations = errors.std(axis=0, ddof=1) if resamples > 1 else np.full(2, np.nan)
    return Calibration(
        accuracy=mean(correct.tolist()),
        confidence=mean(confidence.tolist()),
        ece=Estimate(equal_width.error, float(deviations[0]), len(labels)),
        adaptive_ece=Estimate(equal_size.error, float(deviations[1]), len(labels)),
        brier=mean(((probabilities - truth) ** 2).sum(axis=1).tolist()),
        bins=equal_width,
        adaptive_bins=equal_size,
    )


def _binned(place: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> Bins:
    count = np.bincount(place)
    sums = [np.bincount(place, values)[count > 0] for values in (confidence, correct)]
    count = count[count > 0]
    return Bins(sums[0] / count, sums[1] / count, count)


def _check(probabilities: np.ndarray, labels: np.ndarray, bins: int, resamples: int) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not labels.size:
        raise UserError(
            f"probabilities have shape {probabilities.shape} and labels {labels.shape}; give "
            "[N, K] and [N], N at least 1"
        )
    for name, value in (("bins", bins), ("resamples", resamples)):
        if value < 1:
            raise UserError(f"{name} is {value}; at least 1")
    off = np.abs(probabilities.sum(axis=1) - 1)
    legal = (probabilities >= 0).all(axis=1) & (off <= _SUM_TOLERANCE)
    if not legal.all():
        row = int(np.argmin(legal))
        raise UserError(
            f"probabilities of item {row} are {probabilities[row].tolist()}; they are from 0 to 1 "
            "and sum to 1: give the softmax of the scores"
        )
    answers = probabilities.shape[1]
    if not np.issubdtype(labels.dtype, np.integer) or ((labels < 0) | (labels >= answers)).any():
        raise UserError(f"labels are integers from 0 to {answers - 1}, the places of right answers")
