"""Tokenizers: round trips, GPT-2's ids against an independent reference, training, storage."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gptjax.tokenizer as module
from gptjax.errors import UserError
from gptjax.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    encode_documents,
    tokenizer_from_dict,
)

ROOT = Path(__file__).resolve().parents[1]
GPT2 = ROOT.parent / "shared" / "assets" / "tokenizers" / "gpt2"
needs_gpt2 = pytest.mark.skipif(
    not GPT2.is_dir(), reason="GPT-2's tokenizer files are not in ../shared/assets/tokenizers/gpt2"
)

# What breaks tokenizers: newlines of every kind, BOM, NUL, joined emoji, marks, special tokens.
FRAGMENTS = [
    *"aZ é7.,'\"\n\t\r_-<|",
    *["\r\n", "\ufeff", "\x00", "  ", "   \n", "\u00a0", "\u0085", "\u3000", "e\u0301", "n\u0303"],
    *["👩‍👩‍👧", "🙂", "🇫🇷", "中文", "日本語", "한국", "عربي", "א", "½", "²", "٣", "\U0010ffff"],
    *["<|endoftext|>", "'s", "'ll", "'T", "hello", " world", "123456", "the ", " the"],
]


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train(["the cat sat on the mat. The hat, the bat!\n"] * 3, 300)


def fuzzed(rng: np.random.Generator, length: int = 40) -> str:
    return "".join(rng.choice(np.array(FRAGMENTS, object), size=rng.integers(length + 1)))


def bpe_reference(vocab: dict[str, int], merges: list[str]):
    """An independent byte-level BPE: the paper's greedy merging, one word at a time."""
    regex = pytest.importorskip("regex")
    # \s spelled out, for Python's also takes U+001C to U+001F.
    space = r"\p{White_Space}"
    pattern = regex.compile(
        rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?\p{{N}}+| ?[^{space}\p{{L}}\p{{N}}]+"
        rf"|[{space}]+(?![^{space}])|[{space}]+"
    )
    visible = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    letters = {b: chr(b) for b in visible}
    for b in range(256):
        if b not in letters:
            letters[b] = chr(256 + len(letters) - len(visible))
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(merges)}

    def encode(text: str) -> list[int]:
        ids = []
        for word in pattern.findall(text):
            parts = [letters[b] for b in word.encode()]
            while len(parts) > 1:
                best = min(
                    range(len(parts) - 1),
                    key=lambda i: ranks.get((parts[i], parts[i + 1]), len(ranks)),
                )
                if (parts[best], parts[best + 1]) not in ranks:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            ids += [vocab[part] for part in parts]
        return ids

    return encode


@needs_gpt2
def test_gpt2_known_ids() -> None:
    for tokenizer in (
        BPETokenizer.from_files(GPT2 / "vocab.json", GPT2 / "merges.txt"),
        BPETokenizer.from_directory(GPT2),
    ):
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
        assert tokenizer.encode("Hello world") == [15496, 995]
        assert tokenizer.encode("hello  world\n") == [31373, 220, 995, 198]
        assert tokenizer.encode("") == []
        assert tokenizer.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"
        # tiktoken's encode_ordinary of the special token's spelling.
        assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]


@needs_gpt2
def test_gpt2_equals_independent_bpe(rng: np.random.Generator) -> None:
    vocab = json.loads((GPT2 / "vocab.json").read_text(encoding="utf-8"))
    lines = (GPT2 / "merges.txt").read_text(encoding="utf-8").splitlines()
    reference = bpe_reference(vocab, lines[1:])
    tokenizer = BPETokenizer.from_files(GPT2 / "vocab.json", GPT2 / "merges.txt")
    for _ in range(300):
        text = fuzzed(rng)
        assert tokenizer.encode(text) == reference(text), repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_gpt2
def test_gpt2_files_in_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((GPT2 / name).read_bytes())
    tokenizer = BPETokenizer.from_directory(tmp_path)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.eos_id == 50256
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "Hello"}}')
    assert BPETokenizer.from_directory(tmp_path).eos_id == 15496


def test_every_tokenizer_round_trips(rng: np.random.Generator, trained: BPETokenizer) -> None:
    texts = [fuzzed(rng) for _ in range(200)]
    characters = CharTokenizer.from_text(texts)
    for tokenizer in (characters, ByteTokenizer(), trained):
        assert isinstance(tokenizer, Tokenizer)
        saved = json.loads(json.dumps(tokenizer.to_dict()))
        again = tokenizer_from_dict(saved)
        assert type(again) is type(tokenizer)
        assert again.to_dict() == tokenizer.to_dict()
        assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        for text in texts:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode(np.array(ids, np.int32)) == text
            assert again.encode(text) == ids
            assert again.decode(ids) == text
            assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
            assert tokenizer.eos_id is None or tokenizer.eos_id not in ids


def test_characters() -> None:
    tokenizer = CharTokenizer.from_text("banana\n")
    assert tokenizer.alphabet == "\nabn"
    assert tokenizer.encode("nab\n") == [3, 1, 2, 0]
    assert CharTokenizer.from_text(["ba", "nana\n"]) == tokenizer
    assert tokenizer.eos_id is None
    for text, place in (
        ("abz", "'z' (U+007A) at position 2"),
        ("ab😀b", "(U+1F600) at position 2"),
    ):
        with pytest.raises(UserError) as error:
            tokenizer.encode(text)
        assert place in str(error.value)
    with pytest.raises(UserError, match="empty"):
        CharTokenizer("")
    with pytest.raises(UserError, match="'a' twice"):
        CharTokenizer("aba")


def test_bytes_never_fail_to_decode(rng: np.random.Generator) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    for _ in range(100):
        ids = rng.integers(0, 257, size=50)
        plain = bytes(ids[ids < 256].tolist())
        assert tokenizer.decode(ids) == plain.decode("utf-8", "replace")
    assert tokenizer.decode([104, 105, 256]) == "hi"


def test_bpe_broken_utf8_becomes_replacement(trained: BPETokenizer) -> None:
    ids = trained.encode("🙂")
    assert len(ids) == 4
    assert trained.decode(ids[:2]) == "\ufffd"


def test_ids_outside_the_vocabulary(trained: BPETokenizer) -> None:
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer(), trained):
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(UserError, match=f"id {wrong} at position 1"):
                tokenizer.decode([0, wrong])


def test_training_learns_and_is_deterministic(trained: BPETokenizer) -> None:
    text = ["the cat sat on the mat. The hat, the bat!\n"] * 3
    assert trained.eos_id == 0
    assert 257 < trained.vocab_size <= 300
    assert trained.to_dict() == BPETokenizer.train(text, 300).to_dict()
    assert len(trained.encode(" the")) == 1
    assert BPETokenizer.train(["ab" * 50], 257).vocab_size == 257
    code = (
        "import sys, json, hashlib; from gptjax.tokenizer import BPETokenizer;"
        "t = BPETokenizer.train(json.loads(sys.argv[1]), 300);"
        "print(hashlib.sha256(t.to_dict()['json'].encode()).hexdigest())"
    )
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(text)],
            env={**environment, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    here = hashlib.sha256(trained.to_dict()["json"].encode()).hexdigest()
    assert digests == {here.encode() + b"\n"}
    with pytest.raises(UserError, match="257"):
        BPETokenizer.train(["abc"], 256)


def test_training_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the cat sat on the mat, again and again; 12 cats  sat\n\n there. " * 40
    whole = BPETokenizer.train([text], 320).to_dict()
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 30)
    assert BPETokenizer.train([text], 320).to_dict() == whole


def test_encode_documents_is_encode_joined(
    rng: np.random.Generator, trained: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small enough that documents are cut, and batches end inside documents.
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 20)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 90)
    tokenizers = [trained, ByteTokenizer()]
    if GPT2.is_dir():
        tokenizers.append(BPETokenizer.from_directory(GPT2))
    for count in (0, 1, 2, 3, 30):
        documents = [fuzzed(rng, 120) for _ in range(count)]
        characters = CharTokenizer.from_text([*documents, "x"])
        for tokenizer in (*tokenizers, characters):
            tail = [tokenizer.eos_id] if count > 1 and tokenizer.eos_id is not None else []
            expected = [i for text in documents for i in tokenizer.encode(text) + tail]
            tokens = encode_documents(tokenizer, iter(documents))
            assert tokens.dtype == np.uint16
            assert tokens.ndim == 1
            assert tokens.tolist() == expected


def test_pieces_are_only_used_where_they_are_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers

    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 3)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(["abc def " * 9], trainer)
    tokenizer = BPETokenizer(library, eos_token=None)
    assert tokenizer.eos_id is None
    text = "abc def " * 3
    assert encode_documents(tokenizer, [text]).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_dtype_holds_the_vocabulary(vocab_size: int, dtype: type) -> None:
    class Wide:
        eos_id = vocab_size - 1

        def __init__(self) -> None:
            self.vocab_size = vocab_size

        def encode(self, text: str) -> list[int]:
            return [ord(c) for c in text]

        def decode(self, ids) -> str:
            return "".join(map(chr, ids))

        def to_dict(self) -> dict:
            return {}

    tokens = encode_documents(Wide(), ["ab", "", "c"])
    assert tokens.dtype == dtype
    end = vocab_size - 1
    assert tokens.tolist() == [97, 98, end, end, 99, end]


def test_truncation_in_a_file_is_not_obeyed(tmp_path: Path, trained: BPETokenizer) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_str(trained.to_dict()["json"])
    library.enable_truncation(3)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = BPETokenizer.from_directory(tmp_path)
    text = "the quick brown fox <|endoftext|>"
    assert tokenizer.encode(text) == trained.encode(text)
    assert tokenizer.eos_id == trained.eos_id


def test_files_that_are_missing_or_broken(tmp_path: Path, trained: BPETokenizer) -> None:
    import tokenizers

    with pytest.raises(UserError, match=r"needs tokenizer\.json, or vocab\.json"):
        BPETokenizer.from_directory(tmp_path)
    with pytest.raises(UserError, match="no tokenizer file"):
        BPETokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(UserError, match="cannot read"):
        BPETokenizer.from_directory(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert BPETokenizer.from_directory(tmp_path).eos_id is None
    (tmp_path / "tokenizer.json").write_text("<html>")
    with pytest.raises(UserError, match="cannot read"):
        BPETokenizer.from_directory(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(UserError, match="model is WordLevel"):
        BPETokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(trained.to_dict()["json"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="'</s>' is not among"):
        BPETokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        BPETokenizer.from_directory(tmp_path)


def test_dicts_that_are_no_tokenizer() -> None:
    with pytest.raises(UserError, match="did you mean 'characters'"):
        tokenizer_from_dict({"kind": "character"})
    with pytest.raises(UserError, match="lacks 'alphabet'"):
        tokenizer_from_dict({"kind": "characters"})
