"""The JSON files of a model's folder."""

import json
from pathlib import Path
from typing import Any

from gptjax.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        UserError: It holds something else; a Git LFS pointer and a web page are named as such.
    """
    content = path.read_bytes()
    refuse_other_content(path, content[:512])
    try:
        values = json.loads(content.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one.
        raise UserError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object; download it again")
    return values


def refuse_other_content(path: Path, start: bytes) -> None:
    """Refuses what is often found under a model file's name instead of it.

    Args:
        path: the file.
        start: its first bytes.

    Raises:
        UserError: if it is a Git LFS pointer or a web page.
    """
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder, "
            "or download the file"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page, not a model's file; download the file itself")
