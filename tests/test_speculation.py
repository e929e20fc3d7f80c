"""Proposed and verified tokens: the same as one by one, in tokens and in distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from small_models import GPT2, MODERN, STYLES, random_params

from gptjax import speculation as speculative
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation import DecodeState, Progress, generate, generate_continuations
from gptjax.model import forward
from gptjax.params import Params
from gptjax.sampling import Sampling
from gptjax.speculation import Carry, DraftModel, Plan, PromptLookup

LOOKUPS = [PromptLookup(), PromptLookup(tokens=1, ngram=1), PromptLookup(tokens=3, ngram=2)]


def draft_of(config: ModelConfig, rng: np.random.Generator, **changes) -> DraftModel:
    small = config.replace(num_layers=1, **changes)
    return DraftModel(params=random_params(small, rng), config=small, tokens=3)


def repeating_prompts(rng: np.random.Generator, config: ModelConfig, rows: int) -> list[list[int]]:
    """Of unequal lengths, with repetitions to be found."""
    prompts = []
    for _ in range(rows):
        part = rng.integers(0, config.vocab_size, rng.integers(1, 5)).tolist()
        prompts.append((part * 6)[: int(rng.integers(1, 20))])
    return prompts


@STYLES
@pytest.mark.parametrize("kind", ["lookup", "draft", "itself"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "banned": (3, 4)},
        {"stop": (1, 2, 3, 5, 8, 13, 21), "logprobs": 2},
    ],
    ids=["plain", "penalties", "stops"],
)
def test_greedy_choice_is_the_same(
    config: ModelConfig, kind: str, options: dict, rng: np.random.Generator
) -> None:
    """But for ties at rounding. With ragged prompts, the last to the end of the context."""
    config = config.replace(context_length=40)
    params = random_params(config, rng)
    prompts = [*repeating_prompts(rng, config, 4), rng.integers(0, 31, 21).tolist()]
    sampling = Sampling(max_new_tokens=19, temperature=0, **options)
    plain = generate_continuations(params, prompts, config, sampling)
    proposers = {
        "lookup": LOOKUPS,
        "draft": [draft_of(config, rng)],
        "itself": [DraftModel(params=params, config=config, tokens=5)],
    }[kind]
    for proposer in proposers:
        found = generate_continuations(params, prompts, config, sampling, speculation=proposer)
        for prompt, one, other in zip(prompts, found, plain, strict=True):
            pairs = enumerate(zip(one.tokens, other.tokens, strict=False))
            at = next((at for at, (a, b) in pairs if a != b), None)
            if at is not None:
                logits = _penalized(params, config, prompt, one.tokens[:at], options)
                choices = [one.tokens[at], other.tokens[at]]
                # Either is the greedy choice, to rounding; what follows is another text.
                np.testing.assert_allclose(logits[choices], logits.max(), atol=1e-5)
                continue
            assert (one.tokens, one.finish) == (other.tokens, other.finish)
            if one.logprobs is not None:
                np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def _penalized(
    params: Params, config: ModelConfig, prompt: list[int], drawn: list[int], options: dict
) -> np.ndarray:
    logits = np.array(forward(params, jnp.array([[*prompt, *drawn]]), config)[0, -1], np.float64)
    for token in {*prompt, *drawn}:
        penalty = options.get("repetition_penalty", 1.0)
        logits[token] *= 1 / penalty if logits[token] > 0 else penalty
    for token in drawn:
        logits[token] -= options.get("frequency_penalty", 0)
    logits[list(options.get("banned", ()))] = -np.inf
    return logits


def test_penalized_logits_are_what_greedy_choice_is_of(rng: np.random.Generator) -> None:
    config, options = GPT2, {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "banned": (3, 4)}
    params, prompt = random_params(config, rng), [1, 2, 3, 1, 2]
    sampling = Sampling(max_new_tokens=9, temperature=0, **options)
    [row] = generate(params, [prompt], config, sampling)
    for at, token in enumerate(row):
        logits = _penalized(params, config, prompt, row[:at], options)
        assert logits[token] == pytest.approx(logits.max(), abs=1e-5)


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"top_k": 3}, {"presence_penalty": 1.0, "min_p": 0.02}],
    ids=["temperature", "top_k", "penalties"],
)
def test_draws_have_the_distribution_of_the_model(
    kind: str, options: dict, rng: np.random.Generator
) -> None:
    """Chi-square of three tokens together, against the product of exact probabilities."""
    V, draws = 5, 3000
    config = GPT2.replace(vocab_size=V)
    params = random_params(config, rng)
    prompt = [1, 2, 3, 1, 2]
    proposer = PromptLookup(tokens=2) if kind == "lookup" else draft_of(config, rng)
    sampling = Sampling(max_new_tokens=3, num_samples=draws, **options)
    key = jax.random.key(int(rng.integers(2**31)))
    found = generate(params, [prompt], config, sampling, key, speculation=proposer)
    counts = np.zeros((V, V, V))
    for row in found:
        counts[tuple(row)] += 1

    expected = np.zeros((V, V, V))
    texts = np.array([[*prompt, *drawn] for drawn in itertools.product(range(V), repeat=2)])
    logits = np.asarray(forward(params, jnp.asarray(texts), config), np.float64)[:, -3:]
    for (a, b), rows in zip(itertools.product(range(V), repeat=2), logits, strict=True):
        one = _distribution(rows[0], [], options)
        two = _distribution(rows[1], [a], options)
        three = _distribution(rows[2], [a, b], options)
        expected[a, b] = one[a] * two[b] * three * draws
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    seen = [*counts[often], counts[~often].sum()]
    due = [*expected[often], expected[~often].sum()]
    if due[-1] < 5:
        seen, due = [*seen[:-2], seen[-2] + seen[-1]], [*due[:-2], due[-2] + due[-1]]
    assert scipy.stats.chisquare(seen, due).pvalue > 1e-4


def _distribution(logits: np.ndarray, drawn: list[int], options: dict) -> np.ndarray:
    logits = logits.copy()
    for token in set(drawn):
        logits[token] -= options.get("presence_penalty", 0)
    logits = logits / options.get("temperature", 1)
    if "top_k" in options:
        logits[logits < np.sort(logits)[-options["top_k"]]] = -np.inf
    probs = np.exp(logits - logits.max())
    probs[probs < options.get("min_p", 0)] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_a_row_does_not_depend_on_its_batch(kind: str, rng: np.random.Generator) -> None:
    config = MODERN.replace(context_length=40)
    params = random_params(config, rng)
    proposer = PromptLookup(tokens=4) if kind == "lookup" else draft_of(config, rng)
    prompts = repeating_prompts(rng, config, 5)
    seeds = tuple(rng.integers(0, 1000, 5).tolist())
    sampling = Sampling(max_new_tokens=15, temperature=0.8, top_p=0.9, seeds=seeds, stop=(3, 5))
    batch = generate(params, prompts, config, sampling, speculation=proposer)
    for prompt, seed, row in zip(prompts, seeds, batch, strict=True):
        alone = sampling.replace(seeds=(seed,))
        assert generate(params, [prompt], config, alone, speculation=proposer) == [row]


def test_look_up_finds_the_longest_match_and_of_those_the_latest(
    rng: np.random.Generator,
) -> None:
    tokens, ngram, rows, room = 4, 3, 200, 24
    text = rng.integers(0, 3, (rows, room)).astype(np.int32)
    last = rng.integers(0, room, rows).astype(np.int32)
    zeros = jnp.zeros(rows, jnp.int32)
    progress = Progress(
        state=DecodeState((), zeros, jnp.asarray(last)),
        keys_B=jax.random.split(jax.random.key(0), rows),
        limit_B=zeros,
        stopped_B=zeros > 0,
        out_BN=zeros[:, None],
        count_B=zeros,
        history=None,
        details=None,
    )
    plan = Plan(tokens=tokens, ngram=ngram, draft=None)
    found = speculative.look_up(Carry(progress, jnp.asarray(text), None), plan).tokens_BK
    for row in range(rows):
        seen = text[row, : last[row] + 1].tolist()
        assert found[row].tolist() == _looked_up(seen, tokens, ngram)


def _looked_up(seen: list[int], tokens: int, ngram: int) -> list[int]:
    for n in range(min(ngram, len(seen)), 0, -1):
        for end in range(len(seen) - 1, n - 1, -1):
            if seen[end - n : end] == seen[len(seen) - n :]:
                follows = seen[end:]
                return [follows[i % len(follows)] for i in range(tokens)]
    return [-1] * tokens


def test_fewer_passes(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that drafts for itself needs a pass for each six tokens."""
    config = GPT2.replace(context_length=64)
    params = random_params(config, rng)
    passes = []
    verify = speculative.verify

    def counted(*args):
        jax.debug.callback(lambda: passes.append(1))
        return verify(*args)

    monkeypatch.setattr(speculative, "verify", counted)
    speculative._generate.clear_cache()
    proposer = DraftModel(params=params, config=config, tokens=5)
    sampling = Sampling(max_new_tokens=31, temperature=0)
    generate(params, [[1, 2]], config, sampling, speculation=proposer)
    jax.effects_barrier()
    speculative._generate.clear_cache()
    # The first token comes with the prompt, thirty are left.
    assert len(passes) == 5


def test_one_compilation(rng: np.random.Generator) -> None:
    """Other numbers, prompts and lengths in a bucket do not compile again."""
    config = GPT2.replace(context_length=64)
    params = random_params(config, rng)
    speculative._generate.clear_cache()
    for _ in range(6):
        prompt = rng.integers(0, 31, int(rng.integers(8, 16))).tolist()
        sampling = Sampling(
            max_new_tokens=int(rng.integers(17, 20)), temperature=float(rng.uniform(0.5, 2))
        )
        generate(params, [prompt], config, sampling, speculation=PromptLookup(tokens=12))
    assert speculative._generate._cache_size() == 1


def test_what_does_not_go(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)

    def run(proposer, **options) -> None:
        generate(params, [[1]], GPT2, Sampling(**options), speculation=proposer)

    with pytest.raises(UserError, match="vocabulary of 30"):
        run(draft_of(GPT2, rng, vocab_size=30), max_new_tokens=2)
    with pytest.raises(UserError, match="draft model's context of 8"):
        run(draft_of(GPT2, rng, context_length=8), max_new_tokens=8)
    with pytest.raises(UserError, match="does not go past the context"):
        run(PromptLookup(), max_new_tokens=40, overflow="slide")
    with pytest.raises(UserError, match="tokens is 0"):
        PromptLookup(tokens=0)
    with pytest.raises(UserError, match="ngram is 0"):
        PromptLookup(ngram=0)
