"""BLEU, chrF, exact match and F1 against their definitions and sacrebleu's own numbers."""

import collections
import math
import re
import string
import unicodedata
from typing import Any

import numpy as np
import pytest
import sacrebleu

from gptjax.errors import UserError
from gptjax.evaluation.metrics import bleu, chrf, exact_match, f1, normalize_answer

WORDS = ["the", "a", "An", "cat", "Dog's", "sat,", "on", "mat.", "1990", "«Ω»", "—", "é", "(x)"]
CHINESE = [*"黑豹队，的。防守", "308", "NFL", "(分)", " ", "Ekstraklasa"]


def text(rng: np.random.Generator, words: list[str], most: int = 9) -> str:
    return " ".join(rng.choice(np.array(words, object), rng.integers(1, most)))


def corpus(rng: np.random.Generator, count: int) -> tuple[list[str], list[list[str]]]:
    """Predictions that share much with some of one to three references."""
    references = [[text(rng, WORDS, 15) for _ in range(rng.integers(1, 4))] for _ in range(count)]
    predictions = []
    for given in references:
        words = given[rng.integers(len(given))].split()
        words[rng.integers(len(words))] = "zebra"
        predictions.append(" ".join(words))
    return predictions, references


def streams(references: list[list[str]]) -> Any:
    most = max(map(len, references))
    return [[given[n] if n < len(given) else None for given in references] for n in range(most)]


def plain_bleu(predictions: list[str], references: list[list[str]]) -> float:
    """Papineni et al. 2002, section 2.3, of texts already cut at spaces."""

    def ngrams(words: list[str], n: int) -> collections.Counter[tuple[str, ...]]:
        return collections.Counter(zip(*(words[i:] for i in range(n)), strict=False))

    logs, ours, theirs = 0.0, 0, 0
    for n in range(1, 5):
        right = total = 0
        for prediction, given in zip(predictions, references, strict=True):
            found = ngrams(prediction.split(), n)
            most: collections.Counter[tuple[str, ...]] = collections.Counter()
            for reference in given:
                most |= ngrams(reference.split(), n)
            right += sum((found & most).values())
            total += sum(found.values())
        logs += math.log(right / total) / 4
    for prediction, given in zip(predictions, references, strict=True):
        length = len(prediction.split())
        ours += length
        theirs += min((abs(len(r.split()) - length), len(r.split())) for r in given)[1]
    return 100 * math.exp(min(0, 1 - theirs / ours) + logs)


def test_bleu_is_the_papers(rng: np.random.Generator):
    letters = list("abcdefgh")
    references = [[text(rng, letters, 20) for _ in range(2)] for _ in range(20)]
    predictions = [given[0] + " " + text(rng, letters, 3) for given in references]
    expected = plain_bleu(predictions, references)
    assert bleu(predictions, references).value == pytest.approx(expected, rel=1e-6)


def test_corpus_scores_are_sacrebleus(rng: np.random.Generator):
    predictions, references = corpus(rng, 30)
    given = streams(references)
    found = bleu(predictions, references)
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(predictions, given).score)
    assert found.count == 30
    expected = sacrebleu.corpus_chrf(predictions, given).score
    assert chrf(predictions, references).value == pytest.approx(expected)


def test_chinese_is_cut_into_characters(rng: np.random.Generator):
    references = [["".join(rng.choice(CHINESE, 12))] for _ in range(20)]
    predictions = [given[0][:-2] + "防" for given in references]
    expected = sacrebleu.corpus_bleu(predictions, streams(references), tokenize="zh").score
    assert bleu(predictions, references, language="zh").value == pytest.approx(expected)
    assert bleu(predictions, references).value < expected


def test_their_errors_are_the_spread_of_resampled_corpora(rng: np.random.Generator):
    predictions, references = corpus(rng, 40)
    for measure, score in ((bleu, sacrebleu.corpus_bleu), (chrf, sacrebleu.corpus_chrf)):
        resampled = []
        for _ in range(100):
            draw = rng.integers(len(predictions), size=len(predictions))
            given = streams([references[i] for i in draw])
            resampled.append(score([predictions[i] for i in draw], given).score)
        expected = np.std(resampled)
        assert measure(predictions, references).stderr == pytest.approx(expected, rel=0.35)


def test_one_sentence_has_no_error_and_none_no_score():
    assert math.isnan(bleu(["a b c d e"], [["a b c d e"]]).stderr)
    assert bleu(["x", "y"], [["a"], ["b"]])[:2] == (0, 0)
    # Of these some resampled corpora score 0 and others do not.
    assert 0 < bleu(["a b c d e", "y"], [["a b c d f"], ["b"]]).stderr < 100
    for predictions, references in (([], []), (["a"], [["a"], ["b"]])):
        with pytest.raises(UserError, match="predictions and"):
            bleu(predictions, references)


def official(prediction: str, answer: str) -> tuple[float, float]:
    """Exact match and F1 as SQuAD's evaluation computes them for one answer."""

    def normalized(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    words, wanted = normalized(prediction), normalized(answer)
    same = sum(min(words.count(word), wanted.count(word)) for word in set(words))
    if not words or not wanted:
        return float(words == wanted), float(words == wanted)
    if not same:
        return float(words == wanted), 0.0
    precision, recall = same / len(words), same / len(wanted)
    return float(words == wanted), 2 * precision * recall / (precision + recall)


def test_english_answers_are_compared_as_squad_does(rng: np.random.Generator):
    matches = 0
    for _ in range(300):
        prediction = text(rng, WORDS, 5)
        answers = [text(rng, WORDS, 5) for _ in range(rng.integers(1, 4))]
        if rng.random() < 0.3:
            answers.append(prediction.upper().replace("CAT", "the  CAT!"))
        expected = np.max([official(prediction, answer) for answer in answers], axis=0)
        assert exact_match(prediction, answers) == expected[0]
        assert f1(prediction, answers) == pytest.approx(expected[1])
        matches += int(expected[0])
    assert 0 < matches < 300


def mixed(text: str) -> list[str]:
    """A Chinese text as MLQA's evaluation cuts it, after its normalization."""
    text = "".join(
        c
        for c in text.lower()
        if not unicodedata.category(c).startswith("P") and c not in string.punctuation
    )
    words, held = [], ""
    for character in text:
        if "\u4e00" <= character <= "\u9fa5":
            words += [*held.split(), character]
            held = ""
        else:
            held += character
    return [*words, *held.split()]


def test_chinese_answers_are_compared_by_characters(rng: np.random.Generator):
    for _ in range(200):
        one, other = ("".join(rng.choice(CHINESE, rng.integers(1, 9))) for _ in range(2))
        words, wanted = mixed(one), mixed(other)
        assert normalize_answer(one, "zh").split() == words
        same = sum((collections.Counter(words) & collections.Counter(wanted)).values())
        both = len(words) + len(wanted)
        expected = 2 * same / both if words and wanted else float(words == wanted)
        assert f1(one, [other], language="zh") == pytest.approx(expected)
        assert exact_match(one, [other], language="zh") == float(words == wanted)


def test_articles_and_punctuation_are_each_languages_own():
    assert normalize_answer("The «Cat», an A. x") == "«cat» x"
    assert normalize_answer("Der «Hund», die Katze", "de") == "hund katze"
    assert normalize_answer("El perro. ¿Los?", "es") == "perro"
    assert normalize_answer("the 猫！a", "zh") == "the 猫 a"


def test_a_question_without_answers_is_refused():
    with pytest.raises(UserError, match="no answers"):
        f1("x", [])
