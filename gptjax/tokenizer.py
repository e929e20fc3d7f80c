"""Text to token ids and back: characters, bytes, and byte-level BPE behind one small protocol.

Every tokenizer is complete in its `to_dict()`, so a checkpoint can carry it in its metadata and
`tokenizer_from_dict` brings it back without any file. Files of other tools are read and written by
`gptjax.pretrained.tokenizer_files`.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from gptjax.chat import disguise, render_chat
from gptjax.errors import UserError, nearest

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
_KINDS = ("characters", "bytes", "bpe")

# Texts go to the trainer of the BPE library in pieces, on which it works in parallel.
_PIECE_CHARACTERS = 1 << 16
_PIECE_END = re.compile(r"\S(?= )")

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of gptjax asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids lie in `[0, vocab_size)`."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document; None where the vocabulary has none."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text; None where the vocabulary has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, adding no special tokens."""
        ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Special tokens are spelled out, or left out where `skip_special`.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Returns all of the tokenizer as JSON-serializable values."""
        ...


@dataclass(frozen=True)
class CharTokenizer:
    """One token a character; the id is the character's place in `alphabet`.

    Attributes:
        alphabet: The characters, each once, in the order of their ids.

    Raises:
        UserError: `alphabet` is empty or repeats a character.
    """

    alphabet: str

    def __post_init__(self) -> None:
        if not self.alphabet:
            raise UserError("the alphabet is empty: a character tokenizer needs some text first")
        if len(set(self.alphabet)) != len(self.alphabet):
            twice = next(c for i, c in enumerate(self.alphabet) if c in self.alphabet[:i])
            raise UserError(f"the alphabet holds {twice!r} twice: give each character once")

    @classmethod
    def from_text(cls, text: str | Iterable[str]) -> "CharTokenizer":
        """Returns the tokenizer of the sorted distinct characters of one text or of several."""
        characters: set[str] = set()
        for part in [text] if isinstance(text, str) else text:
            characters.update(part)
        return cls("".join(sorted(characters)))

    @property
    def vocab_size(self) -> int:
        """How many characters there are."""
        return len(self.alphabet)

    @property
    def eos_id(self) -> int | None:
        """None: no character ends a document."""
        return None

    @property
    def bos_id(self) -> int | None:
        """None: no character begins a text."""
        return None

    def encode(self, text: str) -> list[int]:
        """Returns the id of each character of `text`.

        Raises:
            UserError: A character is not in the alphabet; names it, its code point and position.
        """
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Returns the characters of `ids`; none is special.

        Raises:
            UserError: An id lies outside the vocabulary.
        """
        return "".join([self.alphabet[i] for i in _checked_ids(ids, self.vocab_size)])

    def to_dict(self) -> dict[str, Any]:
        """Returns kind and alphabet; `tokenizer_from_dict` is the inverse."""
        return {"kind": "characters", "alphabet": self.alphabet}

    def encode_array(self, text: str) -> np.ndarray:
        """Returns what `encode` does as a 1-D int32 array, many times as fast.

        Raises:
            UserError: As `encode`.
        """
        points = _code_points(text)
        # The table ends with an unknown, to which every larger code point is clipped.
        ids = self._id_of_code_point[np.minimum(points, len(self._id_of_code_point) - 1)]
        unknown = ids < 0
        if unknown.any():
            position = int(unknown.argmax())
            character = text[position]
            raise UserError(
                f"character {character!r} (U+{ord(character):04X}) at position {position} is not "
                f"among the {self.vocab_size} of this tokenizer: encode text of its alphabet, or "
                "build the tokenizer from all of the text"
            )
        return ids

    @cached_property
    def _id_of_code_point(self) -> np.ndarray:
        points = _code_points(self.alphabet)
        table = np.full(int(points.max()) + 2, -1, np.int32)
        table[points] = np.arange(len(points))
        return table


@dataclass(frozen=True)
class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 as the end of a document."""

    @property
    def vocab_size(self) -> int:
        """257: the bytes, and the end of a document."""
        return 257

    @property
    def eos_id(self) -> int | None:
        """256, which is no byte."""
        return 256

    @property
    def bos_id(self) -> int | None:
        """None: nothing begins a text."""
        return None

    def encode(self, text: str) -> list[int]:
        """Returns the bytes of `text` in UTF-8."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Returns the text of `ids`, never with an end of document; broken UTF-8 never fails.

        Raises:
            UserError: An id lies outside the vocabulary.
        """
        checked = _checked_ids(ids, self.vocab_size)
        return bytes(i for i in checked if i < 256).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """Returns the kind; `tokenizer_from_dict` is the inverse."""
        return {"kind": "bytes"}


class BPETokenizer:
    """Byte-pair encoding by the `tokenizers` library: byte-level, or of characters as in Llama 2.

    Text that spells a special token, such as `<|endoftext|>`, is encoded as ordinary text: a
    document cannot end itself. The eos id is there to be appended by the caller.

    Attributes:
        eos_token: The token that ends a document, or None.
        bos_token: The token that begins a text, or None.
        chat_template: The Jinja template that lays messages out, or None.
        splits_at_spaces: Whether text is cut as GPT-2 cuts it, so that what lies between two of the
            cuts is encoded the same by itself; False where that is not known.
    """

    def __init__(
        self,
        library: "tokenizers.Tokenizer",
        eos_token: str | None = END_OF_TEXT,
        *,
        bos_token: str | None = None,
        chat_template: str | None = None,
    ):
        """Wraps (and takes over) a tokenizer of the library.

        Args:
            library: Its model must be BPE. What its post-processor puts before a text is put there
                by `encode_prompt`.
            eos_token: The token that ends a document, None for none.
            bos_token: The token that begins a text, None for none.
            chat_template: The Jinja template for `encode_chat`, None for none.

        Raises:
            UserError: The model is not BPE, or a named token is not in the vocabulary.
        """
        spec = json.loads(library.to_str())
        kind = spec["model"]["type"]
        if kind != "BPE":
            raise UserError(f"the tokenizer's model is {kind}: give one whose model is BPE")
        # Files may carry a truncation length or padding, which would silently change documents.
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        self._library = library
        self.splits_at_spaces = _splits_at_spaces(spec)
        self._prompt_start = _prompt_start(spec)
        decoders = spec["decoder"] or {}
        decoder_names = {d["type"] for d in decoders.get("decoders", [decoders]) if d}
        self._is_byte_level = "ByteLevel" in decoder_names
        self._has_byte_tokens = "ByteFallback" in decoder_names
        self._special_ids = frozenset(t["id"] for t in spec["added_tokens"] if t["special"])
        self._vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_token = eos_token
        self.bos_token = bos_token
        self.chat_template = chat_template
        self._named_id("end-of-text", eos_token)
        self._named_id("beginning-of-text", bos_token)

    def _named_id(self, what: str, token: str | None) -> int | None:
        named = None if token is None else self._library.token_to_id(token)
        if token is not None and named is None:
            raise UserError(
                f"the {what} token {token!r} is not among the {self._vocab_size} tokens of the "
                "vocabulary: name one that is, or None"
            )
        return named

    @classmethod
    def from_files(cls, vocab_json: str | Path, merges_txt: str | Path) -> "BPETokenizer":
        """Reads GPT-2's two files; eos is `<|endoftext|>` where the vocabulary has it.

        Raises:
            UserError: A file is missing or is not what its name says.
        """
        import tokenizers

        for path in (vocab_json, merges_txt):
            if not Path(path).is_file():
                raise UserError(f"no tokenizer file {str(path)!r}: give vocab.json and merges.txt")
        try:
            model = tokenizers.models.BPE.from_file(str(vocab_json), str(merges_txt))
        except Exception as error:  # The library raises bare Exception.
            raise UserError(
                f"cannot read {str(vocab_json)!r} with {str(merges_txt)!r} as a BPE vocabulary "
                f"({_first_line(error)}): give GPT-2's vocab.json and merges.txt"
            ) from error
        library = _byte_level(model)
        has_eos = library.token_to_id(END_OF_TEXT) is not None
        if has_eos:
            library.add_special_tokens([END_OF_TEXT])
        return cls(library, END_OF_TEXT if has_eos else None)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learns a byte-level vocabulary: 256 bytes, `<|endoftext|>` (id 0, eos), then merges.

        The same documents give the same vocabulary. It has fewer than `vocab_size` tokens only
        where the documents hold no more pairs to merge.

        Raises:
            UserError: `vocab_size` is below 257.
        """
        import tokenizers

        if vocab_size < 257:
            raise UserError(
                f"vocab_size is {vocab_size}: byte-level BPE needs at least 257, the 256 bytes "
                f"and {END_OF_TEXT}"
            )
        library = _byte_level(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        )
        pieces = (piece for document in documents for piece in _pieces(document))
        library.train_from_iterator(pieces, trainer)
        return cls(library)

    @property
    def vocab_size(self) -> int:
        """The largest id of the vocabulary, added tokens included, plus 1."""
        return self._vocab_size

    @property
    def base_vocab_size(self) -> int:
        """The size of the vocabulary without the tokens that were added to it."""
        return max(self._library.get_vocab(with_added_tokens=False).values()) + 1

    @property
    def eos_id(self) -> int | None:
        """The id of `eos_token`; None where there is none."""
        return self._named_id("end-of-text", self.eos_token)

    @property
    def bos_id(self) -> int | None:
        """The id of `bos_token`; None where there is none."""
        return self._named_id("beginning-of-text", self.bos_token)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, adding no special tokens."""
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, encoded by several threads."""
        encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of `text` after those that the model expects before any text.

        That is the bos id where the tokenizer's files say so; an eos id is never appended.
        """
        return self._prompt_start + self.encode(text)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        """Returns the ids of a conversation laid out by the chat template.

        Special tokens that the template writes become their ids; those that a message spells are
        ordinary text, so a message cannot end its turn or speak as somebody else.

        Args:
            messages: `{"role": ..., "content": ...}` each, both strings.
            add_generation_prompt: Whether the ids end where the model's turn begins.
            options: Further variables of the template.

        Raises:
            UserError: There is no chat template, the messages are malformed, or the template
                refuses them.
        """
        if self.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template: load a model tuned for chat, set "
                "chat_template, or encode a plain text with encode_prompt"
            )
        added = self._chat_library.get_added_tokens_decoder().values()
        disguised, restored = disguise(
            messages,
            self.chat_template,
            special=[token.content for token in added if token.special],
            added=[token.content for token in added if not token.special],
        )
        text = render_chat(
            self.chat_template,
            disguised,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            **options,
        )
        return self._encode_disguised(text, restored)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Returns the text of `ids`, special tokens spelled out or left out.

        Raises:
            UserError: An id lies outside the vocabulary.
        """
        checked = _checked_ids(ids, self.vocab_size)
        return self._library.decode(checked, skip_special_tokens=skip_special)

    def to_dict(self) -> dict[str, Any]:
        # A run compares what an earlier one stored, so what is not there adds no key.
        """Returns vocabulary, rules, special tokens and template as JSON-serializable values."""
        named = {"bos_token": self.bos_token, "chat_template": self.chat_template}
        return {
            "kind": "bpe",
            "json": self._library.to_str(),
            "eos_token": self.eos_token,
            **{key: value for key, value in named.items() if value is not None},
        }

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickle forgets that special tokens are not to be parsed.
        return tokenizer_from_dict, (self.to_dict(),)

    @cached_property
    def _chat_library(self) -> "tokenizers.Tokenizer":
        """The same tokenizer, but it does parse special tokens; the two share the vocabulary."""
        import tokenizers

        library = tokenizers.Tokenizer.from_str(self._library.to_str())
        library.model = self._library.model
        return library

    @cached_property
    def _plain_libraries(self) -> "tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]":
        """Two that know no added tokens: for the start of a text, and for what is inside one."""
        import tokenizers

        spec = json.loads(self._library.to_str())
        spec |= {"added_tokens": [], "post_processor": None}
        spec["model"] = {"type": "BPE", "vocab": {}, "merges": []}
        text = json.dumps(spec)
        inside = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        both = tokenizers.Tokenizer.from_str(text), tokenizers.Tokenizer.from_str(inside)
        for library in both:
            library.model = self._library.model
        return both

    def _encode_disguised(self, text: str, restored: dict[int, str]) -> list[int]:
        """Encodes a chat, then once more each stretch between added tokens that hides a token."""
        encoding = self._chat_library.encode(text, add_special_tokens=False)
        if not restored:
            return encoding.ids
        names = self._chat_library.get_added_tokens_decoder()
        ids: list[int] = []
        stretch: list[int] = []
        start = 0
        for i, (begin, end) in zip(
            [*encoding.ids, None], [*encoding.offsets, (len(text), len(text))], strict=True
        ):
            # An unknown character has the id of an added token too, but is not spelled like it.
            if i is not None and not (i in names and text[begin:end].strip() == names[i].content):
                stretch.append(i)
                continue
            hidden = text[start:begin]
            shown = hidden.translate(restored)
            if shown != hidden:
                library = self._plain_libraries[start > 0]
                stretch = library.encode(shown, add_special_tokens=False).ids
            ids += stretch if i is None else [*stretch, i]
            stretch, start = [], end
        return ids

    def _bytes_of(self, i: int, is_first: bool) -> bytes:
        """Returns what `i` adds to a decoded text that it begins, or else continues."""
        token = self._library.id_to_token(i)
        if token is None:
            return b""
        if self._is_byte_level:
            try:
                return bytes([_byte_of_letter()[letter] for letter in token])
            except KeyError:  # An added token, which is spelled as it is.
                return token.encode("utf-8")
        byte = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if byte is not None and int(byte[1], 16) >= 0x80:
            return bytes([int(byte[1], 16)])
        # A decoder may drop the space that begins a text; the second of two keeps its own.
        once = self._library.decode([i], skip_special_tokens=False)
        if is_first:
            return once.encode("utf-8")
        twice = self._library.decode([i, i], skip_special_tokens=False)
        return twice[len(once) :].encode("utf-8")


def tokenizer_from_dict(values: dict[str, Any]) -> Tokenizer:
    """Rebuilds the tokenizer whose `to_dict()` gave `values`.

    Raises:
        UserError: `values` is not such a dict.
    """
    kind = values.get("kind")
    try:
        if kind == "characters":
            return CharTokenizer(values["alphabet"])
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "bpe":
            import tokenizers

            return BPETokenizer(
                tokenizers.Tokenizer.from_str(values["json"]),
                eos_token=values["eos_token"],
                bos_token=values.get("bos_token"),
                chat_template=values.get("chat_template"),
            )
    except KeyError as error:
        raise UserError(
            f"the saved {kind} tokenizer lacks {error}: it holds {', '.join(sorted(values))}; "
            "pass what to_dict() returned"
        ) from error
    raise UserError(f"no tokenizer of kind {kind!r}{nearest(str(kind), _KINDS)}")


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text to be continued, of any tokenizer.

    They begin with what the model expects before any text, where a `BPETokenizer` knows of it.
    """
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.encode_prompt(text)
    return tokenizer.encode(text)


def encode_start(tokenizer: Tokenizer, text: str) -> list[int]:
    """As `encode_prompt`; what comes to nothing is the token that begins a text, or that ends one.

    Empty only where the tokenizer has neither.
    """
    starts = [start for start in (tokenizer.bos_id, tokenizer.eos_id) if start is not None]
    return encode_prompt(tokenizer, text) or starts[:1]


def encode_pair(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt, and those of a text that goes on from it.

    A model that goes on has read the prompt's own ids, so a token must not reach over the boundary,
    in training as little as in evaluation. The text's ids are those by which the encoding of both
    together is longer. Where that does not begin with the prompt's, the text is encoded by itself:
    the model then reads a division into tokens that it has rarely seen, and a tokenizer that puts a
    space before every text (Llama 2's) puts one before this.
    """
    before, whole = encode_start(tokenizer, prompt), encode_prompt(tokenizer, prompt + text)
    is_prefix = whole[: len(before)] == before
    return before, whole[len(before) :] if is_prefix else tokenizer.encode(text)


class StreamDecoder:
    """Decodes ids one by one, never half a character; all it returns joined is the whole text.

    Where byte tokens are no UTF-8, only they become U+FFFD, and not what stands beside them, as in
    the library's own decoding of Llama 2's vocabulary.

    Examples:
        >>> stream = StreamDecoder(ByteTokenizer())
        >>> [stream.push(i) for i in "aé".encode()] + [stream.finish()]
        ['a', '', 'é', '']
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = False, continues: bool = False
    ):
        """Begins a text, or goes on with one.

        Args:
            tokenizer: Whose ids they are. One that is none of gptjax's must give every id whole
                characters.
            skip_special: Whether special tokens are left out rather than spelled.
            continues: Whether the ids follow on other text: some tokenizers drop the space that
                begins a text, but not one inside it.
        """
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._is_first = not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        """Returns the characters that are complete with the id `i`, which may be none.

        Raises:
            UserError: The id lies outside the vocabulary.
        """
        tokenizer = self._tokenizer
        [i] = _checked_ids([i], tokenizer.vocab_size)
        if isinstance(tokenizer, ByteTokenizer):
            return self._utf8.decode(bytes([i]) if i < 256 else b"")
        if not isinstance(tokenizer, BPETokenizer):
            return tokenizer.decode([i])
        if self._skip_special and i in tokenizer._special_ids:
            return ""
        added = tokenizer._bytes_of(i, self._is_first)
        # An id without a token, as in a padded vocabulary, begins nothing.
        self._is_first = self._is_first and tokenizer._library.id_to_token(i) is None
        return self._utf8.decode(added)

    def finish(self) -> str:
        """Returns what is left, bytes of an unfinished character as U+FFFD."""
        return self._utf8.decode(b"", final=True)


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smaller of uint16 and uint32 that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.dtype("<u4"))


def _checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    checked = [int(i) for i in ids]
    for position, i in enumerate(checked):
        if not 0 <= i < vocab_size:
            raise UserError(
                f"id {i} at position {position} is outside the vocabulary of {vocab_size}: decode "
                "ids of this tokenizer only"
            )
    return checked


def _byte_level(model: "tokenizers.models.Model") -> "tokenizers.Tokenizer":
    """Puts GPT-2's cut before a model and its byte alphabet on both sides of it."""
    import tokenizers

    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def byte_letters() -> list[str]:
    """Returns the letter that byte-level vocabularies write for each of the 256 bytes.

    Printable bytes of Latin-1 are their own letters; the others have those from U+0100 on.
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


@cache
def _byte_of_letter() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(byte_letters())}


def _prompt_start(spec: dict[str, Any]) -> list[int]:
    """Returns the ids that the post-processor puts before a text, and none that it puts after."""
    after = spec["post_processor"] or {}
    start: list[int] = []
    for step in after.get("processors", [after]):
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):
            start = [step["cls"][1]]
        elif step.get("type") == "TemplateProcessing":
            for part in step["single"]:
                if "Sequence" in part:
                    break
                start += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return start


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text before spaces, where GPT-2's pattern always cuts too."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = _PIECE_END.search(text, start + _PIECE_CHARACTERS)
        if end is None:
            break
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]


def _splits_at_spaces(spec: dict[str, Any]) -> bool:
    """Says whether the text is cut by GPT-2's pattern, after at most a cut around digits."""
    before = spec["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    *digits, last = steps
    # An added token that is not special is found in the text before it is cut.
    found_first = [token for token in spec["added_tokens"] if not token["special"]]
    return (
        not found_first
        and spec["normalizer"] is None
        and all(step["type"] == "Digits" for step in digits)
        and last.get("type") == "ByteLevel"
        and last["use_regex"]
        and not last["add_prefix_space"]
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
