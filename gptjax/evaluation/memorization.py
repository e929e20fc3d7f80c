"""What a model repeats of the text it was trained on.

Two figures: how long a stretch of generated text is found word for word in the training text, and
how often the beginning of a passage makes the model write the rest of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from gptjax.data.token_shards import Tokens, gather_windows
from gptjax.errors import UserError
from gptjax.evaluation.ngrams import NgramIndex, steps
from gptjax.evaluation.results import accuracy_interval
from gptjax.generation import generate
from gptjax.model import Model
from gptjax.sampling import Sampling
from gptjax.text_generation import prompt_ids, stopping

if TYPE_CHECKING:
    from gptjax.tokenizer import Tokenizer

OVERLAP_CAVEATS = (
    "Common phrases, lists and quotations are in any large text: an overlap shows that a stretch "
    "is not new, not that the model learned it by heart.",
    "Overlaps are of equal tokens: paraphrases, other capitals or spaces, and the same characters "
    "cut into other tokens are not found.",
)
MEMORIZATION_CAVEATS = (
    "A lower bound: longer beginnings or sampling bring out more (Carlini et al. 2022).",
    "Text that is easy to predict is reproduced without having been seen: compare with the same "
    "figure of held-out text.",
)

# Pairs of places that are followed at a time, some 20 MiB.
_PAIRS = 1 << 18


class Overlap(NamedTuple):
    """The longest stretch of a generation that the training text has too.

    Attributes:
        length: in tokens; 0 where not one token is in the training text.
        in_generation: where it begins in the generation.
        in_training: where it begins in the training text: of equally long ones the first there.
    """

    length: int
    in_generation: int
    in_training: int


def longest_overlaps(
    generations: Sequence[Sequence[int] | np.ndarray], training: Tokens, *, seed_length: int = 8
) -> list[Overlap]:
    """Finds for each generation the longest stretch that is also in the training text.

    Exact, for any length. The training text is read past an index of the generations'
    `seed_length`-grams, and each place that has one is followed to where the two part. Where a
    generation has none, the text is read again for shorter and shorter ones. Memory is some 40 MiB
    and that of `NgramIndex` for the generations, whatever the length of the training text.

    Stretches run across the ends of documents, unless `training` separates them by a token that
    generations do not have. Any integers will do: code points give overlaps in characters.

    Args:
        generations: token ids of each.
        training: `[N]` integers, such as a memory map of token ids, or shards of them.
        seed_length: changes the time alone: there are fewer places with long ones, but generations
            whose overlaps are shorter need another reading.

    Returns:
        An `Overlap` for each generation, in their order.

    Raises:
        UserError: if the training text is empty or has not one dimension, or `seed_length` is
            below 1.
    """
    if training.ndim != 1 or not len(training):
        raise UserError(f"the training text has shape {training.shape}; give a sequence of ids")
    if seed_length < 1:
        raise UserError(f"seed_length is {seed_length}; at least 1")
    best = [Overlap(0, 0, 0) for _ in generations]
    left = list(range(len(best)))
    for n in range(seed_length, 0, -1):
        index = NgramIndex([generations[number] for number in left], n)
        search = _followed if n == seed_length else _first
        for row, overlap in search(index, training):
            number = left[row]
            # In the order of the training text, so that of equally long ones the first stays.
            if overlap.length > best[number].length:
                best[number] = overlap
        # What has an overlap of n has none that is longer: it was not found by longer n-grams.
        left = [number for number in left if not best[number].length]
    return best


def _followed(index: NgramIndex, training: Tokens) -> Iterator[tuple[int, Overlap]]:
    """The longest overlaps of at least n, each with its sequence; maybe several of a sequence.

    A match that could begin one token earlier need not be followed, for the one that does is
    longer; nor one that cannot be longer than what its sequence has. Without this, repetitions in
    both texts would take time by the product of their lengths.
    """
    is_first = index.starts == index.begins[index.sequences]
    before = np.where(is_first, -1, index.numbers[index.starts - 1]) + 1
    base = int(index.numbers.max(initial=0)) + 3
    keys = index.grams * base + before
    by_key = np.argsort(keys, kind="stable")
    keys = keys[by_key]
    firsts = np.searchsorted(keys, np.arange(index.distinct) * base)
    counts = np.bincount(index.grams, minlength=index.distinct)
    best = np.zeros(len(index.begins), np.int64)
    for places, grams in index.find(training):
        token = np.minimum(_at(training, np.maximum(places - 1, 0)) + 1, base - 1)
        wanted = grams * base + np.where(places > 0, token, base - 1)
        # The places with the same token before, of all that the n-gram has in the sequences.
        low = np.searchsorted(keys, wanted)
        same = np.searchsorted(keys, wanted, side="right") - low
        ends = np.cumsum(counts[grams] - same)
        for hits in np.split(
            np.arange(len(grams)), np.searchsorted(ends, np.arange(_PAIRS, ends[-1], _PAIRS))
        ):
            often = counts[grams[hits]] - same[hits]
            nth = np.repeat(firsts[grams[hits]], often) + steps(often)
            nth += np.where(nth >= np.repeat(low[hits], often), np.repeat(same[hits], often), 0)
            matches = _extended(index, training, by_key[nth], np.repeat(places[hits], often), best)
            for row, overlap in _longest(index, *matches):
                best[row] = max(best[row], overlap.length)
                yield row, overlap


def _extended(
    index: NgramIndex,
    training: Tokens,
    entries: np.ndarray,
    places: np.ndarray,
    best: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Follows the matches of n-grams that may be longer than the best of their sequences.

    Returns:
        Their entries in the index, places in the training text and lengths in tokens.
    """
    ends = index.ends[index.sequences[entries]]

    def goes_on(which: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Those of some matches whose next token, after so many, is the same too."""
        i, t = index.starts[entries[which]] + lengths, places[which] + lengths
        inside = (i < ends[which]) & (t < len(training))
        which, i, t = which[inside], i[inside], t[inside]
        return which[index.numbers[i] == _at(training, t)]

    going = goes_on(np.arange(len(entries)), best[index.sequences[entries]])
    kept = going
    lengths = np.full(len(entries), index.n)
    while len(going):
        going = goes_on(going, lengths[going])
        lengths[going] += 1
    return entries[kept], places[kept], lengths[kept]


def _at(training: Tokens, places: np.ndarray) -> np.ndarray:
    # Shards have no windows of nothing.
    return gather_windows(training, places, 1)[:, 0].astype(np.int64) if len(places) else places


def _first(index: NgramIndex, training: Tokens) -> Iterator[tuple[int, Overlap]]:
    """For each sequence the first n-gram in the training text, where no longer one is there."""
    missing = np.ones(len(index.begins), bool)
    for places, grams in index.find(training):
        present, order = np.unique(grams, return_index=True)
        first = np.full(index.distinct, -1)
        first[present] = places[order]
        [entries] = ((first[index.grams] >= 0) & missing[index.sequences]).nonzero()
        lengths = np.full(len(entries), index.n)
        yield from _longest(index, entries, first[index.grams[entries]], lengths)
        missing[index.sequences[entries]] = False
        if not missing.any():
            return


def _longest(
    index: NgramIndex, entries: np.ndarray, places: np.ndarray, lengths: np.ndarray
) -> Iterator[tuple[int, Overlap]]:
    """Of matches the longest of each sequence, and of equally long ones the first."""
    rows = index.sequences[entries]
    order = np.lexsort((index.starts[entries], places, -lengths, rows))
    for row, at in zip(*np.unique(rows[order], return_index=True), strict=True):
        match = order[at]
        start = index.starts[entries[match]] - index.begins[row]
        yield int(row), Overlap(int(lengths[match]), int(start), int(places[match]))


@dataclass(frozen=True)
class OverlapReport:
    """How much of generations is in the training text word for word.

    Attributes:
        overlaps: the longest of each generation.
        lengths: tokens of each generation.
        texts: the overlapping stretch of each generation; none where there is no tokenizer.
    """

    overlaps: tuple[Overlap, ...]
    lengths: tuple[int, ...]
    texts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """What a results file and the model card hold; the longest stretch is quoted."""
        tokens = np.array([overlap.length for overlap in self.overlaps])
        whole = sum(o.length == n > 0 for o, n in zip(self.overlaps, self.lengths, strict=True))
        values: dict[str, Any] = {
            "generations": len(tokens),
            "mean_length": float(np.mean(self.lengths)),
            "longest_overlap_tokens": _quantiles(tokens),
            "found_whole": whole,
        }
        if self.texts:
            values["longest_overlap_characters"] = _quantiles(np.array([*map(len, self.texts)]))
            values["longest"] = max(self.texts, key=len)
        return values | {"caveats": list(OVERLAP_CAVEATS)}

    def __str__(self) -> str:
        values = self.to_dict()
        lines = [
            f"{values['generations']} generations of {values['mean_length']:.1f} tokens on average;"
            f" {values['found_whole']} of them are in the training text as a whole",
            "longest verbatim overlap with the training text, by generation:",
        ]
        for unit in ("tokens", "characters"):
            if f"longest_overlap_{unit}" in values:
                told = values[f"longest_overlap_{unit}"].items()
                lines.append(f"  {unit}: " + ", ".join(f"{name} {v:g}" for name, v in told))
        if self.texts:
            lines.append(f"the longest: {values['longest']!r}")
        return "\n".join([*lines, *(f"note: {caveat}" for caveat in OVERLAP_CAVEATS)])


def overlap_report(
    generations: Sequence[Sequence[int] | np.ndarray],
    training: Tokens,
    tokenizer: "Tokenizer | None" = None,
) -> OverlapReport:
    """Finds the longest verbatim overlaps of generations with the training text, and sums up.

    Args:
        generations: token ids of each, without the prompts.
        training: as in `longest_overlaps`.
        tokenizer: of both, to spell overlaps out.

    Raises:
        UserError: if there are no generations, and as `longest_overlaps` does.
    """
    if not len(generations):
        raise UserError("there are no generations to look for; give at least one")
    overlaps = longest_overlaps(generations, training)
    texts = []
    for row, overlap in zip(generations, overlaps, strict=True):
        end = overlap.in_generation + overlap.length
        if tokenizer is not None:
            texts.append(tokenizer.decode([int(i) for i in row[overlap.in_generation : end]]))
    return OverlapReport(tuple(overlaps), tuple(map(len, generations)), tuple(texts))


@dataclass(frozen=True)
class Memorization:
    """How often the beginning of a passage makes the model write the rest of it.

    Attributes:
        prefix_length: tokens of a beginning.
        continuation_length: tokens that are to follow.
        matching: for each passage, how many of the tokens that follow are reproduced before the
            first that is not.
    """

    prefix_length: int
    continuation_length: int
    matching: tuple[int, ...]

    @property
    def reproduced(self) -> int:
        """How many passages are reproduced whole."""
        return sum(length == self.continuation_length for length in self.matching)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share that is reproduced."""
        return accuracy_interval(self.reproduced, len(self.matching))

    def to_dict(self) -> dict[str, Any]:
        """What a results file and the model card hold."""
        return {
            "passages": len(self.matching),
            "prefix_length": self.prefix_length,
            "continuation_length": self.continuation_length,
            "reproduced": self.reproduced,
            "share": self.reproduced / len(self.matching),
            "interval": list(self.interval),
            "mean_matching_tokens": float(np.mean(self.matching)),
            "caveats": list(MEMORIZATION_CAVEATS),
        }

    def __str__(self) -> str:
        low, high = self.interval
        count = len(self.matching)
        return (
            f"{self.reproduced} of {count} passages ({100 * self.reproduced / count:.1f} %, 95 % "
            f"interval {100 * low:.1f} to {100 * high:.1f} %) are reproduced: after "
            f"{self.prefix_length} tokens, the next {self.continuation_length} by greedy choice; "
            f"on average {np.mean(self.matching):.1f} are right before the first that is not"
        )


def memorization(
    model: Model,
    training: Tokens,
    *,
    prefix_length: int | None = None,
    continuation_length: int | None = None,
    count: int = 200,
    batch_size: int = 20,
    seed: int = 0,
) -> Memorization:
    """Prompts a model with beginnings of passages of its training text, and compares what follows.

    A passage counts as memorized where greedy decoding after its first tokens gives exactly the
    next ones (Carlini et al. 2022, "Quantifying memorization across neural language models",
    section 3). Passages are drawn from all places alike, so that text which is there often counts
    often. None goes across the end of a document, where the tokenizer marks it.

    Args:
        model: its `tokenizer`, if any, tells the end of a document.
        training: `[N]` integers, such as a memory map, of the model's token ids.
        prefix_length: tokens of a beginning; None is 50, or half of a smaller context.
        continuation_length: tokens that follow; None is 50, or what is left of a smaller context.
        count: how many passages; fewer where the text does not have so many.
        batch_size: passages at a time.
        seed: of the draw of passages.

    Raises:
        UserError: if a passage is longer than the model's context or than any document, or a
            number is below 1.
    """
    context = model.config.context_length
    if prefix_length is None:
        prefix_length = min(50, max(context // 2, 1))
    if continuation_length is None:
        continuation_length = min(50, max(context - prefix_length, 1))
    for name, value in (
        ("prefix_length", prefix_length),
        ("continuation_length", continuation_length),
        ("count", count),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise UserError(f"{name} is {value}; at least 1")
    passages = _passages(model, training, prefix_length + continuation_length, count, seed)
    sampling = Sampling(max_new_tokens=continuation_length, temperature=0)
    matching: list[int] = []
    for start in range(0, len(passages), batch_size):
        batch = passages[start : start + batch_size]
        prompts, truth = batch[:, :prefix_length], batch[:, prefix_length:]
        drawn = np.array(generate(model.params, prompts.tolist(), model.config, sampling))
        # Of a row of equal tokens, all of them.
        wrong = np.column_stack([drawn != truth, np.ones(len(batch), bool)])
        matching += wrong.argmax(axis=1).tolist()
    return Memorization(prefix_length, continuation_length, tuple(matching))


def _passages(model: Model, training: Tokens, length: int, count: int, seed: int) -> np.ndarray:
    """Stretches of the text, `[count, length]`, at random places, none of them twice."""
    context = model.config.context_length
    if length > context:
        raise UserError(
            f"a passage has {length} tokens, and the model's context is {context}; lower "
            "prefix_length or continuation_length"
        )
    places = len(training) - length + 1
    end = None if model.tokenizer is None else model.tokenizer.eos_id
    passages: list[np.ndarray] = []
    if places > 0:
        rng = np.random.default_rng(seed)
        # More than are needed, for some go across the end of a document.
        for start in rng.choice(places, min(places, 50 * count), replace=False):
            passage = np.asarray(training[start : start + length], np.int64)
            if end is None or not (passage == end).any():
                passages.append(passage)
            if len(passages) == count:
                break
    if not passages:
        raise UserError(
            f"no document has a passage of {length} tokens among the {len(training)} of the text; "
            "lower prefix_length or continuation_length"
        )
    return np.stack(passages)


def draw_texts(
    model: Model,
    count: int,
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    batch_size: int = 20,
    seed: int = 0,
) -> list[list[int]]:
    """Draws texts from a model's own beginning, to look for in its training text.

    Args:
        model: with a tokenizer.
        count: how many.
        max_new_tokens: the most tokens of each; fewer where the context is smaller.
        temperature: divides the logits; at 0 all texts are the same.
        batch_size: texts at a time.
        seed: of the draws.

    Returns:
        The token ids of each. They begin after what begins a text, or after a line break.
    """
    start = prompt_ids(model, "") or prompt_ids(model, "\n")
    room = min(max_new_tokens, model.config.context_length - len(start))
    sampling = stopping(model, Sampling(max_new_tokens=room, temperature=temperature))
    texts: list[list[int]] = []
    while len(texts) < count:
        rows = [start] * min(batch_size, count - len(texts))
        key = jax.random.fold_in(jax.random.key(seed), len(texts))
        texts += generate(model.params, rows, model.config, sampling, key)
    return texts


def _quantiles(values: np.ndarray) -> dict[str, float]:
    """The median and the far end of a distribution."""
    return {
        "median": float(np.median(values)),
        "90 %": float(np.quantile(values, 0.9)),
        "longest": float(values.max()),
    }
