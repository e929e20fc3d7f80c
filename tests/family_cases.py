"""A small config.json for every family and every switch that its published checkpoints use.

Where PyTorch and transformers are installed, `python tests/family_cases.py` writes the logits of
transformers for seeded weights to `expected_logits.npz`, to compare with where they are not.
"""

import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.model import Model
from gptjax.params import Params, flat, nested, param_specs
from gptjax.pretrained.families import read_config
from gptjax.pretrained.huggingface import save_pretrained

EXPECTED = Path(__file__).with_name("expected_logits.npz")

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 97,
    "n_positions": 128,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
}
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "rotary_pct": 0.25,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "rms_norm_eps": 1e-5,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

CASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    **{
        f"gpt2-{name}": GPT2 | {"activation_function": name}
        for name in ("gelu", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "tanh")
    },
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False},
    "gpt2-inner-eps": GPT2 | {"n_inner": 80, "layer_norm_epsilon": 1e-3},
    "gpt2-unscaled": GPT2 | {"scale_attn_weights": False},
    "gpt2-mistral": GPT2
    | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "neox": NEOX,
    "neox-serial": NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0},
    "neox-no-bias": NEOX
    | {"attention_bias": False, "rotary_emb_base": 500, "hidden_act": "gelu_new"},
    "neox-tied-linear": NEOX
    | {"tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama": LLAMA,
    "llama-biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama-tied-wide-heads": LLAMA | {"tie_word_embeddings": True, "head_dim": 16},
    "llama-one-kv-head": LLAMA | {"num_key_value_heads": 1, "rope_theta": 500.0},
    "llama-linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama-llama3": LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    "llama-yarn": LLAMA | {"rope_scaling": YARN | {"rope_type": "yarn"}},
    # Heads and base at which every one of the keys makes a difference.
    "llama-yarn-all-keys": LLAMA
    | {
        "head_dim": 16,
        "rope_theta": 100.0,
        "rope_scaling": YARN
        | {"rope_type": "yarn", "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
        | {"mscale": 1.2, "mscale_all_dim": 0.7},
    },
    "llama-newer-spelling": LLAMA
    | {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 9},
    "mistral-no-window": LLAMA | {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen2-windows": LLAMA
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen2-yarn-tied": LLAMA
    | {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6}
    | {"rope_scaling": YARN | {"type": "yarn"}},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 12},
    "qwen3-biases-tied": LLAMA
    | {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
}


def seeded_model(values: dict[str, Any]) -> tuple[Model, np.ndarray]:
    """The same weights and tokens on every machine."""
    _, config = read_config(values, "config.json")
    leaves = {}
    for path, spec in flat(param_specs(config)).items():
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        draws = rng.normal(spec.init == "ones", 0.15, spec.shape)
        leaves[path] = jnp.asarray(draws, jnp.float32)
    params: Params = nested(leaves)
    tokens = np.random.default_rng(7).integers(0, config.vocab_size, (1, 20))
    return Model(config, params, source=values), tokens


def main() -> None:
    import torch
    import transformers

    expected = {}
    for name, values in CASES.items():
        model, tokens = seeded_model(values)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            save_pretrained(model, folder)
            opened = transformers.AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="eager"
            )
            logits = opened.eval()(torch.from_numpy(tokens)).logits[0, -3:]
        expected[name] = logits.numpy()
    np.savez_compressed(EXPECTED, **expected)


if __name__ == "__main__":
    main()
