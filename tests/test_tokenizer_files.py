"""Tokenizer files: transformers folders, tiktoken files and GGUF metadata, read and written."""

import base64
import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tokenizers import (
    GPT2,
    TEXTS,
    WITHOUT_GPT2,
    chat_like,
    fuzzed,
    llama_like,
    needed_smollm2,
    random_unicode,
)

from gptjax.errors import UserError
from gptjax.pretrained.tokenizer_files import (
    read_tokenizer,
    tokenizer_from_gguf,
    write_tokenizer,
)
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, byte_letters

STORIES = GPT2.parents[1] / "models" / "stories260k" / "llama2c_vocab_scores.json"
SMOLLM2 = GPT2.parents[1] / "reference" / "smollm2.npz"
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason=WITHOUT_GPT2)
CHAT_TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train(TEXTS * 3, 320)


def read(directory: Path) -> BPETokenizer:
    tokenizer = read_tokenizer(directory)
    assert isinstance(tokenizer, BPETokenizer)
    return tokenizer


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def auto_tokenizer(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(directory)


def parts(tokenizer: BPETokenizer) -> tuple[dict[str, int], list[str]]:
    """Returns a tokenizer's vocabulary and merges, without its added tokens."""
    spec = json.loads(tokenizer.to_dict()["json"])
    added = {token["content"] for token in spec["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    return {t: i for t, i in spec["model"]["vocab"].items() if t not in added}, merges


def write_vocab_and_merges(tokenizer: BPETokenizer, directory: Path) -> list[str]:
    """Writes the two files, ids counted from 0, and returns the tokens by id."""
    vocab, merges = parts(tokenizer)
    tokens = sorted(vocab, key=vocab.__getitem__)
    write_json(directory / "vocab.json", {token: i for i, token in enumerate(tokens)})
    text = "\n".join(["#version: 0.2", *merges])
    (directory / "merges.txt").write_text(text, encoding="utf-8")
    return tokens


@needs_gpt2
def test_gpt2_files_in_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((GPT2 / name).read_bytes())
    tokenizer = read(tmp_path)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.eos_id, tokenizer.bos_id) == (50256, None)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "Hello"}})
    assert read(tmp_path).eos_id == 15496
    whole = read(GPT2)
    assert (whole.bos_id, whole.encode_prompt("Hello world")) == (50256, [15496, 995])


def test_truncation_in_a_file_is_not_obeyed(tmp_path: Path, trained: BPETokenizer) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_str(trained.to_dict()["json"])
    library.enable_truncation(3)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read(tmp_path)
    text = "the quick brown fox <|endoftext|>"
    assert tokenizer.encode(text) == trained.encode(text)
    assert tokenizer.eos_id == trained.eos_id


def test_files_that_are_missing_or_broken(tmp_path: Path, trained: BPETokenizer) -> None:
    import tokenizers

    assert read_tokenizer(tmp_path) is None
    assert read_tokenizer(str(tmp_path / "none")) is None
    with pytest.raises(UserError, match="no tokenizer file"):
        BPETokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(UserError, match="cannot read"):
        read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert read(tmp_path).eos_id is None
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match=r"cannot read .*tokenizer\.json"):
        read_tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(UserError, match="model is WordLevel"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(trained.to_dict()["json"])
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    with pytest.raises(UserError, match="'</s>' is not among"):
        read_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>"})
    with pytest.raises(UserError, match="'<s>' is not among"):
        read_tokenizer(tmp_path)
    for text, message in (("{", "not JSON"), ("[]", "no JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(UserError, match=rf"tokenizer_config\.json.*{message}"):
            read_tokenizer(tmp_path)


def test_what_the_config_names(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(chat_like().to_dict()["json"])
    config = tmp_path / "tokenizer_config.json"
    # Nothing named: the end of text that the vocabulary has.
    assert (read(tmp_path).eos_token, read(tmp_path).bos_token) == ("<|endoftext|>", None)
    older = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}
    write_json(tmp_path / "special_tokens_map.json", older)
    assert (read(tmp_path).eos_token, read(tmp_path).bos_token) == ("<|im_end|>", "<|im_start|>")
    write_json(config, {"eos_token": "<|endoftext|>", "bos_token": None, "chat_template": "one"})
    tokenizer = read(tmp_path)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", None)
    assert tokenizer.chat_template == "one"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    write_json(config, {"chat_template": named})
    assert read(tmp_path).chat_template == "b"
    write_json(config, {"chat_template": named[:1]})
    assert read(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("é", encoding="utf-8")
    assert read(tmp_path).chat_template == "é"
    # A token that the files only name is special from then on, as in transformers.
    write_json(config, {"eos_token": "<think>"})
    tokenizer = read(tmp_path)
    assert tokenizer.eos_id is not None
    assert tokenizer.decode([tokenizer.eos_id], skip_special=True) == ""
    assert tokenizer.eos_id not in tokenizer.encode("<think>")


@pytest.mark.parametrize("make", [chat_like, llama_like])
def test_prompts_begin_as_in_transformers(tmp_path: Path, make: Any) -> None:
    tokenizer = make()
    named = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_dict()["json"])
    # tokenizer.json says what is put before a text, and nothing else does.
    for more in ({}, {"add_bos_token": make is chat_like, "add_eos_token": True}):
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **more}
        write_json(tmp_path / "tokenizer_config.json", config)
        found, peer = read(tmp_path), auto_tokenizer(tmp_path)
        assert found.encode_prompt("the mat") == tokenizer.encode_prompt("the mat")
        for text in ("the mat", "", " x"):
            assert found.encode_prompt(text) == peer(text)["input_ids"]


@pytest.mark.parametrize("has_bos", [None, False, True])
def test_prompts_of_a_vocabulary_begin_as_its_config_says(
    tmp_path: Path, trained: BPETokenizer, has_bos: bool | None
) -> None:
    tokens = write_vocab_and_merges(trained, tmp_path)
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": tokens[5], "eos_token": tokens[6]}
    config |= {} if has_bos is None else {"add_bos_token": has_bos}
    write_json(tmp_path / "tokenizer_config.json", config)
    found, peer = read(tmp_path), auto_tokenizer(tmp_path)
    assert found.encode_prompt("the") == [5] * bool(has_bos) + found.encode("the")
    assert found.encode_prompt("the") == peer("the")["input_ids"]
    # An end that transformers appends is not part of a prompt.
    write_json(tmp_path / "tokenizer_config.json", config | {"add_eos_token": True})
    ids = auto_tokenizer(tmp_path)("the")["input_ids"]
    assert ids == [*read(tmp_path).encode_prompt("the"), 6]


def test_added_tokens_of_a_vocabulary(tmp_path: Path, trained: BPETokenizer) -> None:
    size = len(write_vocab_and_merges(trained, tmp_path))
    write_json(tmp_path / "added_tokens.json", {"<b>": size + 1, "<a>": size})
    decoder = {str(size + 1): {"content": "<b>", "special": True}}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    tokenizer = read(tmp_path)
    assert tokenizer.decode([size, size + 1]) == "<a><b>"
    assert tokenizer.decode([size, size + 1], skip_special=True) == "<a>"
    assert tokenizer.encode("<a>") == [size]
    assert size + 1 not in tokenizer.encode("<b>")
    write_json(tmp_path / "added_tokens.json", {"<b>": size + 1})
    with pytest.raises(UserError, match=f"'<b>' .* has id {size + 1}, but the next free id"):
        read_tokenizer(tmp_path)
    write_json(tmp_path / "added_tokens.json", {"<b>": "x"})
    with pytest.raises(UserError, match=r"added_tokens\.json"):
        read_tokenizer(tmp_path)


def test_the_class_says_how_a_vocabulary_cuts(tmp_path: Path, trained: BPETokenizer) -> None:
    write_vocab_and_merges(trained, tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "Qwen2TokenizerFast"})
    composed = "syst\u00e8me"
    tokenizer = read(tmp_path)
    assert tokenizer.encode(unicodedata.normalize("NFD", composed)) == tokenizer.encode(composed)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    tokenizer = read(tmp_path)
    assert tokenizer.encode(unicodedata.normalize("NFD", composed)) != tokenizer.encode(composed)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"})
    with pytest.raises(UserError, match=r"CLIPTokenizer.*known: GPT2Tokenizer"):
        read_tokenizer(tmp_path)


def assert_same(one: Tokenizer, other: Tokenizer, texts: list[str]) -> None:
    assert (one.vocab_size, one.eos_id, one.bos_id) == (
        other.vocab_size,
        other.eos_id,
        other.bos_id,
    )
    for text in texts:
        ids = one.encode(text)
        assert other.encode(text) == ids, repr(text)
        assert other.decode(ids) == one.decode(ids)


@pytest.mark.parametrize("kind", ["trained", "chat", "llama", "metaspace", "bytes", "char", "gpt2"])
def test_what_is_written_is_read_and_equals_transformers(
    kind: str, tmp_path: Path, trained: BPETokenizer, rng: np.random.Generator
) -> None:
    if kind == "gpt2" and not GPT2.is_dir():
        pytest.skip(WITHOUT_GPT2)
    # Special tokens in texts are parsed by transformers alone.
    texts = [fuzzed(rng).replace("<|endoftext|>", "") for _ in range(100)]
    texts += [random_unicode(rng) for _ in range(100)]
    make = {
        "trained": lambda: trained,
        "chat": chat_like,
        "llama": llama_like,
        "metaspace": lambda: llama_like(metaspace=True),
        "bytes": ByteTokenizer,
        "char": lambda: CharTokenizer.from_text(texts),
        "gpt2": lambda: read(GPT2),
    }
    tokenizer = make[kind]()
    if isinstance(tokenizer, BPETokenizer):
        tokenizer.chat_template = CHAT_TEMPLATE
    write_tokenizer(tokenizer, tmp_path)
    again = read_tokenizer(tmp_path)
    assert again is not None
    assert type(again) is type(tokenizer)
    assert_same(tokenizer, again, texts)
    peer = auto_tokenizer(tmp_path)
    assert (peer.bos_token_id, peer.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert peer.chat_template == getattr(tokenizer, "chat_template", None)
    for text in texts:
        ids = tokenizer.encode(text)
        assert peer.encode(text, add_special_tokens=False) == ids
        assert peer.decode(ids) == tokenizer.decode(ids)
        if isinstance(tokenizer, BPETokenizer):
            assert peer.encode(text) == tokenizer.encode_prompt(text)
    if isinstance(tokenizer, BPETokenizer):
        assert again.to_dict() == tokenizer.to_dict()
        if tokenizer.bos_id is not None:
            messages = [{"role": "user", "content": "the mat"}]
            rendered = peer.apply_chat_template(messages, tokenize=False)
            assert rendered == f"{tokenizer.bos_token}the mat{tokenizer.eos_token}"
            ids = peer.apply_chat_template(messages, return_dict=False)
            assert ids == tokenizer.encode_chat(messages, add_generation_prompt=False)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["clean_up_tokenization_spaces"] is False
    assert config.get("add_bos_token") == (True if kind in ("llama", "metaspace") else None)


def test_only_own_tokenizers_are_written(tmp_path: Path) -> None:
    class Words:
        vocab_size, eos_id, bos_id = 3, None, None

    with pytest.raises(UserError, match=r"a Words cannot be written as tokenizer\.json"):
        write_tokenizer(Words(), tmp_path)  # pyright: ignore[reportArgumentType]


def test_a_vocabulary_of_characters_with_merges_is_no_character_tokenizer(tmp_path: Path) -> None:
    import tokenizers

    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[], unk_token="a")
    )
    library.save(str(tmp_path / "tokenizer.json"))
    assert type(read_tokenizer(tmp_path)) is BPETokenizer


def tiktoken_ranks(trained: BPETokenizer) -> dict[bytes, int]:
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocab, _ = parts(trained)
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {bytes(byte_of[c] for c in token): rank for rank, token in enumerate(tokens)}


def write_tiktoken(path: Path, ranks: dict[bytes, int]) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")


@pytest.mark.parametrize(
    "name",
    ["r50k_base", "p50k_base", "gpt2", "cl100k_base", "o200k_base", "qwen", "tokenizer.model"],
)
def test_tiktoken_files(
    name: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    from tiktoken_ext import openai_public

    # Merges across all that the patterns cut differently.
    mixed = ["don't 12345 it'S  \n\n x/ y /\r\n\n'LL aBc HTTPServer 日本 \t ''s 2024's…\n" * 4]
    ranks = tiktoken_ranks(BPETokenizer.train([*TEXTS, *mixed, "a'll b'll c'll 1234 12 34"], 400))
    # Tokens that only some cuts allow, and one that no merges lead to.
    extra = [b"/\n", b".\n", b".\n/", b" \n", b"12", b"123", b"1234", b"x'", b"'S", b"x'S", b"qzqz"]
    for token in extra:
        ranks.setdefault(token, len(ranks))
    # tiktoken's own definitions, but for the vocabulary, which lies elsewhere.
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *_, **__: ranks)
    if name == "tokenizer.model":
        path, pattern = tmp_path / name, LLAMA3_PATTERN
    else:
        path, pattern = tmp_path / f"{name}.tiktoken", QWEN_PATTERN
    if name in ("qwen", "tokenizer.model"):
        published = {"pat_str": pattern, "special_tokens": {}}
    else:
        published = getattr(openai_public, name)()
    peer = tiktoken.Encoding(
        name, pat_str=published["pat_str"], mergeable_ranks=ranks, special_tokens={}
    )
    write_tiktoken(path, ranks)
    tokenizer = read(tmp_path)
    for number in range(2000):
        text = fuzzed(rng) if number % 2 else random_unicode(rng)
        text += "".join(rng.choice(list("/.\r\n x'S1234"), size=rng.integers(12))) + "\nqzqz.\n/"
        if name == "qwen":
            text = unicodedata.normalize("NFC", text)
        assert tokenizer.encode(text) == peer.encode_ordinary(text), repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for token, i in published["special_tokens"].items():
        assert tokenizer.decode([i]) == token
        assert tokenizer.decode([i], skip_special=True) == ""
    eos = "<|end_of_text|>" if name == "tokenizer.model" else "<|endoftext|>"
    assert tokenizer.eos_token == eos
    if name == "tokenizer.model":
        n = len(ranks)
        assert tokenizer.vocab_size == n + 256
        texts = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 9: "eot_id"}
        texts |= {2: "reserved_special_token_0", 8: "reserved_special_token_4"}
        texts |= {10: "reserved_special_token_5", 255: "reserved_special_token_250"}
        for i, text in texts.items():
            assert tokenizer.decode([n + i]) == f"<|{text}|>"
        assert tokenizer.encode_prompt("x") == [n, *tokenizer.encode("x")]
        decoder = {str(n + 4): {"content": "<|finetune_right_pad_id|>", "special": True}}
        config = {"eos_token": "<|eot_id|>", "added_tokens_decoder": decoder}
        write_json(tmp_path / "tokenizer_config.json", config)
        assert read(tmp_path).eos_id == n + 9
        assert read(tmp_path).decode([n + 4]) == "<|finetune_right_pad_id|>"
    elif name == "qwen":
        n = len(ranks)
        assert tokenizer.decode([n, n + 1, n + 2]) == "<|endoftext|><|im_start|><|im_end|>"
        assert tokenizer.decode([n + 207]) == "<|extra_204|>"
        assert tokenizer.vocab_size == n + 208
    # What was read can be written for transformers.
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out")
    assert_same(tokenizer, read(tmp_path / "out"), ["the mat", "it's 12345 日本  \n"])


@needs_gpt2
def test_gpt2_as_a_tiktoken_file(tmp_path: Path, rng: np.random.Generator) -> None:
    whole = read(GPT2)
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocab, _ = parts(whole)
    write_tiktoken(
        tmp_path / "gpt2.tiktoken",
        {bytes(byte_of[c] for c in token): rank for token, rank in vocab.items()},
    )
    tokenizer = read(tmp_path)
    assert tokenizer.vocab_size == whole.vocab_size
    for _ in range(1000):
        text = fuzzed(rng)
        assert tokenizer.encode(text) == whole.encode(text)


def test_tiktoken_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>")
    with pytest.raises(UserError, match=r"SentencePiece model.*AutoTokenizer.*tokenizer\.json"):
        read_tokenizer(tmp_path)
    path.unlink()
    (tmp_path / "r50k_bse.tiktoken").write_text("YQ== 0\n")
    with pytest.raises(UserError, match="did you mean 'r50k_base'"):
        read_tokenizer(tmp_path)
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\n")
    with pytest.raises(UserError, match=r"qwen\.tiktoken and r50k_bse\.tiktoken: leave one"):
        read_tokenizer(tmp_path)
    (tmp_path / "r50k_bse.tiktoken").unlink()
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\n\nYg== x\n")
    with pytest.raises(UserError, match=r"line 3 of .*qwen\.tiktoken"):
        read_tokenizer(tmp_path)


def gguf_bpe(tokenizer: BPETokenizer, pre: str | None, **more: Any) -> dict[str, Any]:
    """Returns the metadata of a byte-level vocabulary and four added tokens; <user> is plain."""
    vocab, merges = parts(tokenizer)
    tokens = [*sorted(vocab, key=vocab.__getitem__), "<s>", "</s>", "<user>", "<x>"]
    types = [1] * len(vocab) + [3, 3, 4, 3]
    values = {"model": "gpt2", "tokens": tokens, "merges": merges, "token_type": types, **more}
    values |= {"bos_token_id": len(vocab), "eos_token_id": len(vocab) + 1}
    values |= {} if pre is None else {"pre": pre}
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()} | {
        "general.architecture": "llama",
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


@pytest.mark.parametrize(
    "pre", [None, "default", "gpt-2", "smollm", "llama-bpe", "llama3", "qwen2"]
)
def test_byte_level_gguf(pre: str | None, trained: BPETokenizer, rng: np.random.Generator) -> None:
    source = BPETokenizer.train([*TEXTS, "123\n45\n12345\n" * 9], 360)
    fields = gguf_bpe(source, pre)
    tokenizer = tokenizer_from_gguf(fields)
    assert isinstance(tokenizer, BPETokenizer)
    tokens = fields["tokenizer.ggml.tokens"]
    size = len(tokens) - 4
    assert (tokenizer.bos_id, tokenizer.eos_id) == (size, size + 1)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.decode([size, size + 2, size + 3], skip_special=True) == "<user>"
    assert size + 3 not in tokenizer.encode("<x>")
    assert tokenizer.encode("<user>") == [size + 2]
    assert size not in tokenizer.encode("<s>")
    has_bos = pre in ("llama-bpe", "llama3")
    assert tokenizer.encode_prompt("the") == [size] * has_bos + tokenizer.encode("the")
    numbers = [tokens[i] for i in tokenizer.encode("12345")]
    longest = {"smollm": 1, "qwen2": 1, "llama-bpe": 3, "llama3": 3}.get(pre or "", 5)
    assert max(map(len, numbers)) == longest
    for text in (fuzzed(rng) for _ in range(100)):
        if pre == "qwen2":
            text = unicodedata.normalize("NFC", text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        if longest == 5:
            # The source has its one special token before the others.
            assert [i + 1 for i in tokenizer.encode(text)] == source.encode(text)
    for wanted in (True, False):
        fields["tokenizer.ggml.add_bos_token"] = wanted
        tokenizer = tokenizer_from_gguf(fields)
        assert isinstance(tokenizer, BPETokenizer)
        assert tokenizer.encode_prompt("")[:1] == [size] * wanted


def test_gguf_that_is_not_supported(trained: BPETokenizer) -> None:
    fields = gguf_bpe(trained, "gpt-2")
    assert tokenizer_from_gguf({"general.architecture": "llama"}) is None
    assert tokenizer_from_gguf({"tokenizer.ggml.model": "none"}) is None
    for changed, message in (
        ({"model": "t5"}, "kind 't5': gptjax reads gpt2 and llama"),
        ({"pre": "gpt-4o"}, "'gpt-4o'"),
        ({"pre": "zzz"}, "known: default, gpt-2, llama-bpe, llama3, qwen2, smollm"),
        ({"merges": None}, r"lacks tokenizer\.ggml\.merges"),
        ({"merges": ["z z"]}, "do not fit"),
        ({"tokens": ["a", "b", "a"]}, "'a' 2 times"),
        ({"tokens": []}, "no tokens"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000"),
        ({"model": "llama"}, "scores"),
        ({"model": "llama", "scores": [0.0]}, "1 scores"),
    ):
        values = {f"tokenizer.ggml.{name}": value for name, value in changed.items()}
        with pytest.raises(UserError, match=message):
            tokenizer_from_gguf(fields | values)


def stories() -> tuple[list[str], list[float], dict[str, Any]]:
    """Returns tokens, scores and GGUF metadata of a small SentencePiece vocabulary."""
    if not STORIES.is_file():
        pytest.skip("the vocabulary of stories260K is not in ../shared/assets/models/stories260k")
    pairs = json.loads(STORIES.read_text(encoding="utf-8"))
    tokens = ["<unk>", "<s>", "</s>"] + [text.replace(" ", "▁") for text, _ in pairs[3:]]
    scores = [float(score) for _, score in pairs]
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return tokens, scores, {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def merged_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's BPE, word for word: merge the neighbours that make the best token."""
    id_of = {token: i for i, token in enumerate(tokens)}
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [left + right for left, right in itertools.pairwise(pieces)]
        known = [
            (scores[id_of[pair]], -place)
            for place, pair in enumerate(pairs)
            if id_of.get(pair, 0) >= 259
        ]
        if not known:
            break
        place = -max(known)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    ids = []
    for piece in pieces:
        # The three tokens that no text spells, and the 256 of bytes, come first.
        known_id = id_of.get(piece, 0)
        ids += [known_id] if known_id >= 259 else [3 + byte for byte in piece.encode()]
    return ids


def test_sentencepiece_gguf(rng: np.random.Generator) -> None:
    tokens, scores, fields = stories()
    tokenizer = tokenizer_from_gguf(fields)
    assert isinstance(tokenizer, BPETokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    story = (
        'Once upon a time, there was a little girl named Lily. "Hi!" said Tim.\n\nThe end é 日本🙂'
    )
    words = [*story.split(" "), "aaaa", "    ", "  ", "eee", "...", "!!!", "ll", "\n\n\n", "Timmy"]
    texts = [story, "", " two", "<s>", "<unk>"]
    texts += [" ".join(rng.choice(words, size=12)) for _ in range(200)]
    texts += ["".join(rng.choice(words, size=12)) for _ in range(200)]
    texts += ["".join(rng.choice(list("eht lo \n"), size=20)) for _ in range(300)]
    for text in [*texts, *(fuzzed(rng) for _ in range(200))]:
        ids = tokenizer.encode(text)
        assert ids == merged_by_score(text, tokens, scores), repr(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_prompt("Once") == [1, *tokenizer.encode("Once")]
    assert len(tokenizer.encode(story)) < len(story)
    plain = tokenizer_from_gguf(
        fields | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    )
    assert isinstance(plain, BPETokenizer)
    assert plain.encode_prompt(" the") == tokenizer.encode("the")
    assert plain.decode(plain.encode(" the")) == " the"


def test_sentencepiece_gguf_is_written_for_transformers(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    _, _, fields = stories()
    tokenizer = tokenizer_from_gguf(fields)
    assert isinstance(tokenizer, BPETokenizer)
    write_tokenizer(tokenizer, tmp_path)
    peer = auto_tokenizer(tmp_path)
    for text in (fuzzed(rng) for _ in range(100)):
        assert peer(text)["input_ids"] == tokenizer.encode_prompt(text)


def test_smollm2s_own_gguf() -> None:
    tokenizer = needed_smollm2()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
    assert tokenizer.encode_prompt("12") == tokenizer.encode("12")
    assert len(tokenizer.encode("2018")) == 4
    if not SMOLLM2.is_file():
        pytest.skip("SmolLM2's reference ids are not in ../shared/assets/reference")
    with np.load(SMOLLM2) as stored:
        ids = stored["input_ids"][0].tolist()
    text = "The quick brown fox jumps over the lazy dog. In 2018, 345 people"
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
