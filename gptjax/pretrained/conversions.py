"""Dequantized models, kept on disk: reading them back takes a tenth of dequantizing them."""

import hashlib
import json
import os
import shutil
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.caching import cache_directory
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.params import abstract_params, flat, nested
from gptjax.pretrained.safetensors_files import SINGLE, open_file, read_json
from gptjax.tokenizer import tokenizer_from_dict

_FORMAT = 1
_unfinished: dict[Path, threading.Thread] = {}
_DESCRIPTION = "model.json"


def conversion_directory(source: Path) -> Path:
    """Where the conversion of a file lies; a file that has changed has another place."""
    source = source.resolve()
    status = source.stat()
    identity = f"{_FORMAT} {source} {status.st_size} {status.st_mtime_ns}"
    name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    return cache_directory() / "converted" / name


def read_conversion(source: Path, mesh: Mesh | None, dtype: Any) -> Model | None:
    """The kept model of a file; None where there is none, or it cannot be read."""
    directory = conversion_directory(source)
    finish_keeping(directory)
    if not (directory / _DESCRIPTION).is_file():
        return None
    try:
        about = read_json(directory / _DESCRIPTION)
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
    params = nested(leaves)
    return Model(model.config, params, model.tokenizer, model.generation, model.source)


def _smallest(values: np.ndarray) -> np.ndarray:
    """Float16 where that holds every value, as it does what was quantized."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.array_equal(half, values) else values


def keep_conversion(source: Path, model: Model) -> None:
    """Writes a float32 model beside others, in the background; a full disk only warns."""
    directory = conversion_directory(source)
    # Taken now: the caller may soon give the parameters away.
    arrays = {name: np.asarray(leaf) for name, leaf in flat(model.params).items()}
    thread = threading.Thread(target=_write, args=(directory, model, arrays))
    _unfinished[directory] = thread
    thread.start()


def finish_keeping(directory: Path) -> None:
    """Waits until a conversion that is being written is whole."""
    thread = _unfinished.pop(directory, None)
    if thread is not None:
        thread.join()


def _write(directory: Path, model: Model, arrays: dict[str, np.ndarray]) -> None:
    import safetensors.numpy

    about = {
        "config": model.config.to_dict(),
        "tokenizer": None if model.tokenizer is None else model.tokenizer.to_dict(),
        "generation": model.generation,
        "source": model.source,
    }
    unfinished = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=directory.name, dir=directory.parent))
        small = {name: _smallest(values) for name, values in arrays.items()}
        safetensors.numpy.save_file(small, unfinished / SINGLE)
        (unfinished / _DESCRIPTION).write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(unfinished, directory)
    except Exception as error:  # safetensors' own error, or the system's.
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        warnings.warn(
            f"the converted model could not be kept in {directory} ({error}); it will be "
            "converted again the next time",
            stacklevel=2,
        )
