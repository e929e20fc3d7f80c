"""Records with fields, from where they lie, and what to learn from them: token ids with weights."""

import csv
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.chat import render_chat
from gptjax.data.packing import Example
from gptjax.data.sources import (
    TFDS_PREFIX,
    find_files,
    jsonl_records,
    open_unpacked,
    read_documents,
    suffixes,
    tfds_records,
)
from gptjax.errors import UserError
from gptjax.tokenizer import BPETokenizer, StreamDecoder, Tokenizer, encode_pair

Record = dict[str, Any]
RECORD_SUFFIXES = (".jsonl", ".json", ".tsv", ".txt", ".csv", ".parquet")

# Noncharacters of Unicode, which no text may hold.
_BEGIN, _END = "\ufdd0", "\ufdd1"


def read_records(
    source: str | Path,
    *,
    columns: Sequence[str] = (),
    data_dir: str | Path | None = None,
) -> list[Record]:
    """Reads all records of a source, as dicts of its fields.

    Args:
        source: One of
            a file (also packed as .gz or .zst) or a glob pattern: `.jsonl`, an object a line;
            `.json`, a list of objects or a data set in SQuAD's form, of which each question
            becomes a record of id, title, context, question and answers (a list of texts);
            `.tsv` or `.txt`, fields between tabs; `.csv`; `.parquet`;
            `"tfds:NAME[/CONFIG][:VERSION][@SPLIT]"`, as in `read_documents`.
        columns: The names of the first fields of a .tsv, .txt or .csv file without a header. A
            first line that has one of them is a header, and so is any where there are none.
        data_dir: Where TFDS keeps prepared data.

    Raises:
        UserError: The source is missing, empty, not UTF-8 (with the byte's place) or not what its
            name says; names file and place.
    """
    name = str(source)
    if name.startswith(TFDS_PREFIX):
        records = [
            _plain(record, place)
            for record, place in tfds_records(name.removeprefix(TFDS_PREFIX), data_dir)
        ]
    else:
        if Path(source).is_dir():
            raise UserError(f"{name!r} is a folder: give one of its files, or a glob pattern")
        records = [r for path in find_files(source) for r in _file_records(path, columns)]
    if not records:
        raise UserError(f"{name!r} holds no records: give a source that has some")
    return records


def text_of(record: Mapping[str, Any], *names: str) -> str:
    """The text of the first of some fields that a record has.

    Raises:
        UserError: It has none of them (names those it has), or one that is no text.
    """
    for name in names:
        if name in record:
            if not isinstance(record[name], str):
                raise UserError(
                    f"{name!r} is a {type(record[name]).__name__}, not text, in "
                    f"{_shortened(record)}"
                )
            return record[name]
    raise UserError(
        f"no field {' or '.join(map(repr, names))} in a record; its fields are "
        f"{', '.join(map(repr, record)) or 'none'}"
    )


def encode_example(
    tokenizer: Tokenizer,
    prompt: str,
    completion: str,
    *,
    eos: bool = True,
    prompt_weight: float = 0.0,
) -> Example:
    """A prompt and its completion as token ids, of which the completion's are to be learned.

    The prompt's ids are those of the prompt alone, for these are what `generate_text` begins from
    (`tokenizer.encode_pair`). Begin a completion with the white space that belongs between the two,
    and end no prompt with it.

    Args:
        tokenizer: of the model.
        prompt: the text that is given.
        completion: the text that is to follow.
        eos: whether the end-of-text token, where the tokenizer has one, follows and is learned too.
        prompt_weight: how much a token of the prompt counts as a target, where one of the
            completion counts 1. Above 0 the model learns to write prompts on the side, which is of
            use where there is little to learn from.

    Raises:
        UserError: there are fewer than two tokens.

    Warns:
        UserWarning: there is no token to learn from.
    """
    before, after = encode_pair(tokenizer, prompt, completion)
    if eos and tokenizer.eos_id is not None:
        after = [*after, tokenizer.eos_id]
    return _example(before + after, [prompt_weight] * len(before) + [1.0] * len(after))


def encode_chat_example(
    tokenizer: Tokenizer | None, messages: Sequence[Mapping[str, Any]], **options: Any
) -> Example:
    """A conversation by the model's own template, of which the assistant's turns are to be learned.

    What the assistant writes is found by laying out the conversation up to each of its turns, once
    with the beginning of the turn and once with the whole: what is more is its own, with the token
    that ends the turn. Templates that change earlier turns as a conversation goes on must mark the
    assistant's words by `{% generation %}`. A token that reaches over the boundary of a turn is
    learned; white space after its last token is not, for generation has stopped there.

    Args:
        tokenizer: with a chat template.
        messages: `{"role": ..., "content": ...}` each. A special token that a content spells is
            encoded as the text it is.
        options: further variables of the template.

    Raises:
        UserError: there is no chat template, it refuses the messages, or the assistant's turns
            cannot be told from the rest.

    Warns:
        UserWarning: there is no turn of the assistant.
    """
    if not isinstance(tokenizer, BPETokenizer) or tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template; use encode_example, or a model tuned for chat"
        )
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False, **options)
    spans = _turns_by_prefix(tokenizer, messages, ids, options)
    if spans is None:
        spans = _turns_by_marks(tokenizer, messages, ids, options)
    weights = np.zeros(len(ids), np.float32)
    for start, end in spans:
        while end > start and tokenizer.decode(ids[end - 1 : end]).isspace():
            end -= 1
        weights[start:end] = 1
    return _example(ids, weights)


def _example(ids: Sequence[int], weights: Sequence[float] | np.ndarray) -> Example:
    weights = np.array(weights, np.float32)
    # Nothing comes before the first token that it could be predicted from.
    weights[:1] = 0
    example = Example(np.array(ids, np.int32), weights)
    if not weights.any():
        warnings.warn("an example has no token to learn from and counts nothing", stacklevel=3)
    return example


def _turns_by_prefix(
    tokenizer: BPETokenizer,
    messages: Sequence[Mapping[str, Any]],
    ids: list[int],
    options: dict[str, Any],
) -> list[tuple[int, int]] | None:
    """Where the assistant's turns begin and end; None where a layout does not begin the next."""
    whole = _laid_out(tokenizer, tokenizer.chat_template, messages, options)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if place == 0:
            # Templates may refuse a conversation without messages.
            return None
        before, after = messages[:place], messages[: place + 1]
        asked = _laid_out(
            tokenizer, tokenizer.chat_template, before, options, add_generation_prompt=True
        )
        answered = _laid_out(tokenizer, tokenizer.chat_template, after, options)
        if not (answered.startswith(asked) and whole.startswith(answered)):
            return None
        ends = (
            tokenizer.encode_chat(before, add_generation_prompt=True, **options),
            tokenizer.encode_chat(after, add_generation_prompt=False, **options),
        )
        start, end = (_common_prefix(part, ids) for part in ends)
        spans.append((start, end))
    return spans


def _turns_by_marks(
    tokenizer: BPETokenizer,
    messages: Sequence[Mapping[str, Any]],
    ids: list[int],
    options: dict[str, Any],
) -> list[tuple[int, int]]:
    """Where the tokens of what `{% generation %}` encloses begin and end."""
    template = str(tokenizer.chat_template)
    # What the two tags print must be printed inside them, and not change the white space that
    # Jinja drops around them.
    marked = re.sub(
        r"\{%[-+]?\s*generation\s*(-?)\+?%\}\n?",
        rf"\g<0>{{{{ '{_BEGIN}' \1}}}}",
        template,
    )
    marked = re.sub(
        r"(?m)(?:^[ \t]*)?(\{%(-?)\+?\s*endgeneration\s*[-+]?%\})",
        rf"{{{{\2 '{_END}' }}}}\1",
        marked,
    )
    pieces = StreamDecoder(tokenizer)
    lengths = [len(pieces.push(i)) for i in ids]
    text = _laid_out(tokenizer, marked, messages, options) if marked != template else ""
    parts = re.split(f"{_BEGIN}|{_END}", text)
    if len(parts) < 3 or sum(lengths) != sum(map(len, parts)):
        raise UserError(
            "the assistant's turns cannot be told from the rest: the chat template lays out "
            "earlier messages differently as a conversation goes on, and does not mark the "
            "assistant's words by {% generation %}; split the conversation so that it ends with "
            "its one answer, or mark the template"
        )
    begins, ends = np.cumsum([0, *lengths[:-1]]), np.cumsum(lengths)
    bounds = np.cumsum([len(part) for part in parts])
    # Tokens without a character are the first bytes of the next one's.
    return [
        (
            int(min(np.searchsorted(begins, start), np.searchsorted(ends, start, "right"))),
            int(np.searchsorted(begins, end)),
        )
        for start, end in zip(bounds[0::2], bounds[1::2], strict=False)
    ]


def _laid_out(
    tokenizer: BPETokenizer,
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    options: dict[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> str:
    return render_chat(
        str(template),
        messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        **options,
    )


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    length = min(len(one), len(other))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), length)


def _file_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    _, suffix = suffixes(path)
    if suffix == ".parquet":
        yield from _parquet_records(path)
        return
    if suffix == ".jsonl":
        with open_unpacked(path) as file:
            for record, _ in jsonl_records(file, path):
                yield record
        return
    if suffix not in RECORD_SUFFIXES:
        raise UserError(f"{str(path)!r} holds no records: legal are {', '.join(RECORD_SUFFIXES)}")
    [text] = read_documents(path)
    text = text.removeprefix("\ufeff")
    if suffix == ".json":
        yield from _json_records(text, path)
    elif suffix == ".csv":
        reader = csv.reader(io.StringIO(text, newline=""))
        yield from _named(((reader.line_num, row) for row in reader if row), columns, path)
    else:
        lines = (
            (number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)
        )
        yield from _named(((n, line.split("\t")) for n, line in lines if line), columns, path)


def _named(
    rows: Iterable[tuple[int, list[str]]], columns: Sequence[str], path: Path
) -> Iterator[Record]:
    """Gives the fields of rows the names of the header, or else those that the caller knows."""
    names: Sequence[str] = ()
    for number, row in rows:
        if not names:
            is_header = not columns or bool(set(columns) & {field.strip() for field in row})
            names = [field.strip() for field in row] if is_header else columns
            if is_header:
                continue
        if len(row) < len(names):
            raise UserError(
                f"{path}:{number}: {len(row)} fields where there should be {len(names)} "
                f"({', '.join(names)})"
            )
        yield dict(zip(names, row, strict=False))


def _json_records(text: str, path: Path) -> Iterator[Record]:
    value = _parsed(text, str(path))
    if isinstance(value, dict) and "data" in value:
        yield from _squad_records(value["data"], path)
        return
    if not isinstance(value, list):
        raise UserError(
            f"{path}: a {type(value).__name__}: give a list of objects, or a data set in SQuAD's "
            "form"
        )
    for number, item in enumerate(value):
        yield _object(item, f"{path}, item {number}")


def _squad_records(articles: Any, path: Path) -> Iterator[Record]:
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {
                        "id": question["id"],
                        "title": article.get("title", ""),
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": [answer["text"] for answer in question["answers"]],
                    }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not in SQuAD's form ({type(error).__name__}: {error})") from error


def _parquet_records(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{str(path)!r} is no complete Parquet file ({str(error).splitlines()[0]}): "
            "copy it again"
        ) from error


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from error


def _object(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{place}: a {type(value).__name__}: give objects with named fields")
    return value


def _plain(value: Any, place: str) -> Any:
    """What TFDS gives as text, numbers, lists and dicts."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 at byte {error.start}") from error
    if isinstance(value, Mapping):
        return {name: _plain(item, place) for name, item in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_plain(item, place) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _shortened(record: Mapping[str, Any]) -> str:
    text = repr(dict(record))
    return text if len(text) <= 100 else text[:97] + "..."
