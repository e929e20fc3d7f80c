"""What a tokenizer makes of each script: how many tokens a character, a byte and a word."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from gptjax.data.sources import read_documents
from gptjax.errors import UserError
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

# The names of a script's characters in Unicode begin with the script.
_SCRIPT = re.compile(
    "(?:FULLWIDTH |HALFWIDTH )?(ARABIC|ARMENIAN|BENGALI|CANADIAN|CHEROKEE|COPTIC|CYRILLIC|"
    "DEVANAGARI|ETHIOPIC|GEORGIAN|GREEK|GUJARATI|GURMUKHI|HANGUL|HEBREW|HIRAGANA|JAVANESE|KANNADA|"
    "KATAKANA|KHMER|LAO|LATIN|MALAYALAM|MONGOLIAN|MYANMAR|ORIYA|SINHALA|SYRIAC|TAMIL|TELUGU|"
    r"THAANA|THAI|TIBETAN|TIFINAGH|CJK|IDEOGRAPHIC)\b"
)
_NAMED_OTHERWISE = {"CJK": "HAN", "IDEOGRAPHIC": "HAN"}
_SPACELESS = {"HAN", "HIRAGANA", "KATAKANA", "KHMER", "LAO", "MYANMAR", "THAI", "TIBETAN"}
_BY_CATEGORY = {"N": "digits", "P": "punctuation", "S": "symbols", "Z": "space"}

_SPACELESS_CHARACTERS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)

# One line of this many is held out from what a vocabulary is trained on.
_HELD_OUT = 10


@dataclass(frozen=True)
class ScriptTokens:
    """What a tokenizer makes of the characters of one script, or of all.

    Attributes:
        characters: how many there are.
        bytes: of UTF-8.
        tokens: those of the characters' bytes; see `tokens_by_script`.
        words: of the script's letters; None for scripts that put no spaces between words, and for
            what is no script.
    """

    characters: int
    bytes: int
    tokens: float
    words: int | None

    @property
    def per_character(self) -> float:
        """Tokens a character."""
        return self.tokens / self.characters

    @property
    def per_byte(self) -> float:
        """Tokens a byte."""
        return self.tokens / self.bytes

    @property
    def per_word(self) -> float | None:
        """Tokens a word, not counting the spaces before it."""
        return self.tokens / self.words if self.words else None


@cache
def script_of(character: str) -> str:
    """The script of a letter or mark, such as "LATIN" or "HAN", by its name in Unicode.

    Of others what they are: "digits" (numbers of any script), "punctuation", "symbols" (emoji
    too), "space" or "other" (control characters, marks that belong to no script, letters of rare
    scripts).
    """
    category = unicodedata.category(character)
    if character in "\t\n\v\f\r\x85":
        return "space"
    if category[0] in _BY_CATEGORY:
        return _BY_CATEGORY[category[0]]
    if category[0] not in "LM":
        return "other"
    found = _SCRIPT.match(unicodedata.name(character, ""))
    return "other" if found is None else _NAMED_OTHERWISE.get(found[1], found[1])


def tokens_by_script(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, ScriptTokens]:
    """Counts characters, bytes, tokens and words of texts by script.

    Tokens are shared out by bytes: one of " the" counts as three quarters of a Latin token and a
    quarter of a space. Where tokens are parts of characters, the fewest of them that together spell
    whole characters are shared out together. So the parts sum up to the number of tokens. What a
    tokenizer changes (Llama 2 puts a space first, some normalize) is counted as it decodes it.

    Args:
        tokenizer: encodes each text by itself.
        texts: read once.

    Returns:
        Script (see `script_of`) -> what there is of it, most characters first; at the end "all".

    Raises:
        UserError: if the texts are empty, or a text cannot be encoded.
    """
    characters: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    words: Counter[str] = Counter()
    groups: Counter[tuple[str, int]] = Counter()
    for text in texts:
        groups.update(_groups(tokenizer, text))
        found = (word[0][0] for word in word_pattern().finditer(text))
        words.update(script_of(first) for first in found if first.isalpha())
    tokens: dict[str, float] = defaultdict(float)
    for (spelled, count), times in groups.items():
        size = len(spelled.encode("utf-8"))
        for character in spelled:
            script, part = script_of(character), len(character.encode("utf-8"))
            characters[script] += times
            sizes[script] += times * part
            tokens[script] += times * count * part / size
    if not characters:
        raise UserError("the texts are empty; give some text")
    for script in _SPACELESS:
        del words[script]
    table = {
        script: ScriptTokens(count, sizes[script], tokens[script], words.get(script))
        for script, count in characters.most_common()
    }
    total = sum(count * times for (_, count), times in groups.items())
    table["all"] = ScriptTokens(characters.total(), sizes.total(), total, None)
    return table


def _groups(tokenizer: Tokenizer, text: str) -> Iterator[tuple[str, int]]:
    """Whole characters, and how many tokens spell them."""
    decoder = StreamDecoder(tokenizer)
    spelled, count, waiting = "", 0, 0
    for i in tokenizer.encode(text):
        waiting += 1
        if piece := decoder.push(i):
            if spelled:
                yield spelled, count
            spelled, count, waiting = piece, waiting, 0
    # Tokens at the end that spell nothing go with what was last.
    spelled += decoder.finish()
    if spelled:
        yield spelled, count + waiting


@cache
def word_pattern() -> re.Pattern[str]:
    """Matches words of letters, digits and marks, in any language, and apostrophes inside them.

    In scripts that put no spaces between words (Han, kana, Thai, Lao, Tibetan, Burmese, Khmer) each
    character is a word.
    """
    # Vowel signs and other marks are no letters to `re`, but do not end a word either.
    codes = range(0x300, 0x1F000)
    marks = "".join(chr(c) for c in codes if unicodedata.category(chr(c)).startswith("M"))
    letters = f"[^\\W_{_SPACELESS_CHARACTERS}]"
    return re.compile(
        f"[{_SPACELESS_CHARACTERS}]|{letters}+(?:[{marks}]+{letters}*|['’]{letters}+)*"
    )


def compare_tokenizers(
    source: str | Path | Iterable[str],
    tokenizers: Sequence[str | Path | Tokenizer],
    *,
    bpe_vocab_size: int = 4096,
    columns: Sequence[int] = (),
    text_key: str = "text",
) -> dict[str, dict[str, ScriptTokens]]:
    """Counts tokens by script for several tokenizers, on lines that none was trained on here.

    Every tenth line is counted, and "bpe" is trained on the others, so that it has no advantage.

    Args:
        source: as in `read_documents`, or texts; its lines are held in memory.
        tokenizers: "bytes"; "bpe", trained here; folders with tokenizer.json, or vocab.json and
            merges.txt; run folders; or tokenizers.
        bpe_vocab_size: how many tokens "bpe" learns.
        columns: of lines with tabs, the parts to take, from 1; empty is the whole line.
        text_key: the field of a record that holds its text.

    Returns:
        Tokenizer, by its name and size of vocabulary -> what `tokens_by_script` gives.

    Raises:
        UserError: if the source has fewer than ten lines, or lines without such columns; if it or a
            tokenizer cannot be read.
    """
    if isinstance(source, str | Path):
        documents, name = read_documents(source, text_key=text_key), repr(str(source))
    else:
        documents, name = source, "the text"
    lines = [
        _take(line, columns) for text in documents for line in text.splitlines(True) if line.strip()
    ]
    counted = lines[_HELD_OUT - 1 :: _HELD_OUT]
    if not counted:
        raise UserError(f"{name} has {len(lines)} lines; give at least {_HELD_OUT}")
    results = {}
    for given in tokenizers:
        if given == "bpe":
            trained = (line for number, line in enumerate(lines, 1) if number % _HELD_OUT)
            tokenizer: Tokenizer = BPETokenizer.train(trained, bpe_vocab_size)
        elif isinstance(given, str | Path):
            tokenizer = _named_tokenizer(given)
        else:
            tokenizer = given
        name = Path(given).name if isinstance(given, str | Path) else type(given).__name__
        label = f"{name} ({tokenizer.vocab_size})"
        if label in results:
            label = f"{given} ({tokenizer.vocab_size})"
        results[label] = tokens_by_script(tokenizer, counted)
    return results


def _take(line: str, columns: Sequence[int]) -> str:
    cells = line.rstrip("\r\n").split("\t")
    if any(not 1 <= column <= len(cells) for column in columns):
        raise UserError(
            f"a line has {len(cells)} columns, and columns {', '.join(map(str, columns))} are "
            f"asked for: {line[:60]!r}"
        )
    return "\t".join(cells[column - 1] for column in columns) + "\n" if columns else line


def _named_tokenizer(name: str | Path) -> Tokenizer:
    from gptjax.checkpoint import read_metadata
    from gptjax.pretrained.tokenizer_files import read_tokenizer
    from gptjax.tokenizer import tokenizer_from_dict

    if name == "bytes":
        return ByteTokenizer()
    found = None
    if (Path(name) / "checkpoints").is_dir():
        stored = read_metadata(name)["tokenizer"]
        found = None if stored is None else tokenizer_from_dict(stored)
    elif Path(name).is_dir():
        found = read_tokenizer(name)
    if found is None:
        raise UserError(
            f"no tokenizer {str(name)!r}; give bytes, bpe, a folder with tokenizer.json or with "
            "vocab.json and merges.txt, or a run folder"
        )
    return found


def print_scripts(
    results: Mapping[str, Mapping[str, ScriptTokens]], console: "Console | None" = None
) -> None:
    """Prints what tokenizers make of each script, as a table.

    Args:
        results: as `compare_tokenizers` gives them.
        console: where to; None is standard output.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("script", "tokenizer", box=None)
    for name in ("characters", "tokens", "a character", "a byte", "a word"):
        table.add_column(name, justify="right")
    scripts = dict.fromkeys(script for result in results.values() for script in result)
    for script in sorted(scripts, key=lambda script: script == "all"):
        shown = script
        for name, result in results.items():
            if script not in result:
                continue
            part = result[script]
            word = "" if part.per_word is None else f"{part.per_word:.2f}"
            rates = (f"{part.per_character:.3f}", f"{part.per_byte:.3f}", word)
            table.add_row(shown, name, f"{part.characters}", f"{part.tokens:.0f}", *rates)
            shown = ""
    (Console(highlight=False) if console is None else console).print(table)
