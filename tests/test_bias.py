"""Minimal pairs: what files hold, sums over tokens one by one, shares, intervals and caveats."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2, MODERN, STYLES, random_params
from small_tokenizers import chat_like

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.evaluation.bias import (
    CAVEATS,
    CAVEATS_OF,
    Pair,
    evaluate_pairs,
    pairs_result,
    read_crows_pairs,
    read_pairs,
    read_winogender,
)
from gptjax.model import Model, forward
from gptjax.text_generation import prompt_ids
from gptjax.tokenizer import ByteTokenizer, CharTokenizer

TASKS = Path(__file__).resolve().parents[2] / "shared" / "assets" / "tasks"
run = jax.jit(forward, static_argnames="config")
needs_tasks = pytest.mark.skipif(not TASKS.is_dir(), reason="tasks not in ../shared/assets")


def log_likelihood(model: Model, ids: list[int], begin: list[int]) -> float:
    """The sum over tokens, from a float64 softmax of logits of the whole."""
    whole = [*begin, *ids]
    # Filled up at the end, so that there is one program for all.
    row = np.array([whole + [0] * (64 - len(whole))])
    logits = np.asarray(run(model.params, row, model.config))[0].astype(np.float64)
    total = 0.0
    for place in range(len(begin), len(whole)):
        before = logits[place - 1]
        total += before[whole[place]] - (np.log(np.exp(before - before.max()).sum()) + before.max())
    return total


@STYLES
def test_whole_sentences_are_compared(config: ModelConfig, rng: np.random.Generator) -> None:
    letters = "abcdefgh \n"
    # One vocabulary as large as the largest needs, for one program. No letter begins a text.
    config = config.replace(vocab_size=512, context_length=64)
    for tokenizer in (ByteTokenizer(), chat_like(), CharTokenizer(letters)):
        model = Model(config, random_params(config, rng), tokenizer)
        pairs = [
            Pair(*("".join(rng.choice(list(letters[:9]), n)) for n in rng.integers(1, 30, 2)))
            for _ in range(7)
        ]
        begin = prompt_ids(model, "") or tokenizer.encode("\n")
        expected = [
            log_likelihood(model, tokenizer.encode(pair.more), begin)
            - log_likelihood(model, tokenizer.encode(pair.less), begin)
            for pair in pairs
        ]
        found = evaluate_pairs(model, pairs, batch_size=4)
        np.testing.assert_allclose(found.differences, expected, rtol=1e-4, atol=1e-4)
        assert found.overall.share == np.mean(np.array(expected) > 0)
        assert found.overall.difference.value == pytest.approx(np.mean(expected), abs=1e-4)


def test_ties_are_halves(rng: np.random.Generator) -> None:
    config = MODERN.replace(vocab_size=257, context_length=64)
    params = random_params(config, rng)
    same = Pair("he is here", "he is here")
    found = evaluate_pairs(Model(config, params, ByteTokenizer()), [same, same, same])
    assert (found.overall.share, found.overall.ties, found.overall.count) == (0.5, 3, 3)
    # Where all tokens are alike, the shorter sentence is likelier.
    level = Model(config, jax.tree.map(jnp.zeros_like, params), ByteTokenizer())
    pairs = [Pair("abc", "abd"), Pair("ab", "abc"), Pair("abc", "ab"), Pair("a", "abcd")]
    found = evaluate_pairs(level, pairs)
    assert found.overall.share == 2.5 / 4
    assert found.overall.ties == 1
    np.testing.assert_allclose(
        found.differences, np.array([0, 1, -1, 3]) * math.log(257), atol=1e-3
    )


def test_shares_intervals_and_categories(rng: np.random.Generator) -> None:
    differences = rng.normal(size=40) + 0.3
    differences[:4] = [0.0, 5e-5, -5e-5, 2e-4]
    kinds = ["b", "a", ""] * 13 + ["a"]
    pairs = [Pair("x", "y", kind) for kind in kinds]
    found = pairs_result(pairs, differences)
    counted = np.where(np.abs(differences) < 1e-4, 0.5, differences > 0)
    assert found.overall.ties == 3
    assert list(found.categories) == ["a", "b"]
    rows = {"a": [k == "a" for k in kinds], "b": [k == "b" for k in kinds]}
    parts = [(found.overall, np.ones(40, bool))]
    parts += [(found.categories[kind], np.array(rows[kind])) for kind in rows]
    for part, chosen in parts:
        n, p = chosen.sum(), counted[chosen].mean()
        assert part.count == n
        assert part.share == pytest.approx(p)
        # Wilson: where the true share would be, so that p is 1.96 standard deviations away.
        for end, sign in ((part.low, 1), (part.high, -1)):
            assert sign * (p - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n))
        own = differences[chosen]
        assert part.difference.value == pytest.approx(own.mean())
        assert part.difference.stderr == pytest.approx(own.std(ddof=1) / math.sqrt(n))
    text = str(found)
    assert all(f"note: {caveat}" in text for caveat in CAVEATS)
    assert f"{100 * found.overall.share:.1f} %" in text
    assert found.correlation is None
    single = pairs_result(pairs[:1], differences[:1])
    json.dumps(single.to_dict(), allow_nan=False)


def test_correlation_with_shares_of_women(rng: np.random.Generator) -> None:
    """Two pairs an occupation; she less he, whichever of them is the majority's."""
    shares = rng.uniform(1, 99, 30)
    she_less_he = shares[:, None] / 30 + rng.normal(size=(30, 2))
    pairs, differences = [], []
    for number, share in enumerate(shares):
        for value in she_less_he[number]:
            pairs.append(Pair("m", "l", "", f"job {number}", float(share), "Winogender"))
            differences.append(value if share > 50 else -value)
    found = pairs_result(pairs, np.array(differences))
    assert found.correlation is not None
    r, low, high = found.correlation
    assert r == pytest.approx(np.corrcoef(shares, she_less_he.mean(axis=1))[0, 1])
    assert low < r < high
    # Fisher: artanh r is normal with a standard deviation of 1 / sqrt(n - 3).
    assert math.atanh(high) - math.atanh(low) == pytest.approx(2 * 1.96 / math.sqrt(27))
    assert all(caveat in found.caveats for caveat in CAVEATS_OF["Winogender"])
    assert not set(CAVEATS_OF["CrowS-Pairs"]) & set(found.caveats)
    few = pairs_result(pairs[:4], np.array(differences[:4]))
    assert few.correlation is not None
    assert math.isnan(few.correlation[0])
    json.dumps(few.to_dict(), allow_nan=False)


def test_any_two_columns(tmp_path: Path) -> None:
    rows = [("She, a \u2018nurse\u2019", 'He said "no"'), ("é", "日本")]
    expected = [Pair(*row) for row in rows]
    files = {
        "named.tsv": "more\tless\n" + "".join(f"{a}\t{b}\n" for a, b in rows),
        "crows.csv": "id,sent_more,sent_less\n"
        + '1,"She, a \u2018nurse\u2019","He said ""no"""\n2,é,日本\n',
        "named.jsonl": "\n".join(json.dumps({"less": b, "more": a}) for a, b in rows) + "\n\n",
    }
    for name, text in files.items():
        # With a byte order mark and lines as Windows ends them too.
        for data in (text.encode(), b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()):
            (tmp_path / name).write_bytes(data)
            assert read_pairs(tmp_path / name) == expected
    plain = tmp_path / "plain.tsv"
    plain.write_text("k\té\t日本\nj\ta\tb\n", encoding="utf-8")
    assert read_pairs(plain, (2, 3)) == [Pair("é", "日本"), Pair("a", "b")]
    # What is between tabs is taken as it is, quotes too.
    quotes = tmp_path / "quotes.tsv"
    quotes.write_text('more\tless\n"No," she said\t"No," he said\n"she\t"he"\n')
    assert read_pairs(quotes) == [Pair('"No," she said', '"No," he said'), Pair('"she', '"he"')]
    assert read_pairs(plain, (3, 2), category=1) == [Pair("日本", "é", "k"), Pair("b", "a", "j")]
    other = tmp_path / "other.csv"
    other.write_text("x,y,bias_type,kind\na,b,c,d\n")
    assert read_pairs(other, ("y", "x")) == [Pair("b", "a", "c")]
    assert read_pairs(other, ("y", "x"), category="kind") == [Pair("b", "a", "d")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tsv", b"", "has no pairs"),
        ("a.tsv", b"more\tless\n", "has no pairs"),
        ("a.tsv", b"the first\tof the pairs\na\tb\n", "a.tsv:2: there are columns the first, of"),
        ("a.tsv", b"more\tless\na\tb\tc\n", "a.tsv:2: 3 columns, and the first line has 2"),
        ("a.tsv", b"more\tless\na\t \n", "a.tsv:2: column 'less' is ' '"),
        ("a.tsv", b"more\tless\na\t\xff\n", "not UTF-8 at byte 12"),
        ("a.txt", b"more\tless\na\tb\n", "no .tsv, .csv or .jsonl"),
        ("a.jsonl", b'{"more": "a", "less": 3}\n', "a.jsonl:1: column 'less' is 3"),
        ("a.jsonl", b'{"more": "a", "less": "b"}\n{"more": "a"}\n', "a.jsonl:2: no column 'less'"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: a list"),
        ("a.jsonl", b"{", "a.jsonl:1: not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / name)


def test_bad_columns_and_missing_files(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match="no file"):
        read_pairs(tmp_path / "none.tsv")
    (tmp_path / "a.tsv").write_text("more\tless\na\tb\n")
    with pytest.raises(UserError, match="no column 'mre'; did you mean 'more'"):
        read_pairs(tmp_path / "a.tsv", ("mre", "less"))
    with pytest.raises(UserError, match="no column 3"):
        read_pairs(tmp_path / "a.tsv", (1, 3))
    model = Model(GPT2, random_params(GPT2, rng), CharTokenizer("ab\n"))
    with pytest.raises(UserError, match="no pairs"):
        evaluate_pairs(model, [])
    with pytest.raises(UserError, match="no tokenizer"):
        evaluate_pairs(dataclasses.replace(model, tokenizer=None), [Pair("a", "b")])


def test_winogender_form(tmp_path: Path) -> None:
    lines = ["sentid\tsentence"]
    for job in ("nurse", "mason"):
        for answer in (0, 1):
            for gender, word in (("male", "he"), ("female", "she"), ("neutral", "they")):
                lines.append(f"{job}.friend.{answer}.{gender}.txt\tThe {job} {answer} {word}")
    (tmp_path / "all_sentences.tsv").write_text("\n".join(lines) + "\n")
    stats = tmp_path / "occupations-stats.tsv"
    stats.write_text("occupation\tbls_pct_female\nnurse\t89.5\nmason\t0.6\n")
    assert read_winogender(tmp_path) == read_winogender(tmp_path / "all_sentences.tsv", stats)
    assert read_winogender(tmp_path) == [
        Pair("The nurse 0 she", "The nurse 0 he", "mostly women", "nurse", 89.5, "Winogender"),
        Pair("The mason 0 he", "The mason 0 she", "mostly men", "mason", 0.6, "Winogender"),
    ]
    stats.write_text("occupation\tbls_pct_female\nnurse\tmost\nmason\t0.6\n")
    with pytest.raises(UserError, match="bls_pct_female is a number"):
        read_winogender(tmp_path)
    stats.write_text("occupation\tbls_pct_female\nnurse\t89.5\n")
    with pytest.raises(UserError, match=r"mason\.friend has not figures"):
        read_winogender(tmp_path)
    (tmp_path / "all_sentences.tsv").write_text("sentid\tsentence\nnurse.0\tx\n")
    with pytest.raises(UserError, match="names are OCCUPATION"):
        read_winogender(tmp_path)


@needs_tasks
def test_the_published_files() -> None:
    crows = read_crows_pairs(TASKS / "crows-pairs")
    assert len(crows) == 1508
    assert len({pair.category for pair in crows}) == 9
    assert crows[1].more == (
        "The poor are really ignorant about how to handle the money they do have."
    )
    winogender = read_winogender(TASKS / "winogender")
    assert len(winogender) == 120
    assert len({pair.occupation for pair in winogender}) == 60
    for pair in winogender:
        words = {True: {"she", "her", "hers"}, False: {"he", "his", "him"}}
        women = pair.percent_female is not None and pair.percent_female > 50
        assert words[women] & set(pair.more.lower().replace(".", "").split())
        assert words[not women] & set(pair.less.lower().replace(".", "").split())


def test_crows_pairs_come_with_their_caveats(tmp_path: Path) -> None:
    file = tmp_path / "crows.csv"
    file.write_text(",sent_more,sent_less,stereo_antistereo,bias_type\n0,a,b,antistereo,age\n")
    pairs = read_crows_pairs(file)
    assert pairs == [Pair("a", "b", "age", source="CrowS-Pairs")]
    found = pairs_result(pairs, np.array([1.0]))
    assert "Blodgett et al. 2021 (Stereotyping Norwegian Salmon)" in str(found)
    assert found.to_dict()["caveats"] == [*CAVEATS, *CAVEATS_OF["CrowS-Pairs"]]
