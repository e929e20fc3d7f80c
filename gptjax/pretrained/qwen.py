"""Qwen 2 and 2.5 (biases of q, k and v) and Qwen 3 (RMS-normalized queries and keys instead)."""

from typing import Any

from gptjax.config import ModelConfig
from gptjax.pretrained import llama
from gptjax.pretrained.family import ConfigReader, Family


def _read_common(values: ConfigReader) -> dict[str, Any]:
    fields = llama.read_common(values)
    layers = fields["num_layers"]
    # Published files give a window and leave it off.
    given, first = values.get("sliding_window"), values.get("max_window_layers", 28)
    windowed = values.windowed_layers(layers)
    if windowed is None:
        windowed = tuple(range(first, layers))
    if values.flag("use_sliding_window", False) and given is not None and windowed:
        return fields | {"sliding_window": given, "windowed_layers": windowed}
    return fields


def _write_common(config: ModelConfig) -> dict[str, Any]:
    layers = range(config.num_layers)
    windowed = layers if config.windowed_layers is None else config.windowed_layers
    if config.sliding_window is None:
        windowed = ()
    kinds = {True: "sliding_attention", False: "full_attention"}
    return llama.write_common(config) | {
        "use_sliding_window": bool(windowed),
        "sliding_window": config.sliding_window,
        "max_window_layers": min(windowed, default=config.num_layers),
        "layer_types": [kinds[layer in windowed] for layer in layers],
    }


def _read_qwen2(values: ConfigReader) -> ModelConfig:
    return ModelConfig(**_read_common(values), qkv_bias=True)


def _read_qwen3(values: ConfigReader) -> ModelConfig:
    bias = values.flag("attention_bias", False)
    return ModelConfig(**_read_common(values), qk_norm=True, qkv_bias=bias, out_bias=bias)


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return _write_common(config) | {"attention_bias": config.has_bias("qkv")}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=_read_qwen2,
    write=_write_common,
    weights=llama.weights,
    prefix="model.",
    buffers=(".rotary_emb.inv_freq",),
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read_qwen3,
    write=_write_qwen3,
    weights=llama.weights,
    prefix="model.",
    buffers=(".rotary_emb.inv_freq",),
)
