"""Matrix products in 8-bit floats, for chips that multiply these faster.

Inputs have 4 bits of exponent and 3 of mantissa (E4M3), gradients 5 and 2 (E5M2), as Micikevicius
et al. 2022 propose, and each array one scale, taken from its largest value as it is ("current
scaling"), so that nothing is to be carried from step to step. XLA makes a product of 8-bit floats
out of a product of what they stand for, where the GPU has one (NVIDIA's H100 is the first). Other
devices multiply what they stand for: the same numbers but for how sums are rounded, and not faster.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.layouts import Int8, LowRank

_INPUTS, _GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2
# By a smaller scale neither float32 nor bfloat16 could divide.
_SMALLEST_EXPONENT = -100


@struct.dataclass
class InFloat8:
    """A kernel that is multiplied with in 8-bit floats.

    Attributes:
        kernel: as it would else be, `[*stack, *inputs, *outputs]`.
    """

    kernel: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        return self.kernel.shape


def in_float8(kernel: Any) -> Any:
    """A kernel as `InFloat8`; of a `LowRank` what is added to. `Int8` stays as it is."""
    if isinstance(kernel, LowRank):
        return kernel.replace(kernel=in_float8(kernel.kernel))  # pyright: ignore[reportAttributeAccessIssue]
    return kernel if isinstance(kernel, Int8) else InFloat8(kernel)


def to_float8(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Rounds to 8-bit floats.

    Args:
        x: `[..., D]`. What is not finite makes values that are not finite.
        dtype: `jnp.float8_e4m3fn` or `jnp.float8_e5m2`.

    Returns:
        Values in `dtype`, and the scale, a float32 scalar: x is about values · scale. It is a power
        of two, so that scaling rounds nothing: the one with which the largest value comes to lie
        between a half and the whole of the largest power of two of `dtype` (128 to 256 in E4M3).
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x)).astype(jnp.float32))
    highest = math.frexp(float(jnp.finfo(dtype).max))[1] - 1
    exponent = jnp.maximum(exponent - highest, _SMALLEST_EXPONENT)
    scale = jnp.ldexp(jnp.float32(1), exponent)
    return (x / scale.astype(x.dtype)).astype(dtype), scale


@jax.custom_vjp
def matmul_float8(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """`[..., I]` times `[I, O]`, both rounded to E4M3.

    The backward pass multiplies the same rounded arrays, and the output's gradient rounded to E5M2.
    Rounding itself counts as the identity in derivatives.

    Args:
        x: `[..., I]`.
        kernel_IO: `[I, O]`, of the same dtype, in which the product is given.
    """
    return _forward(x, kernel_IO)[0]


def _forward(x: jax.Array, kernel_IO: jax.Array):
    rounded = to_float8(x, _INPUTS), to_float8(kernel_IO, _INPUTS)
    x, kernel_IO = (_widened(array, x.dtype) for array in rounded)
    return jax.lax.dot_general(x, kernel_IO, (((x.ndim - 1,), (0,)), ((), ()))), rounded


def _backward(rounded: Any, grad: jax.Array):
    x, kernel_IO = (_widened(array, grad.dtype) for array in rounded)
    grad = _widened(to_float8(grad, _GRADIENTS), grad.dtype)
    last, outer = grad.ndim - 1, tuple(range(grad.ndim - 1))
    # cuBLAS would else add up in fewer bits than float32 has, which is for the forward pass alone.
    product = partial(jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST)
    grad_x = product(grad, kernel_IO, (((last,), (1,)), ((), ())))
    return grad_x, product(x, grad, ((outer, outer), ((), ())))


matmul_float8.defvjp(_forward, _backward)


def _widened(rounded: tuple[jax.Array, jax.Array], dtype: Any) -> jax.Array:
    values, scale = rounded
    return values.astype(dtype) * scale.astype(dtype)
