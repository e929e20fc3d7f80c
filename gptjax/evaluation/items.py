"""Reading the items of an evaluation from local files, with errors that name the line."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.resumable import from_line


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, without a byte-order mark.

    Raises:
        UserError: if it is not UTF-8, or empty.
        OSError: if it cannot be read.
    """
    data = Path(path).expanduser().read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte {error.start} ({error.reason}); convert it first"
        ) from error
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with items")
    return text


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text, blank ones too but at its end; raises as `read_text` does."""
    # Not splitlines, which also breaks at characters that a line may have, such as U+2028.
    return [line.removesuffix("\r") for line in read_text(path).rstrip("\r\n").split("\n")]


def read_objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON Lines, each after the place that names it in errors.

    Blank lines are passed over.

    Raises:
        UserError: if a line is no object in UTF-8, or there are none.
        OSError: if the file cannot be read.
    """
    some = False
    with Path(path).expanduser().open("rb") as file:
        for number, data in enumerate(file, 1):
            data = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
            if data.strip():
                some = True
                place = f"{path}:{number}"
                record = from_line(place, data)
                _check_characters(place, record)
                yield place, record
    if not some:
        raise UserError(f"{path} is empty; give one object a line")


def _check_characters(place: str, record: dict[str, Any]) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place} has half a character (a surrogate); write it as UTF-8 or as both halves"
        ) from error


def read_texts(path: str | Path) -> list[tuple[str, str]]:
    """Texts, each after the place that names it: JSON Lines with `text`, else a line each.

    Raises:
        UserError: if a line has no text, or there are none.
        OSError: if the file cannot be read.
    """
    if Path(path).suffix != ".jsonl":
        lines = enumerate(read_lines(path), 1)
        return [(f"{path}:{number}", line) for number, line in lines if line.strip()]
    texts = []
    for place, record in read_objects(path):
        text = record.get("text")
        if not isinstance(text, str):
            raise UserError(f'{place} has no text; give {{"text": "..."}}')
        texts.append((place, text))
    return texts
