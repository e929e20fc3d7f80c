"""GPT-NeoX and Pythia (Black et al. 2022): RoPE on a part of each head, parallel blocks."""

from typing import Any

from gptjax.config import ModelConfig
from gptjax.pretrained.family import ACTIVATION_NAMES, ConfigReader, Family, rope_keys
from gptjax.pretrained.mapping import Weight, weight


def _read(values: ConfigReader) -> ModelConfig:
    context = values.size("max_position_embeddings")
    bias = values.flag("attention_bias", True)
    return ModelConfig(
        vocab_size=values.size("vocab_size"),
        context_length=context,
        num_layers=values.size("num_hidden_layers"),
        embed_dim=values.size("hidden_size"),
        num_heads=values.size("num_attention_heads"),
        mlp_dim=values.size("intermediate_size"),
        position="rope",
        activation=values.activation("hidden_act", "gelu"),
        norm_eps=values.number("layer_norm_eps", 1e-5),
        qkv_bias=bias,
        out_bias=bias,
        parallel_blocks=values.flag("use_parallel_residual", True),
        tie_embeddings=values.flag("tie_word_embeddings", False),
        **values.rope(
            context, base_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25
        ),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    keys = rope_keys(config)
    keys["rope_parameters"]["partial_rotary_factor"] = config.rope_fraction
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "layer_norm_eps": config.norm_eps,
        "attention_bias": config.has_bias("qkv"),
        "use_parallel_residual": config.parallel_blocks,
        "tie_word_embeddings": config.tie_embeddings,
        "rotary_emb_base": config.rope_base,
        "rotary_pct": config.rope_fraction,
    } | {key: value for key, value in keys.items() if key != "rope_theta"}


def _weights(config: ModelConfig) -> list[Weight]:
    # The linear layers are stored as [out, in]; queries, keys and values lie together by head.
    block, attention, mlp = "gpt_neox.layers.{layer}.", "blocks.attention.", "blocks.mlp."
    qkv = f"{attention}query {attention}key {attention}value"
    weights = [
        weight("gpt_neox.embed_in.weight", "V D", "embed.tokens", "VD"),
        weight(block + "input_layernorm.weight", "D", "blocks.attention_norm.scale", "D"),
        weight(block + "input_layernorm.bias", "D", "blocks.attention_norm.bias", "D"),
        weight(block + "attention.query_key_value.weight", "HPC D", qkv, "DHC"),
        weight(block + "attention.dense.weight", "D HC", attention + "out", "HCD"),
        weight(block + "post_attention_layernorm.weight", "D", "blocks.mlp_norm.scale", "D"),
        weight(block + "post_attention_layernorm.bias", "D", "blocks.mlp_norm.bias", "D"),
        weight(block + "mlp.dense_h_to_4h.weight", "F D", mlp + "up", "DF"),
        weight(block + "mlp.dense_h_to_4h.bias", "F", mlp + "up_bias", "F"),
        weight(block + "mlp.dense_4h_to_h.weight", "D F", mlp + "down", "FD"),
        weight(block + "mlp.dense_4h_to_h.bias", "D", mlp + "down_bias", "D"),
        weight("gpt_neox.final_layer_norm.weight", "D", "final_norm.scale", "D"),
        weight("gpt_neox.final_layer_norm.bias", "D", "final_norm.bias", "D"),
    ]
    if config.has_bias("qkv"):
        biases = f"{attention}query_bias {attention}key_bias {attention}value_bias"
        weights += [
            weight(block + "attention.query_key_value.bias", "HPC", biases, "HC"),
            weight(block + "attention.dense.bias", "D", attention + "out_bias", "D"),
        ]
    if not config.tie_embeddings:
        weights.append(weight("embed_out.weight", "V D", "head.kernel", "VD"))
    return weights


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    read=_read,
    write=_write,
    weights=_weights,
    prefix="gpt_neox.",
    buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
