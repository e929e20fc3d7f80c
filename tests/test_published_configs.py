"""Settings as the hub's repositories have them: read, or refused for what they say."""

from typing import Any

import pytest

from gptjax.errors import UserError
from gptjax.pretrained.families import read_config

# The keys that bear on the model or might be taken for such, from the published config.json files.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
}
QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}
READ: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2-medium": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "bos_token_id": 50256,
            "embd_pdrop": 0.1,
            "eos_token_id": 50256,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 1024,
            "n_head": 16,
            "n_layer": 24,
            "n_positions": 1024,
            "n_special": 0,
            "predict_special_tokens": True,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        {"num_layers": 24, "context_length": 1024, "tie_embeddings": True},
    ),
    "SmolLM2-135M": (
        LLAMA
        | {
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "vocab_size": 49152,
        },
        {"kv_heads": 3, "rope_base": 100000.0, "tie_embeddings": True, "head_width": 64},
    ),
    "Llama-3.2-1B": (
        LLAMA
        | {
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        {"context_length": 131072, "rope_base": 500000.0},
    ),
    "Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 32000,
        },
        {"sliding_window": 4096, "kv_heads": 8},
    ),
    "Qwen2.5-0.5B-Instruct": (
        QWEN
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_window_layers": 21,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "sliding_window": 32768,
            "vocab_size": 151936,
        },
        {"sliding_window": None, "qkv_bias": True, "out_bias": None},
    ),
    "Qwen3-0.6B": (
        QWEN
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "sliding_window": None,
            "vocab_size": 151936,
        },
        {"qk_norm": True, "head_width": 128, "qkv_bias": False},
    ),
    "pythia-70m": (
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "gelu",
            "hidden_size": 512,
            "initializer_range": 0.02,
            "intermediate_size": 2048,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neox",
            "num_attention_heads": 8,
            "num_hidden_layers": 6,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_cache": True,
            "use_parallel_residual": True,
            "vocab_size": 50304,
        },
        {"parallel_blocks": True, "rope_width": 16, "activation": "gelu"},
    ),
}


@pytest.mark.parametrize("name", READ)
def test_published_settings_are_read(name: str) -> None:
    values, expected = READ[name]
    _, config = read_config(values, "config.json")
    assert {field: getattr(config, field) for field in expected} == expected


SMALL = READ["SmolLM2-135M"][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings .* true or false"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps .* number above 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps .* number above 0"),
        ({"rope_theta": 0}, "rope_theta .* number above 0"),
        ({"rope_scaling": 2.0}, "rope_scaling .* an object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor .* a number"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2}}, "not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1, 2]}}, "'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "differ by layer"),
        ({"num_key_value_heads": "3"}, "num_key_value_heads .* whole number"),
        ({"head_dim": 64.0}, "head_dim .* whole number"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"num_experts": 8}, "num_experts=8"),
    ],
)
def test_settings_that_are_not_honoured(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read_config(SMALL | changes, "config.json")
    assert "\n" not in str(error.value)


def test_yarn_as_it_is_published() -> None:
    scaling = {"factor": 16.0, "finetuned": True, "type": "yarn", "beta_fast": None}
    scaling["original_max_position_embeddings"] = 4096
    _, config = read_config(SMALL | {"rope_scaling": scaling}, "config.json")
    assert config.rope_scaling is not None
    assert config.rope_scaling.beta_fast == 32


def test_layers_of_unknown_kinds() -> None:
    values = READ["Qwen3-0.6B"][0]
    for kinds in (3, ["full_attention"], ["chunked_attention"] * 28):
        with pytest.raises(UserError, match="layer_types"):
            read_config(values | {"layer_types": kinds}, "config.json")
