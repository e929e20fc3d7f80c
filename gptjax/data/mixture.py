"""Several sources of rows in fixed proportions."""

import functools
from collections.abc import Sequence

import numpy as np

from gptjax.data.loader import Batch, Loader, check_seed, check_shape, permutation
from gptjax.errors import UserError

BLOCK = 1000
"""Rows in which the proportions are exact, to a row."""

_FILLED = ("segment_ids", "positions", "weights")


class Mixture(Loader):
    """An endless, random-access sequence of batches whose rows come from several loaders.

    Every `BLOCK` rows hold the same number of each source, in an order of the block's own; a
    source's rows come in the source's own order, however often that goes through its data. Which
    row of which source a row is depends on its number alone.

    Where one source's rows have `segment_ids`, `positions` or `weights`, all have: those of the
    others are one segment, counted from 0, of weight 1.
    """

    def __init__(
        self,
        loaders: Sequence[Loader],
        weights: Sequence[float] | np.ndarray,
        *,
        batch_size: int,
        seed: int = 0,
    ):
        """Takes loaders and their shares.

        Args:
            loaders: At least one, of one context length; their own batch sizes do not matter.
            weights: How many of the rows come from each, relative to the sum; a share is rounded
                to a row in `BLOCK` (by largest remainders).
            batch_size: B, rows a batch.
            seed: Of the order in which the sources take turns, not negative.

        Raises:
            UserError: The loaders do not fit together, a share is less than half a row in `BLOCK`,
                or an argument is not legal.
        """
        if not loaders or len(loaders) != len(weights):
            raise UserError(
                f"{len(loaders)} loaders and {len(weights)} weights: give at least one loader, and "
                "each its weight"
            )
        lengths = [loader.context_length for loader in loaders]
        if len(set(lengths)) > 1:
            raise UserError(
                f"the loaders have context_length {lengths}: make all of them with the same"
            )
        check_shape(batch_size, lengths[0])
        check_seed(seed)
        self.batch_size = batch_size
        self.context_length = lengths[0]
        self.seed = seed
        self._loaders = list(loaders)
        self._counts = _counts(weights)
        rows = [loader.read(np.arange(1)) for loader in loaders]
        self._dtypes: dict[str, np.dtype] = {}
        for row in rows:
            for name, values in row.items():
                self._dtypes[name] = np.result_type(self._dtypes.get(name, values), values)
        lacking = {name for row in rows for name in self._dtypes.keys() - row.keys()}
        if lacking - set(_FILLED):
            raise UserError(
                f"some loaders' batches have {', '.join(sorted(lacking))} and others' have not: "
                f"mix loaders of one kind (only {', '.join(_FILLED)} may be missing)"
            )

    @property
    def batches_per_epoch(self) -> float:
        """How many batches hold all data of every source at least once."""
        rows = [loader.batches_per_epoch * loader.batch_size for loader in self._loaders]
        blocks = max(n / count for n, count in zip(rows, self._counts, strict=True))
        return blocks * BLOCK / self.batch_size

    def read(self, rows: np.ndarray) -> Batch:
        """Returns the rows of these global numbers, 0 or more each, in their order."""
        sources, places = self._sources(rows)
        shape = (len(rows), self.context_length)
        batch = {name: np.empty(shape, dtype) for name, dtype in self._dtypes.items()}
        for source, loader in enumerate(self._loaders):
            here = sources == source
            if not here.any():
                continue
            part = loader.read(places[here])
            for name, values in batch.items():
                values[here] = part[name] if name in part else self._one_segment(name)
        return batch

    def _one_segment(self, name: str) -> np.ndarray:
        """Returns what a row has that is not packed."""
        if name == "positions":
            return np.arange(self.context_length)
        return np.ones(self.context_length)

    def _sources(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each row, and which row of that source it is."""
        blocks, places = np.divmod(rows, BLOCK)
        sources, numbers = np.empty_like(rows), np.empty_like(rows)
        for block in np.unique(blocks):
            here = blocks == block
            turns, before = _turns(self._counts, self.seed, int(block))
            sources[here] = turns[places[here]]
            numbers[here] = before[places[here]]
        return sources, blocks * np.asarray(self._counts)[sources] + numbers


def _counts(weights: Sequence[float] | np.ndarray) -> tuple[int, ...]:
    """Shares `BLOCK` rows out by weight."""
    given = np.asarray(weights, np.float64)
    if not (given > 0).all() or not np.isfinite(given).all():
        raise UserError(f"weights are {list(weights)}: give finite ones above 0")
    exact = BLOCK * given / given.sum()
    counts = np.floor(exact).astype(int)
    most_left = np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]
    counts[most_left] += 1
    if not counts.all():
        raise UserError(
            f"weights are {list(weights)}, which leaves a loader less than 1 row in {BLOCK}: raise "
            "it, or first mix the rare ones with each other"
        )
    return tuple(counts.tolist())


@functools.lru_cache(maxsize=8)
def _turns(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each row of a block its source, and how many rows of that come before it."""
    draw = int(np.random.SeedSequence([seed, block]).generate_state(1)[0])
    turns = np.repeat(np.arange(len(counts)), counts)[permutation(BLOCK, draw)]
    before = np.empty(BLOCK, np.int64)
    for source, count in enumerate(counts):
        before[turns == source] = np.arange(count)
    return turns, before
