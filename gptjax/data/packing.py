"""Examples of any length in rows of one length, kept apart: less fill, and nothing cut."""

import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from gptjax.data.loader import Batch, Loader, check_seed, check_shape, epoch_places
from gptjax.errors import UserError

Long = Literal["error", "cut", "drop", "split"]


@dataclass(frozen=True, eq=False)
class Example:
    """Tokens that belong together, and which of them are to be learned.

    Attributes:
        tokens: `[N]` int32 ids, at least 2.
        weights: `[N]` float32, how much each token counts as a target, 0 or more. The first is no
            target, so its weight never counts.

    Raises:
        UserError: They are not like this.
    """

    tokens: np.ndarray
    weights: np.ndarray

    def __post_init__(self):
        tokens, weights = _ids(self.tokens), np.asarray(self.weights, np.float32)
        if len(tokens) < 2:
            raise UserError(
                f"an example of {len(tokens)} tokens has none to predict: give at least 2"
            )
        if weights.shape != tokens.shape:
            raise UserError(
                f"an example has {len(tokens)} tokens and weights of shape {weights.shape}: give "
                "each token its own"
            )
        if not (weights >= 0).all() or np.isinf(weights).any():
            raise UserError(
                f"an example has weights from {weights.min()} to {weights.max()}: give finite ones "
                "of at least 0"
            )
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "weights", weights)


class Examples(Protocol):
    """A sequence of `Example`s or of documents: 1-D ids, all targets but the first."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class PackedLoader(Loader):
    """An endless, random-access sequence of batches of packed rows.

    An example of N tokens takes N - 1 places of a row, for its last token has no target. Which
    examples share a row is settled once, by their lengths (`pack_rows`); the order of the rows is
    each epoch's own. Where an epoch ends inside a batch the next one fills it.

    A batch is a dict of
        tokens: `[B, T]` int32.
        targets: `[B, T]` int32, the token after each in its example.
        segment_ids: `[B, T]` int32, 1 for the first example of a row, 2 for the next.
        positions: `[B, T]` int32, 0 at the start of each example.
        weights: `[B, T]` float32, the targets' own.
    All are 0 in places that no example takes.

    Held in memory are 8 bytes an example and 8 a row (and 4 more an example where some are split);
    the examples themselves are read when their row is.

    Attributes:
        fill_rate: The share of places that hold a token.
        cut: How many examples lose their end.
        dropped: How many examples are left out, being too long or of fewer than 2 tokens.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        context_length: int,
        seed: int = 0,
        shuffle: bool = True,
        long: Long = "error",
        lengths: np.ndarray | None = None,
    ):
        """Packs examples.

        Args:
            examples: Examples or documents. Read by `examples[i]`, so they may lie in a file.
            batch_size: B, rows a batch.
            context_length: T, tokens a row.
            seed: Of the order, and of which examples of equal length go where; not negative.
            shuffle: False gives every epoch the rows in one order.
            long: What becomes of an example of more than T + 1 tokens: "error" refuses it, "cut"
                keeps its first T + 1, "drop" leaves it out, "split" makes it pieces, each of which
                starts with the last token of the one before, so that every target counts once.
            lengths: `[len(examples)]` tokens of each, where that is known; without it all examples
                are read once.

        Raises:
            UserError: There are no examples, one is too long, or an argument is not legal.

        Warns:
            UserWarning: Examples are left out, or have no target that counts (which is seen only
                without `lengths`).
        """
        check_shape(batch_size, context_length)
        check_seed(seed)
        if long not in ("error", "cut", "drop", "split"):
            raise UserError(f"long is {long!r}: give 'error', 'cut', 'drop' or 'split'")
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self.shuffle = shuffle
        self._examples = examples
        which, self._parts, self._sizes = self._pieces(
            _places(examples, context_length, long, lengths), long
        )
        order = np.arange(len(which))
        if shuffle:
            # Another key than the epochs have.
            draw = np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1)[0]
            order = np.random.RandomState(draw).permutation(len(which))
        row_of = pack_rows(self._sizes[order], context_length)
        self._ends = np.cumsum(np.bincount(row_of))
        order = order[np.argsort(row_of, kind="stable")]
        self._which, self._sizes = which[order], self._sizes[order]
        self._parts = None if self._parts is None else self._parts[order]
        places = len(self._ends) * context_length
        self.fill_rate = float(self._sizes.sum(dtype=np.int64) / places)

    def _pieces(
        self, places: np.ndarray, long: Long
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Returns of every piece its example, which part of it it is, and how many places it takes.

        The parts are None where every example is one piece.
        """
        T = self.context_length
        too_long = places > T
        keep = places >= 1
        if long == "drop":
            keep &= ~too_long
        elif long == "error" and too_long.any():
            first = int(too_long.argmax())
            raise UserError(
                f"example {first} has {places[first] + 1} tokens, more than the {T + 1} of a row "
                f"with context_length {T} ({too_long.sum()} of {len(places)} examples are too "
                "long): raise context_length, or set long to 'cut', 'drop' or 'split'"
            )
        self.cut = int(too_long.sum()) if long == "cut" else 0
        self.dropped = int(len(places) - keep.sum())
        which = np.flatnonzero(keep).astype(np.int32)
        if not len(which):
            raise UserError(
                f"none of {len(places)} examples has 2 to {T + 1} tokens (their lengths are "
                f"{places.min() + 1} to {places.max() + 1}): give others, or another context_length"
            )
        if self.dropped:
            warnings.warn(
                f"{self.dropped} of {len(places)} examples are left out: {(places < 1).sum()} of "
                f"fewer than 2 tokens, {(~keep & too_long).sum()} of more than {T + 1}",
                stacklevel=3,
            )
        if long != "split" or not too_long.any():
            return which, None, np.minimum(places[which], T).astype(np.int32)
        counts = -(-places[which] // T)
        parts = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        which = np.repeat(which, counts)
        sizes = np.minimum(places[which] - parts * T, T)
        return which, parts.astype(np.int32), sizes.astype(np.int32)

    @property
    def batches_per_epoch(self) -> float:
        """How many batches hold every row once; seldom whole."""
        return len(self._ends) / self.batch_size

    def read(self, rows: np.ndarray) -> Batch:
        """Returns the rows of these global numbers, 0 or more each, in their order."""
        seed = self.seed if self.shuffle else None
        places, _ = epoch_places(rows, len(self._ends), seed)
        return self._read(places)

    def _read(self, rows: np.ndarray) -> Batch:
        """Returns rows by their number in the table; those beyond it are empty."""
        shape = (len(rows), self.context_length)
        names = ("tokens", "targets", "segment_ids", "positions")
        batch: Batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["weights"] = np.zeros(shape, np.float32)
        for b, row in enumerate(rows):
            if row >= len(self._ends):
                continue
            pieces = range(self._ends[row - 1] if row else 0, self._ends[row])
            start = 0
            for segment, piece in enumerate(pieces, 1):
                tokens, weights = self._piece(piece)
                here = (b, slice(start, start + len(tokens) - 1))
                batch["tokens"][here] = tokens[:-1]
                batch["targets"][here] = tokens[1:]
                batch["segment_ids"][here] = segment
                batch["positions"][here] = np.arange(len(tokens) - 1)
                batch["weights"][here] = weights[1:]
                start += len(tokens) - 1
        return batch

    def _piece(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        index = int(self._which[piece])
        start = 0 if self._parts is None else int(self._parts[piece]) * self.context_length
        part = slice(start, start + self.context_length + 1)
        tokens, weights = _tokens_and_weights(self._examples[index])
        tokens, weights = _ids(tokens[part]), weights[part]
        if len(tokens) != self._sizes[piece] + 1:
            raise UserError(
                f"example {index} gives {len(tokens)} tokens where {self._sizes[piece] + 1} were "
                "counted: give the lengths of these examples, and examples that stay as they are"
            )
        return tokens, weights


def packed_batches(
    examples: Examples,
    *,
    batch_size: int,
    context_length: int,
    long: Long = "error",
    lengths: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields batches that hold every example exactly once.

    All batches have the same shape; what is left of the last one is empty, of weight 0.

    Args:
        examples: As in `PackedLoader`.
        batch_size: B, rows a batch.
        context_length: T, tokens a row.
        long: As in `PackedLoader`.
        lengths: As in `PackedLoader`.

    Returns:
        Batches as `PackedLoader` gives them.

    Raises:
        UserError: At once, for what `PackedLoader` refuses.
    """
    loader = PackedLoader(
        examples,
        batch_size=batch_size,
        context_length=context_length,
        shuffle=False,
        long=long,
        lengths=lengths,
    )
    starts = range(0, len(loader._ends), batch_size)
    return (loader._read(np.arange(start, start + batch_size)) for start in starts)


def pack_rows(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Packs things into about as few rows as there can be.

    Row by row: the largest thing that is left, and with it those that leave the least room (Gupta
    and Ho 1999, "A new heuristic algorithm for the one-dimensional bin-packing problem"; of rows
    longer than 4,096 up to 1 place in 2,048 is not searched for). It works
    on counts of equal sizes, and repeats a row as often as they last (as Krell et al. 2021,
    "Efficient Sequence Packing without Cross-contamination"), so a million things take a second.

    Args:
        sizes: `[N]` integers in `[1, capacity]`.
        capacity: The size of a row.

    Returns:
        `[N]` int32, the row of each, from 0 without gaps.
    """
    row_of = np.empty(len(sizes), np.int32)
    order = np.argsort(sizes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1)
    left = {int(sizes[group[0]]): group for group in groups}
    ascending = list(left)
    rows = 0
    while ascending:
        row = _fullest_row(ascending, left, capacity)
        times = min(len(left[size]) // copies for size, copies in row.items())
        for size, copies in row.items():
            here, left[size] = np.split(left[size], [times * copies])
            row_of[here] = np.repeat(np.arange(rows, rows + times), copies)
            if not len(left[size]):
                del ascending[bisect_left(ascending, size)]
        rows += times
    return row_of


def _fullest_row(
    ascending: list[int], left: dict[int, np.ndarray], capacity: int
) -> dict[int, int]:
    """Returns how many of each size make the fullest row with one of the largest."""
    largest = ascending[-1]
    row = {largest: 1}
    room = capacity - largest
    # Bit n of the last is set where sizes so far can add up to n; the larger are tried first, and
    # only until the room is filled.
    sums, tried = [1], []
    # In a long row some places may stay free, or millions of sums would be looked at for them.
    slack = capacity // 2048 if capacity > 4096 else 0
    for size in reversed(ascending[: bisect_right(ascending, room)]):
        reached, step = sums[-1], 1
        copies = min(len(left[size]) - row.get(size, 0), room // size)
        while copies:
            step = min(step, copies)
            reached |= reached << step * size
            copies -= step
            step *= 2
        sums.append(reached & ((2 << room) - 1))
        tried.append(size)
        if sums[-1] >> (room - min(slack, room)):
            break
    total = sums[-1].bit_length() - 1
    for size, before in zip(reversed(tried), reversed(sums[:-1]), strict=True):
        while not before >> total & 1:
            row[size] = row.get(size, 0) + 1
            total -= size
    return row


def _places(
    examples: Examples, context_length: int, long: Long, lengths: np.ndarray | None
) -> np.ndarray:
    """Returns how many places of a row each example would take."""
    if not hasattr(examples, "__getitem__") or not hasattr(examples, "__len__"):
        raise UserError(
            f"examples are a {type(examples).__name__}: give a list, or a sequence with a length "
            "and examples[i]"
        )
    if not len(examples):
        raise UserError("there are no examples: give at least one, and look at what they come from")
    if lengths is not None:
        lengths = np.asarray(lengths)
        if lengths.shape != (len(examples),) or not np.issubdtype(lengths.dtype, np.integer):
            raise UserError(
                f"lengths are {lengths.dtype} of shape {lengths.shape} for {len(examples)} "
                "examples: give an integer for each"
            )
        return lengths.astype(np.int64) - 1
    places = np.empty(len(examples), np.int64)
    without_target = 0
    end = context_length + 1 if long == "cut" else None
    for i in range(len(examples)):
        tokens, weights = _tokens_and_weights(examples[i])
        places[i] = len(tokens) - 1
        without_target += len(tokens) > 1 and not weights[1:end].any()
    if without_target:
        warnings.warn(
            f"{without_target} of {len(examples)} examples have no target that counts"
            f"{f' among their first {end} tokens' if end else ''}: nothing is learned from them",
            stacklevel=3,
        )
    return places


def _tokens_and_weights(example: Example | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(example, Example):
        return example.tokens, example.weights
    return example, np.ones(len(example), np.float32)


def _ids(tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"tokens are {tokens.dtype} of shape {tokens.shape}: give a 1-D array of integer ids"
        )
    if len(tokens) and tokens.min() < 0:
        raise UserError(
            f"tokens hold id {tokens.min()}: give ids of the vocabulary, and a token that shall "
            "not count as a target the weight 0"
        )
    return tokens.astype(np.int32, copy=False)
