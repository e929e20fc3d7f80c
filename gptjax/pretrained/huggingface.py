"""Models in Hugging Face's layout: config.json, files of weights, a tokenizer."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from gptjax.adapters import merge_params
from gptjax.config import ModelConfig
from gptjax.errors import UserError, nearest
from gptjax.model import Model
from gptjax.pretrained import flax_files
from gptjax.pretrained.families import family_of, read_config
from gptjax.pretrained.family import Family, canonical
from gptjax.pretrained.json_files import read_json
from gptjax.pretrained.mapping import (
    Tensor,
    Weight,
    by_layer,
    check_tensors,
    export_tensors,
    file_shape,
    import_params,
)
from gptjax.pretrained.safetensors_files import INDEX, open_directory, write_directory
from gptjax.pretrained.tokenizer_files import read_tokenizer, write_tokenizer
from gptjax.tokenizer import Tokenizer

_EXPORT_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def is_directory(path: Path) -> bool:
    """Whether a folder is in this layout: its config.json names a model type."""
    config = path / "config.json"
    return config.is_file() and "model_type" in read_json(config)


def load_directory(
    directory: Path, mesh: Mesh | None = None, dtype: Any = jnp.float32, tokenizer: bool = True
) -> Model:
    """Loads a model, everything checked before anything is allocated.

    Args:
        directory: the folder.
        mesh: as in `load`.
        dtype: of the parameters.
        tokenizer: as in `load`.

    Raises:
        UserError: see `load`.
    """
    values = read_json(directory / "config.json")
    family, config = read_config(values, str(directory / "config.json"))
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    tensors = named_tensors(family, config, _open(directory), str(directory))
    found = read_own_tokenizer(directory) if tokenizer else None
    entries = family.weights(config)
    return Model(
        config,
        import_params(tensors, entries, config, mesh, dtype),
        found,
        generation,
        values,
        {name: np.dtype(tensor.dtype).name for name, tensor in tensors.items()},
    )


def _open(directory: Path) -> dict[str, Tensor]:
    """The tensors of a folder by PyTorch's names; safetensors where there are both."""
    has_safetensors = any(directory.glob("*.safetensors")) or (directory / INDEX).is_file()
    if flax_files.is_directory(directory) and not has_safetensors:
        return flax_files.open_directory(directory)
    tensors = open_directory(directory)
    return flax_files.as_pytorch(tensors) if flax_files.is_flax(tensors) else tensors


def read_own_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a folder.

    Raises:
        UserError: if it cannot be read; says how to do without.
    """
    try:
        return read_tokenizer(directory)
    except UserError as error:
        raise UserError(f"{error}; load(..., tokenizer=False) loads the weights alone") from error


def named_tensors(
    family: Family, config: ModelConfig, tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The tensors of a model by its family's names, checked.

    Args:
        family: whose names they are.
        config: the model.
        tensors: name in the file -> tensor.
        where: they lie, for errors.

    Raises:
        UserError: if they are not the model's.
    """
    entries = family.weights(config)
    expected = {name for name, _, _ in by_layer(entries, config)}
    named = {}
    for name, tensor in tensors.items():
        if name.endswith(family.buffers):
            continue
        with_prefix = family.prefix + name
        named[with_prefix if with_prefix in expected and name not in expected else name] = tensor
    if config.tie_embeddings:
        _drop_tied_head(family, config, named, where)
    check_tensors(named, entries, config, where)
    return named


def _drop_tied_head(
    family: Family, config: ModelConfig, tensors: dict[str, Tensor], where: str
) -> None:
    """Files may hold a tied head all the same; it must then be the embedding."""
    by_params = {
        entry.params[0]: entry.name
        for entry in family.weights(config.replace(tie_embeddings=False))
    }
    head, table = by_params["head.kernel"], by_params["embed.tokens"]
    if head not in tensors or table not in tensors:
        return
    one, other = tensors[head], tensors[table]
    if one is not other and (one.shape != other.shape or not _equal(one.read(), other.read())):
        raise UserError(
            f"config.json of {where} ties the output matrix to the embedding "
            f"(tie_word_embeddings), but {head} and {table} differ; set it to false if the model "
            "was trained so"
        )
    del tensors[head]


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Piece by piece, for a comparison of whole tensors would hold a third of their size."""
    rows = max(1, 2**24 // max(one[0].size, 1))
    pieces = range(0, len(one), rows)
    return all(np.array_equal(one[at : at + rows], other[at : at + rows]) for at in pieces)


def save_pretrained(
    model: Model,
    directory: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Writes a model in Hugging Face's layout, which transformers opens.

    The folder gets config.json, generation_config.json, safetensors files and the tokenizer's
    files. A model that was loaded from this layout is written with the config.json that it came
    with and gives the same tensors bit for bit; another, such as a trained one, is written in the
    first family that has all that it has: GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2 or 3. Weights
    that were changed since they were loaded, by training, are written as float32, unless the
    dtypes that they came in hold them exactly.

    Args:
        model: the model.
        directory: a folder, made where it is missing. Weights that it holds are replaced.
        dtype: "float32", "float16" or "bfloat16" for all tensors; None loses nothing.
        max_shard_size: the most that one file holds, such as "500MB".

    Raises:
        UserError: if no family fits the model, naming what stands in the way, or an argument is
            not legal.
    """
    directory = Path(directory).expanduser()
    model = replace(model, params=merge_params(model.params))
    family = family_of(model.config, model.source.get("model_type"))
    config = model.config
    if dtype is not None and dtype not in _EXPORT_DTYPES:
        raise UserError(f"dtype is {dtype!r}{nearest(str(dtype), _EXPORT_DTYPES)}")
    shard_bytes = _bytes(max_shard_size)
    entries = family.weights(config)
    dtypes = _tensor_dtypes(model, entries, dtype)
    shapes = {
        tensor: (file_shape(entry, config), dtypes[tensor])
        for tensor, entry, _ in by_layer(entries, config)
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_directory(directory, export_tensors(model.params, entries, config), shapes, shard_bytes)
    own = {"architectures": [family.architecture], "model_type": family.model_type}
    name = next(iter(dtypes.values())).name
    ids = _special_ids(model)
    values = own | {"dtype": name} | ids | family.write(config)
    if model.source.get("model_type") == family.model_type:
        _, source = read_config(model.source, "config.json")
        if canonical(source) == canonical(config):
            values = own | model.source
            if {tensor: own.name for tensor, own in dtypes.items()} != model.dtypes:
                values.pop("torch_dtype", None)
                values["dtype"] = name
    _write_json(directory / "config.json", values)
    _write_json(directory / "generation_config.json", ids | model.generation)
    if model.tokenizer is not None:
        write_tokenizer(model.tokenizer, directory)


def _tensor_dtypes(model: Model, entries: list[Weight], dtype: str | None) -> dict[str, Any]:
    """NumPy's dtype of each tensor in the file."""
    names = [name for name, _, _ in by_layer(entries, model.config)]
    if dtype is not None:
        return dict.fromkeys(names, _EXPORT_DTYPES[dtype])
    own = jax.tree.leaves(model.params)[0].dtype
    if set(names) != set(model.dtypes) or not set(model.dtypes.values()) <= set(_EXPORT_DTYPES):
        return dict.fromkeys(names, own)
    came_in = {name: _EXPORT_DTYPES[model.dtypes[name]] for name in names}
    for name, values in export_tensors(model.params, entries, model.config):
        with np.errstate(over="ignore"):
            narrow = values.astype(came_in[name])
        if not np.array_equal(narrow.astype(values.dtype), values, equal_nan=True):
            return dict.fromkeys(names, own)
    return came_in


def _special_ids(model: Model) -> dict[str, Any]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", size.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(f"max_shard_size is {size!r}; a number with KB, MB, GB or TB")
    if float(match[1]) == 0:
        raise UserError(f"max_shard_size is {size!r}; above 0")
    power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
    return max(1, int(float(match[1]) * 1000**power))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
