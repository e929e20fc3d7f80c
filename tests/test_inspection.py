"""What is shown of a forward pass is that of the forward pass: maps, stream, and predictions."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, seeded_model
from small_models import GPT2, MODERN, random_params

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.inspection import attention_map, inspect, logit_lens, token_labels
from gptjax.layouts import decoding_params, quantize, unstack_blocks
from gptjax.model import forward, linear, normalize, unembed
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.tokenizer import ByteTokenizer, CharTokenizer

# Every way in which blocks and their attention differ.
STYLES = {
    "gpt2": GPT2,
    "modern": MODERN,
    "window": MODERN.replace(sliding_window=3, windowed_layers=(1,)),
    "parallel": GPT2.replace(parallel_blocks=True, inverse_layer_scale=True, attention_scale=0.7),
    "experts": MODERN.replace(num_experts=4),
    "bfloat16": MODERN.replace(compute_dtype="bfloat16"),
}
CONFIGS = pytest.mark.parametrize("config", STYLES.values(), ids=STYLES.keys())


def draw_tokens(config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, config.vocab_size, (2, 11)).astype(np.int32)


@CONFIGS
def test_the_last_residual_gives_the_logits_of_forward(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params, tokens = random_params(config, rng), draw_tokens(config, rng)
    seen = inspect(params, tokens, config)
    L, D = config.num_layers, config.embed_dim
    assert seen.residuals.shape == (L + 1, 2, 11, D)
    last = normalize(seen.residuals[-1], params["final_norm"], config)
    logits = np.asarray(unembed(params, last, config))
    # Bit for bit where the blocks are the same programs, and up to rounding where they are scanned.
    one_by_one = unstack_blocks(params, config)
    np.testing.assert_array_equal(logits, forward(one_by_one, jnp.asarray(tokens), config))
    scanned = np.asarray(jax.jit(forward, static_argnames="config")(params, tokens, config))
    tolerance = 1e-5 if config.compute_dtype == "float32" else 0.05
    assert np.abs(logits - scanned).max() <= tolerance * np.abs(scanned).max()


@CONFIGS
def test_attention_is_causal_and_makes_what_is_added(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    """The maps times the values, projected, are what the model's own attention adds."""
    params, tokens = random_params(config, rng), draw_tokens(config, rng)
    seen = inspect(params, tokens, config)
    L, H, K, C, T = config.num_layers, config.num_heads, config.kv_heads, config.head_width, 11
    attention = np.asarray(seen.attention)
    assert attention.shape == (L, 2, H, T, T)
    assert seen.queries.shape == (L, 2, T, H, C)
    assert seen.keys.shape == seen.values.shape == (L, 2, T, K, C)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-6)
    assert (attention[..., ~np.tri(T, dtype=bool)] == 0).all()
    assert (attention[..., np.eye(T, dtype=bool)] > 0).all()
    if config.sliding_window is not None:
        beyond = np.tri(T, k=-config.sliding_window, dtype=bool)
        assert (attention[1][..., beyond] == 0).all()
        assert (attention[0][..., beyond] > 0).all()
    tolerance = 1e-5 if config.compute_dtype == "float32" else 0.05
    for number, weights in enumerate(unstack_blocks(params, config)["blocks"]):
        values = np.repeat(np.asarray(seen.values[number], np.float32), H // K, axis=2)
        mixed = np.einsum("bhts,bshc->bthc", attention[number], values)
        attended = weights["attention"]
        added = linear(jnp.asarray(mixed), attended["out"], attended.get("out_bias"), inputs=2)
        wanted = np.asarray(seen.attention_added[number], np.float32)
        assert np.abs(added - wanted).max() <= tolerance * np.abs(wanted).max()
    rises = seen.residuals[1:] - seen.residuals[:-1]
    added = np.asarray(seen.attention_added + seen.mlp_added, np.float32)
    assert np.abs(added - np.asarray(rises, np.float32)).max() <= tolerance * np.abs(added).max()
    norms = seen.norms(row=1)
    wanted = np.sqrt(np.square(np.asarray(seen.residuals, np.float32)[:, 1]).sum(-1))
    np.testing.assert_allclose(norms["residual stream"], wanted, rtol=1e-5)
    assert norms["added by attention"].shape == norms["added by MLP"].shape == (L, T)


def test_documents_of_a_row_do_not_see_each_other(rng: np.random.Generator) -> None:
    params = random_params(MODERN, rng)
    one, two = rng.integers(0, MODERN.vocab_size, (2, 5))
    places = np.arange(5)
    packed = inspect(
        params,
        np.concatenate([one, two])[None],
        MODERN,
        positions=jnp.asarray(np.concatenate([places, places])[None]),
        segment_ids=jnp.asarray(np.repeat([0, 1], 5)[None]),
    )
    alone = inspect(params, [two], MODERN)
    assert (np.asarray(packed.attention)[..., 5:, :5] == 0).all()
    np.testing.assert_allclose(packed.attention[..., 5:, 5:], alone.attention, atol=1e-5)
    np.testing.assert_allclose(packed.residuals[:, :, 5:], alone.residuals, atol=1e-4)


@pytest.mark.parametrize("form", [decoding_params, quantize, unstack_blocks])
def test_other_forms_of_the_parameters(form: Any, rng: np.random.Generator) -> None:
    params, tokens = form(random_params(MODERN, rng), MODERN), draw_tokens(MODERN, rng)
    seen = inspect(params, tokens, MODERN)
    logits = unembed(params, normalize(seen.residuals[-1], params["final_norm"], MODERN), MODERN)
    wanted = np.asarray(forward(params, jnp.asarray(tokens), MODERN))
    assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max()


@CONFIGS
def test_the_lens_at_the_last_layer_is_the_prediction(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params, tokens = random_params(config, rng), draw_tokens(config, rng)
    seen = inspect(params, tokens, config)
    lens = logit_lens(params, seen.residuals, config, top=3)
    assert lens.tokens.shape == lens.probabilities.shape == (config.num_layers + 1, 2, 11, 3)
    logits = forward(unstack_blocks(params, config), jnp.asarray(tokens), config)
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    order = np.argsort(-probabilities, axis=-1, kind="stable")[..., :3]
    tolerance = 1e-5 if config.compute_dtype == "float32" else 0.05
    wanted = np.take_along_axis(probabilities, order, axis=-1)
    np.testing.assert_allclose(lens.probabilities[-1], wanted, rtol=tolerance)
    told = np.take_along_axis(probabilities, lens.tokens[-1], axis=-1)
    np.testing.assert_allclose(lens.probabilities[-1], told, rtol=tolerance)
    # Every depth by itself is the model without the blocks after it.
    cut = {**params, "blocks": unstack_blocks(params, config)["blocks"][:1]}
    first = forward(cut, jnp.asarray(tokens), config.replace(num_layers=1, windowed_layers=None))
    if config.windowed_layers is None:
        np.testing.assert_allclose(
            lens.probabilities[1, ..., 0], jax.nn.softmax(first, -1).max(-1), rtol=tolerance
        )
    some = logit_lens(params, seen.residuals[::2], config)
    np.testing.assert_array_equal(some.tokens, lens.tokens[::2, ..., :1])


def test_the_map_is_the_formula(rng: np.random.Generator) -> None:
    """By NumPy in float64, head by head."""
    q, k = rng.normal(size=(2, 7, 6, 4)), rng.normal(size=(2, 7, 3, 4))
    found = attention_map(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32))
    for row in range(2):
        for head in range(6):
            scores = q[row, :, head] @ k[row, :, head // 2].T / np.sqrt(4)
            weights = np.exp(scores) * np.tri(7)
            weights /= weights.sum(axis=-1, keepdims=True)
            np.testing.assert_allclose(found[row, head], weights, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "gpt2-mistral",
        "neox",
        "llama",
        "mistral",
        "qwen2-windows",
        "qwen3",
    ],
)
def test_maps_are_those_of_transformers(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    torch: Any = pytest.importorskip("torch", reason="PyTorch, which is compared with, is missing")
    transformers: Any = pytest.importorskip(
        "transformers", reason="transformers, which is compared with, is missing"
    )
    model, _ = seeded_model(CASES[name])
    tokens = rng.integers(0, model.config.vocab_size, (2, 20))
    save_pretrained(model, tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        wanted = opened(torch.from_numpy(tokens), output_attentions=True, output_hidden_states=True)
    seen = inspect(model.params, tokens, model.config)
    for layer, expected in enumerate(wanted.attentions):
        np.testing.assert_allclose(seen.attention[layer], expected.numpy(), atol=1e-5)
    # The last of transformers' is normalized already.
    for depth, expected in enumerate(wanted.hidden_states[:-1]):
        scale = float(expected.abs().max())
        difference = np.abs(np.asarray(seen.residuals[depth]) - expected.numpy()).max()
        assert difference <= 1e-5 * scale


def test_labels() -> None:
    assert token_labels(CharTokenizer("a b\n\t"), [0, 1, 2, 3, 4]) == ["a", "·", "b", "↵", "→"]
    assert token_labels(ByteTokenizer(), "é".encode()) == ["�", "�"]


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1, 2], r"shape \(2,\)"),
        ([[]], r"shape \(1, 0\)"),
        ([[0.5]], "dtype float64"),
        ([[1, 2], [1]], "differ in length"),
        ([[0] * 17], "17 tokens, but the model's context is 16"),
        ([[31]], "run from 0 to 30"),
        ([[-1]], "run from 0 to 30"),
    ],
)
def test_refused(tokens: Any, says: str, rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    with pytest.raises(UserError, match=says):
        inspect(params, tokens, GPT2)
    for top in (0, 32):
        with pytest.raises(UserError, match=f"top is {top}"):
            logit_lens(params, jnp.zeros((1, 1, 1, 32)), GPT2, top=top)
