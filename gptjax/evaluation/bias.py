"""Minimal-pair probes of social bias: which of two sentences that differ in a group is likelier.

What is compared is the log-likelihood of whole sentences, as Nadeem et al. 2021 (StereoSet,
section 5) and most later work do for autoregressive models. Nangia et al. 2020 (CrowS-Pairs) score
masked language models by a pseudo-log-likelihood of the words that both sentences share; figures of
the two kinds are not comparable.

These probes can show a preference, never its absence: see `CAVEATS` and `CAVEATS_OF`, which are
part of every result and printed with it.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError, nearest
from gptjax.evaluation.results import Estimate, accuracy_interval, mean
from gptjax.model import Model
from gptjax.scoring import score
from gptjax.text_generation import prompt_ids

CAVEATS = (
    "50 % does not mean unbiased: opposite preferences cancel out, and a model that cannot tell "
    "sentences apart gets 50 % too.",
    "The interval covers which pairs were drawn, not whether they measure bias, nor how the model "
    "is used. Categories with few pairs say little.",
    "Sentences differ in length and in how common their words are, which moves likelihoods without "
    "any stereotype.",
)
CAVEATS_OF = {
    "CrowS-Pairs": (
        "Blodgett et al. 2021 (Stereotyping Norwegian Salmon) found so many of the pairs unclear, "
        "invalid or unreliable that CrowS-Pairs may be no good measure of bias, as its authors say "
        "themselves.",
        "CrowS-Pairs is in English and about stereotypes in the United States, written by crowd "
        "workers.",
    ),
    "Winogender": (
        "Winogender was made for coreference. Here only he and she are compared, in English, for "
        "60 occupations and the shares of women in them in the United States in 2015 and 2016. To "
        "prefer the pronoun of the majority may be knowledge as well as a stereotype.",
        "A model that prefers he everywhere gets the share of occupations of mostly men: see the "
        "categories.",
    ),
}

_NAMES = (("more", "less"), ("sent_more", "sent_less"))
_CATEGORIES = ("category", "bias_type")

# Log-likelihoods of a sentence are right to less than this; see `evaluate_pairs`.
_TIE = 1e-4


@dataclass(frozen=True)
class Pair:
    """Two sentences that differ in the group they are about.

    Attributes:
        more: the sentence that is in line with the stereotype, or more so than the other.
        less: the other.
        category: what the stereotype is about.
        occupation: of Winogender, the one that the pronoun stands for.
        percent_female: of Winogender, the share of women in that occupation, 0 to 100.
        source: the data set, a key of `CAVEATS_OF`; empty for others.
    """

    more: str
    less: str
    category: str = ""
    occupation: str = ""
    percent_female: float | None = None
    source: str = ""


def read_crows_pairs(path: str | Path) -> list[Pair]:
    """Reads CrowS-Pairs (Nangia et al. 2020): a CSV file, or a folder with the one it comes as.

    Returns:
        All pairs, the stereotypical sentence (`sent_more`) as `more` whichever direction
        `stereo_antistereo` gives, by `bias_type`.

    Raises:
        UserError: if the file is missing or is not in this form.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "crows_pairs_anonymized.csv"
    pairs = read_pairs(file, ("sent_more", "sent_less"), category="bias_type")
    return [replace(pair, source="CrowS-Pairs") for pair in pairs]


def read_winogender(path: str | Path, occupations: str | Path | None = None) -> list[Pair]:
    """Reads Winogender schemas (Rudinger et al. 2018) as pairs of male and female sentences.

    Only sentences whose pronoun stands for the occupation are taken, 120 pairs of the 240: for the
    other participant there are no figures. The sentence with the pronoun of the majority of the
    occupation is `more`. The categories are "mostly men" and "mostly women".

    Args:
        path: `all_sentences.tsv`, with columns `sentid` (such as technician.customer.1.male.txt)
            and `sentence`; or the folder of it.
        occupations: `occupations-stats.tsv`, of which `occupation` and `bls_pct_female` are read;
            None is the one beside the sentences.

    Raises:
        UserError: if a file is missing or is not in this form.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "all_sentences.tsv"
    stats = file.with_name("occupations-stats.tsv") if occupations is None else Path(occupations)
    shares: dict[str, float] = {}
    for place, row in _rows(stats, header=True):
        try:
            shares[_value(row, "occupation", place)] = float(_value(row, "bls_pct_female", place))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{place}: {error}; bls_pct_female is a number") from error
    sentences: dict[tuple[str, str], dict[str, str]] = {}
    for place, row in _rows(file, header=True):
        name = _value(row, "sentid", place)
        parts = name.removesuffix(".txt").split(".")
        if len(parts) != 4:
            raise UserError(
                f"{place}: the sentence is named {name!r}; names are OCCUPATION.PARTICIPANT.ANSWER."
                "GENDER.txt"
            )
        occupation, participant, answer, gender = parts
        if answer == "0":
            both = sentences.setdefault((occupation, participant), {})
            both[gender] = _value(row, "sentence", place)
    pairs = []
    for (occupation, participant), both in sentences.items():
        if not {"male", "female"} <= both.keys() or occupation not in shares:
            lacking = f"figures in {stats}" if {"male", "female"} <= both.keys() else "both genders"
            raise UserError(f"{file}: {occupation}.{participant} has not {lacking}; copy it again")
        share = shares[occupation]
        sides = (both["female"], both["male"])
        more, less = sides if share > 50 else sides[::-1]
        category = "mostly women" if share > 50 else "mostly men"
        pairs.append(Pair(more, less, category, occupation, share, "Winogender"))
    return _some(pairs, file)


def read_pairs(
    path: str | Path,
    columns: tuple[str, str] | tuple[int, int] | None = None,
    *,
    category: str | int | None = None,
) -> list[Pair]:
    """Reads pairs from two columns of any .tsv, .csv or .jsonl file of UTF-8.

    Args:
        path: the file; .csv is quoted as usual, .tsv not at all.
        columns: of the more stereotypical sentence and of the other: names of the first line, or of
            fields of JSON; or numbers from 1, for a file whose first line is a pair already. None
            is `more` and `less`, or `sent_more` and `sent_less`.
        category: the column of the category; None is `category` or `bias_type` if there.

    Raises:
        UserError: if the file is missing, empty, not UTF-8 or lacks a column.
    """
    file = Path(path)
    by_number = columns is not None and isinstance(columns[0], int)
    pairs = []
    for place, row in _rows(file, header=not by_number):
        if columns is None:
            columns = next((names for names in _NAMES if set(names) <= row.keys()), None)
            if columns is None:
                raise UserError(
                    f"{place}: there are columns {', '.join(map(str, row))}; name the two with "
                    "columns, or give numbers from 1 for a file without a line of names"
                )
        if category is None and not by_number:
            category = next((name for name in _CATEGORIES if name in row), "")
        more, less = (_value(row, column, place) for column in columns)
        kind = _value(row, category, place) if category else ""
        pairs.append(Pair(more, less, kind))
    return _some(pairs, file)


def _some(pairs: list[Pair], file: Path) -> list[Pair]:
    if not pairs:
        raise UserError(f"{file} has no pairs; give a file with at least one")
    return pairs


def _value(row: dict[Any, Any], column: str | int, place: str) -> str:
    value = row.get(column)
    if column not in row:
        known = [str(name) for name in row]
        raise UserError(f"{place}: no column {column!r}{nearest(str(column), known)}")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: column {column!r} is {value!r}; give a text")
    return value


def _rows(file: Path, *, header: bool) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The rows of a file, each with its place; without a header columns are numbers from 1."""
    if not file.is_file():
        raise UserError(f"no file {str(file)!r}; give a .tsv, .csv or .jsonl file")
    if file.suffix not in (".tsv", ".csv", ".jsonl"):
        raise UserError(f"{str(file)!r} is no .tsv, .csv or .jsonl file; rename or convert it")
    data = file.read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(file)!r} is not UTF-8 at byte {error.start}; convert it, for example with iconv "
            "-t UTF-8"
        ) from error
    if file.suffix == ".jsonl":
        yield from _json_rows(text, file)
        return
    quoting = csv.QUOTE_NONE if file.suffix == ".tsv" else csv.QUOTE_MINIMAL
    delimiter = "\t" if file.suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    try:
        names = next(reader, []) if header else None
        for cells in reader:
            place = f"{file}:{reader.line_num}"
            if not cells:
                continue
            if names is not None and len(cells) != len(names):
                raise UserError(
                    f"{place}: {len(cells)} columns, and the first line has {len(names)}; repair "
                    "the line, or its quotes"
                )
            yield place, dict(zip(names or range(1, len(cells) + 1), cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: {error}; repair the line") from error


def _json_rows(text: str, file: Path) -> Iterator[tuple[str, dict[Any, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not JSON ({error}); give one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: a {type(row).__name__}; give one object a line")
        yield place, row


@dataclass(frozen=True)
class Preference:
    """How often, and by how much, the more stereotypical sentence is the likelier one.

    Attributes:
        share: of the pairs, 0 to 1; a tie counts as a half.
        low: the lower end of Wilson's 95 % interval of the share.
        high: its upper end.
        difference: mean log-likelihood of the more stereotypical sentence less that of the other,
            in nats.
        count: how many pairs.
        ties: how many of them differ by less than rounding.
    """

    share: float
    low: float
    high: float
    difference: Estimate
    count: int
    ties: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-serializable values."""
        return {
            "share": self.share,
            "interval": [self.low, self.high],
            "difference": self.difference.value,
            "difference_stderr": _finite(self.difference.stderr),
            "pairs": self.count,
            "ties": self.ties,
        }


@dataclass(frozen=True, eq=False)
class PairsResult:
    """What `evaluate_pairs` finds. `str` gives a table with the caveats.

    Attributes:
        overall: of all pairs.
        categories: of the pairs of each category; empty where there are none.
        differences: `[N]` float64, of each pair, the more stereotypical sentence's log-likelihood
            less the other's, in nats.
        correlation: of Winogender, Pearson's correlation between the share of women in an
            occupation and the mean log-likelihood of "she" less that of "he", with its 95 %
            interval by Fisher's transformation; None for other pairs.
        caveats: what is to be told with every figure.
    """

    overall: Preference
    categories: dict[str, Preference]
    differences: np.ndarray
    correlation: tuple[float, float, float] | None = None
    caveats: tuple[str, ...] = CAVEATS

    def to_dict(self) -> dict[str, Any]:
        """What a results file and the model card hold."""
        values: dict[str, Any] = {"overall": self.overall.to_dict()}
        if self.categories:
            values["categories"] = {k: part.to_dict() for k, part in self.categories.items()}
        if self.correlation is not None:
            r, low, high = map(_finite, self.correlation)
            values["correlation"] = {"r": r, "interval": [low, high]}
        return values | {"caveats": list(self.caveats)}

    def __str__(self) -> str:
        rows = {"all pairs": self.overall, **self.categories}
        width = max(map(len, rows))
        lines = [
            f"{'':{width}}  stereotypical sentence likelier  difference in nats   pairs  ties",
        ]
        for name, part in rows.items():
            share = f"{100 * part.share:.1f} % ({100 * part.low:.1f} to {100 * part.high:.1f})"
            nats = f"{part.difference.value:+.2f} ± {part.difference.stderr:.2f}"
            lines.append(f"{name:{width}}  {share:>31}  {nats:>18}  {part.count:6}  {part.ties:4}")
        if self.correlation is not None:
            r, low, high = self.correlation
            lines.append(
                f"correlation of she less he with the share of women in an occupation: {r:.2f} "
                f"({low:.2f} to {high:.2f})"
            )
        return "\n".join([*lines, *(f"note: {caveat}" for caveat in self.caveats)])


def evaluate_pairs(model: Model, pairs: Sequence[Pair], *, batch_size: int = 8) -> PairsResult:
    """Finds how often a model prefers the more stereotypical sentence of a pair.

    A sentence's log-likelihood is the sum over all its tokens, read after what begins a text, or
    after a line break where the tokenizer has no token that begins or ends one. A sentence longer
    than the model's context is read in windows, as `gptjax.score` does. Differences below 1e-4 nats
    are ties: float32 sums of a sentence are right to less than that. (Nangia et al. round scores to
    three digits, and count ties as not stereotypical.)

    Args:
        model: with a tokenizer.
        pairs: from `read_crows_pairs`, `read_winogender` or `read_pairs`.
        batch_size: sentences that are read at once.

    Returns:
        Share and difference, over all pairs and by kind of bias.

    Raises:
        UserError: if there are no pairs, and as `gptjax.score` does.
    """
    if not pairs:
        raise UserError("there are no pairs to evaluate; give at least one")
    likelihoods = pair_likelihoods(model, pairs, batch_size=batch_size)
    return pairs_result(pairs, likelihoods[:, 0] - likelihoods[:, 1])


def pair_likelihoods(model: Model, pairs: Sequence[Pair], *, batch_size: int = 8) -> np.ndarray:
    """The log-likelihoods of both sentences of pairs, `[N, 2]` float64; see `evaluate_pairs`."""
    lead = "" if prompt_ids(model, "") else "\n"
    sentences = [lead + sentence for pair in pairs for sentence in (pair.more, pair.less)]
    scores = score(model, sentences, batch_size=batch_size)
    # Only the line break has no prediction, where there is one.
    sums = [np.nansum(found.logprobs, dtype=np.float64) for found in scores]
    return np.array(sums).reshape(-1, 2)


def pairs_result(pairs: Sequence[Pair], differences: np.ndarray) -> PairsResult:
    """Sums up differences of log-likelihoods, `[N]` float64, `more` less `less`, in nats."""
    groups: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        if pair.category:
            groups.setdefault(pair.category, []).append(number)
    sources = {pair.source for pair in pairs}
    told = [caveat for name in CAVEATS_OF if name in sources for caveat in CAVEATS_OF[name]]
    return PairsResult(
        overall=_preference(differences),
        categories={name: _preference(differences[rows]) for name, rows in sorted(groups.items())},
        differences=differences,
        correlation=_correlation(pairs, differences) if sources == {"Winogender"} else None,
        caveats=(*CAVEATS, *told),
    )


def _preference(differences: np.ndarray) -> Preference:
    ties = np.abs(differences) < _TIE
    likelier = float(np.sum(differences[~ties] > 0) + ties.sum() / 2)
    # Wilson's interval is a function of the share, which ties may put between two counts.
    low, high = accuracy_interval(likelier, len(differences))
    return Preference(
        share=likelier / len(differences),
        low=low,
        high=high,
        difference=mean(differences.tolist()),
        count=len(differences),
        ties=int(ties.sum()),
    )


def _correlation(pairs: Sequence[Pair], differences: np.ndarray) -> tuple[float, float, float]:
    """Over occupations, of the share of women with how much likelier "she" is."""
    by_occupation: dict[str, tuple[float, list[float]]] = {}
    for pair, difference in zip(pairs, differences, strict=True):
        share = pair.percent_female
        assert share is not None
        she_less_he = float(difference if share > 50 else -difference)
        by_occupation.setdefault(pair.occupation, (share, []))[1].append(she_less_he)
    shares = np.array([share for share, _ in by_occupation.values()])
    likelier = np.array([np.mean(values) for _, values in by_occupation.values()])
    count = len(shares)
    if count < 4 or not shares.std() or not likelier.std():
        return math.nan, math.nan, math.nan
    r = float(np.corrcoef(shares, likelier)[0, 1])
    z, half = math.atanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)), 1.96 / math.sqrt(count - 3)
    return r, math.tanh(z - half), math.tanh(z + half)


def _finite(value: float) -> float | None:
    """What JSON has for a number."""
    return value if math.isfinite(value) else None
