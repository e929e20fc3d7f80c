"""The Chinese example, small; and that README.zh.md says only what can be run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from commands import Command
from test_docs import check_flags

from gptjax import cli
from gptjax.data.languages import compare_tokenizers
from gptjax.errors import UserError
from gptjax.pretrained.loading import load

ROOT = Path(__file__).parents[1]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")
CHARACTERS = "我你他她们是不在有人这个大来上国到说时要就出会可也好学生天气书读写"
WORDS = ["I", "you", "they", "are", "not", "here", "people", "this", "big", "come", "say", "want"]
TINY = (
    *("--steps", "3", "--batch-size", "2", "--eval-items", "4", "--few-shot", "0", "--show", "2"),
    *("--scratch.num-layers", "1", "--scratch.embed-dim", "16", "--scratch.num-heads", "2"),
    *("--bpe-vocab-size", "300", "--eval-batch-size", "4", "--validation-items", "2"),
    *("--context-length", "96", "--optimizer.name", "adamw"),
)


def sentence(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(CHARACTERS), rng.integers(3, 9))) + "。"


@pytest.fixture
def pairs(tmp_path: Path, rng: np.random.Generator) -> Path:
    """English, a tab, Chinese, a tab and where it is from, as on manythings.org."""
    path = tmp_path / "cmn.txt"
    lines = [
        f"{' '.join(rng.choice(WORDS, rng.integers(1, 5)))}.\t{sentence(rng)}\tCC-BY"
        for _ in range(60)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_example(pairs: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "run"
    status, shown, error = command("chinese", "--data", pairs, "--out", out, *TINY)
    assert status == 0, error
    # The table counts every tenth of the Chinese sentences, and nothing else.
    rows = [pair.split("\t")[1] for pair in pairs.read_text(encoding="utf-8").splitlines()]
    counted = list(dict.fromkeys(rows))[9::10]
    characters = sum(character in CHARACTERS for line in counted for character in line)
    bytes_row = re.search(r"HAN .*?bytes \(257\) +(\d+) +(\d+) +3\.000 +1\.000", shown, re.S)
    assert bytes_row, shown
    assert [int(part) for part in bytes_row.groups()] == [characters, 3 * characters]
    assert "LATIN" not in shown.partition("training items")[0]
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(results["results"]["fine-tuned"]) == {"loss", "BLEU", "chrF"}
    model = load(out)
    assert model.tokenizer is not None
    assert model.config.vocab_size == model.tokenizer.vocab_size == 300
    # The prompts are of the form that README.zh.md has one generate by.
    items = [json.loads(line) for line in (out / "items.jsonl").read_text("utf-8").splitlines()]
    assert all(re.fullmatch(r"Chinese: .+\nEnglish:", item["prompt"]) for item in items)


def test_the_table_of_another_text(
    pairs: Path, tmp_path: Path, rng: np.random.Generator, command: Command
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ΑΒΓΔ αβγδ ελληνικά\n" * 3 + "\n".join(f"λόγος {n}" for n in range(40)))
    flags = ("--data", pairs, "--out", tmp_path / "run", "--text", text, "--compare", "bytes")
    _, shown, _ = command("chinese", *flags, *TINY, "--show", "-1")
    assert "GREEK" in shown
    assert "HAN" not in shown


def test_texts_themselves_are_counted_as_a_file_is(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    lines = [sentence(rng) for _ in range(50)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    options = {"tokenizers": ("bpe", "bytes"), "bpe_vocab_size": 270}
    # A file's lines end: their characters are those of the texts, and the ends.
    one, other = (
        compare_tokenizers(source, **options) for source in (tmp_path / "text.txt", lines)
    )
    for name in ("HAN", "punctuation"):
        assert one["bytes (257)"][name] == other["bytes (257)"][name]
    with pytest.raises(UserError, match="the text has 9 lines; give at least 10"):
        compare_tokenizers(lines[:9], ("bytes",))


# README.zh.md


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_the_two_commands_are_those_of_the_readme() -> None:
    ours = [block for block in blocks(CHINESE, "bash") if "venv" in block]
    assert ours == [block for block in blocks(ENGLISH, "bash") if "venv" in block]
    assert len(ours) == 2


def test_python_is_that_of_the_readme() -> None:
    """Which tests/test_readme.py runs."""
    ours = blocks(CHINESE, "python")
    assert ours
    assert set(ours) <= set(blocks(ENGLISH, "python"))


def test_commands_exist_with_their_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        *(line for block in blocks(CHINESE, "bash") for line in block.splitlines()),
        *re.findall(r"`((?:gptjax|python experiments/)[^`]*)`", CHINESE),
    ]
    checked = 0
    for line in lines:
        words = [word.strip("\"'") for word in re.findall(r"\$?'[^']*'|\"[^\"]*\"|\S+", line)]
        if words[0] == "gptjax":
            assert words[1] in cli.COMMANDS, line
            if words[2:]:
                check_flags("gptjax", words[1:], monkeypatch)
        elif words[0] == "python" and words[1].startswith("experiments/"):
            assert (ROOT / words[1]).is_file(), line
            check_flags(Path(words[1]).stem, words[2:], monkeypatch)
        else:
            continue
        checked += 1
    assert checked > 8


def test_what_it_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", CHINESE):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`(gptjax/[\w/.]+|experiments/[\w/.]+|tests/[\w/.]+)`", CHINESE):
        assert (ROOT / name).exists(), name


def test_figures_are_those_of_the_readme_or_of_the_example() -> None:
    """A figure with a decimal point stands in the English one too, or beside its command."""
    example = CHINESE[CHINESE.index("experiments/chinese.py") :].partition("\n## ")[0]
    for figure in re.findall(
        r"(?<![\w.])\d+\.\d+(?![\w.]*\.)", CHINESE.replace(example, "").replace("Qwen2.5-0.5B", "")
    ):
        assert figure in ENGLISH or figure in ("3.11",), figure
