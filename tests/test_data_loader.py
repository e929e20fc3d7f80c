"""Batches by position: exact resume, windows once an epoch, targets once an evaluation."""

import hashlib
import itertools
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from gptjax.data import BatchLoader, evaluation_batches
from gptjax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def window_starts(loader: BatchLoader, epochs: int) -> np.ndarray:
    """Reads the starts of the windows off batches of `arange` tokens: `[epochs, windows]`."""
    windows = round(loader.batches_per_epoch * loader.batch_size)
    rows = epochs * windows
    batches = [loader[n]["tokens"][:, 0] for n in range(-(-rows // loader.batch_size))]
    return np.concatenate(batches)[:rows].reshape(epochs, windows)


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.int64])
def test_targets_are_the_next_tokens(kind: type) -> None:
    loader = BatchLoader(np.arange(1000, dtype=kind), batch_size=7, context_length=12)
    for position in (0, 1, 50, 10**12):
        batch = loader[position]
        assert batch.keys() == {"tokens", "targets"}
        for array in batch.values():
            assert array.shape == (7, 12)
            assert array.dtype == np.int32
        assert (batch["targets"] == batch["tokens"] + 1).all()
        assert (np.diff(batch["tokens"], axis=1) == 1).all()
    assert loader.tokens_per_batch == 84


def test_rows_are_those_of_the_batch(rng: np.random.Generator) -> None:
    """However many processes share a batch, and also where an epoch ends inside it."""
    tokens = rng.integers(0, 50, 700).astype(np.uint16)
    loader = BatchLoader(tokens, batch_size=9, context_length=16, document_separator=7)
    assert loader.batches_per_epoch % 1
    for position in range(12):
        whole = loader[position]
        cuts = [0, *sorted(rng.choice(np.arange(1, 9), 3, replace=False)), 9]
        parts = [loader.rows(position, *cut) for cut in itertools.pairwise(cuts)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
        assert same(joined, whole)
    with pytest.raises(UserError, match="position is -1"):
        loader.rows(-1, 0, 2)


def test_a_batch_depends_on_the_position_alone(rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 60000, 5000).astype(np.uint16)

    def fresh(seed: int = 3) -> BatchLoader:
        return BatchLoader(tokens, batch_size=5, context_length=16, seed=seed, document_separator=7)

    straight = [fresh()[n] for n in range(200)]
    one = fresh()
    for position in rng.permutation(200):
        assert same(one[int(position)], straight[position])
        assert same(one[position], straight[position])
    other = fresh(seed=4)
    assert not any(same(other[n], straight[n]) for n in range(200))


@pytest.fixture(params=["list", "keyed"])
def shuffling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Takes the way of small epochs, then that of huge ones."""
    if request.param == "keyed":
        monkeypatch.setattr("gptjax.data.loader._LARGEST_PERMUTATION", 0)
    return request.param


def test_resume_in_another_process(shuffling: str) -> None:
    code = (
        "import sys, hashlib, numpy as np, gptjax.data.loader as m;"
        "m._LARGEST_PERMUTATION = int(sys.argv[1]);"
        "t = np.arange(30000, dtype=np.uint16);"
        "b = m.BatchLoader(t, batch_size=3, context_length=8, seed=11)[12345];"
        "print(hashlib.sha256(b['tokens'].tobytes()).hexdigest());"
        "bad = {'tensorflow', 'torch'} & set(sys.modules); assert not bad, bad"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "1000000" if shuffling == "list" else "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "5"},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    loader = BatchLoader(np.arange(30000, dtype=np.uint16), batch_size=3, context_length=8, seed=11)
    assert out.strip() == hashlib.sha256(loader[12345]["tokens"].tobytes()).hexdigest()


def test_each_epoch_visits_each_window_once(shuffling: str, rng: np.random.Generator) -> None:
    for _ in range(20 if shuffling == "list" else 4):
        context = int(rng.integers(1, 20))
        length = int(rng.integers(context + 1, 2000))
        batch = int(rng.integers(1, 9))
        loader = BatchLoader(
            np.arange(length), batch_size=batch, context_length=context, seed=int(rng.integers(99))
        )
        starts = window_starts(loader, epochs=3)
        windows = starts.shape[1]
        # No more than the shift and the tail is left out.
        assert length - 1 - windows * context < 2 * context
        for epoch in starts:
            ordered = np.sort(epoch)
            offset = ordered[0]
            assert 0 <= offset < context
            assert (ordered == offset + context * np.arange(windows)).all()
            assert ordered[-1] + context <= length - 1


def test_epochs_differ_in_order_and_offset(shuffling: str) -> None:
    context, epochs = 5, 30
    loader = BatchLoader(np.arange(5003), batch_size=64, context_length=context, seed=5)
    starts = window_starts(loader, epochs)
    windows = starts.shape[1]
    offsets = starts.min(axis=1)
    assert set(offsets) == set(range(context))
    order = (starts - offsets[:, None]) // context
    assert len({tuple(row) for row in order}) == epochs
    # Every window comes early and late alike: the mean place over epochs is near the middle.
    places = np.argsort(order, axis=1).mean(axis=0)
    assert (abs(places - (windows - 1) / 2) < 6 * windows / np.sqrt(12 * epochs)).all()
    # Neighbours in the text are not neighbours in the epoch.
    assert (abs(np.diff(order, axis=1)) == 1).mean() < 0.1


def test_in_order_without_shuffle() -> None:
    loader = BatchLoader(np.arange(101), batch_size=4, context_length=10, shuffle=False, seed=9)
    starts = window_starts(loader, epochs=3)
    assert (starts == 10 * np.arange(10)).all()
    assert loader.batches_per_epoch == 2.5
    # The epoch ends inside batch 2, and the next one fills it.
    assert loader[2]["tokens"][:, 0].tolist() == [80, 90, 0, 10]


def test_shortest_text_that_fits() -> None:
    for shuffle in (True, False):
        loader = BatchLoader(np.arange(9), batch_size=2, context_length=8, shuffle=shuffle)
        assert (loader[5]["targets"] == np.arange(1, 9)).all()
    both = BatchLoader(np.arange(10), batch_size=50, context_length=8)[0]["tokens"][:, 0]
    assert set(both) == {0, 1}


def test_hosts_can_take_slices_of_a_batch() -> None:
    loader = BatchLoader(np.arange(500), batch_size=8, context_length=4, seed=1)
    for position in (0, 20, 33):
        whole = loader[position]["tokens"][:, 0]
        parts = [loader._starts(np.arange(8 * position + a, 8 * position + a + 4)) for a in (0, 4)]
        assert (np.concatenate(parts) == whole).all()


def documents_reference(tokens: np.ndarray, separator: int) -> dict[str, np.ndarray]:
    result = {k: np.zeros(tokens.shape, int) for k in ("segment_ids", "positions", "weights")}
    for b, row in enumerate(tokens):
        segment, position = 1, 0
        for t, token in enumerate(row):
            result["segment_ids"][b, t] = segment
            result["positions"][b, t] = position
            result["weights"][b, t] = token != separator
            position += 1
            if token == separator:
                segment, position = segment + 1, 0
    return result


def test_documents_are_kept_apart(rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 5, 2000).astype(np.uint16)
    loader = BatchLoader(tokens, batch_size=9, context_length=17, document_separator=2)
    plain = BatchLoader(tokens, batch_size=9, context_length=17)
    for position in range(30):
        batch = loader[position]
        assert (batch["tokens"] == plain[position]["tokens"]).all()
        assert (batch["targets"] == plain[position]["targets"]).all()
        for key, expected in documents_reference(batch["tokens"], 2).items():
            assert (batch[key] == expected).all(), key
        assert batch["segment_ids"].dtype == batch["positions"].dtype == np.int32
        assert batch["weights"].dtype == np.float32


@pytest.mark.parametrize("separator", [None, 3])
def test_evaluation_covers_every_target_once(
    rng: np.random.Generator, separator: int | None
) -> None:
    for _ in range(40):
        length = int(rng.integers(2, 400))
        batch_size, context = (int(n) for n in rng.integers(1, 12, 2))
        tokens = rng.integers(0, 6, length).astype(np.uint16)
        batches = list(
            evaluation_batches(
                tokens,
                batch_size=batch_size,
                context_length=context,
                document_separator=separator,
            )
        )
        assert len(batches) == -(-(length - 1) // (batch_size * context))
        for batch in batches:
            assert {a.shape for a in batch.values()} == {(batch_size, context)}
            assert batch["weights"].dtype == np.float32
            assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
        flat = {k: np.concatenate([b[k].ravel() for b in batches]) for k in batches[0]}
        real = np.arange(len(flat["weights"])) < length - 1
        assert (flat["tokens"][real] == tokens[:-1]).all()
        assert (flat["targets"][real] == tokens[1:]).all()
        expected = real.astype(float)
        if separator is None:
            assert flat.keys() == {"tokens", "targets", "weights"}
        else:
            expected[: length - 1] *= tokens[:-1] != separator
            for b in batches:
                exists = b["segment_ids"] > 0
                reference = documents_reference(b["tokens"], separator)
                for key in ("segment_ids", "positions"):
                    assert (b[key][exists] == reference[key][exists]).all()
            assert ((flat["segment_ids"] > 0) == real).all()
        assert (flat["weights"] == expected).all()


def test_memory_is_flat_in_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    with path.open("wb") as file:
        file.truncate(2 * 10**9)
    tokens = np.memmap(path, np.uint16, mode="r")
    BatchLoader(tokens, batch_size=8, context_length=64)[0]
    tracemalloc.start()
    loader = BatchLoader(tokens, batch_size=8, context_length=64)
    for position in range(20):
        loader[position * 10**5]
    next(evaluation_batches(tokens, batch_size=8, context_length=64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6


def test_errors() -> None:
    tokens = np.arange(16)
    with pytest.raises(UserError, match=r"16 tokens are too few .* 16, which needs 17.*at most 15"):
        BatchLoader(tokens, batch_size=2, context_length=16)
    with pytest.raises(UserError, match=r"^0 tokens"):
        BatchLoader(tokens[:0], batch_size=2, context_length=16)
    with pytest.raises(UserError, match="batch_size is 0"):
        BatchLoader(tokens, batch_size=0, context_length=4)
    with pytest.raises(UserError, match="context_length is -1"):
        evaluation_batches(tokens, batch_size=1, context_length=-1)
    with pytest.raises(UserError, match="seed is -1"):
        BatchLoader(tokens, batch_size=1, context_length=4, seed=-1)
    with pytest.raises(UserError, match="position is -1"):
        BatchLoader(tokens, batch_size=1, context_length=4)[-1]
    with pytest.raises(UserError, match="1 tokens hold no next token"):
        evaluation_batches(tokens[:1], batch_size=1, context_length=4)
    for wrong in (tokens.reshape(4, 4), tokens * 0.5):
        with pytest.raises(UserError, match="1-D array of integer ids"):
            BatchLoader(wrong, batch_size=1, context_length=4)
