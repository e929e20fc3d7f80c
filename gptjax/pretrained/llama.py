"""Llama (Touvron et al. 2023), and with it SmolLM2 and TinyLlama: RoPE, RMSNorm, SwiGLU."""

from typing import Any

from gptjax.config import ModelConfig
from gptjax.pretrained.family import ACTIVATION_NAMES, ConfigReader, Family, rope_keys
from gptjax.pretrained.mapping import Weight, weight


def read_common(values: ConfigReader) -> dict[str, Any]:
    """The fields of `ModelConfig` that Llama and the families after it share."""
    context = values.size("max_position_embeddings")
    heads = values.size("num_attention_heads")
    # transformers' Llama turns whole heads whatever this says.
    values.only("partial_rotary_factor", 1, 1.0)
    return {
        "vocab_size": values.size("vocab_size"),
        "context_length": context,
        "num_layers": values.size("num_hidden_layers"),
        "embed_dim": values.size("hidden_size"),
        "num_heads": heads,
        "num_kv_heads": values.size("num_key_value_heads", heads),
        "head_dim": values.size("head_dim") if values.get("head_dim") is not None else None,
        "mlp_dim": values.size("intermediate_size"),
        "position": "rope",
        "norm": "rmsnorm",
        "norm_eps": values.number("rms_norm_eps", 1e-6),
        "activation": values.activation("hidden_act", "silu"),
        "gated_mlp": True,
        "use_bias": False,
        "tie_embeddings": values.flag("tie_word_embeddings", False),
    } | values.rope(context)


def write_common(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_common`."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
    } | rope_keys(config)


def weights(config: ModelConfig) -> list[Weight]:
    """The tensors of Llama and of the families after it, by what the model has."""
    # The linear layers are stored as [out, in].
    block, attention, mlp = "model.layers.{layer}.", "blocks.attention.", "blocks.mlp."
    own, feed = block + "self_attn.", block + "mlp."
    entries = [
        weight("model.embed_tokens.weight", "V D", "embed.tokens", "VD"),
        weight(block + "input_layernorm.weight", "D", "blocks.attention_norm.scale", "D"),
        weight(own + "q_proj.weight", "HC D", attention + "query", "DHC"),
        weight(own + "k_proj.weight", "KC D", attention + "key", "DKC"),
        weight(own + "v_proj.weight", "KC D", attention + "value", "DKC"),
        weight(own + "o_proj.weight", "D HC", attention + "out", "HCD"),
        weight(block + "post_attention_layernorm.weight", "D", "blocks.mlp_norm.scale", "D"),
        weight(feed + "gate_proj.weight", "F D", mlp + "gate", "DF"),
        weight(feed + "up_proj.weight", "F D", mlp + "up", "DF"),
        weight(feed + "down_proj.weight", "D F", mlp + "down", "FD"),
        weight("model.norm.weight", "D", "final_norm.scale", "D"),
    ]
    if config.has_bias("qkv"):
        entries += [
            weight(own + "q_proj.bias", "HC", attention + "query_bias", "HC"),
            weight(own + "k_proj.bias", "KC", attention + "key_bias", "KC"),
            weight(own + "v_proj.bias", "KC", attention + "value_bias", "KC"),
        ]
    if config.has_bias("out"):
        entries.append(weight(own + "o_proj.bias", "D", attention + "out_bias", "D"))
    if config.has_bias("mlp"):
        entries += [
            weight(feed + "gate_proj.bias", "F", mlp + "gate_bias", "F"),
            weight(feed + "up_proj.bias", "F", mlp + "up_bias", "F"),
            weight(feed + "down_proj.bias", "D", mlp + "down_bias", "D"),
        ]
    if config.qk_norm:
        entries += [
            weight(own + "q_norm.weight", "C", attention + "query_norm.scale", "C"),
            weight(own + "k_norm.weight", "C", attention + "key_norm.scale", "C"),
        ]
    if not config.tie_embeddings:
        entries.append(weight("lm_head.weight", "V D", "head.kernel", "VD"))
    return entries


def _read(values: ConfigReader) -> ModelConfig:
    bias = values.flag("attention_bias", False)
    return ModelConfig(
        **read_common(values),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=values.flag("mlp_bias", False),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.has_bias("qkv"), "mlp_bias": config.has_bias("mlp")}
    return write_common(config) | biases


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=_write,
    weights=weights,
    prefix="model.",
    buffers=(".rotary_emb.inv_freq",),
)
