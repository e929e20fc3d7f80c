"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm first, one matrix for q, k and v."""

from typing import Any

from gptjax.config import ModelConfig
from gptjax.pretrained.family import ACTIVATION_NAMES, ConfigReader, Family
from gptjax.pretrained.mapping import Weight, weight


def _read(values: ConfigReader) -> ModelConfig:
    values.only("add_cross_attention", False)
    width = values.size("n_embd")
    context = values.size("n_positions", values.get("n_ctx"))
    values.only("n_ctx", context)
    scaled = values.flag("scale_attn_weights", True)
    return ModelConfig(
        vocab_size=values.size("vocab_size"),
        context_length=context,
        num_layers=values.size("n_layer"),
        embed_dim=width,
        num_heads=values.size("n_head"),
        mlp_dim=values.size("n_inner", 4 * width),
        activation=values.activation("activation_function", "gelu_new"),
        norm_eps=values.number("layer_norm_epsilon", 1e-5),
        attention_scale=None if scaled else 1.0,
        inverse_layer_scale=values.flag("scale_attn_by_inverse_layer_idx", False),
        tie_embeddings=values.flag("tie_word_embeddings", True),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "activation_function": ACTIVATION_NAMES[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": config.inverse_layer_scale,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _weights(config: ModelConfig) -> list[Weight]:
    # The linear layers are stored as [in, out].
    block, attention, mlp = "transformer.h.{layer}.", "blocks.attention.", "blocks.mlp."
    qkv = f"{attention}query {attention}key {attention}value"
    qkv_bias = f"{attention}query_bias {attention}key_bias {attention}value_bias"
    weights = [
        weight("transformer.wte.weight", "V D", "embed.tokens", "VD"),
        weight("transformer.wpe.weight", "T D", "embed.positions", "TD"),
        weight(block + "ln_1.weight", "D", "blocks.attention_norm.scale", "D"),
        weight(block + "ln_1.bias", "D", "blocks.attention_norm.bias", "D"),
        weight(block + "attn.c_attn.weight", "D PHC", qkv, "DHC"),
        weight(block + "attn.c_attn.bias", "PHC", qkv_bias, "HC"),
        weight(block + "attn.c_proj.weight", "HC D", attention + "out", "HCD"),
        weight(block + "attn.c_proj.bias", "D", attention + "out_bias", "D"),
        weight(block + "ln_2.weight", "D", "blocks.mlp_norm.scale", "D"),
        weight(block + "ln_2.bias", "D", "blocks.mlp_norm.bias", "D"),
        weight(block + "mlp.c_fc.weight", "D F", mlp + "up", "DF"),
        weight(block + "mlp.c_fc.bias", "F", mlp + "up_bias", "F"),
        weight(block + "mlp.c_proj.weight", "F D", mlp + "down", "FD"),
        weight(block + "mlp.c_proj.bias", "D", mlp + "down_bias", "D"),
        weight("transformer.ln_f.weight", "D", "final_norm.scale", "D"),
        weight("transformer.ln_f.bias", "D", "final_norm.bias", "D"),
    ]
    if not config.tie_embeddings:
        weights.append(weight("lm_head.weight", "V D", "head.kernel", "VD"))
    return weights


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read=_read,
    write=_write,
    weights=_weights,
    prefix="transformer.",
    # Causal masks, which older files hold beside the weights.
    buffers=(".attn.bias", ".attn.masked_bias"),
)
