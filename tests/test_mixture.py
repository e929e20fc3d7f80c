"""Mixtures: exact proportions, every source in its own order, a function of the position."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gptjax.data import BatchLoader, Mixture, PackedLoader
from gptjax.data.loader import Loader
from gptjax.data.mixture import BLOCK
from gptjax.errors import UserError

T = 4
PACKED = {"segment_ids": np.int32, "positions": np.int32, "weights": np.float32}


def windows(source: int, rng: np.random.Generator, **given: Any) -> BatchLoader:
    """A loader whose every token says which source it is from."""
    tokens = 10000 * source + np.arange(rng.integers(200, 4000))
    return BatchLoader(tokens, batch_size=int(rng.integers(1, 9)), context_length=T, **given)


def packed(source: int, rng: np.random.Generator, **given: Any) -> PackedLoader:
    documents = [10000 * source + rng.integers(0, 999, n) for n in rng.integers(2, T + 2, 300)]
    return PackedLoader(documents, batch_size=3, context_length=T, **given)


def read_rows(loader: Loader, count: int) -> dict[str, np.ndarray]:
    """The first rows of a loader, batch by batch."""
    batches = [loader[n] for n in range(-(-count // loader.batch_size))]
    return {name: np.concatenate([b[name] for b in batches])[:count] for name in batches[0]}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def test_each_source_keeps_its_order_and_its_share(rng: np.random.Generator) -> None:
    for _ in range(5):
        count = int(rng.integers(1, 6))
        loaders = [
            (windows if rng.random() < 0.5 else packed)(i, rng, seed=i, shuffle=bool(i % 2))
            for i in range(count)
        ]
        weights = rng.uniform(0.05, 1, count)
        mixture = Mixture(loaders, weights, batch_size=int(rng.integers(1, 50)), seed=3)
        rows = read_rows(mixture, 3 * BLOCK)
        sources = rows["tokens"][:, 0] // 10000
        blocks = sources.reshape(3, BLOCK)
        shares = [np.bincount(block, minlength=count) for block in blocks]
        for share in shares:
            assert (abs(share - BLOCK * weights / weights.sum()) < 1).all()
            assert (share == shares[0]).all()
        if count > 1:
            assert (blocks[0] != blocks[1]).any()
        for source, loader in enumerate(loaders):
            mine = sources == source
            expected = read_rows(loader, mine.sum())
            for name, values in expected.items():
                assert (rows[name][mine] == values).all()


def test_shares_are_rounded_by_largest_remainders(rng: np.random.Generator) -> None:
    loaders = [windows(i, rng) for i in range(3)]
    for weights, expected in [
        ([0.7, 0.2, 0.1], [700, 200, 100]),
        ([1, 1, 1], [334, 333, 333]),
        ([5, 2.5, 2.5], [500, 250, 250]),
        ([998.4, 1, 0.6], [998, 1, 1]),
    ]:
        mixture = Mixture(loaders, weights, batch_size=BLOCK)
        assert np.bincount(mixture[0]["tokens"][:, 0] // 10000).tolist() == expected


def test_the_sources_take_turns_evenly(rng: np.random.Generator) -> None:
    """No part of a block has much more of a source than its share."""
    mixture = Mixture([windows(i, rng) for i in range(2)], [3, 1], batch_size=BLOCK, seed=8)
    sources = np.concatenate([mixture[n]["tokens"][:, 0] // 10000 for n in range(20)])
    counts = sources.reshape(-1, 100).sum(axis=1)
    # 100 of 1000, of which 250 are counted, drawn without putting back.
    deviation = np.sqrt(100 * 0.25 * 0.75 * 900 / 999)
    assert abs(counts - 25).max() < 6 * deviation
    assert counts.std() > deviation / 2


def test_a_batch_depends_on_the_position_alone(rng: np.random.Generator) -> None:
    loaders = [windows(0, rng), packed(1, rng)]

    def fresh(seed: int = 5) -> Mixture:
        return Mixture(loaders, [2, 1], batch_size=7, seed=seed)

    positions = [*range(30), 142, 143, 10**9]
    straight = {n: fresh()[n] for n in positions}
    one = fresh()
    for position in rng.permutation(positions):
        assert same(one[position], straight[position])
        cuts = [0, *sorted(rng.choice(np.arange(1, 7), 2, replace=False)), 7]
        parts = [one.rows(position, *cut) for cut in itertools.pairwise(cuts)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert same(joined, straight[position])
    other = fresh(seed=6)
    assert not all(same(other[n], straight[n]) for n in positions)
    assert one.tokens_per_batch == 7 * T
    assert one.rows(0, 3, 3)["tokens"].shape == (0, T)


def test_rows_of_one_document_are_filled_in(rng: np.random.Generator) -> None:
    plain, apart = windows(0, rng), packed(1, rng)
    for other in (apart, windows(1, rng, document_separator=10003)):
        mixture = Mixture([plain, other], [9, 1], batch_size=2)
        for position in range(300):
            batch = mixture[position]
            assert batch.keys() == {"tokens", "targets"} | PACKED.keys()
            for name, kind in PACKED.items():
                assert batch[name].dtype == kind
            mine = batch["tokens"][:, 0] < 10000
            assert (batch["segment_ids"][mine] == 1).all()
            assert (batch["positions"][mine] == np.arange(T)).all()
            assert (batch["weights"][mine] == 1).all()
    both_plain = Mixture([plain, windows(1, rng)], [1, 1], batch_size=2)
    assert both_plain[0].keys() == {"tokens", "targets"}


def test_mixtures_of_mixtures(rng: np.random.Generator) -> None:
    loaders = [windows(i, rng) for i in range(3)]
    rare = Mixture(loaders[1:], [3, 1], batch_size=1)
    mixture = Mixture([loaders[0], rare], [0.99, 0.01], batch_size=40)
    rows = read_rows(mixture, 100 * BLOCK)
    sources = rows["tokens"][:, 0] // 10000
    assert np.bincount(sources).tolist() == [99000, 750, 250]
    inner = read_rows(rare, 1000)["tokens"]
    assert (rows["tokens"][sources > 0] == inner).all()


def test_an_epoch_is_one_of_the_slowest_source(rng: np.random.Generator) -> None:
    loaders = [windows(0, rng, shuffle=False), windows(1, rng, shuffle=False)]
    mixture = Mixture(loaders, [1, 4], batch_size=16)
    rows = round(mixture.batches_per_epoch * 16)
    found = set(read_rows(mixture, rows + BLOCK)["tokens"][:, 0].tolist())
    for loader in loaders:
        count = round(loader.batches_per_epoch * loader.batch_size)
        assert set(read_rows(loader, count)["tokens"][:, 0].tolist()) <= found
    seen = [round(loader.batches_per_epoch * loader.batch_size) for loader in loaders]
    assert rows == round(max(seen[0] * 5, seen[1] * 5 / 4))


def test_errors(rng: np.random.Generator) -> None:
    loaders = [windows(i, rng) for i in range(2)]
    longer = BatchLoader(np.arange(100), batch_size=1, context_length=T + 1)
    cases: list[tuple[Sequence[Loader], list[float], dict[str, Any], str]] = [
        ([], [], {}, "0 loaders and 0 weights"),
        (loaders, [1], {}, "2 loaders and 1 weights"),
        (loaders, [1, 0], {}, r"weights are \[1, 0\]: give finite ones above 0"),
        (loaders, [1, -1], {}, "above 0"),
        (loaders, [1, float("nan")], {}, "above 0"),
        (loaders, [1, float("inf")], {}, "above 0"),
        (loaders, [1, 1e-4], {}, "less than 1 row in 1000: raise it, or first mix"),
        ([*loaders, longer], [1, 1, 1], {}, r"context_length \[4, 4, 5\]"),
        (loaders, [1, 1], {"batch_size": 0}, "batch_size is 0"),
        (loaders, [1, 1], {"seed": -1}, "seed is -1"),
    ]
    for given, weights, change, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            Mixture(given, weights, **{"batch_size": 2} | change)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="position is -1"):
        Mixture(loaders, [1, 1], batch_size=2)[-1]
