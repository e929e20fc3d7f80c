"""Tokenizers: round trips, GPT-2's ids against an independent reference, training, storage."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import (
    GPT2,
    WITHOUT_GPT2,
    chat_like,
    fuzzed,
    llama_like,
    random_unicode,
)

import gptjax.tokenizer as module
from gptjax.errors import UserError
from gptjax.pretrained.tokenizer_files import read_tokenizer
from gptjax.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    Tokenizer,
    encode_prompt,
    tokenizer_from_dict,
)

ROOT = Path(__file__).resolve().parents[1]
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason=WITHOUT_GPT2)


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train(["the cat sat on the mat. The hat, the bat!\n"] * 3, 300)


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
        read_tokenizer(GPT2),
    ):
        assert tokenizer is not None
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
def test_gpt2_equals_tiktoken(rng: np.random.Generator) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    vocab = json.loads((GPT2 / "vocab.json").read_text(encoding="utf-8"))
    byte_of = {letter: byte for byte, letter in enumerate(module.byte_letters())}
    ranks = {bytes(map(byte_of.__getitem__, t)): i for t, i in vocab.items() if i != 50256}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    tokenizer = read_tokenizer(GPT2)
    assert tokenizer is not None
    for number in range(10_000):
        text = fuzzed(rng, 25) if number % 2 else random_unicode(rng)
        ids = encoding.encode_ordinary(text)
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == encoding.decode(ids) == text


def test_every_tokenizer_round_trips(rng: np.random.Generator, trained: BPETokenizer) -> None:
    texts = [fuzzed(rng) for _ in range(200)]
    characters = CharTokenizer.from_text(texts)
    for tokenizer in (characters, ByteTokenizer(), trained, chat_like()):
        assert isinstance(tokenizer, Tokenizer)
        saved = json.loads(json.dumps(tokenizer.to_dict()))
        again = tokenizer_from_dict(saved)
        assert type(again) is type(tokenizer)
        assert again.to_dict() == tokenizer.to_dict()
        for name in ("vocab_size", "eos_id", "bos_id"):
            assert getattr(again, name) == getattr(tokenizer, name)
        for text in texts:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode(ids, skip_special=True) == text
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


def test_dicts_that_are_no_tokenizer() -> None:
    with pytest.raises(UserError, match="did you mean 'characters'"):
        tokenizer_from_dict({"kind": "character"})
    with pytest.raises(UserError, match="lacks 'alphabet'"):
        tokenizer_from_dict({"kind": "characters"})


def test_what_is_stored(trained: BPETokenizer) -> None:
    # Stored forms from before there were other keys are equal to today's.
    old = {"kind": "bpe", "json": trained.to_dict()["json"], "eos_token": "<|endoftext|>"}
    again = tokenizer_from_dict(old)
    assert isinstance(again, BPETokenizer)
    assert again.to_dict() == trained.to_dict() == old
    assert (again.bos_token, again.bos_id, again.chat_template) == (None, None, None)
    full = llama_like()
    full.chat_template = "{{ messages }}"
    again = tokenizer_from_dict(json.loads(json.dumps(full.to_dict())))
    assert isinstance(again, BPETokenizer)
    assert (again.bos_token, again.bos_id, again.eos_id) == ("<s>", 1, 2)
    assert again.chat_template == "{{ messages }}"
    assert again.encode_prompt("the") == full.encode_prompt("the")


def test_pickling_keeps_special_tokens_unparsed(trained: BPETokenizer) -> None:
    again = pickle.loads(pickle.dumps(trained))
    assert again.encode("a<|endoftext|>") == trained.encode("a<|endoftext|>")
    assert again.to_dict() == trained.to_dict()


@pytest.mark.parametrize("metaspace", [False, True])
def test_llama_like_round_trips(metaspace: bool, rng: np.random.Generator) -> None:
    tokenizer = llama_like(metaspace=metaspace)
    assert len(tokenizer.encode("the the")) == 2
    for _ in range(200):
        # The sign of a space and, in newer files, a space that begins a text are lost by design.
        text = fuzzed(rng).lstrip(" ")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids)


def test_prompts_begin_as_the_model_expects(trained: BPETokenizer) -> None:
    import tokenizers

    for plain in (trained, ByteTokenizer(), CharTokenizer("ab ")):
        assert encode_prompt(plain, "ab") == plain.encode("ab")
    llama = llama_like()
    assert encode_prompt(llama, "the </s>") == [1, *llama.encode("the </s>")]
    assert encode_prompt(llama, "") == [1]
    library = tokenizers.Tokenizer.from_str(llama.to_dict()["json"])
    template = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    library.post_processor = tokenizers.processors.Sequence(
        [tokenizers.processors.ByteLevel(trim_offsets=False), template]
    )
    assert BPETokenizer(library, "</s>").encode_prompt("the") == [1, *llama.encode("the")]
    library.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    assert BPETokenizer(library, "</s>").encode_prompt("the") == [1, *llama.encode("the")]


def test_special_tokens_can_be_left_out() -> None:
    tokenizer = chat_like()
    start, end = tokenizer.bos_id, tokenizer.eos_id
    assert start is not None
    assert end is not None
    ids = [start, *tokenizer.encode("the <|im_end|>"), end, *tokenizer.encode("mat")]
    assert tokenizer.decode(ids) == "<|im_start|>the <|im_end|><|im_end|>mat"
    assert tokenizer.decode(ids, skip_special=True) == "the <|im_end|>mat"
    assert ByteTokenizer().decode([104, 256, 105], skip_special=True) == "hi"


def test_named_tokens_must_be_there(trained: BPETokenizer) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_str(trained.to_dict()["json"])
    with pytest.raises(UserError, match="beginning-of-text token '<s>' is not among the"):
        BPETokenizer(library, bos_token="<s>")


def streamed(tokenizer: Tokenizer, ids: Iterable[int], **options: bool) -> list[str]:
    stream = StreamDecoder(tokenizer, **options)
    return [*(stream.push(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("kind", ["trained", "chat", "gpt2", "llama", "metaspace", "bytes", "char"])
def test_streamed_text_is_the_decoded_text(
    kind: str, trained: BPETokenizer, rng: np.random.Generator
) -> None:
    if kind == "gpt2" and not GPT2.is_dir():
        pytest.skip(WITHOUT_GPT2)
    texts = [fuzzed(rng) if n % 2 else random_unicode(rng) for n in range(200)]
    texts += ["  two", " ", "\ufffd", "a\ufffd\ufffd🙂\ufffd", "🙂🙂", " 日", "\ufffd" * 50]
    make = {
        "trained": lambda: trained,
        "chat": chat_like,
        "gpt2": lambda: BPETokenizer.from_files(GPT2 / "vocab.json", GPT2 / "merges.txt"),
        "llama": llama_like,
        "metaspace": lambda: llama_like(metaspace=True),
        "bytes": ByteTokenizer,
        "char": lambda: CharTokenizer.from_text(texts),
    }
    tokenizer = make[kind]()
    special = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    for text in texts:
        ids = tokenizer.encode(text)
        for i in special:
            # Between two texts, for inside a character it would break it.
            ids = ids + [i] * int(rng.integers(2)) + tokenizer.encode(text[: len(text) // 2])
        parts = streamed(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids), repr(text)
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(parts)
            assert parts[-1] == ""
        parts = streamed(tokenizer, ids, skip_special=True)
        assert "".join(parts) == tokenizer.decode(ids, skip_special=True)


def test_streamed_bytes_that_are_no_text(trained: BPETokenizer, rng: np.random.Generator) -> None:
    for tokenizer in (trained, chat_like(), ByteTokenizer()):
        for _ in range(200):
            ids = rng.integers(0, tokenizer.vocab_size, size=30).tolist()
            assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_streamed_characters_come_whole(trained: BPETokenizer) -> None:
    for tokenizer, count in ((trained, 4), (ByteTokenizer(), 4), (llama_like(), 5)):
        ids = tokenizer.encode("🙂")
        assert len(ids) == count
        *held, whole, rest = streamed(tokenizer, ids)
        assert "".join(held) == ""
        assert (whole, rest) == ("🙂", "")
        *_, unfinished = streamed(tokenizer, ids[:-1])
        assert unfinished == "\ufffd"
    with pytest.raises(UserError, match="id 300"):
        StreamDecoder(trained).push(300)


def test_streaming_keeps_the_space_of_a_lone_token() -> None:
    for tokenizer in (llama_like(), llama_like(metaspace=True)):
        ids = tokenizer.encode("the the  the")
        assert tokenizer.decode(ids[:1]) == "the"
        assert streamed(tokenizer, ids)[:2] == ["the", " the"]
        space = tokenizer._library.token_to_id("▁")
        assert space is not None
        ids = [space] * 3 + ids
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_streaming_costs_the_same_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    class Counting:
        def __init__(self, library) -> None:
            self.id_to_token = library.id_to_token
            self.token_to_id = library.token_to_id
            self._decode = library.decode

        def decode(self, ids, skip_special_tokens: bool) -> str:
            decoded.append(len(ids))
            return self._decode(ids, skip_special_tokens=skip_special_tokens)

    for tokenizer in (llama_like(), chat_like()):
        for text in ("the cat \ufffd" * 200, "\ufffd" * 500, "🙂" * 300):
            ids = tokenizer.encode(text)
            decoded.clear()
            with monkeypatch.context() as patch:
                patch.setattr(tokenizer, "_library", Counting(tokenizer._library))
                assert "".join(streamed(tokenizer, ids)) == text
            assert sum(decoded) <= 3 * len(ids)
