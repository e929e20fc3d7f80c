"""Every family against transformers: logits, gradients, greedy tokens, and the way back."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES

from gptjax.generation import generate
from gptjax.loss import loss_fn
from gptjax.model import Model, forward
from gptjax.params import flat
from gptjax.pretrained.families import family_of
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.pretrained.loading import load
from gptjax.sampling import Sampling

torch: Any = pytest.importorskip("torch", reason="PyTorch, which is compared with, is missing")
transformers: Any = pytest.importorskip(
    "transformers", reason="transformers, which is compared with, is missing"
)
safetensors_numpy: Any = pytest.importorskip("safetensors.numpy")


@dataclasses.dataclass
class Case:
    values: dict[str, Any]
    directory: Path
    torch_model: Any


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def case(request: Any, tmp_path_factory: Any) -> Case:
    """A randomly drawn model of transformers, saved as its users save it."""
    values = CASES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    config = transformers.AutoConfig.for_model(**{"bos_token_id": 1, "eos_token_id": 2} | values)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = np.random.default_rng()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual start, so that each parameter takes part in the result.
            noise = torch.from_numpy(generator.normal(0, 0.15, parameter.shape).astype(np.float32))
            parameter.add_(noise)
    model.save_pretrained(directory)
    # As the file of the hub spells it: transformers writes its newer spelling.
    written = json.loads((directory / "config.json").read_text())
    for key in ("rope_scaling", "rope_theta", "rotary_pct", "rotary_emb_base"):
        if key in values:
            written.pop("rope_parameters", None)
            written[key] = values[key]
    (directory / "config.json").write_text(json.dumps(written))
    return Case(values, directory, model)


def test_logits(case: Case, rng: np.random.Generator) -> None:
    model = load(case.directory)
    tokens = rng.integers(0, model.config.vocab_size, (3, 64))
    with torch.no_grad():
        expected = case.torch_model(torch.from_numpy(tokens)).logits.numpy()
    got = np.asarray(forward(model.params, jnp.asarray(tokens), model.config))
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


def test_gradients(case: Case, tmp_path: Path, rng: np.random.Generator) -> None:
    model = load(case.directory)
    tokens = rng.integers(0, model.config.vocab_size, (2, 41))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    case.torch_model.zero_grad()
    logits = case.torch_model(torch.from_numpy(inputs)).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets.copy()).flatten()
    ).backward()
    # Written and read as if they were weights: what is compared is then in one layout.
    gradients = copy.deepcopy(case.torch_model)
    for parameter, source in zip(
        gradients.parameters(), case.torch_model.parameters(), strict=True
    ):
        parameter.data = source.grad
    gradients.save_pretrained(tmp_path)
    wanted = load(tmp_path).params
    batch = {"tokens": jnp.asarray(inputs), "targets": jnp.asarray(targets)}
    got = jax.grad(lambda params: loss_fn(params, batch, model.config)[0])(model.params)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for path, leaf in flat(got).items():
        other = flat(wanted)[path]
        difference = float(jnp.abs(leaf - other).max())
        assert difference <= 1e-4 * max(float(jnp.abs(other).max()), 1e-2 * scale), path


def test_greedy_tokens(case: Case, rng: np.random.Generator) -> None:
    model = load(case.directory)
    prompt = rng.integers(3, model.config.vocab_size, 9)
    with torch.no_grad():
        expected = case.torch_model.generate(
            torch.from_numpy(prompt)[None],
            do_sample=False,
            max_new_tokens=64,
            min_new_tokens=64,
            eos_token_id=None,
            pad_token_id=0,
        )[0, 9:].tolist()
    sampling = Sampling(max_new_tokens=64, temperature=0)
    got = generate(model.params, [prompt.tolist()], model.config, sampling)[0]
    assert got == expected


def test_import_then_export_gives_the_file(case: Case, tmp_path: Path) -> None:
    save_pretrained(load(case.directory), tmp_path)
    before = safetensors_numpy.load_file(case.directory / "model.safetensors")
    after = safetensors_numpy.load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.dtype == after[name].dtype
        assert values.tobytes() == after[name].tobytes(), name
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (case.directory / "config.json").read_text()
    )


def test_a_model_without_a_file_is_written_and_opened(case: Case, tmp_path: Path, rng) -> None:
    """As for a model trained here: its config.json is made anew."""
    model = load(case.directory)
    family = family_of(model.config, case.values["model_type"])
    assert family.model_type == case.values["model_type"]
    fresh = Model(model.config, model.params)
    save_pretrained(fresh, tmp_path)
    tokens = rng.integers(0, model.config.vocab_size, (2, 50))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = opened(torch.from_numpy(tokens)).logits.numpy()
    got = np.asarray(forward(model.params, jnp.asarray(tokens), model.config))
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()
    again = load(tmp_path)
    np.testing.assert_array_equal(
        np.asarray(forward(again.params, jnp.asarray(tokens), again.config)), got
    )
