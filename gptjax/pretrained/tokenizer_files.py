"""Tokenizers in the files of other tools: transformers folders, tiktoken files, GGUF metadata."""

import base64
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.errors import UserError, nearest
from gptjax.pretrained.json_files import read_json, refuse_other_content
from gptjax.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    byte_letters,
)

if TYPE_CHECKING:
    import tokenizers

# How a text is cut before merging, as published with each vocabulary.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "llama3": _LLAMA3_PATTERN,
    "cl100k": _LLAMA3_PATTERN,
    "qwen2": _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

# tiktoken files by name: the cut, and the special tokens. Those given as a list follow the ranks.
_LLAMA3_SPECIAL = [
    *["<|begin_of_text|>", "<|end_of_text|>"],
    *[f"<|reserved_special_token_{i}|>" for i in range(4)],
    *["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"],
    *[f"<|reserved_special_token_{i}|>" for i in range(5, 251)],
]
_TIKTOKEN: dict[str, tuple[str, dict[str, int] | list[str]]] = {
    "gpt2": ("gpt-2", {END_OF_TEXT: 50256}),
    "r50k_base": ("gpt-2", {END_OF_TEXT: 50256}),
    "p50k_base": ("gpt-2", {END_OF_TEXT: 50256}),
    "cl100k_base": (
        "cl100k",
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": ("o200k", {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
    "qwen": (
        "qwen2",
        [END_OF_TEXT, "<|im_start|>", "<|im_end|>", *[f"<|extra_{i}|>" for i in range(205)]],
    ),
    "llama3": ("llama3", _LLAMA3_SPECIAL),
}

# The cut that `tokenizer.ggml.pre` names.
_GGUF_CUTS = {
    "gpt-2": "gpt-2",
    "default": "gpt-2",
    "smollm": "smollm",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "qwen2": "qwen2",
}
# Token types of GGUF.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# The cut of a vocab.json with merges.txt, which only the class named beside them tells.
_CLASS_CUTS = {
    "GPT2Tokenizer": "gpt-2",
    "PreTrainedTokenizer": "gpt-2",
    "TokenizersBackend": "gpt-2",
    "CodeGenTokenizer": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
}


def read_tokenizer(directory: str | Path) -> Tokenizer | None:
    """Reads the tokenizer of a folder, with its bos and eos tokens and its chat template.

    Of several forms the first is taken: `tokenizer.json`, which says everything; `vocab.json` with
    `merges.txt`; a tiktoken file, `*.tiktoken` or Llama 3's `tokenizer.model`. What is not in them
    comes from `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and
    `chat_template.jinja`. The eos token is the one named there, else `<|endoftext|>` where the
    vocabulary has it.

    Args:
        directory: The folder.

    Returns:
        The tokenizer, of the kind that `write_tokenizer` was given where that wrote the folder;
        None where the folder holds no tokenizer.

    Raises:
        UserError: A file cannot be read or is of a kind that is not supported.
    """
    directory = Path(directory)
    config = _read_json(directory / "tokenizer_config.json")
    # Older folders name their special tokens only here.
    for name, token in _read_json(directory / "special_tokens_map.json").items():
        config.setdefault(name, token)
    eos_token = bos_token = None
    is_whole = (directory / "tokenizer.json").is_file()
    if is_whole:
        library = _from_json(directory / "tokenizer.json")
        own = _own_kind(library)
        if own is not None:
            return own
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        library = _from_vocab_and_merges(directory, config)
    else:
        path = _tiktoken_file(directory)
        if path is None:
            return None
        name = "llama3" if path.name == "tokenizer.model" else path.stem
        library = _from_tiktoken(path, name, config)
        if name == "llama3":
            bos_token, eos_token = _LLAMA3_SPECIAL[:2]
            config.setdefault("add_bos_token", True)
    if eos_token is None and library.token_to_id(END_OF_TEXT) is not None:
        eos_token = END_OF_TEXT
    eos_token = _content(config.get("eos_token")) or eos_token
    bos_token = _content(config.get("bos_token")) or bos_token
    if not is_whole:
        _put_around(
            library,
            bos_token if config.get("add_bos_token") else None,
            eos_token if config.get("add_eos_token") else None,
        )
    _mark_special(library, [bos_token, eos_token])
    return BPETokenizer(
        library,
        eos_token,
        bos_token=bos_token,
        chat_template=_chat_template(directory, config),
    )


def write_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` into a folder that exists.

    `transformers.AutoTokenizer` and `read_tokenizer` get the same ids, texts and chats from them.

    Raises:
        UserError: The tokenizer is none of gptjax's.
    """
    directory = Path(directory)
    library = _library_of(tokenizer)
    # Of a tokenizer that the folder held before; it would be read with this one.
    for name in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"):
        (directory / name).unlink(missing_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, ByteTokenizer):
        config["eos_token"] = END_OF_TEXT
    elif isinstance(tokenizer, BPETokenizer):
        named = {
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "chat_template": tokenizer.chat_template,
        }
        config |= {name: value for name, value in named.items() if value is not None}
        # tokenizer.json says it too, but some readers look only here.
        if library.encode("").ids == [tokenizer.bos_id]:
            config["add_bos_token"] = True
    library.save(str(directory / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def tokenizer_from_gguf(fields: dict[str, Any]) -> Tokenizer | None:
    """Builds the tokenizer that a GGUF file describes.

    Args:
        fields: The file's metadata as plain Python values, by their names in the file.

    Returns:
        The tokenizer, or None where the metadata describes none.

    Raises:
        UserError: The tokenizer is of a kind that is not supported, or its parts do not fit.
    """
    values = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in fields.items()
        if name.startswith("tokenizer.ggml.")
    }
    kind = values.get("model")
    if kind is None or kind == "none":
        return None
    builders = {"gpt2": _byte_level_from_gguf, "llama": _sentencepiece_from_gguf}
    if kind not in builders:
        raise UserError(
            f"the GGUF file's tokenizer is of kind {kind!r}: gptjax reads gpt2 and llama; load the "
            "model from a folder with tokenizer.json"
        )
    tokens = _gguf_list(values, "tokens")
    if not tokens:
        raise UserError("the GGUF file's vocabulary has no tokens: convert it again")
    [(token, count)] = Counter(tokens).most_common(1)
    if count > 1:
        raise UserError(
            f"the GGUF file's vocabulary holds {token!r} {count} times: convert it again"
        )
    library = builders[kind](values, tokens)
    types = values.get("token_type") or []
    added = [
        # The texts of pieces with this sign are compared after spaces have become it.
        _added_token(token, special=type_ == _CONTROL, normalized="▁" in token)
        for token, type_ in zip(tokens, types, strict=False)
        if type_ in (_CONTROL, _USER_DEFINED)
    ]
    library.add_tokens(added)
    named: list[str | None] = []
    for name in ("bos_token_id", "eos_token_id"):
        i = values.get(name)
        if i is not None and not 0 <= i < len(tokens):
            raise UserError(
                f"the GGUF file's {name} is {i}, outside its vocabulary of {len(tokens)}: convert "
                "it again"
            )
        named.append(None if i is None else tokens[i])
    bos_token, eos_token = named
    _mark_special(library, named)
    starts_with_bos = kind == "llama" or _GGUF_CUTS[values.get("pre") or "default"] == "llama3"
    if bos_token is not None and values.get("add_bos_token", starts_with_bos):
        _put_around(library, bos_token, None)
    return BPETokenizer(
        library,
        eos_token,
        bos_token=bos_token,
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _byte_level_from_gguf(values: dict[str, Any], tokens: list[str]) -> "tokenizers.Tokenizer":
    pre = values.get("pre") or "default"
    if pre not in _GGUF_CUTS:
        raise UserError(
            f"the GGUF file's text is cut as {pre!r} says (tokenizer.ggml.pre)"
            f"{nearest(pre, _GGUF_CUTS)}: load the model from a folder with tokenizer.json"
        )
    merges = [tuple(merge.split(" ")) for merge in _gguf_list(values, "merges")]
    cut = _GGUF_CUTS[pre]
    return _byte_level({t: i for i, t in enumerate(tokens)}, merges, cut, cut == "llama3")


def _sentencepiece_from_gguf(values: dict[str, Any], tokens: list[str]) -> "tokenizers.Tokenizer":
    """Builds BPE that merges the pair with the best score, as SentencePiece's does."""
    from tokenizers import decoders, normalizers

    scores = _gguf_list(values, "scores")
    types = _gguf_list(values, "token_type")
    if not len(tokens) == len(scores) == len(types):
        raise UserError(
            f"the GGUF file has {len(tokens)} tokens, {len(scores)} scores and {len(types)} token "
            "types: convert it again"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = [i for i, type_ in enumerate(types) if type_ == _NORMAL]
    unknown = next((tokens[i] for i, type_ in enumerate(types) if type_ == _UNKNOWN), None)
    ranked = [tokens[i] for i in sorted(normal, key=lambda i: (-scores[i], i))]
    library = _library(
        vocab,
        _all_splits(ranked, set(ranked)),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback="<0x00>" in vocab,
    )
    before: list[Any] = [normalizers.Replace(" ", "▁")]
    after: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if values.get("add_space_prefix", True):
        before.insert(0, normalizers.Prepend("▁"))
        after.append(decoders.Strip(" ", 1, 0))
    library.normalizer = normalizers.Sequence(before)
    library.decoder = decoders.Sequence(after)
    return library


def _gguf_list(values: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(values.get(name), list | tuple):
        raise UserError(
            f"the GGUF file lacks tokenizer.ggml.{name}, which a {values['model']} tokenizer "
            "needs: convert it again"
        )
    return list(values[name])


def _from_json(path: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    with path.open("rb") as file:
        refuse_other_content(path, file.read(512))
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exception.
        raise UserError(
            f"cannot read {str(path)!r} ({_first_line(error)}): give a tokenizer.json of the "
            "tokenizers library"
        ) from error


def _from_vocab_and_merges(directory: Path, config: dict[str, Any]) -> "tokenizers.Tokenizer":
    name = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if name not in _CLASS_CUTS:
        raise UserError(
            f"{str(directory)!r} has vocab.json and merges.txt of a {name}, whose way to cut text "
            f"is not known (known: {', '.join(_CLASS_CUTS)}): save the tokenizer with transformers "
            "as tokenizer.json"
        )
    library = BPETokenizer.from_files(directory / "vocab.json", directory / "merges.txt")._library
    _cut_by(library, _CLASS_CUTS[name])
    added = {i: _added_token(token) for token, i in _added_ids(directory).items()}
    added |= _configured_tokens(config)
    for i, token in sorted(added.items()):
        library.add_tokens([token])
        if library.token_to_id(token.content) != i:
            raise UserError(
                f"the added token {token.content!r} of {str(directory)!r} has id {i}, but the next "
                f"free id is {library.token_to_id(token.content)}: ids must have no holes"
            )
    return library


def _added_ids(directory: Path) -> dict[str, int]:
    path = directory / "added_tokens.json"
    added = _read_json(path)
    if not all(isinstance(i, int) for i in added.values()):
        raise UserError(f"{str(path)!r} does not give each token an id: repair or remove it")
    return added


def _configured_tokens(config: dict[str, Any]) -> "dict[int, tokenizers.AddedToken]":
    """Returns the added tokens of a `tokenizer_config.json` by id."""
    found = (config.get("added_tokens_decoder") or {}).items()
    named = {_content(config.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    return {
        int(i): _added_token(
            token["content"],
            special=token.get("special", False) or token["content"] in named,
            normalized=token.get("normalized", False),
            lstrip=token.get("lstrip", False),
            rstrip=token.get("rstrip", False),
            single_word=token.get("single_word", False),
        )
        for i, token in found
    }


def _tiktoken_file(directory: Path) -> Path | None:
    found = sorted(directory.glob("*.tiktoken"))
    if len(found) > 1:
        raise UserError(
            f"{str(directory)!r} holds {' and '.join(path.name for path in found)}: leave one"
        )
    if found:
        return found[0]
    path = directory / "tokenizer.model"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.readline(1000)
    if _rank_of(first) is None:
        raise UserError(
            f"{str(path)!r} is a SentencePiece model, which gptjax does not read: convert it with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...), which writes "
            "tokenizer.json"
        )
    return path


def _from_tiktoken(path: Path, name: str, config: dict[str, Any]) -> "tokenizers.Tokenizer":
    if name not in _TIKTOKEN:
        raise UserError(
            f"how {str(path)!r} cuts text is not known{nearest(name, _TIKTOKEN)}: name the file "
            "after its vocabulary, or convert it to tokenizer.json"
        )
    cut, special = _TIKTOKEN[name]
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        found = _rank_of(line)
        if found is None:
            raise UserError(
                f"line {number} of {str(path)!r} is not a token in base64 and its rank: download "
                "the file again"
            )
        ranks[found[0]] = found[1]
    letters = byte_letters()
    vocab = {"".join([letters[byte] for byte in token]): rank for token, rank in ranks.items()}
    merges = _all_splits(sorted(vocab, key=vocab.__getitem__), set(vocab))
    if isinstance(special, list):
        special = {
            token: max(vocab.values(), default=-1) + 1 + i for i, token in enumerate(special)
        }
    added = {i: _added_token(token, special=True) for token, i in special.items()}
    # Later models keep a vocabulary and give reserved tokens new names.
    added |= _configured_tokens(config)
    vocab |= {token.content: i for i, token in added.items()}
    library = _byte_level(vocab, merges, cut, ignore_merges=True)
    library.add_tokens([token for _, token in sorted(added.items())])
    return library


def _rank_of(line: bytes) -> tuple[bytes, int] | None:
    try:
        token, rank = line.split()
        return base64.b64decode(token, validate=True), int(rank)
    except ValueError:
        return None


def _all_splits(ranked: Iterable[str], known: set[str]) -> list[tuple[str, str]]:
    """Returns the merges of a vocabulary that says only which token comes before which.

    Any two parts that make a token may be merged to it, first those of the first in `ranked`.
    """
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _library(vocab: dict[str, int], merges: list[Any], **options: Any) -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        return tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # The library raises bare Exception.
        raise UserError(
            f"the vocabulary and its merges do not fit ({_first_line(error)}): get the file again"
        ) from error


def _byte_level(
    vocab: dict[str, int], merges: list[Any], cut: str, ignore_merges: bool
) -> "tokenizers.Tokenizer":
    import tokenizers

    library = _library(vocab, merges, ignore_merges=ignore_merges)
    library.decoder = tokenizers.decoders.ByteLevel()
    _cut_by(library, cut)
    return library


def _cut_by(library: "tokenizers.Tokenizer", cut: str) -> None:
    """Sets how a text is cut before merging."""
    import tokenizers
    from tokenizers import pre_tokenizers

    if cut in _PATTERNS:
        pattern = tokenizers.Regex(_PATTERNS[cut])
        steps: list[Any] = [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if cut == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    library.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    if cut == "qwen2":
        # Qwen's own code composes characters first.
        library.normalizer = tokenizers.normalizers.NFC()


def _put_around(library: "tokenizers.Tokenizer", bos: str | None, eos: str | None) -> None:
    """Sets what the library's post-processor puts around a text."""
    from tokenizers import processors

    # A token that is not in the vocabulary is reported by the tokenizer's constructor.
    ids = {token: library.token_to_id(token) for token in (bos, eos) if token is not None}
    if not ids or None in ids.values():
        return
    before, after = [bos] if bos else [], [eos] if eos else []
    library.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *[f"{token}:1" for token in before], "$B:1"]
        + [f"{token}:1" for token in after],
        special_tokens=list(ids.items()),
    )


def _mark_special(library: "tokenizers.Tokenizer", names: Iterable[str | None]) -> None:
    """Makes named tokens special, as transformers does; a missing one is reported elsewhere."""
    special = {t.content for t in library.get_added_tokens_decoder().values() if t.special}
    for name in names:
        if name is not None and name not in special and library.token_to_id(name) is not None:
            library.add_special_tokens([_added_token(name, special=True)])


def _added_token(content: str, **flags: bool) -> "tokenizers.AddedToken":
    import tokenizers

    return tokenizers.AddedToken(content, **{"normalized": False, **flags})


def _library_of(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """Expresses a tokenizer in the library."""
    import tokenizers

    if isinstance(tokenizer, BPETokenizer):
        return tokenizer._library
    if isinstance(tokenizer, CharTokenizer):
        library = _library({c: i for i, c in enumerate(tokenizer.alphabet)}, [])
        library.decoder = tokenizers.decoders.Fuse()
        return library
    if isinstance(tokenizer, ByteTokenizer):
        library = _library({letter: byte for byte, letter in enumerate(byte_letters())}, [])
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        library.decoder = tokenizers.decoders.ByteLevel()
        library.add_special_tokens([_added_token(END_OF_TEXT, special=True)])
        return library
    raise UserError(
        f"a {type(tokenizer).__name__} cannot be written as tokenizer.json: give a CharTokenizer, "
        "ByteTokenizer or BPETokenizer"
    )


def _own_kind(library: "tokenizers.Tokenizer") -> Tokenizer | None:
    """Returns the character or byte tokenizer that `write_tokenizer` wrote, None for any other."""
    size = library.get_vocab_size()
    if not library.token_to_id(END_OF_TEXT) == 256 == size - 1:
        alphabet = [library.id_to_token(i) or "" for i in range(size)]
        own = CharTokenizer("".join(alphabet)) if all(len(c) == 1 for c in alphabet) else None
    else:
        own = ByteTokenizer()
    if own is None or json.loads(_library_of(own).to_str()) != json.loads(library.to_str()):
        return None
    return own


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}.get("default")
    return template


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise UserError(f"tokenizer_config.json names {token!r} as a token; tokens are strings")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
