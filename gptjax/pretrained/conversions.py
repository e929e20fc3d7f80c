"""Dequantized models, kept on disk: reading them back takes a tenth of dequantizing them."""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.caching import cache_directory, gptjax_version
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.params import abstract_params, flat, nested
from gptjax.pretrained.gguf_files import as_float16
from gptjax.pretrained.json_files import read_json
from gptjax.pretrained.safetensors_files import SINGLE, open_file
from gptjax.tokenizer import tokenizer_from_dict

_unfinished: dict[Path, threading.Thread] = {}
_DESCRIPTION = "model.json"


def conversion_directory(source: Path) -> Path:
    """Where the conversion of a file lies: one place for each path."""
    name = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]
    return cache_directory() / "converted" / f"{source.stem}-{name}"


def _identity(source: Path) -> list[Any]:
    """What a conversion was made of and by; where it has changed the conversion is made anew."""
    status = source.stat()
    return [gptjax_version(), status.st_size, status.st_mtime_ns]


def read_conversion(source: Path, mesh: Mesh | None, dtype: Any) -> Model | None:
    """The kept model of a file; None where there is none, or it cannot be read."""
    directory = conversion_directory(source)
    finish_keeping(directory)
    if not (directory / _DESCRIPTION).is_file():
        return None
    try:
        about = read_json(directory / _DESCRIPTION)
        if about["identity"] != _identity(source):
            return None
        config = ModelConfig.from_dict(about["config"])
        tensors = open_file(directory / SINGLE)
        shapes = flat(abstract_params(config, mesh))
        if {name: tensor.shape for name, tensor in tensors.items()} != {
            name: leaf.shape for name, leaf in shapes.items()
        }:
            return None
        tokenizer = about["tokenizer"]
        model = Model(
            config,
            {},
            None if tokenizer is None else tokenizer_from_dict(tokenizer),
            about["generation"],
            about["source"],
            about["dtypes"],
        )
    except (UserError, KeyError, OSError):
        return None
    leaves = {}
    for name, tensor in tensors.items():
        # Copied, since what JAX makes of a mapped file may share its memory.
        copy = jax.jit(
            lambda x: jnp.array(x, dtype, copy=True), out_shardings=shapes[name].sharding
        )
        leaves[name] = copy(tensor.read())
    return dataclasses.replace(model, params=nested(leaves))


def keep_conversion(source: Path, model: Model) -> None:
    """Writes a float32 model in the background; where that cannot be done it only warns."""
    # Taken now: the caller may soon give the parameters away.
    arrays = {name: np.asarray(leaf) for name, leaf in flat(model.params).items()}
    directory, identity = conversion_directory(source), _identity(source)
    thread = threading.Thread(target=_write, args=(directory, identity, model, arrays))
    _unfinished[directory] = thread
    thread.start()


def finish_keeping(directory: Path) -> None:
    """Waits until a conversion that is being written is whole."""
    thread = _unfinished.pop(directory, None)
    if thread is not None:
        thread.join()


def _write(
    directory: Path, identity: list[Any], model: Model, arrays: dict[str, np.ndarray]
) -> None:
    import filelock
    import safetensors.numpy

    about = {
        "identity": identity,
        "config": model.config.to_dict(),
        "tokenizer": None if model.tokenizer is None else model.tokenizer.to_dict(),
        "generation": model.generation,
        "source": model.source,
        "dtypes": model.dtypes,
    }
    unfinished = directory.with_name(directory.name + ".new")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory.with_name(directory.name + ".lock"), timeout=0):
            # What a process left that was killed here.
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            small = {name: as_float16(values) for name, values in arrays.items()}
            needed = sum(values.nbytes for values in small.values())
            free = shutil.disk_usage(directory.parent).free
            if free < 2 * needed:
                raise OSError(f"it needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
            safetensors.numpy.save_file(small, unfinished / SINGLE)
            (unfinished / _DESCRIPTION).write_text(json.dumps(about), encoding="utf-8")
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(unfinished, directory)
    except filelock.Timeout:
        return  # Another process writes the same.
    except Exception as error:  # safetensors' own error, or the system's.
        shutil.rmtree(unfinished, ignore_errors=True)
        warnings.warn(
            f"the converted model could not be kept in {directory} ({error}); it will be "
            "converted again the next time",
            stacklevel=2,
        )
