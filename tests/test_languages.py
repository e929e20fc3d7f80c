"""Tokens shared out by script against bytes counted one by one; every token is in the sum."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from commands import Command
from small_models import GPT2
from small_tokenizers import GPT2 as GPT2_FILES
from small_tokenizers import WITHOUT_GPT2, chat_like, fuzzed, llama_like, random_unicode

from gptjax.checkpoint import CheckpointManager
from gptjax.data.languages import compare_tokenizers, script_of, tokens_by_script, word_pattern
from gptjax.errors import UserError
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

TATOEBA = Path(__file__).resolve().parents[2] / "shared/assets/tasks/tatoeba-cmn-eng/cmn.txt"


def test_scripts() -> None:
    scripts = {
        "LATIN": "aZéßŁﬁＡ",
        "HAN": "中々龘𠀀",
        "HIRAGANA": "あん",
        "KATAKANA": "カｶー",
        "HANGUL": "한ㄱ",
        "CYRILLIC": "Жя",
        "ARABIC": "عم\u064b",
        "DEVANAGARI": "हि\u094d",
        "GREEK": "Ωά",
        "THAI": "กั",
        "digits": "07٣½²Ⅻ",
        "punctuation": ".,!?«—“。、",
        "symbols": "+$🙂€",
        "space": " \t\n\r\u00a0\u3000\u2028",
        "other": "\x00\u0301\ufeffª𐀀\U0010ffff",
    }
    for script, characters in scripts.items():
        assert {script_of(character) for character in characters} == {script}, script


def test_every_token_is_in_the_sum(rng: np.random.Generator) -> None:
    texts = [fuzzed(rng, 60) for _ in range(8)] + ["", random_unicode(rng), "the cat 日本 é"]
    letters = CharTokenizer("".join(sorted(set("".join(texts)))))
    every: list[Tokenizer] = [chat_like(), llama_like(), ByteTokenizer(), letters]
    for tokenizer in every:
        table = tokens_by_script(tokenizer, texts)
        total = table.pop("all")
        assert total.tokens == sum(len(tokenizer.encode(text)) for text in texts)
        assert sum(part.tokens for part in table.values()) == pytest.approx(total.tokens)
        assert sum(part.characters for part in table.values()) == total.characters
        assert sum(part.bytes for part in table.values()) == total.bytes
        if tokenizer is not every[1]:
            # Llama's decoder drops a first space.
            assert total.characters == sum(map(len, texts))
            assert total.bytes == sum(len(text.encode()) for text in texts)
        counts = [part.characters for part in table.values()]
        assert counts == sorted(counts, reverse=True)


def test_bytes_and_characters(rng: np.random.Generator) -> None:
    """One token a byte, or one a character, in every script."""
    texts = [fuzzed(rng, 60) + "a1 .é中+" for _ in range(4)]
    for part in tokens_by_script(ByteTokenizer(), texts).values():
        assert part.per_byte == pytest.approx(1)
    letters = CharTokenizer("".join(sorted(set("".join(texts)))))
    for part in tokens_by_script(letters, texts).values():
        assert part.per_character == pytest.approx(1)


def expected_shares(text: str, cuts: list[int]) -> dict[str, float]:
    """Groups of tokens that end together with characters, shared out by bytes."""
    data = text.encode()
    starts = {len(text[:i].encode()) for i in range(len(text) + 1)}
    shares: dict[str, float] = defaultdict(float)
    held, begin = 0, 0
    for end in [*cuts, len(data)]:
        held += 1
        # The last character that is complete.
        whole = max(start for start in starts if start <= end)
        if whole > begin:
            part = data[begin:whole].decode()
            for character in part:
                size = len(character.encode())
                shares[script_of(character)] += held * size / (whole - begin)
            held, begin = 0, whole
    return shares


def test_parts_of_characters_are_shared_out_by_bytes(rng: np.random.Generator) -> None:
    """Against groups found from the bytes of a byte-level vocabulary's own tokens."""
    text = "中文 text, 한국 ελ 12é🙂 " * 3
    tokenizer = BPETokenizer.train([text], 290)
    for _ in range(5):
        words = rng.permutation(text.split(" "))
        sample = " ".join(words)
        ids = tokenizer.encode(sample)
        ends = np.cumsum([len(tokenizer._bytes_of(i, False)) for i in ids]).tolist()
        assert ends[-1] == len(sample.encode())
        shares = expected_shares(sample, ends[:-1])
        table = tokens_by_script(tokenizer, [sample])
        assert {script: part.tokens for script, part in table.items() if script != "all"} == (
            pytest.approx(shares)
        )


class Padding:
    """One token a letter, and two that spell nothing before and after a text."""

    vocab_size = 3
    eos_id = bos_id = None

    def encode(self, text: str) -> list[int]:
        return [0, 0, *("12".index(letter) + 1 for letter in text), 0, 0]

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        return "".join(["", "a", "-"][i] for i in ids)

    def to_dict(self) -> dict[str, object]:
        return {}


def test_tokens_that_spell_nothing_count() -> None:
    """With the characters after them, or at the end with those before."""
    table = tokens_by_script(Padding(), ["1221"])
    assert table["LATIN"].tokens == 1 + 2 + 1 + 2
    assert table["punctuation"].tokens == 2
    assert table["all"].tokens == 8


def test_words() -> None:
    texts = ["Don't stop, naïve Ελλάδα हिन्दी में 3 x2 中文字 中"]
    table = tokens_by_script(ByteTokenizer(), texts)
    counts = {script: part.words for script, part in table.items()}
    assert counts["LATIN"] == 4
    assert counts["GREEK"] == 1
    assert counts["DEVANAGARI"] == 2
    assert counts["HAN"] is None
    assert counts["digits"] is None
    assert table["GREEK"].per_word == 12
    assert table["HAN"].per_word is None
    assert [m[0] for m in word_pattern().finditer("a’b c- 'd e\u0301f 日本go")] == [
        *("a’b", "c", "d", "e\u0301f", "日", "本", "go")
    ]


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        tokens_by_script(ByteTokenizer(), ["", ""])
    text = tmp_path / "text.txt"
    text.write_text("a\tb\n" * 9)
    with pytest.raises(UserError, match="has 9 lines"):
        compare_tokenizers(text, ["bytes"])
    text.write_text("a\tb\n" * 10)
    with pytest.raises(UserError, match="a line has 2 columns, and columns 1, 3"):
        compare_tokenizers(text, ["bytes"], columns=(1, 3))
    for name in ("byte", tmp_path):
        with pytest.raises(UserError, match="no tokenizer"):
            compare_tokenizers(text, [name])


def test_compared_on_what_was_not_trained_on(
    tmp_path: Path, rng: np.random.Generator, command: Command
) -> None:
    lines = [f"line {n} of words\tzeile {n}\n" for n in range(1, 41)]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines))
    found = compare_tokenizers(text, ["bpe", "bytes"], bpe_vocab_size=300, columns=(2,))
    counted = [f"zeile {n}\n" for n in (10, 20, 30, 40)]
    trained = [f"zeile {n}\n" for n in range(1, 41) if n % 10]
    own = BPETokenizer.train(trained, 300)
    assert found == {
        f"bpe ({own.vocab_size})": tokens_by_script(own, counted),
        "bytes (257)": tokens_by_script(ByteTokenizer(), counted),
    }
    # A run folder has its tokenizer in its checkpoints.
    with CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        metadata = {"model": GPT2.to_dict(), "tokenizer": own.to_dict()}
        manager.save(1, {"params": {"x": np.zeros(2)}}, metadata)
    flags = ("--tokenizer", tmp_path / "run", "bytes", "--columns", 2)
    status, printed, error = command("gptjax", "languages", text, *flags)
    assert (status, error) == (0, "")
    assert f"run ({own.vocab_size})" in printed
    assert "bytes (257)" in printed
    row = next(line.split() for line in printed.splitlines() if line.split()[:1] == ["LATIN"])
    part = tokens_by_script(own, counted)["LATIN"]
    assert row[3:] == [
        f"{part.characters}",
        f"{part.tokens:.0f}",
        f"{part.per_character:.3f}",
        f"{part.per_byte:.3f}",
        f"{part.per_word:.2f}",
    ]


@pytest.mark.skipif(not TATOEBA.exists(), reason="Tatoeba's pairs are not in ../shared/assets")
@pytest.mark.skipif(not GPT2_FILES.is_dir(), reason=WITHOUT_GPT2)
def test_chinese_and_english() -> None:
    """A small vocabulary of the text itself needs far fewer tokens for Chinese than GPT-2's."""
    found = compare_tokenizers(TATOEBA, [GPT2_FILES, "bpe"], bpe_vocab_size=2048, columns=(1, 2))
    gpt2, own = found.values()
    assert gpt2["HAN"].per_character > 2
    assert own["HAN"].per_character < 1.1
    assert own["LATIN"].per_character < 1.6 * gpt2["LATIN"].per_character
    assert own["all"].tokens < 0.8 * gpt2["all"].tokens
