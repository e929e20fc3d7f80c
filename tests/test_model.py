"""The model as a function: what may see what, and what may not change the values."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2, MODERN, random_params

from gptjax.attention import attention
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.layouts import unstack_blocks
from gptjax.loss import loss_fn
from gptjax.model import dropout, embed, forward, scan_unroll
from gptjax.params import Params, init_params

CONFIGS = {
    "gpt2": GPT2,
    "gpt2-grouped": GPT2.replace(num_kv_heads=2),
    "modern": MODERN,
}
STYLES = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

run = jax.jit(forward, static_argnames="config")


def random_tokens(config: ModelConfig, rng: np.random.Generator, rows: int = 3) -> np.ndarray:
    shape = (rows, config.context_length)
    return rng.integers(0, config.vocab_size, shape).astype(np.int32)


def random_key(rng: np.random.Generator) -> jax.Array:
    return jax.random.key(int(rng.integers(2**31)))


@STYLES
def test_no_gradient_flows_from_later_tokens(config: ModelConfig, rng: np.random.Generator) -> None:
    # Untied, so that the table is an input alone; distinct tokens, so that a row is one place.
    config = config.replace(tie_embeddings=False)
    params = random_params(config, rng)
    tokens = rng.permutation(config.vocab_size)[: config.context_length].astype(np.int32)
    project = jnp.asarray(rng.normal(size=config.vocab_size), jnp.float32)

    @jax.jit
    def gradients(t: jax.Array) -> Params:
        def logits_at(table: Params) -> jax.Array:
            logits = forward({**params, "embed": table}, tokens[None], config)
            return logits[0, t] @ project

        return jax.grad(logits_at)(params["embed"])

    for t in range(config.context_length):
        grads = gradients(t)
        rows = np.asarray(grads["tokens"])[tokens]
        assert (rows[t + 1 :] == 0).all()
        assert (np.abs(rows[: t + 1]).max(axis=1) > 0).all()
        if "positions" in grads:
            rows = np.asarray(grads["positions"])
            assert (rows[t + 1 :] == 0).all()
            assert (np.abs(rows[: t + 1]).max(axis=1) > 0).all()


@STYLES
def test_later_tokens_change_no_bit_of_earlier_logits(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params, tokens = random_params(config, rng), random_tokens(config, rng)
    before = np.asarray(run(params, tokens, config))
    for t in (0, 4, config.context_length - 2):
        changed = tokens.copy()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1 + t) % config.vocab_size
        after = np.asarray(run(params, changed, config))
        np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
        assert np.abs(after[:, t + 1 :] - before[:, t + 1 :]).max() > 1e-3


@STYLES
def test_packed_documents_do_not_see_each_other(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params, tokens = random_params(config, rng), random_tokens(config, rng, rows=2)
    T = config.context_length
    cuts = [[5, T], [3, 4, T]]
    segments = np.zeros_like(tokens)
    positions = np.zeros_like(tokens)
    for row, ends in enumerate(cuts):
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            segments[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
    packed = run(params, tokens, config, positions=positions, segment_ids=segments)
    for row, ends in enumerate(cuts):
        for start, end in zip([0, *ends], ends, strict=False):
            alone = run(params, tokens[row : row + 1, start:end], config)
            np.testing.assert_allclose(packed[row, start:end], alone[0], atol=1e-5, rtol=1e-5)


def test_rope_depends_on_distances_alone(rng: np.random.Generator) -> None:
    params, tokens = random_params(MODERN, rng), random_tokens(MODERN, rng)
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    here = run(params, tokens, MODERN, positions=places)
    np.testing.assert_allclose(run(params, tokens, MODERN), here, atol=1e-5)
    np.testing.assert_allclose(run(params, tokens, MODERN, positions=places + 9), here, atol=1e-4)
    stretched = run(params, tokens, MODERN, positions=places * 2)
    assert np.abs(np.asarray(stretched - here)).max() > 1e-3


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_the_textbook_formula(kv_heads: int, rng: np.random.Generator) -> None:
    B, T, S, H, C = 2, 5, 9, 4, 6
    q, k, v = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((B, T, H, C), (B, S, kv_heads, C), (B, S, kv_heads, C))
    )
    slots = np.sort(rng.integers(0, S, (B, T)), axis=1)
    query_segments, key_segments = rng.integers(0, 2, (B, T)), rng.integers(0, 2, (B, S))
    for b in range(B):
        key_segments[b, slots[b]] = query_segments[b] = key_segments[b, slots[b]]
    got = attention(
        *map(jnp.asarray, (q, k, v)),
        query_slots=jnp.asarray(slots),
        query_segments=jnp.asarray(query_segments),
        key_segments=jnp.asarray(key_segments),
    )
    got_last = attention(*map(jnp.asarray, (q, k, v)))
    for b, t, h in np.ndindex(B, T, H):
        scores = k[b, :, h // (H // kv_heads)].astype(np.float64) @ q[b, t, h] / np.sqrt(C)
        values = v[b, :, h // (H // kv_heads)].astype(np.float64)

        def expected(seen: list[int], scores=scores, values=values) -> np.ndarray:
            probs = np.exp(scores[seen] - scores[seen].max())
            return probs @ values[seen] / probs.sum()

        seen = [s for s in range(slots[b, t] + 1) if key_segments[b, s] == query_segments[b, t]]
        np.testing.assert_allclose(got[b, t, h], expected(seen), atol=2e-6)
        last = list(range(S - T + t + 1))
        np.testing.assert_allclose(got_last[b, t, h], expected(last), atol=2e-6)


@pytest.mark.parametrize("vocab_size", [31, 400, 3000])
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_the_first_loss_is_that_of_guessing(
    name: str, vocab_size: int, rng: np.random.Generator
) -> None:
    config = CONFIGS[name].replace(vocab_size=vocab_size)
    params = init_params(config, jax.random.key(int(rng.integers(2**31))))
    batch = {"tokens": random_tokens(config, rng, 8), "targets": random_tokens(config, rng, 8)}
    _, metrics = loss_fn(params, batch, config)
    # The modern head starts at zero, and so guesses exactly uniformly.
    near = 1e-4 if name == "modern" else 0.3
    assert abs(float(metrics["loss"]) - np.log(vocab_size)) < near


VARIANTS = [
    {"remat": "none", "scan_unroll": 1},
    {"remat": "none", "scan_unroll": 2},
    {"remat": "dots", "scan_unroll": 1},
    {"remat": "dots", "scan_unroll": 2},
    {"remat": "full", "scan_unroll": 1},
    {"remat": "offload", "scan_unroll": 1},
    {"remat": "full", "scan_unroll": 2},
]


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_how_it_is_computed_changes_nothing(
    name: str, rate: float, rng: np.random.Generator
) -> None:
    config = CONFIGS[name].replace(dropout=rate)
    params = random_params(config, rng)
    batch = {"tokens": random_tokens(config, rng), "targets": random_tokens(config, rng)}
    key = jax.random.key(7) if rate else None

    @partial(jax.jit, static_argnames="config")
    def value_and_grad(params: Params, config: ModelConfig) -> tuple[jax.Array, Params]:
        loss = lambda params: loss_fn(params, batch, config, dropout_key=key)[0]
        return jax.value_and_grad(loss)(params)

    loss, grads = value_and_grad(params, config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        # The softmax is blind to the keys' bias.
        if "key_bias" not in jax.tree_util.keystr(path):
            assert np.abs(np.asarray(leaf)).max() > 1e-8
    # With dropout only the ends, which is what the random keys could go wrong in.
    for variant in VARIANTS if not rate else VARIANTS[-2:]:
        other_loss, other_grads = value_and_grad(params, config.replace(**variant))
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5), grads, other_grads)

    other_loss, other_grads = value_and_grad(unstack_blocks(params, config), config)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    unstacked = unstack_blocks(grads, config)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5), unstacked, other_grads)


def lowered_gradient(config: ModelConfig, rows: int) -> Any:
    """The program of a gradient, from shapes alone."""
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((rows, config.context_length), jnp.int32)
    grad = jax.grad(lambda params, tokens: forward(params, tokens, config).sum())
    return jax.jit(grad).lower(params, tokens)


def test_shallow_models_have_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def loops(layers: int) -> int:
        program = lowered_gradient(GPT2.replace(num_layers=layers), rows=1)
        return program.as_text().count("stablehlo.while")

    assert loops(12) == 0
    assert loops(13) == 2
    monkeypatch.setattr("gptjax.model.platform", lambda: "gpu")
    assert [scan_unroll(GPT2.replace(num_layers=n)) for n in (6, 7, 12)] == [6, 1, 1]


@pytest.mark.parametrize("layers", [4, 12])
def test_remat_saves_memory(layers: int) -> None:
    def scratch(remat: Any) -> int:
        config = GPT2.replace(num_layers=layers, context_length=64, remat=remat)
        analysis = lowered_gradient(config, rows=16).compile().memory_analysis()
        assert analysis is not None
        return int(analysis.temp_size_in_bytes)

    none, dots, full = (scratch(remat) for remat in ("none", "dots", "full"))
    assert full < dots < none
    assert full < 0.6 * none


def test_remat_recomputes() -> None:
    def products(remat: str, kind: str = "dot_general", experts: int | None = None) -> int:
        config = GPT2.replace(remat=remat, scan_unroll=1, num_experts=experts)
        params = random_params(config, np.random.default_rng(0))
        tokens = jnp.zeros((1, 4), jnp.int32)
        grad = jax.grad(lambda params: forward(params, tokens, config).sum())
        return str(jax.make_jaxpr(grad)(params)).count(kind)

    assert products("none") < products("dots") < products("full") == products("offload")
    none, dots, full = (products(remat, "ragged_dot", 2) for remat in ("none", "dots", "full"))
    assert none == dots < full


def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(rng: np.random.Generator) -> None:
    x = jnp.ones((200, 500))
    out = np.asarray(dropout(x, 0.3, jax.random.split(random_key(rng), len(x))))
    assert np.mean(out == 0) == pytest.approx(0.3, abs=0.01)
    assert out.mean() == pytest.approx(1, abs=0.01)
    assert dropout(x, 0.3, None) is x
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.split(random_key(rng), len(x))), x)


def test_dropout_of_attention_keeps_the_mean(rng: np.random.Generator) -> None:
    q, k, v = (jnp.asarray(rng.normal(size=(1, 6, 2, 4)), jnp.float32) for _ in range(3))
    keys = jax.random.split(random_key(rng), (4000, 1))
    drawn = jax.jit(jax.vmap(lambda key: attention(q, k, v, dropout=0.3, dropout_key=key)))(keys)
    np.testing.assert_allclose(drawn.mean(axis=0), attention(q, k, v), atol=0.12)
    assert np.std(np.asarray(drawn), axis=0).min() > 0


@STYLES
def test_dropout_follows_its_key(config: ModelConfig, rng: np.random.Generator) -> None:
    config = config.replace(dropout=0.3)
    params, tokens = random_params(config, rng), random_tokens(config, rng)
    tokens[1] = tokens[0]
    a, b = jax.random.split(jax.random.key(int(rng.integers(2**31))))
    first = np.asarray(run(params, tokens, config, dropout_key=a))
    np.testing.assert_array_equal(first, run(params, tokens, config, dropout_key=a))
    assert np.abs(first - run(params, tokens, config, dropout_key=b)).max() > 1e-3
    assert np.abs(first[0] - first[1]).max() > 1e-3
    whole = run(params, tokens, config.replace(dropout=0.0))
    np.testing.assert_array_equal(run(params, tokens, config), whole)


def test_rows_have_dropout_of_their_own(rng: np.random.Generator) -> None:
    """And what a row drops does not depend on those beside it."""
    config = GPT2.replace(dropout=0.5)
    params, key = random_params(config, rng), random_key(rng)
    tokens = np.repeat(random_tokens(config, rng, rows=1), 4, axis=0)
    drawn = np.asarray(run(params, tokens, config, dropout_key=key))
    for row in range(1, 4):
        assert np.abs(drawn[row] - drawn[0]).max() > 1e-2
    fewer = run(params, tokens[:2], config, dropout_key=key)
    np.testing.assert_allclose(fewer, drawn[:2], atol=1e-5, rtol=1e-5)


def test_layers_have_dropout_of_their_own(rng: np.random.Generator) -> None:
    """Two equal layers with equal inputs differ, or they would share a key."""
    config = GPT2.replace(dropout=0.5)
    params = random_params(config, rng)
    # Blocks that put out zeros but for a bias, so that a block's output is its dropout alone.
    blocks = jax.tree.map(jnp.zeros_like, params["blocks"])
    blocks["mlp"]["down_bias"] = jnp.ones_like(blocks["mlp"]["down_bias"])
    embed = jax.tree.map(jnp.zeros_like, params["embed"])
    params = {**params, "blocks": blocks, "embed": embed}
    from gptjax.model import Context, run_blocks

    x = jnp.zeros((1, 16, 32))
    keys = jax.random.split(random_key(rng), 1)
    out = run_blocks(blocks, x, Context(None, None, None), config, keys, None).x_BTD
    # Each layer adds 0 or 2: with a key of its own, 2 arises in half of the places.
    assert set(np.unique(np.asarray(out)).tolist()) == {0.0, 2.0, 4.0}


@STYLES
def test_bfloat16_is_near_and_logits_are_float32(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params, tokens = random_params(config, rng), random_tokens(config, rng)
    full = np.asarray(run(params, tokens, config))
    half = run(params, tokens, config.replace(compute_dtype="bfloat16"))
    assert half.dtype == jnp.float32
    difference = np.abs(np.asarray(half) - full).max()
    assert 0 < difference < 0.1 * np.abs(full).max()


@pytest.mark.parametrize("vocab_size", [31, 1500])
def test_the_gradient_of_the_embedding_is_a_sum_over_uses(
    vocab_size: int, rng: np.random.Generator
) -> None:
    from gptjax.model import look_up

    table = jnp.asarray(rng.normal(size=(vocab_size, 8)), jnp.float32)
    tokens = rng.integers(0, 20, (3, 11))
    upstream = rng.normal(size=(3, 11, 8)).astype(np.float32)

    def objective(table: jax.Array) -> jax.Array:
        return jnp.sum(look_up(table, jnp.asarray(tokens), jnp.float32) * upstream)

    got = jax.grad(objective)(table)
    expected = np.zeros(table.shape)
    np.add.at(expected, tokens, upstream)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_gradient_of_positions_is_a_sum_over_uses(rng: np.random.Generator) -> None:
    """Also where the rows of a batch count differently, as packed documents make them."""
    params, tokens = random_params(GPT2, rng), random_tokens(GPT2, rng)
    B, T = tokens.shape
    plain = np.broadcast_to(np.arange(T), (B, T))
    upstream = rng.normal(size=(B, T, GPT2.embed_dim)).astype(np.float32)

    def gradient(positions: jax.Array) -> np.ndarray:
        def objective(table: jax.Array) -> jax.Array:
            embedded = embed(
                params["embed"] | {"positions": table},
                jnp.asarray(tokens),
                positions,
                GPT2,
                jnp.float32,
            )
            return jnp.sum(embedded * upstream)

        return np.asarray(jax.grad(objective)(params["embed"]["positions"]))

    for positions in (plain, rng.integers(0, T, (B, T))):
        expected = np.zeros(params["embed"]["positions"].shape)
        np.add.at(expected, positions, upstream)
        np.testing.assert_allclose(gradient(jnp.asarray(positions)), expected, atol=1e-5)
    np.testing.assert_allclose(
        gradient(jnp.arange(T)[None]), gradient(jnp.asarray(plain)), atol=1e-5
    )


def test_logits_are_capped(rng: np.random.Generator) -> None:
    params, tokens = random_params(MODERN, rng), random_tokens(MODERN, rng)
    free = np.asarray(run(params, tokens, MODERN.replace(logit_softcap=None)))
    capped = run(params, tokens, MODERN.replace(logit_softcap=2.0))
    np.testing.assert_allclose(capped, 2 * np.tanh(free / 2), atol=1e-5)


def test_sequences_beyond_the_context_are_refused() -> None:
    with pytest.raises(UserError, match=r"17 tokens.*context is 16"):
        forward({}, jnp.zeros((1, 17), jnp.int32), GPT2)


@STYLES
def test_no_rank_is_promoted(config: ModelConfig, rng: np.random.Generator) -> None:
    config = config.replace(dropout=0.1)
    params, tokens = random_params(config, rng), jnp.asarray(random_tokens(config, rng))
    with jax.numpy_rank_promotion("raise"):
        forward(params, tokens, config)
        forward(params, tokens, config, dropout_key=jax.random.key(0))
        forward(params, tokens, config, positions=tokens * 0, segment_ids=tokens)
