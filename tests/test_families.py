"""Every family without PyTorch: stored logits of transformers, and the way to a config and back."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, EXPECTED, seeded_model

from gptjax.model import forward
from gptjax.pretrained.families import FAMILIES, read_config
from gptjax.pretrained.family import ConfigReader, canonical


@pytest.mark.parametrize("name", CASES)
def test_stored_logits(name: str) -> None:
    model, tokens = seeded_model(CASES[name])
    expected = np.load(EXPECTED)[name]
    got = np.asarray(forward(model.params, jnp.asarray(tokens), model.config))[0, -3:]
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


def test_stored_logits_are_of_every_case() -> None:
    assert set(np.load(EXPECTED)) == set(CASES)
    assert {values["model_type"] for values in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("values", CASES.values(), ids=list(CASES))
def test_a_config_is_written_as_it_was_read(values: dict[str, Any]) -> None:
    family, config = read_config(values, "config.json")
    again = family.read(ConfigReader(family.write(config)))
    assert canonical(again) == canonical(config)
