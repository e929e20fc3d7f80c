"""Beam search against transformers, against published beams and against all continuations."""

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from family_cases import CASES, seeded_model
from small_models import GPT2, MODERN, STYLES, random_params

from gptjax import beams as module
from gptjax.beams import Beam, beam_search
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation import generate
from gptjax.model import Model, forward
from gptjax.params import Params
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.pretrained.loading import load
from gptjax.sampling import Sampling

TINY = Path(__file__).resolve().parents[2] / "shared" / "assets" / "models" / "tiny-random-gpt2"
NEW = 12
PROMPTS = [[5, 17, 60], [1, 2, 3], [96, 0, 40], [33, 33, 8]]

run = jax.jit(forward, static_argnames="config")


class Reference:
    """A seeded model here and, with the same weights, in transformers."""

    def __init__(self, family: str, folder: Path):
        torch = pytest.importorskip("torch", reason="PyTorch is what beams are compared with")
        transformers = pytest.importorskip(
            "transformers", reason="transformers is what beams are compared with"
        )
        self.model, _ = seeded_model(CASES[family])
        save_pretrained(self.model, folder)
        self._torch = torch
        self._settings = transformers.GenerationConfig
        self._opened = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        # What is None in the call's settings would be taken from here.
        self._opened.generation_config.eos_token_id = None
        greedy = generate(
            self.model.params, PROMPTS, self.model.config, Sampling(max_new_tokens=5, temperature=0)
        )
        # Tokens that continuations do come to: some at their beginning, some later.
        self.stop = (greedy[0][1], greedy[1][4], greedy[2][2])

    def beams(self, prompts: list[list[int]], stop: tuple[int, ...], **options: Any):
        """What transformers finds, as `beam_search` gives it. The prompts are of one length."""
        num_return = options.pop("num_return", 1)
        settings = self._settings(
            do_sample=False,
            eos_token_id=list(stop) or None,
            pad_token_id=stop[0] if stop else 1,
            num_return_sequences=num_return,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        ids = self._torch.tensor(prompts)
        # Threads wait longer for each other than products as small as these take.
        threads = self._torch.get_num_threads()
        self._torch.set_num_threads(1)
        with self._torch.no_grad():
            out = self._opened.generate(
                ids, attention_mask=self._torch.ones_like(ids), generation_config=settings
            )
        self._torch.set_num_threads(threads)
        rows = out.sequences[:, len(prompts[0]) :].tolist()
        # Greedy decoding has no scores of whole continuations.
        scores = getattr(out, "sequences_scores", None)
        scores = [np.nan] * len(rows) if scores is None else scores.tolist()
        flat = [Beam(until(row, stop), score) for row, score in zip(rows, scores, strict=True)]
        return [flat[at : at + num_return] for at in range(0, len(flat), num_return)]


def until(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in stop, tokens))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory):
    opened: dict[str, Reference] = {}

    def reference(family: str) -> Reference:
        if family not in opened:
            opened[family] = Reference(family, tmp_path_factory.mktemp(family))
        return opened[family]

    return reference


def search(model: Model, prompts: list[list[int]], **options: Any) -> list[list[Beam]]:
    return beam_search(model.params, prompts, model.config, **options)


def assert_same(found: list[list[Beam]], expected: list[list[Beam]], case: Any = "") -> None:
    ids = [[beam.tokens for beam in beams] for beams in found]
    assert ids == [[beam.tokens for beam in beams] for beams in expected], case
    scores = [[beam.score for beam in beams] for beams in found]
    np.testing.assert_allclose(
        scores, [[beam.score for beam in beams] for beams in expected], rtol=2e-5, err_msg=str(case)
    )


CASES_OF_RULES = [
    (stops, penalty, early)
    for stops, penalty, early in itertools.product(
        [0, 1, 3], [0.0, 0.7, 1.0, 2.0], [False, True, "never"]
    )
    # Without stop tokens nothing ends before the last step.
    if stops or early is False
]


def compare_with_transformers(reference: Reference, num_beams: int, cases: list) -> None:
    ended = 0
    for stops, penalty, early in cases:
        stop = reference.stop[:stops]
        options = {
            "num_beams": num_beams,
            "max_new_tokens": NEW,
            "length_penalty": penalty,
            "early_stopping": early,
            "num_return": num_beams,
        }
        expected = reference.beams(PROMPTS, stop, **options)
        found = search(reference.model, PROMPTS, stop=stop, **options)
        assert_same(found, expected, case=(stop, penalty, early))
        ended += sum(len(beam.tokens) < NEW for beams in found for beam in beams)
        fewer = search(reference.model, PROMPTS, stop=stop, **(options | {"num_return": 1}))
        assert fewer == [beams[:1] for beams in found]
    assert ended > len(cases)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("num_beams", [2, 3, 4, 5])
def test_beams_are_those_of_transformers(references: Any, family: str, num_beams: int) -> None:
    # Between them the four numbers of beams go through all cases.
    compare_with_transformers(references(family), num_beams, CASES_OF_RULES[num_beams % 4 :: 4])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "qwen2-windows"])
@pytest.mark.parametrize("num_beams", [2, 3, 4, 5, 8])
def test_beams_are_those_of_transformers_in_every_case(
    references: Any, family: str, num_beams: int
) -> None:
    compare_with_transformers(references(family), num_beams, CASES_OF_RULES)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_beam_is_greedy(references: Any, family: str) -> None:
    reference = references(family)
    model, stop = reference.model, reference.stop
    expected = reference.beams(PROMPTS, stop, num_beams=1, max_new_tokens=NEW)
    for early in (False, True, "never"):
        found = search(
            model, PROMPTS, num_beams=1, max_new_tokens=NEW, stop=stop, early_stopping=early
        )
        ids = [beam.tokens for [beam] in found]
        assert ids == [beam.tokens for [beam] in expected]
        greedy = Sampling(max_new_tokens=NEW, temperature=0, stop=stop)
        assert ids == generate(model.params, PROMPTS, model.config, greedy)


@pytest.mark.skipif(not TINY.is_dir(), reason="tiny-random-gpt2 is not in ../shared/assets/models")
def test_published_beams() -> None:
    """Those of BeamSearchGptFp32 in onnxruntime-genai's test/model_tests.cpp."""
    model = load(TINY)
    prompts = [
        [0, 0, 0, 0, 0, 52, 195, 731, 321, 301, 734, 620],
        [41, 554, 74, 622, 206, 222, 75, 223, 221, 198, 224, 572],
        [0, 0, 0, 52, 328, 219, 328, 206, 288, 227, 896, 328],
    ]
    found = search(model, prompts, num_beams=4, max_new_tokens=8, stop=model.stop_ids)
    assert [beam.tokens for [beam] in found] == [
        [131, 131, 131, 181, 638, 638, 638, 638],
        [292] * 8,
        [328, *[669] * 7],
    ]


def next_logprobs(params: Params, config: ModelConfig, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of what follows, `[T, V]`, by the full forward."""
    padded = np.zeros((1, config.context_length), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(run(params, padded, config), np.float64)[0, : len(tokens)]
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def searched_in_python(
    params: Params,
    prompt: list[int],
    config: ModelConfig,
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: bool | str,
    stop: tuple[int, ...],
) -> list[Beam]:
    """The same search with lists, one beam at a time and no cache."""
    open_beams, done = [(0.0, [])], []
    for length in range(1, max_new_tokens + 1):
        grown = [
            (total + logprob, [*tokens, token])
            for total, tokens in open_beams
            for token, logprob in enumerate(next_logprobs(params, config, prompt + tokens)[-1])
        ]
        grown.sort(key=lambda beam: -beam[0])
        for total, tokens in grown[:num_beams]:
            if tokens[-1] in stop or length == max_new_tokens:
                done.append(Beam(until(tokens, stop), total / length**length_penalty))
        done = sorted(done, key=lambda beam: -beam.score)[:num_beams]
        open_beams = [beam for beam in grown if beam[1][-1] not in stop][:num_beams]
        if len(done) == num_beams:
            longest = early_stopping == "never" and length_penalty > 0
            hope = open_beams[0][0] / (max_new_tokens if longest else length) ** length_penalty
            if early_stopping is True or hope <= done[-1].score:
                break
    return done


@pytest.mark.parametrize("early", [False, True, "never"])
@STYLES
def test_the_search_is_that_of_plain_lists(config: ModelConfig, early: bool | str) -> None:
    # Fixed, for two sums may be too close to tell apart.
    rng = np.random.default_rng(5)
    params = random_params(config, rng)
    prompts = [rng.integers(0, 31, length).tolist() for length in (1, 8, 4)]
    greedy = generate(params, prompts, config, Sampling(max_new_tokens=4, temperature=0))
    stop = (greedy[0][1], greedy[1][3])
    ended = 0
    for penalty in (-0.5, 0.0, 1.5):
        options: dict[str, Any] = {
            "num_beams": 3,
            "max_new_tokens": 7,
            "length_penalty": penalty,
            "early_stopping": early,
            "stop": stop,
        }
        found = beam_search(params, prompts, config, num_return=3, **options)
        expected = [searched_in_python(params, prompt, config, **options) for prompt in prompts]
        assert_same(found, expected, case=penalty)
        ended += sum(len(beam.tokens) < 7 for beams in found for beam in beams)
    assert ended


def bigram_model(probabilities_VV: np.ndarray) -> tuple[Params, ModelConfig]:
    """A model whose next token depends on the last alone, as the rows of the table say."""
    V = len(probabilities_VV)
    config = MODERN.replace(
        vocab_size=V,
        embed_dim=V,
        num_heads=1,
        num_kv_heads=1,
        tie_embeddings=False,
        logit_softcap=None,
    )
    params = jax.tree.map(np.zeros_like, random_params(config, np.random.default_rng(0)))
    params["embed"]["tokens"] = 100 * np.eye(V, dtype=np.float32)
    # RMSNorm makes a row of it √V long.
    params["head"]["kernel"] = np.log(probabilities_VV).T.astype(np.float32) / np.sqrt(V)
    if "scale" in params["final_norm"]:
        params["final_norm"]["scale"] += 1
    return params, config


def test_never_stops_before_a_better_end_where_short_is_better() -> None:
    """An open beam's best length is its own where the penalty is negative, not the longest."""
    stop, table = 3, np.full((6, 6), 1e-6)
    table[0, [stop, 1, 2]] = 0.5, 0.3, 0.2
    table[1, [4, stop]] = 0.9, 0.1
    table[2, [stop, 4]] = 0.9, 0.1
    table[4, stop] = table[3, 3] = table[5, 5] = 1
    table /= table.sum(axis=1, keepdims=True)
    params, config = bigram_model(table)
    # By the second step two have ended; the better end of 0, 1, 4 comes with the third.
    for early, second in (("never", [1, 4]), (False, [1, 4]), (True, [2])):
        [found] = beam_search(
            params,
            [[0]],
            config,
            num_beams=2,
            max_new_tokens=14,
            length_penalty=-0.3,
            early_stopping=early,
            stop=[stop],
            num_return=2,
        )
        assert [beam.tokens for beam in found] == [[], second]
        total = np.log(0.3 * 0.9) * 3**0.3 if second == [1, 4] else np.log(0.2 * 0.9) * 2**0.3
        assert [beam.score for beam in found] == pytest.approx([np.log(0.5), total], rel=1e-3)


def test_never_waits_for_a_better_end_where_long_is_better() -> None:
    stop, table = 3, np.full((6, 6), 1e-6)
    table[0, [stop, 1]] = 0.6, 0.4
    table[1, [stop, 2]] = 0.6, 0.4
    table[[2, 3, 4, 5], [2, 3, 4, 5]] = 1
    table /= table.sum(axis=1, keepdims=True)
    params, config = bigram_model(table)
    # With the second step two have ended. 0, 1, 2 has a worse mean than both, and a third step,
    # certain as it is, makes its mean better than that of 0, 1 and its end.
    for early, second in (("never", [1, 2, 2]), (False, [1]), (True, [1])):
        [found] = beam_search(
            params,
            [[0]],
            config,
            num_beams=2,
            max_new_tokens=3,
            early_stopping=early,
            stop=[stop],
            num_return=2,
        )
        assert [beam.tokens for beam in found] == [[], second]
        mean = np.log(0.4 * 0.4) / 3 if early == "never" else np.log(0.4 * 0.6) / 2
        assert [beam.score for beam in found] == pytest.approx([np.log(0.6), mean], rel=1e-3)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.7, 2.0])
@STYLES
def test_enough_beams_find_the_best_of_all(
    config: ModelConfig, penalty: float, rng: np.random.Generator
) -> None:
    """The square of the vocabulary holds all beginnings, so that nothing is lost on the way."""
    V, steps, stop = 4, 3, 2
    config = config.replace(vocab_size=V)
    params = random_params(config, rng)
    prompt = [1, 3]
    every = {}
    for tokens in itertools.product(range(V), repeat=steps):
        logprobs = next_logprobs(params, config, [*prompt, *tokens])[len(prompt) - 1 : -1]
        new = until(list(tokens), (stop,))
        counted = list(tokens)[: len(new) + 1]
        total = sum(logprobs[at, token] for at, token in enumerate(counted))
        every[tuple(counted)] = (total / len(counted) ** penalty, new)
    best = sorted(every.values(), reverse=True)[: V**2]
    found = beam_search(
        params,
        [prompt],
        config,
        num_beams=V**2,
        max_new_tokens=steps,
        length_penalty=penalty,
        early_stopping="never",
        stop=[stop],
        num_return=V**2,
    )[0]
    np.testing.assert_allclose([beam.score for beam in found], [s for s, _ in best], atol=1e-4)
    scores = {tuple(new): score for score, new in every.values()}
    for beam in found:
        whole = tuple(beam.tokens) if len(beam.tokens) == steps else (*beam.tokens, stop)
        assert beam.score == pytest.approx(every[whole][0], abs=1e-4)
    gap = best[0][0] - best[1][0]
    assert found[0].tokens == best[0][1] or gap < 1e-4
    assert len({tuple(beam.tokens) for beam in found}) == V**2 <= len(scores)


@STYLES
def test_prompts_do_not_know_of_each_other(config: ModelConfig) -> None:
    rng = np.random.default_rng(6)
    params = random_params(config, rng)
    prompts = [rng.integers(0, 31, length).tolist() for length in (1, 9, 4, 9)]
    stop = generate(params, prompts, config, Sampling(max_new_tokens=3, temperature=0))[1][1:2]
    for early in (False, True, "never"):
        options: dict[str, Any] = {
            "num_beams": 3,
            "max_new_tokens": 7,
            "early_stopping": early,
            "stop": stop,
            "num_return": 3,
        }
        together = beam_search(params, prompts, config, **options)
        alone = [beam_search(params, [prompt], config, **options)[0] for prompt in prompts]
        assert_same(together, alone)


def test_a_full_context_is_used_to_its_end(rng: np.random.Generator) -> None:
    params = random_params(GPT2, rng)
    prompt = rng.integers(0, 31, 9).tolist()
    [[beam]] = beam_search(params, [prompt], GPT2, max_new_tokens=7, length_penalty=0)
    logprobs = next_logprobs(params, GPT2, prompt + beam.tokens)
    expected = sum(logprobs[8 + at, token] for at, token in enumerate(beam.tokens))
    assert len(beam.tokens) == 7
    assert beam.score == pytest.approx(expected, abs=1e-3)


def test_fewer_continuations_than_beams_are_fewer(rng: np.random.Generator) -> None:
    config = GPT2.replace(vocab_size=3)
    params = random_params(config, rng)
    [found] = beam_search(params, [[0]], config, num_beams=5, max_new_tokens=1, num_return=5)
    assert sorted(beam.tokens for beam in found) == [[0], [1], [2]]
    assert sum(np.exp(beam.score) for beam in found) == pytest.approx(1, abs=1e-5)
    # Where every token stops, nothing goes on.
    [found] = beam_search(
        params, [[0]], config, num_beams=4, max_new_tokens=6, num_return=4, stop=range(3)
    )
    assert [beam.tokens for beam in found] == [[], [], []]


def test_nothing_asked_for_is_nothing_given() -> None:
    assert beam_search({}, [[1], [2, 3]], GPT2, max_new_tokens=0) == [[Beam([], 0.0)]] * 2
    assert beam_search({}, [], GPT2, max_new_tokens=4) == []


def test_numbers_do_not_recompile(rng: np.random.Generator) -> None:
    config = GPT2.replace(context_length=64)
    params = random_params(config, rng)
    compiled: Any = module._search
    base: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 9}
    beam_search(params, [[1, 2], [3]], config, **base)
    before = compiled._cache_size()
    for length in (1, 3, 7):
        for changes in (
            {"length_penalty": 0.7},
            {"max_new_tokens": 1},
            {"max_new_tokens": 10, "early_stopping": True},
            {"early_stopping": "never"},
            {"stop": (4, 5, 6, 7, 8)},
            {"num_return": 3},
        ):
            beam_search(params, [[1] * length, [3]], config, **(base | changes))
    assert compiled._cache_size() == before
    # The next powers of two, and of the cache's quarters between them one for all (48 slots, 64).
    for more, sizes in ((1, (17, 20, 24)), (2, (25, 28, 31))):
        for size in sizes:
            beam_search(params, [[1] * size, [3]], config, num_beams=3, max_new_tokens=size)
        assert compiled._cache_size() == before + more
    beam_search(params, [[1, 2], [3]], config, **(base | {"num_beams": 2}))
    assert compiled._cache_size() == before + 3


@STYLES
def test_no_rank_is_promoted(config: ModelConfig, rng: np.random.Generator) -> None:
    params = random_params(config, rng)
    with jax.numpy_rank_promotion("raise"):
        beam_search(params, [[1, 2, 3], [4]], config, max_new_tokens=3, stop=[4])


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 31]], {}, "token id 31.*0 to 30"),
        ([[1] * 10], {"max_new_tokens": 7}, "10 tokens and 7 new.*context of 16.*most 6 new tok"),
        ([[1] * 17], {"max_new_tokens": 0}, "17 tokens.*context of 16"),
        ([[1]], {"num_beams": 0}, "num_beams is 0; at least 1"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[1]], {"num_return": 5}, "num_return is 5; from 1 to num_beams, which is 4"),
        ([[1]], {"num_return": 0}, "num_return is 0"),
        ([[1]], {"early_stopping": "always"}, "early_stopping is 'always'; True, False or 'never'"),
        ([[1]], {"length_penalty": float("nan")}, "length_penalty is nan"),
        ([[1]], {"length_penalty": 90.0}, "length_penalty is 90.0: 4 tokens"),
        ([[1]], {"length_penalty": -90.0}, "length_penalty is -90.0"),
        ([[1]], {"stop": ("END",)}, "stop is.*token ids"),
        ([[1]], {"stop": 3}, "stop is 3; give a sequence"),
    ],
)
def test_illegal_options_are_refused(prompts: Any, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        beam_search({}, prompts, GPT2, **{"max_new_tokens": 4, **options})
    assert "\n" not in str(error.value)
