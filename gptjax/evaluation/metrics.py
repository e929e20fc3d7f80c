"""What generated text is worth: BLEU and chrF of a corpus, exact match and F1 of an answer."""

import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.evaluation.results import Estimate

_RESAMPLES = 1000


def bleu(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, language: str = "en"
) -> Estimate:
    """Corpus BLEU by sacrebleu (Post 2018), from 0 to 100.

    Args:
        predictions: a text each.
        references: of each prediction one or more, in any number.
        language: of the texts. Chinese ("zh") is cut into characters, Japanese and Korean too, as
            they write no spaces; anything else is cut as mteval-v13a does it.

    Returns:
        The score, with the standard error of the bootstrap over sentences (Koehn 2004).

    Raises:
        UserError: there are no predictions, or not as many references.
    """
    from sacrebleu.metrics.bleu import BLEU

    tokenize = {"zh": "zh", "ja": "char", "ko": "char"}.get(language, "13a")
    return _corpus_score(BLEU(tokenize=tokenize), predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Estimate:
    """Corpus chrF2 by sacrebleu (Popović 2015), from 0 to 100; arguments and errors as `bleu`."""
    from sacrebleu.metrics.chrf import CHRF

    return _corpus_score(CHRF(), predictions, references)


def _corpus_score(
    metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Estimate:
    if not predictions or len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions and {len(references)} references: give one a text, "
            "and at least one text"
        )
    most = max(map(len, references))
    streams = [[r[n] if n < len(r) else None for r in references] for n in range(most)]
    score = metric.corpus_score(list(predictions), streams).score
    count = len(predictions)
    if count == 1:
        return Estimate(float(score), math.nan, count)
    # sacrebleu's own bootstrap fails where one corpus of many scores 0.
    counts = np.array(metric._extract_corpus_statistics(list(predictions), streams), np.float64)
    rng = np.random.default_rng(0)
    resampled = [
        float(
            metric._compute_score_from_stats(counts[rng.integers(count, size=count)].sum(0)).score
        )
        for _ in range(_RESAMPLES)
    ]
    return Estimate(float(score), float(np.std(resampled)), count)


def exact_match(prediction: str, answers: Sequence[str], *, language: str = "en") -> float:
    """1 where a prediction is one of the answers, but for what `normalize_answer` takes away."""
    return _best(_is_equal, prediction, answers, language)


def f1(prediction: str, answers: Sequence[str], *, language: str = "en") -> float:
    """F1 of the words that a prediction shares with an answer, for the answer that fits best.

    As SQuAD defines it (Rajpurkar et al. 2016, section 6.1). Where one of the two is empty, it is 1
    if both are (SQuAD 2.0).
    """
    return _best(_overlap, prediction, answers, language)


def normalize_answer(text: str, language: str = "en") -> str:
    """A text in lower case, without punctuation, articles and needless white space.

    English as SQuAD's evaluation has it: ASCII's punctuation, and the articles a, an and the. Other
    languages as MLQA's evaluation (Lewis et al. 2020), which XQuAD is measured by too: Unicode's
    punctuation as well, each language's own articles, and in Chinese a space around each character.
    """
    text = text.lower()
    marks = set(string.punctuation) if language == "en" else _punctuation()
    text = "".join(character for character in text if character not in marks)
    articles = _ARTICLES.get(language)
    if articles:
        text = re.sub(articles, " ", text)
    if language == "zh":
        text = _CHINESE.sub(r" \g<0> ", text)
    return " ".join(text.split())


_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": r"ال",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
}
_CHINESE = re.compile("[\u4e00-\u9fa5]")


@cache
def _punctuation() -> frozenset[str]:
    marks = (c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "P")
    return frozenset(marks) | frozenset(string.punctuation)


def _best(
    compare: Callable[[str, str], float], prediction: str, answers: Sequence[str], language: str
) -> float:
    if not answers:
        raise UserError("a question has no answers to compare with: give at least one")
    given = normalize_answer(prediction, language)
    return max(compare(given, normalize_answer(answer, language)) for answer in answers)


def _is_equal(one: str, other: str) -> float:
    return float(one == other)


def _overlap(one: str, other: str) -> float:
    words, wanted = one.split(), other.split()
    if not words or not wanted:
        return float(words == wanted)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))
