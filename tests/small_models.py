"""Models small enough to test with, and parameters that all take part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig, preset
from gptjax.params import Params, ParamSpec, is_spec, param_specs

SMALL = {
    "vocab_size": 31,
    "context_length": 16,
    "num_layers": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "compute_dtype": "float32",
}
GPT2 = preset("char-gpt").replace(**SMALL)
MODERN = preset("char-gpt-modern").replace(**SMALL, num_kv_heads=2)
STYLES = pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])


def random_params(config: ModelConfig, rng: np.random.Generator) -> Params:
    """No parameter at 0 or 1, so that each takes part in the result."""

    def draw(spec: ParamSpec) -> jax.Array:
        values = rng.normal(spec.init == "ones", spec.std + 0.15, spec.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(draw, param_specs(config), is_leaf=is_spec)
