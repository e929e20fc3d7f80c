"""The nonlinearities of feed-forward layers."""

import math

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.devices import materialized


def activate(x: jax.Array, config: ModelConfig) -> jax.Array:
    """The nonlinearity that the configuration names."""
    match config.activation:
        case "gelu_tanh":
            return gelu_tanh(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "quick_gelu":
            return x * jax.nn.sigmoid(1.702 * x)
        case "relu":
            return jax.nn.relu(x)
        case "squared_relu":
            return jnp.square(jax.nn.relu(x))
        case "silu":
            return jax.nn.silu(x)
        case "tanh":
            return jnp.tanh(x)


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU in its tanh form (Hendrycks & Gimpel 2016), which GPT-2 uses; it keeps x alone."""
    return _gelu_tanh_forward(x)[0]


def _gelu_tanh_forward(x: jax.Array):
    return materialized(0.5 * x * (1 + _inner_tanh(x))), (x,)


def _gelu_tanh_backward(residuals: tuple[jax.Array], grad: jax.Array):
    (x,) = residuals
    tanh = _inner_tanh(x)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return (grad * 0.5 * (1 + tanh + x * (1 - tanh * tanh) * slope),)


def _inner_tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))


gelu_tanh.defvjp(_gelu_tanh_forward, _gelu_tanh_backward)
