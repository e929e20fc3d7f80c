"""Batches as a pure function of the tokens and one integer, the position.

The position is all there is to save: `loader[n]` is the same batch in every process and after
every restart. Nothing here grows with the number of tokens, so they may be a memory map.
"""

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from gptjax.data.token_shards import ShardedTokens, Tokens, gather_windows
from gptjax.errors import UserError

# An epoch of so many windows is shuffled as a list of 2 MB in some milliseconds.
_LARGEST_PERMUTATION = 1 << 18


Batch = dict[str, np.ndarray]
"""Arrays `[B, T]` by name, as `gptjax.loss.Batch`."""


class Loader(ABC):
    """Batches by position, cut from an endless, random-access sequence of rows.

    Row r of batch n is row `n * batch_size + r` of all.

    Attributes:
        batch_size: B, rows a batch.
        context_length: T, tokens a row.
    """

    batch_size: int
    context_length: int

    @abstractmethod
    def read(self, rows: np.ndarray) -> Batch:
        """Returns the rows of these global numbers, 0 or more each, in their order."""

    @property
    @abstractmethod
    def batches_per_epoch(self) -> float:
        """How many batches hold all the data once; seldom whole."""

    @property
    def tokens_per_batch(self) -> int:
        """Targets in a batch, B * T."""
        return self.batch_size * self.context_length

    def __getitem__(self, position: int) -> Batch:
        """Returns the batch at a position, 0 or more.

        Raises:
            UserError: `position` is negative.
        """
        return self.rows(position, 0, self.batch_size)

    def rows(self, position: int, start: int, stop: int) -> Batch:
        """Returns rows `[start, stop)` of the batch at a position, and reads no others.

        Raises:
            UserError: `position` is negative.
        """
        position = operator.index(position)
        if position < 0:
            raise UserError(f"position is {position}: batches are numbered from 0")
        first = position * self.batch_size
        return self.read(np.arange(first + start, first + stop))


class BatchLoader(Loader):
    """An endless, random-access sequence of batches of windows.

    An epoch visits every window of `context_length` targets once, in an order of its own. With
    `shuffle` the windows of an epoch start at an offset of its own in `[0, context_length)`, so
    that text is not always cut in the same places; up to two windows' length of tokens at the two
    ends is then left out of an epoch. Where an epoch ends inside a batch the next one fills it.

    A batch is a dict of
        tokens: `[B, T]` int32.
        targets: `[B, T]` int32, the token after each.
    and, where `document_separator` is given,
        segment_ids: `[B, T]` int32, 1 for the first document of the row, one more after each
            separator (which itself ends its document).
        positions: `[B, T]` int32, 0 at the start of the row and of each document.
        weights: `[B, T]` float32, 0 where the target is the first token of another document.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        batch_size: int,
        context_length: int,
        seed: int = 0,
        shuffle: bool = True,
        document_separator: int | None = None,
    ):
        """Takes ids and how to cut them.

        Args:
            tokens: 1-D integer ids; may be a memory map, or several as one. The caller checks them
                against the vocabulary.
            batch_size: B, rows a batch.
            context_length: T, tokens a row.
            seed: Of the order and the offsets, not negative.
            shuffle: False gives the windows in order, every epoch the same.
            document_separator: The id that ends a document, usually the tokenizer's `eos_id`.

        Raises:
            UserError: There are fewer than `context_length + 1` tokens, or an argument is not
                legal.
        """
        tokens = _checked_tokens(tokens, batch_size, context_length)
        if len(tokens) < context_length + 1:
            raise UserError(
                f"{len(tokens)} tokens are too few for a context_length of {context_length}, which "
                f"needs {context_length + 1}: give more text, or a context_length of at most "
                f"{len(tokens) - 1}"
            )
        check_seed(seed)
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self.shuffle = shuffle
        self.document_separator = document_separator
        # As many windows as fit after the largest offset, for epochs must be equally long.
        in_order = (len(tokens) - 1) // context_length
        self._windows = max(1, len(tokens) // context_length - 1) if shuffle else in_order
        unused = len(tokens) - 1 - self._windows * context_length
        self._offsets = min(context_length, unused + 1)
        self._tokens = tokens

    @property
    def batches_per_epoch(self) -> float:
        """How many batches visit every window once; seldom whole."""
        return self._windows / self.batch_size

    def read(self, rows: np.ndarray) -> Batch:
        """Returns the rows of these global numbers, 0 or more each, in their order."""
        windows = gather_windows(self._tokens, self._starts(rows), self.context_length + 1)
        return _batch(windows.astype(np.int32), self.document_separator)

    def _starts(self, rows: np.ndarray) -> np.ndarray:
        """Returns where the windows of global rows begin."""
        windows, shifts = epoch_places(rows, self._windows, self.seed if self.shuffle else None)
        return windows * self.context_length + shifts % self._offsets


def epoch_places(rows: np.ndarray, count: int, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Lays epochs of the same `count` things end to end, each in an order of its own.

    Args:
        rows: `[n]`, which of all to look at, 0 or more each.
        count: How many things an epoch visits.
        seed: Of the orders; None keeps every epoch in order.

    Returns:
        For each row which thing it is, in `[0, count)`, and a random number of its epoch, 0 without
        a seed.
    """
    epochs, places = np.divmod(rows, count)
    draws = np.zeros_like(rows)
    if seed is None:
        return places, draws
    for epoch in np.unique(epochs):
        # SeedSequence: NumPy promises its numbers across versions, a Generator's it doesn't.
        order, draw = np.random.SeedSequence([seed, int(epoch)]).generate_state(2)
        here = epochs == epoch
        places[here] = _shuffled(places[here], count, int(order))
        draws[here] = draw
    return places, draws


def evaluation_batches(
    tokens: Tokens,
    *,
    batch_size: int,
    context_length: int,
    document_separator: int | None = None,
) -> Iterator[Batch]:
    """Yields batches that hold every target of an array exactly once, in order.

    The windows do not overlap. All batches have the same shape: what is left of the last one is
    filled with zeros of weight 0 (and, with `document_separator`, segment 0).

    Args:
        tokens: 1-D integer ids, at least 2; the first is the only one that is not a target.
        batch_size: B, rows a batch.
        context_length: T, tokens a row.
        document_separator: As in `BatchLoader`. Targets across documents then have weight 0.

    Returns:
        Batches as `BatchLoader` gives them, always with `weights` `[B, T]` float32.

    Raises:
        UserError: At once, where there are fewer than 2 tokens or an argument is not legal.
    """
    tokens = _checked_tokens(tokens, batch_size, context_length)
    if len(tokens) < 2:
        raise UserError(
            f"{len(tokens)} tokens hold no next token to predict: give at least 2 to evaluate on"
        )
    return _evaluation_batches(tokens, batch_size, context_length, document_separator)


def _evaluation_batches(
    tokens: Tokens, batch_size: int, context_length: int, separator: int | None
) -> Iterator[Batch]:
    size = batch_size * context_length
    columns = np.arange(context_length + 1)
    row_starts = np.arange(batch_size)[:, None] * context_length
    for start in range(0, len(tokens) - 1, size):
        part = np.zeros(size + 1, np.int32)
        found = tokens[start : start + size + 1]
        part[: len(found)] = found
        batch = _batch(part[row_starts + columns], separator)
        exists = np.arange(size).reshape(batch_size, context_length) < len(found) - 1
        weights = batch.get("weights", np.float32(1))
        batch["weights"] = np.where(exists, weights, np.float32(0))
        if separator is not None:
            batch["segment_ids"] = np.where(exists, batch["segment_ids"], 0)
        yield batch


def _batch(rows: np.ndarray, separator: int | None) -> Batch:
    """Turns `[B, T + 1]` tokens into a batch."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    batch = {"tokens": np.ascontiguousarray(tokens), "targets": np.ascontiguousarray(targets)}
    if separator is None:
        return batch
    ends = tokens == separator
    begins = np.zeros_like(ends)
    begins[:, 1:] = ends[:, :-1]
    columns = np.arange(tokens.shape[1], dtype=np.int32)
    batch["segment_ids"] = 1 + np.cumsum(begins, axis=1, dtype=np.int32)
    batch["positions"] = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    batch["weights"] = (~ends).astype(np.float32)
    return batch


def check_shape(batch_size: int, context_length: int) -> None:
    """Refuses batches without rows or rows without tokens.

    Raises:
        UserError: Either is below 1.
    """
    for name, value in (("batch_size", batch_size), ("context_length", context_length)):
        if value < 1:
            raise UserError(f"{name} is {value}: give 1 or more")


def check_seed(seed: int) -> None:
    """Refuses negative seeds.

    Raises:
        UserError: It is negative.
    """
    if seed < 0:
        raise UserError(f"seed is {seed}: give 0 or more")


def _checked_tokens(tokens: Tokens, batch_size: int, context_length: int) -> Tokens:
    check_shape(batch_size, context_length)
    if not isinstance(tokens, ShardedTokens):
        tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"tokens are {tokens.dtype} of shape {tokens.shape}: give a 1-D array of integer ids"
        )
    return tokens


def _shuffled(places: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns what a permutation of `[0, count)`, drawn from a seed, has at some places."""
    if count <= _LARGEST_PERMUTATION:
        return permutation(count, seed)[places]
    # A keyed permutation, computed place by place: no list to make and hold. It is not used for
    # less because its search within a larger range takes 1 / count: 17 ms a place for 2 of them.
    from grain.experimental import index_shuffle

    return np.array(
        [index_shuffle(int(p), max_index=count - 1, seed=seed, rounds=4) for p in places]
    )


# Enough for a mixture of some sources, each at the end of one epoch and the start of the next.
@functools.lru_cache(maxsize=32)
def permutation(count: int, seed: int) -> np.ndarray:
    """Returns `[0, count)` in an order drawn from a 32-bit seed; read-only, for it is kept."""
    # RandomState, for its numbers are frozen: a saved position must mean the same for ever.
    order = np.random.RandomState(seed).permutation(count)
    order.setflags(write=False)
    return order
