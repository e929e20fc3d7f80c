"""The same weights give the same numbers in PyTorch: logits, and ten steps of training."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2, random_params

from gptjax.config import ModelConfig
from gptjax.model import forward
from gptjax.optimizer import OptimizerConfig, make_optimizer
from gptjax.params import Params
from gptjax.training import init_state, make_train_step

torch: Any = pytest.importorskip("torch", reason="PyTorch, which is compared with, is missing")
transformers: Any = pytest.importorskip(
    "transformers", reason="transformers, which is compared with, is missing"
)

LLAMA = GPT2.replace(
    num_kv_heads=2,
    mlp_dim=48,
    position="rope",
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    use_bias=False,
    tie_embeddings=False,
)


def gpt2_weights(params: Params) -> dict[str, np.ndarray]:
    """Parameters by transformers' names; the linear layers' weights there are `[in, out]`."""
    p = jax.tree.map(np.array, params)
    D = p["embed"]["tokens"].shape[1]
    weights = {
        "transformer.wte.weight": p["embed"]["tokens"],
        "transformer.wpe.weight": p["embed"]["positions"],
        "transformer.ln_f.weight": p["final_norm"]["scale"],
        "transformer.ln_f.bias": p["final_norm"]["bias"],
    }
    for layer in range(p["blocks"]["mlp"]["up"].shape[0]):
        block = jax.tree.map(lambda w, layer=layer: w[layer], p["blocks"])
        attention, mlp = block["attention"], block["mlp"]
        name = f"transformer.h.{layer}."
        qkv = ("query", "key", "value")
        weights |= {
            name + "ln_1.weight": block["attention_norm"]["scale"],
            name + "ln_1.bias": block["attention_norm"]["bias"],
            name + "attn.c_attn.weight": np.concatenate(
                [attention[part].reshape(D, -1) for part in qkv], axis=1
            ),
            name + "attn.c_attn.bias": np.concatenate(
                [attention[part + "_bias"].ravel() for part in qkv]
            ),
            name + "attn.c_proj.weight": attention["out"].reshape(-1, D),
            name + "attn.c_proj.bias": attention["out_bias"],
            name + "ln_2.weight": block["mlp_norm"]["scale"],
            name + "ln_2.bias": block["mlp_norm"]["bias"],
            name + "mlp.c_fc.weight": mlp["up"],
            name + "mlp.c_fc.bias": mlp["up_bias"],
            name + "mlp.c_proj.weight": mlp["down"],
            name + "mlp.c_proj.bias": mlp["down_bias"],
        }
    return weights


def llama_weights(params: Params) -> dict[str, np.ndarray]:
    """Parameters by transformers' names; the linear layers' weights there are `[out, in]`."""
    p = jax.tree.map(np.array, params)
    D = p["embed"]["tokens"].shape[1]
    weights = {
        "model.embed_tokens.weight": p["embed"]["tokens"],
        "model.norm.weight": p["final_norm"]["scale"],
        "lm_head.weight": p["head"]["kernel"],
    }
    for layer in range(p["blocks"]["mlp"]["up"].shape[0]):
        block = jax.tree.map(lambda w, layer=layer: w[layer], p["blocks"])
        attention, mlp = block["attention"], block["mlp"]
        name = f"model.layers.{layer}."
        weights |= {
            name + "input_layernorm.weight": block["attention_norm"]["scale"],
            name + "post_attention_layernorm.weight": block["mlp_norm"]["scale"],
            name + "self_attn.q_proj.weight": attention["query"].reshape(D, -1).T,
            name + "self_attn.k_proj.weight": attention["key"].reshape(D, -1).T,
            name + "self_attn.v_proj.weight": attention["value"].reshape(D, -1).T,
            name + "self_attn.o_proj.weight": attention["out"].reshape(-1, D).T,
            name + "mlp.gate_proj.weight": mlp["gate"].T,
            name + "mlp.up_proj.weight": mlp["up"].T,
            name + "mlp.down_proj.weight": mlp["down"].T,
        }
    return weights


def fill(model: Any, weights: dict[str, np.ndarray]) -> Any:
    """Every parameter of the torch model is set, and nothing else is given."""
    names = {name for name, _ in model.named_parameters()}
    assert names == weights.keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert tuple(parameter.shape) == weights[name].shape
            parameter.copy_(torch.from_numpy(np.array(weights[name])))
    return model


def torch_gpt2(config: ModelConfig, params: Params) -> Any:
    settings = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.embed_dim,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return fill(transformers.GPT2LMHeadModel(settings), gpt2_weights(params))


def torch_llama(config: ModelConfig, params: Params) -> Any:
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return fill(transformers.LlamaForCausalLM(settings), llama_weights(params))


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (GPT2, torch_gpt2),
        (LLAMA, torch_llama),
        (LLAMA.replace(rope_base=500.0, norm_eps=1e-3), torch_llama),
    ],
    ids=["gpt2", "llama", "llama-other-base"],
)
def test_logits(config: ModelConfig, make: Any, rng: np.random.Generator) -> None:
    params = random_params(config, rng)
    tokens = rng.integers(0, config.vocab_size, (3, config.context_length))
    with torch.no_grad():
        expected = make(config, params).eval()(torch.from_numpy(tokens)).logits.numpy()
    got = forward(params, jnp.asarray(tokens), config)
    assert np.abs(np.asarray(got) - expected).max() <= 2e-5 * np.abs(expected).max()


def test_ten_steps_of_training(rng: np.random.Generator) -> None:
    steps, warmup, peak, final = 10, 3, 1e-3, 0.1
    options = OptimizerConfig(
        learning_rate=peak,
        warmup_steps=warmup,
        final_fraction=final,
        beta1=0.9,
        beta2=0.99,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config = GPT2
    params = random_params(config, rng)
    batches = []
    for _ in range(steps):
        tokens = rng.integers(0, config.vocab_size, (4, config.context_length + 1))
        batches.append((tokens[:, :-1], tokens[:, 1:]))

    model = torch_gpt2(config, params).train()
    wide = [p for p in model.parameters() if p.dim() >= 2]
    narrow = [p for p in model.parameters() if p.dim() < 2]
    torch_optimizer = torch.optim.AdamW(
        [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
        eps=1e-8,
    )
    optimizer = make_optimizer(options, config, steps)
    step = make_train_step(config, optimizer)
    state = init_state(config, optimizer, jax.random.key(0), params=params)
    clipped = 0
    for made, (tokens, targets) in enumerate(batches):
        rate = peak * (made + 1) / (warmup + 1)
        if made >= warmup:
            progress = (made - warmup) / (steps - warmup)
            rate = peak * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
        for group in torch_optimizer.param_groups:
            group["lr"] = rate
        logits = model(torch.from_numpy(tokens)).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(targets).flatten()
        )
        torch_optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        torch_optimizer.step()
        batch = {"tokens": tokens.astype(np.int32), "targets": targets.astype(np.int32)}
        state, metrics = step(state, batch)
        assert abs(float(metrics["loss"]) - float(loss)) < 1e-5
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-3)
        clipped += norm > 1.0
    assert clipped

    got = gpt2_weights(state.params)
    expected = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    D = config.embed_dim
    for weights in (got, expected):
        for name in weights:
            if name.endswith("c_attn.bias"):
                # The keys' bias adds the same to all scores of a query: its gradient is rounding
                # alone, which Adam scales up to full steps in directions that mean nothing.
                weights[name][D : 2 * D] = 0
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), got, expected)
