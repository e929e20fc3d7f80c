"""Finds the n-grams of some short sequences in one of any length, without an index of that one.

The long text is read past an index of the short ones, in pieces, so that memory does not grow with
it. Hashes only select: every hit is compared, number by number, before it counts.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from gptjax.data.token_shards import Tokens
from gptjax.errors import UserError

# Numbers of the long sequence that are hashed at a time; some 30 MiB of working memory.
CHUNK = 1 << 20
# A table of this many hashes' first bits turns most places away before they are searched for.
_TABLE_BITS = 22
# Odd and without a pattern in its bits. Others are drawn from it if two n-grams share a hash.
_MULTIPLIER = 0x9E3779B97F4A7C15


class NgramIndex:
    """The distinct n-grams of sequences of integers.

    Takes some `24 n + 100` bytes for each n-gram while it is built, about half of it after, and
    4 MiB.

    Attributes:
        n: how many numbers an n-gram has.
        numbers: `[N]` int64, the sequences one after another.
        begins: `[S]` int64, where in `numbers` each sequence begins.
        ends: `[S]` int64, where each ends.
        starts: `[G]` int64, where in `numbers` an n-gram begins, for all n-grams that lie within
            one sequence.
        sequences: `[G]` int64, which sequence each belongs to.
        grams: `[G]` int64, which of the distinct n-grams each is.
        distinct: how many distinct ones there are.
    """

    def __init__(self, sequences: Sequence[Sequence[int] | np.ndarray], n: int):
        """Indexes sequences; one that is shorter than n adds nothing.

        Raises:
            UserError: `n` is below 1.
        """
        if n < 1:
            raise UserError(f"n-grams of {n}; give at least 1")
        self.n = n
        arrays = [np.asarray(sequence, np.int64).reshape(-1) for sequence in sequences]
        self.numbers = np.concatenate([np.zeros(0, np.int64), *arrays])
        lengths = np.array([len(array) for array in arrays], np.int64)
        self.ends = np.cumsum(lengths)
        self.begins = self.ends - lengths
        counts = np.maximum(lengths - n + 1, 0)
        self.sequences = np.repeat(np.arange(len(arrays)), counts)
        self.starts = self.begins[self.sequences] + steps(counts)
        self._rows = np.zeros((0, n), np.int64)
        self.grams = np.zeros(0, np.int64)
        if len(self.starts):
            windows = np.lib.stride_tricks.sliding_window_view(self.numbers, n)
            self._rows, grams = np.unique(windows[self.starts], axis=0, return_inverse=True)
            self.grams = grams.reshape(-1)
        self.distinct = len(self._rows)
        self._multiplier = np.uint64(_MULTIPLIER)
        hashes = self._hash(self._rows.T)
        while len(np.unique(hashes)) < self.distinct:
            self._multiplier = self._multiplier * np.uint64(_MULTIPLIER) | np.uint64(1)
            hashes = self._hash(self._rows.T)
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[self._hashes >> np.uint64(64 - _TABLE_BITS)] = True

    def find(self, numbers: Tokens) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Finds the n-grams in a sequence, from its beginning to its end.

        Args:
            numbers: `[M]` integers, such as a memory map or shards; a piece is read at a time.

        Yields:
            For each piece with any: places in `numbers` where an n-gram begins, ascending, and
            which of the distinct n-grams it is, each `[H]` int64.
        """
        for start in range(0, len(numbers) - self.n + 1, CHUNK):
            piece = np.asarray(numbers[start : start + CHUNK + self.n - 1])
            windows = len(piece) - self.n + 1
            columns = [piece[j : j + windows] for j in range(self.n)]
            hashes = self._hash(columns)
            [places] = self._table[hashes >> np.uint64(64 - _TABLE_BITS)].nonzero()
            found = np.searchsorted(self._hashes, hashes[places])
            known = found < self.distinct
            places, grams = places[known], self._order[found[known]]
            same = np.ones(len(places), bool)
            for j, column in enumerate(columns):
                same &= column[places] == self._rows[grams, j]
            if same.any():
                yield start + places[same], grams[same]

    def _hash(self, columns: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """A hash, uint64, of each n-gram; `columns` are its first numbers, its second, and on."""
        hashes = np.zeros(len(columns[0]), np.uint64)
        for column in columns:
            hashes *= self._multiplier
            # One more, for zeros before others would not change a hash.
            hashes += column.astype(np.uint64) + np.uint64(1)
        return hashes * self._multiplier


def steps(counts: np.ndarray) -> np.ndarray:
    """0, 1 and on for each count, up to it: `[3, 1, 2]` gives `[0, 1, 2, 0, 0, 1]`."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
