"""Direct preference optimization."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2, STYLES, random_params

from gptjax.adapters import LoRA
from gptjax.config import ModelConfig
from gptjax.data.mixture import Mixture
from gptjax.data.packing import Example, PackedLoader
from gptjax.errors import UserError
from gptjax.fitting import fit
from gptjax.loss import LossOptions
from gptjax.model import forward
from gptjax.optimizer import OptimizerConfig, make_optimizer
from gptjax.params import Params
from gptjax.preferences import DPO, Preference, PreferenceLoader
from gptjax.training import init_state, make_train_step


def draw_pairs(config: ModelConfig, rng: np.random.Generator, count: int) -> list[Preference]:
    """A prompt with two answers, of any lengths."""

    def answer(prompt: np.ndarray) -> Example:
        room = config.context_length + 1 - len(prompt)
        own = rng.integers(0, config.vocab_size, rng.integers(1, room + 1))
        weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(own))])
        return Example(np.concatenate([prompt, own]), weights)

    pairs = []
    for _ in range(count):
        prompt = rng.integers(0, config.vocab_size, rng.integers(1, 8))
        pairs.append(Preference(answer(prompt), answer(prompt)))
    return pairs


def answer_logprob(params: Params, example: Example, config: ModelConfig) -> float:
    """One answer by itself, in float64."""
    logits = np.asarray(forward(params, jnp.asarray(example.tokens[None, :-1]), config)[0])
    logits = logits.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = example.tokens[1:]
    return float((logprobs[np.arange(len(targets)), targets] * example.weights[1:]).sum())


def by_hand(
    params: Params, reference: Params, pairs: list[Preference], config: ModelConfig, beta: float
) -> tuple[float, float, float]:
    """Loss, accuracy and margin of Rafailov et al. 2023, equation 7, pair by pair."""
    margins = []
    for chosen, rejected in pairs:
        gains = [
            answer_logprob(params, answer, config) - answer_logprob(reference, answer, config)
            for answer in (chosen, rejected)
        ]
        margins.append(beta * (gains[0] - gains[1]))
    values = np.array(margins)
    return float(np.log1p(np.exp(-values)).mean()), float((values > 0).mean()), float(values.mean())


def near(params: Params, rng: np.random.Generator) -> Params:
    return jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, 0.02, x.shape), jnp.float32), params
    )


# A block of several tokens each, or of one.
@pytest.mark.parametrize("at_once", [2**26, 800, 100], ids=["whole", "blocks", "tokens"])
@STYLES
def test_loss_is_the_formula(config: ModelConfig, at_once: int, rng: np.random.Generator) -> None:
    pairs = draw_pairs(config, rng, 5)
    reference = random_params(config, rng)
    params = near(reference, rng)
    loader = PreferenceLoader(pairs, batch_size=3, context_length=16)
    loader = loader.with_reference(reference, config)
    beta, options = float(rng.uniform(0.1, 1)), LossOptions(logits_at_once=at_once)
    totals: dict[str, float] = {}
    for batch in loader.in_order():
        assert batch["tokens"].shape == (3, 16)
        objective, sums = DPO(beta)(params, batch, config, options=options)
        assert float(objective) == float(sums["nll"])
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + float(value)
    loss, accuracy, margin = by_hand(params, reference, pairs, config, beta)
    assert totals["targets"] == len(pairs)
    assert totals["tokens"] == sum(a.weights[1:].sum() for pair in pairs for a in pair)
    assert totals["nll"] / len(pairs) == pytest.approx(loss, rel=1e-4)
    assert totals["accuracy"] / len(pairs) == pytest.approx(accuracy)
    assert totals["margin"] / len(pairs) == pytest.approx(margin, rel=1e-3, abs=1e-4)
    # Of the reference itself the loss is that of a coin.
    objective, _ = DPO(beta)(reference, next(loader.in_order()), config, options=options)
    assert float(objective) / 3 == pytest.approx(np.log(2), rel=1e-5)


def test_gradient_by_blocks(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    loader = PreferenceLoader(draw_pairs(GPT2, rng, 4), batch_size=4, context_length=16)
    batch = loader.with_reference(near(params, rng), GPT2)[0]

    def gradient(at_once: int) -> Params:
        options = LossOptions(logits_at_once=at_once)
        return jax.grad(lambda p: DPO()(p, batch, GPT2, options=options)[0])(params)

    with jax.default_matmul_precision("highest"):
        whole, blocks = gradient(2**26), gradient(1000)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), whole, blocks)


def test_accumulated_pairs_are_the_whole_batch(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    loader = PreferenceLoader(draw_pairs(GPT2, rng, 8), batch_size=8, context_length=16)
    batch = loader.with_reference(near(params, rng), GPT2)[3]
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
    optimizer, ends = make_optimizer(config, GPT2, 10), []
    for accumulate in (1, 4):
        step = make_train_step(GPT2, optimizer, accumulate=accumulate, objective=DPO(0.3))
        state = init_state(GPT2, optimizer, jax.random.key(0), params=params)
        _, metrics = step(state, batch)
        ends.append({name: float(value) for name, value in metrics.items()})
    one, four = ends
    assert set(one) >= {"loss", "tokens", "accuracy", "margin", "grad_norm"}
    for name, value in one.items():
        assert four[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_run_learns_what_is_preferred(tmp_path: Path, rng: np.random.Generator) -> None:
    """Answers of one token are preferred to those of another; with additions only."""
    config, params = GPT2, random_params(GPT2, rng)
    pairs = []
    for _ in range(40):
        prompt = rng.integers(5, config.vocab_size, 6)
        weights = np.array([0] * 6 + [1, 1], np.float32)
        good, bad = (np.concatenate([prompt, [token, token]]) for token in (1, 2))
        pairs.append(Preference(Example(good, weights), Example(bad, weights)))
    loader = PreferenceLoader(pairs[:32], batch_size=8, context_length=8)
    held_out = PreferenceLoader(pairs[32:], batch_size=8, context_length=8)
    options: dict[str, Any] = {
        "params": params,
        "trainable": LoRA(4, 8.0),
        "objective": DPO(0.5),
        "eval_data": list(held_out.with_reference(params, config).in_order()),
        "eval_every": 20,
        "progress": False,
    }
    result = fit(
        config,
        OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        loader.with_reference(params, config),
        steps=40,
        out=tmp_path / "run",
        **options,
    )
    assert result.val_loss is not None
    assert result.val_loss < 0.3
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert '"accuracy"' in rows[0]
    assert '"margin"' in rows[0]
    # Another objective is another run.
    with pytest.raises(UserError, match="objective"):
        fit(
            config,
            OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
            loader.with_reference(params, config),
            steps=50,
            out=tmp_path / "run",
            **options | {"objective": DPO(0.1)},
        )


def test_pairs_by_position(rng: np.random.Generator) -> None:
    pairs = draw_pairs(GPT2, rng, 7)
    loader = PreferenceLoader(pairs, batch_size=3, context_length=16, seed=5)
    # An epoch has every pair once, in rows that belong together.
    rows = [loader.read(np.array([n])) for n in range(7)]
    seen = set()
    for row in rows:
        found = [
            number
            for number, pair in enumerate(pairs)
            for length in [len(pair.chosen.tokens) - 1]
            if (row["targets"][0, :length] == pair.chosen.tokens[1:]).all()
            and row["weights"].sum() == pair.chosen.weights[1:].sum()
            and row["rejected_weights"].sum() == pair.rejected.weights[1:].sum()
        ]
        seen.update(found)
    assert seen == set(range(7))
    batch, part = loader[4], loader.rows(4, 1, 3)
    for name in batch:
        np.testing.assert_array_equal(batch[name][1:3], part[name])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda pairs: DPO(0.0), "beta is 0"),
        (lambda pairs: PreferenceLoader([], batch_size=1, context_length=4), "no preference pairs"),
        (lambda pairs: PreferenceLoader(pairs, batch_size=0, context_length=16), "batch_size is 0"),
        (lambda pairs: PreferenceLoader(pairs, batch_size=1, context_length=2), "context"),
        (
            lambda pairs: DPO()(
                {},
                PreferenceLoader(pairs, batch_size=1, context_length=16)[0],
                GPT2,
                options=LossOptions(),
            ),
            "with_reference",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, says: str, rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match=says):
        make(draw_pairs(GPT2, rng, 4))


def test_routers_are_balanced_too(rng: np.random.Generator) -> None:
    config = GPT2.replace(num_experts=3, experts_per_token=2)
    params = random_params(config, rng)
    loader = PreferenceLoader(draw_pairs(config, rng, 4), batch_size=4, context_length=16)
    batch = loader.with_reference(params, config)[0]
    plain = LossOptions(balance_loss=0, router_z_loss=0)
    alone, _ = DPO()(params, batch, config, options=plain)
    options = LossOptions(balance_loss=2, router_z_loss=3)
    objective, sums = DPO()(params, batch, config, options=options)
    wanted = alone + 2 * sums["balance_loss"] + 3 * sums["router_z_loss"]
    assert float(objective) == pytest.approx(float(wanted), rel=1e-5)
    assert float(sums["balance_loss"]) > 0
    with pytest.raises(UserError, match="z_loss"):
        DPO()(params, batch, config, options=LossOptions(z_loss=0.1))


def test_pairs_that_count_nothing_are_told(rng: np.random.Generator) -> None:
    good, silent = draw_pairs(GPT2, rng, 2)
    nothing = Example(silent.chosen.tokens, np.zeros(len(silent.chosen.tokens)))
    with pytest.warns(UserWarning, match="1 of 2 pairs"):
        PreferenceLoader(
            [good, Preference(nothing, silent.rejected)], batch_size=1, context_length=16
        )


def test_ids_of_rejected_answers_are_checked(tmp_path: Path) -> None:
    tokens = np.array([1, 2, 80], np.int32)
    pairs = [Preference(Example(np.array([1, 2, 3]), np.ones(3)), Example(tokens, np.ones(3)))]
    loader = PreferenceLoader(pairs, batch_size=1, context_length=16)
    config = OptimizerConfig(warmup_steps=0)
    with pytest.raises(UserError, match=r"rejected_t.* hold id 80"):
        fit(GPT2, config, loader, steps=1, out=tmp_path / "run", objective=DPO(), progress=False)


def test_mixed_preferences_stay_what_they_are(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    parts = [
        PreferenceLoader(draw_pairs(GPT2, rng, 3), batch_size=2, context_length=16)
        for _ in range(2)
    ]
    whole = Mixture([p.with_reference(params, GPT2) for p in parts], [1, 1], batch_size=4)
    objective, sums = DPO()(params, whole[0], GPT2, options=LossOptions())
    assert float(sums["targets"]) == 4
    assert float(objective) / 4 == pytest.approx(np.log(2), rel=1e-5)
    packed = PackedLoader([np.arange(9, dtype=np.int32)], batch_size=1, context_length=16)
    with pytest.raises(UserError, match="rejected_tokens"):
        Mixture([parts[0], packed], [1, 1], batch_size=2)
