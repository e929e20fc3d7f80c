"""JSON Lines that a stopped run goes on with: whole lines, one writer, the same settings."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import EXECUTION_FIELDS
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.params import Params

_OPAQUE = {
    "model": "another model",
    "params": "another model",
    "key": "another seed or key",
    "items": "other items",
}
"""Settings that are told by a phrase and not by their value."""


def to_line(record: dict[str, Any]) -> bytes:
    """A record as a line of UTF-8."""
    try:
        return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        # Half a surrogate pair, which JSON can spell and UTF-8 cannot.
        return json.dumps(record).encode("ascii") + b"\n"


def from_line(place: str, data: bytes) -> dict[str, Any]:
    """The record of a line; `place` names it in errors.

    Raises:
        UserError: if the line is no object in UTF-8.
    """
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason}); convert the file first") from error
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); give one object a line") from error
    except RecursionError as error:
        raise UserError(f"{place}: nested too deeply; give one object a line") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: a {type(record).__name__}; give one object a line")
    return record


def whole_lines(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """The lines of a file that are complete, each as its place and its record.

    A last line that a kill cut short is left out; a file that is not there has none.

    Returns:
        The lines, and how many bytes they have.

    Raises:
        UserError: as `from_line` does.
    """
    lines: list[tuple[str, dict[str, Any]]] = []
    end = 0
    if path.exists():
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if not data.endswith(b"\n"):
                    break
                place = f"{path}:{number}"
                lines.append((place, from_line(place, data)))
                end += len(data)
    return lines, end


def model_settings(model: Model) -> dict[str, Any]:
    """What tells a model from others: its configuration, and a hash of some of its values."""
    config = model.config.to_dict()
    return {
        "model": {name: config[name] for name in config if name not in EXECUTION_FIELDS},
        "params": params_fingerprint(model.params),
        "tokenizer": _tokenizer_hash(model),
    }


def _tokenizer_hash(model: Model) -> str | None:
    if model.tokenizer is None:
        return None
    text = json.dumps([model.tokenizer.to_dict(), model.stop_ids], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def params_fingerprint(params: Params) -> str:
    """A hash of some values of every parameter: enough to tell models apart, and soon computed."""
    digest = hashlib.sha256()
    for path, values in jax.tree_util.tree_leaves_with_path(_some_values(params)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(values).tobytes())
    return digest.hexdigest()


@jax.jit
def _some_values(params: Params) -> Params:
    def some(x: jax.Array) -> jax.Array:
        places = np.unravel_index(np.linspace(0, x.size - 1, num=64, dtype=np.int64), x.shape)
        return x[places].astype(jnp.float32)

    return jax.tree.map(some, params)


def check_settings(destination: Path, settings: dict[str, Any], *, is_begun: bool) -> None:
    """Compares settings with those of a run that goes on, or writes those of a new one.

    They stand in a file of the destination's name with `.settings.json` behind it.

    Args:
        destination: the file of lines.
        settings: all that lines depend on, as JSON has it.
        is_begun: whether the destination has lines.

    Raises:
        UserError: if the settings differ, or those of lines that are there are missing.
    """
    path = destination.with_name(destination.name + ".settings.json")
    if not is_begun:
        # Replaced at once, so that a kill leaves a whole file.
        unfinished = path.with_name(path.name + ".new")
        unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
        return
    try:
        before = dict(_flat(json.loads(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        raise UserError(
            f"{destination} has lines, but {path.name}, which tells what they were made with, is "
            "missing; give another file to write"
        ) from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); give another file to write") from error
    for name, value in _flat(settings):
        old = before.get(name)
        if old != value:
            what = _OPAQUE.get(name, f"{name} {old}, not {value}")
            raise UserError(
                f"{destination} was made with {what}; go on with the same settings, or give "
                "another file to write"
            )


def _flat(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and name not in _OPAQUE:
            yield from value.items()
        else:
            yield name, value


@contextlib.contextmanager
def alone(destination: Path) -> Iterator[None]:
    """Holds a lock beside the file, so that no two runs write to it.

    Raises:
        UserError: if another run holds it.
    """
    import filelock

    lock = filelock.FileLock(destination.with_name(destination.name + ".lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{destination} is in use by another run; wait for it to end, or give another file"
        ) from None
    try:
        yield
    finally:
        lock.release()
