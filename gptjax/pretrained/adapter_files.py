"""Adapters of LoRA in PEFT's layout: adapter_config.json beside adapter_model.safetensors.

PEFT adapts the modules of transformers, gptjax its own kernels. Where a module holds several
kernels (GPT-2's `c_attn`), they share what PEFT calls `lora_A`. Read, each kernel gets a copy of
it; written, the kernels' additions stand side by side in it, so that nothing is lost either way.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gptjax.adapters import LoRA, join_params, trainable_shardings
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.layouts import LowRank, merge_low_rank
from gptjax.model import Model
from gptjax.params import Params, flat, nested, param_specs
from gptjax.pretrained.families import family_of
from gptjax.pretrained.json_files import read_json
from gptjax.pretrained.mapping import Weight, by_layer, dimensions
from gptjax.pretrained.safetensors_files import open_file, refuse_pickle

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (path / CONFIG).is_file()


def save_adapter(model: Model, directory: str | Path, *, base: str | None = None) -> None:
    """Writes the additions of LoRA as an adapter that PEFT opens on the base model.

    Args:
        model: with `LowRank` parameters, as `load(run, merge=False)` and `join_params` give them.
        directory: a folder, made where it is missing.
        base: the base model's name or path, as transformers takes it; None is where it came from,
            if that is known.

    Raises:
        UserError: if there are no additions, or the model is of no family that transformers has.
    """
    import safetensors.numpy

    directory = Path(directory).expanduser()
    config = model.config
    lora = lora_of(model.params)
    family = family_of(config, model.source.get("model_type"))
    targets = {path: leaf for path, leaf in flat(model.params).items() if _is_low_rank(leaf)}
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, int] = {}
    for name, entry, layer in by_layer(family.weights(config), config):
        parts = [part for part, path in enumerate(entry.params) if path in targets]
        if not parts:
            continue
        pairs = []
        for path in (entry.params[part] for part in parts):
            kernel = targets[path]
            down, up = (np.asarray(x[layer], np.float32) for x in (kernel.down, kernel.up))
            pairs.append((down, up * (kernel.scale / lora.scale)))
        module = name.removesuffix(".weight")
        one, other = _to_module(entry, parts, pairs, config)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = one
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = other
        # The last two parts of a name, for the last alone need not be unique.
        modules[".".join(module.split(".")[-2:])] = len(parts)
    fused = {module: count for module, count in modules.items() if count > 1}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or model.source.get("_name_or_path"),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family.model_type == "gpt2",
        "target_modules": sorted(modules),
        "rank_pattern": {module: lora.rank * count for module, count in fused.items()},
        "alpha_pattern": {module: lora.alpha * count for module, count in fused.items()},
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_adapter(directory: str | Path, model: Model) -> Model:
    """Puts an adapter that PEFT or `save_adapter` wrote on its base model.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.
        model: the base model.

    Returns:
        The model with `LowRank` parameters. It generates, is evaluated and goes on being trained
        (`fit(..., params=model.params, trainable=lora_of(model.params))`) as it is;
        `adapters.merge_params` makes plain arrays of them.

    Raises:
        UserError: if it is an adapter of another kind than LoRA's matrices, has a setting that is
            not supported, or tensors that are not the model's.
    """
    directory = Path(directory).expanduser()
    values, where = read_adapter_config(directory)
    tensors = _open_weights(directory)
    config = model.config
    family = family_of(config, model.source.get("model_type"))
    scale = float(values.get("lora_alpha", 8)) / float(values.get("r", 8))
    # By target: the number of each block that has one, and its two matrices.
    found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    known: set[str] = set()
    for name, entry, layer in by_layer(family.weights(config), config):
        module = name.removesuffix(".weight")
        pair = [f"{module}.lora_A.weight", f"{module}.lora_B.weight"]
        present = [key for key in pair if key in tensors]
        if not present:
            continue
        known.update(present)
        if len(present) < 2:
            raise UserError(f"{where} has {present[0]} and not its counterpart; write it again")
        one, other = (tensors[key].read().astype(np.float32) for key in pair)
        specs = flat(param_specs(config))
        if any(specs[path].kind != "matrix" for path in entry.params):
            raise UserError(f"{where} adapts {module}, which is no matrix of the blocks")
        _check_shapes(one, other, entry, config, module, where)
        own = _scale(values, module, len(one)) / scale
        for path, down, up in _from_module(entry, one, other * own, config):
            found.setdefault(path, {})[layer] = down, up
    unknown = sorted(tensors.keys() - known)
    if unknown or not found:
        names = ", ".join(unknown[:10]) or "none"
        raise UserError(
            f"{directory / WEIGHTS} holds tensors that are not of this model's matrices ({names}); "
            "give the model that the adapter was trained on"
        )
    trained, rank = _stacked(found, config)
    lora = LoRA(rank, scale * rank, tuple(sorted(found)))
    leaf = jax.tree.leaves(model.params)[0]
    place = leaf.sharding
    if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
        places = trainable_shardings(config, lora, place.mesh)
        trained = jax.tree.map(jax.device_put, trained, places)
    else:
        trained = jax.tree.map(jnp.asarray, trained)
    return replace(model, params=join_params(trained, merge_low_rank(model.params), lora))


def lora_of(params: Params) -> LoRA:
    """The `LoRA` whose additions parameters have, to go on with them.

    Raises:
        UserError: if there are none.
    """
    found = {path: leaf for path, leaf in flat(params).items() if _is_low_rank(leaf)}
    if not found:
        raise UserError("the parameters have no low-rank additions; give LoRA(...) of your own")
    first = next(iter(found.values()))
    rank = first.down.shape[-1]
    return LoRA(rank, first.scale * rank, tuple(found))


def _is_low_rank(leaf: Any) -> bool:
    return isinstance(leaf, LowRank)


def read_adapter_config(directory: Path) -> tuple[dict[str, Any], str]:
    """The values of adapter_config.json, and its path.

    Raises:
        UserError: if they say something that changes the model and is not supported.
    """
    path = directory / CONFIG
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path} is of type {values.get('peft_type')!r}; only LORA is supported")
    wanted: dict[str, tuple[Any, ...]] = {
        "bias": ("none", None),
        "use_dora": (False, None),
        "lora_bias": (False, None),
        "modules_to_save": (None, []),
        "trainable_token_indices": (None, []),
        "target_parameters": (None, []),
        "layer_replication": (None, []),
        "alora_invocation_tokens": (None, []),
    }
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        # PEFT changes the base's own weights when it opens these.
        raise UserError(
            f"{path} sets init_lora_weights to {start!r}, which changes the base model too and is "
            "not supported; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, legal in wanted.items():
        if values.get(key) not in legal:
            raise UserError(f"{path} sets {key} to {values[key]!r}, which is not supported")
    return values, str(path)


def _open_weights(directory: Path) -> dict[str, Any]:
    if not (directory / WEIGHTS).is_file():
        pickled = directory / "adapter_model.bin"
        if pickled.is_file():
            refuse_pickle(pickled)
        raise UserError(f"{directory} holds no {WEIGHTS}; download the adapter again")
    tensors = open_file(directory / WEIGHTS)
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _scale(values: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies a module's addition by."""
    alpha = values.get("lora_alpha", 8)
    for pattern, own in (values.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    # Rank-stabilized (Kalajdzievski 2023) or not.
    return float(alpha) / (math.sqrt(rank) if values.get("use_rslora") else rank)


class _Order:
    """Where the inputs and outputs of a kernel lie in a module's matrix."""

    def __init__(self, entry: Weight, config: ModelConfig):
        spec = flat(param_specs(config))[entry.params[0]]
        self.inputs, self.outputs = entry.order[: spec.fan_in], entry.order[spec.fan_in :]
        dims = entry.dims.split()
        # One dimension of the file's tensor has the inputs; the other has the outputs and parts.
        self.input_dim, self.output_dim = sorted(dims, key=lambda dim: dim[0] not in self.inputs)
        self.sizes = dimensions(entry, config)

    def shape(self, letters: str) -> list[int]:
        return [self.sizes[letter] for letter in letters]


def _to_module(
    entry: Weight,
    parts: list[int],
    pairs: list[tuple[np.ndarray, np.ndarray]],
    config: ModelConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """`lora_A` `[R, inputs]` and `lora_B` `[outputs, R]` of kernels in one module."""
    order = _Order(entry, config)
    rank = pairs[0][0].shape[-1]
    one, other = [], np.zeros([*order.shape(order.output_dim), rank * len(parts)], np.float32)
    for place, (part, (down, up)) in enumerate(zip(parts, pairs, strict=True)):
        axes = [order.inputs.index(letter) for letter in order.input_dim]
        one.append(down.transpose([*axes, down.ndim - 1]).reshape(-1, rank).T)
        letters = order.output_dim.replace("P", "")
        axes = [1 + order.outputs.index(letter) for letter in letters]
        index: list[Any] = [part if letter == "P" else slice(None) for letter in order.output_dim]
        other[(*index, slice(place * rank, (place + 1) * rank))] = up.transpose([*axes, 0])
    # safetensors writes memory as it lies.
    return np.ascontiguousarray(np.concatenate(one)), other.reshape(-1, other.shape[-1])


def _from_module(
    entry: Weight, one: np.ndarray, other: np.ndarray, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The inverse: the path, `down` and `up` of each kernel in a module."""
    order = _Order(entry, config)
    down = one.T.reshape(*order.shape(order.input_dim), -1)
    axes = [order.input_dim.index(letter) for letter in order.inputs]
    down = down.transpose([*axes, down.ndim - 1])
    outputs = other.reshape(*order.shape(order.output_dim), -1)
    letters = order.output_dim
    for part, path in enumerate(entry.params):
        up = outputs
        if "P" in letters:
            up = np.take(outputs, part, axis=letters.index("P"))
        left = letters.replace("P", "")
        up = up.transpose([up.ndim - 1, *(left.index(letter) for letter in order.outputs)])
        # Of a module with several kernels, what adds nothing to this one.
        used = up.reshape(len(up), -1).any(axis=1)
        if len(entry.params) == 1 or not used.any():
            used = np.full(len(up), len(entry.params) == 1)
        if used.any():
            yield path, down[..., used], up[used]


def _stacked(
    found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]], config: ModelConfig
) -> tuple[Params, int]:
    """The additions of all blocks, stacked, and their rank: those of a lower rank have zeros."""
    rank = max(len(up) for blocks in found.values() for _, up in blocks.values())
    leaves: dict[str, np.ndarray] = {}
    for path, blocks in found.items():
        down, up = next(iter(blocks.values()))
        downs = np.zeros((config.num_layers, *down.shape[:-1], rank), np.float32)
        ups = np.zeros((config.num_layers, rank, *up.shape[1:]), np.float32)
        for layer, (down, up) in blocks.items():
            downs[layer, ..., : len(up)], ups[layer, : len(up)] = down, up
        leaves |= {f"{path}.down": downs, f"{path}.up": ups}
    return nested(leaves), rank


def _check_shapes(
    one: np.ndarray, other: np.ndarray, entry: Weight, config: ModelConfig, module: str, where: str
) -> None:
    order = _Order(entry, config)
    inputs = math.prod(order.shape(order.input_dim))
    outputs = math.prod(order.shape(order.output_dim))
    if one.shape == (len(one), inputs) and other.shape == (outputs, len(one)):
        return
    raise UserError(
        f"{where}: {module} is {list(one.shape)} and {list(other.shape)}, but the model needs "
        f"[rank, {inputs}] and [{outputs}, rank]; give the model that the adapter was trained on"
    )
