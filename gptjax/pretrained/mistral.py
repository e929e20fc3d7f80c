"""Mistral (Jiang et al. 2023): Llama with a sliding window."""

from typing import Any

from gptjax.config import ModelConfig
from gptjax.pretrained import llama
from gptjax.pretrained.family import ConfigReader, Family


def _read(values: ConfigReader) -> ModelConfig:
    fields = llama.read_common(values)
    return ModelConfig(
        **fields,
        sliding_window=values.size("sliding_window") if values.get("sliding_window") else None,
        windowed_layers=values.windowed_layers(fields["num_layers"]),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return llama.write_common(config) | {"sliding_window": config.sliding_window}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=_read,
    write=_write,
    weights=llama.weights,
    prefix="model.",
    buffers=(".rotary_emb.inv_freq",),
)
