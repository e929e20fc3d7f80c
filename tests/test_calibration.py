"""Calibration against sums written out, and sources whose calibration is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.evaluation.calibration import calibration
from gptjax.plots import plot_reliability


def drawn(
    rng: np.random.Generator, items: int, answers: int, sharpness: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and answers that come with just those."""
    logits = sharpness * rng.normal(size=(items, answers))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(answers, p=row) for row in probabilities])
    return probabilities, labels


def sums(
    probabilities: np.ndarray, labels: np.ndarray, edges: list[float]
) -> tuple[float, list[tuple[float, float, int]]]:
    """The calibration error over bins (a, b], item by item."""
    error, bins = 0.0, []
    for low, high in zip([-1.0, *edges], [*edges, 2.0], strict=True):
        inside = [
            (row.max(), float(row.argmax() == label))
            for row, label in zip(probabilities, labels, strict=True)
            if low < row.max() <= high
        ]
        if inside:
            confidence, accuracy = (
                sum(column) / len(inside) for column in zip(*inside, strict=True)
            )
            error += len(inside) / len(labels) * abs(confidence - accuracy)
            bins.append((confidence, accuracy, len(inside)))
    return error, bins


def test_figures_are_the_sums(rng: np.random.Generator) -> None:
    for _ in range(5):
        N, K, M = (int(rng.integers(*ends)) for ends in ((1, 60), (2, 6), (1, 20)))
        probabilities, labels = drawn(rng, N, K)
        # Some on the edges of bins, and some alike.
        probabilities[: N // 4] = np.eye(K)[0]
        found = calibration(probabilities, labels, bins=M, resamples=10)
        error, bins = sums(probabilities, labels, [m / M for m in range(1, M)])
        assert found.ece.value == pytest.approx(error)
        parts = zip(found.bins.confidence, found.bins.accuracy, found.bins.count, strict=True)
        assert list(parts) == [pytest.approx(part) for part in bins]
        ranked = np.sort(probabilities.max(axis=1))
        edges = np.quantile(ranked, [m / M for m in range(1, M)]).tolist()
        assert found.adaptive_ece.value == pytest.approx(sums(probabilities, labels, edges)[0])
        assert found.adaptive_bins.count.sum() == N
        brier = sum(
            (probabilities[i, k] - (labels[i] == k)) ** 2 for i in range(N) for k in range(K)
        )
        assert found.brier.value == pytest.approx(brier / N)
        right = (probabilities.argmax(axis=1) == labels).mean()
        assert found.accuracy.value == pytest.approx(right)
        assert found.confidence.value == pytest.approx(ranked.mean())


def test_edges_belong_to_the_bin_below() -> None:
    probabilities = np.array([[0.6, 0.4], [0.61, 0.39], [0.8, 0.2], [1.0, 0.0]])
    found = calibration(probabilities, np.zeros(4, int), bins=5, resamples=2)
    np.testing.assert_allclose(found.bins.confidence, [0.6, (0.61 + 0.8) / 2, 1.0])


def test_adaptive_bins_are_of_equal_size(rng: np.random.Generator) -> None:
    probabilities, labels = drawn(rng, 1000, 3)
    found = calibration(probabilities, labels, bins=8, resamples=2)
    assert (np.abs(found.adaptive_bins.count - 125) <= 1).all()
    # And equal probabilities lie in one bin.
    same = calibration(np.full((100, 2), 0.5), rng.integers(0, 2, 100), bins=8, resamples=2)
    assert same.adaptive_bins.count.tolist() == [100]


def test_a_calibrated_source_and_an_overconfident_one(rng: np.random.Generator) -> None:
    probabilities, labels = drawn(rng, 20_000, 4)
    found = calibration(probabilities, labels, resamples=100)
    # By chance each of 15 bins is off by some sqrt(p (1 - p) / n).
    assert found.ece.value < 0.02
    assert found.adaptive_ece.value < 0.02
    sharper = probabilities**3 / (probabilities**3).sum(axis=1, keepdims=True)
    over = calibration(sharper, labels, resamples=100)
    assert over.confidence.value - over.accuracy.value > 0.1
    # All bins lie on the same side, so that the error is the difference of the means.
    assert over.ece.value == pytest.approx(over.confidence.value - over.accuracy.value, abs=0.01)
    assert over.brier.value > found.brier.value
    assert over.accuracy.value == found.accuracy.value


def test_standard_errors(rng: np.random.Generator) -> None:
    """The bootstrap tells how much the error varies from one set of items to another."""
    many = []
    for _ in range(60):
        probabilities, labels = drawn(rng, 400, 3)
        # Overconfident, for near 0 the error cannot vary as it does elsewhere.
        sharper = probabilities**3 / (probabilities**3).sum(axis=1, keepdims=True)
        many.append(calibration(sharper, labels, resamples=100))
    spread = np.std([found.ece.value for found in many])
    told = np.mean([found.ece.stderr for found in many])
    assert 0.6 < told / spread < 1.6
    brier = [found.brier.value for found in many]
    assert np.mean([found.brier.stderr for found in many]) == pytest.approx(np.std(brier), rel=0.4)
    one = calibration(np.array([[0.5, 0.5]]), np.array([0]), resamples=1)
    assert math.isnan(one.ece.stderr)
    json.dumps(one.to_dict(), allow_nan=False)


def test_the_same_seed_gives_the_same(rng: np.random.Generator) -> None:
    probabilities, labels = drawn(rng, 50, 3)
    one, two, other = (calibration(probabilities, labels, seed=seed) for seed in (0, 0, 1))
    assert one.to_dict() == two.to_dict()
    assert one.ece.stderr != other.ece.stderr


def test_report_and_picture(rng: np.random.Generator, tmp_path: Path) -> None:
    found = calibration(*drawn(rng, 200, 4))
    assert str(found).count("note: ") == 2
    assert f"{found.ece.value:.4f} ± {found.ece.stderr:.4f}" in str(found)
    assert found.to_dict()["items"] == 200
    plot_reliability({"one": found.bins, "two": found.adaptive_bins}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.ones((3, 2)), np.zeros(3, int), "item 0"),
        (np.array([[1.2, -0.2]]), np.zeros(1, int), "from 0 to 1"),
        (np.array([[0.5, np.nan]]), np.zeros(1, int), "item 0"),
        (np.full((3, 2), 0.5), np.zeros(2, int), r"\(3, 2\)"),
        (np.zeros((0, 2)), np.zeros(0, int), "N at least 1"),
        (np.full((1, 2), 0.5), np.array([2]), "from 0 to 1"),
        (np.full((1, 2), 0.5), np.array([-1]), "from 0 to 1"),
        (np.full((1, 2), 0.5), np.array([0.5]), "integers"),
    ],
)
def test_refused(probabilities: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibration(probabilities, labels)


def test_refused_numbers() -> None:
    for name in ("bins", "resamples"):
        with pytest.raises(UserError, match=f"{name} is 0"):
            calibration(np.full((2, 2), 0.5), np.zeros(2, int), **{name: 0})
