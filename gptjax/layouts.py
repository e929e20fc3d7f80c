"""Forms of the parameters for use without training: single blocks, outputs first, int8.

`forward` and everything above it take parameters in any of these forms as they take the stacked
arrays of `init_params`: a kernel in another form is a pytree that stands where the array stood.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.config import ModelConfig
from gptjax.devices import compute_dtype, platform
from gptjax.params import Params, is_spec, param_specs


@struct.dataclass
class Int8:
    """An array of 8-bit integers with its scales: values · scale.

    Attributes:
        values: int8, of any shape, from -127 to 127.
        scale: float32, of the same rank; the dimensions that share a scale have size 1.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        return self.values.shape

    def astype(self, dtype: Any) -> jax.Array:
        """The array that this stands for."""
        return self.values.astype(dtype) * self.scale.astype(dtype)

    def __getitem__(self, rows: jax.Array) -> "Int8":
        """Whole rows, by an index of the first dimension, as of an array."""
        return Int8(self.values[rows], self.scale[rows])


@struct.dataclass
class LowRank:
    """A kernel with a low-rank addition: kernel + scale · down · up (Hu et al. 2021).

    Attributes:
        kernel: `[*stack, *inputs, *outputs]`, an array or `Int8`.
        down: `[*stack, *inputs, rank]`.
        up: `[*stack, rank, *outputs]`.
        scale: of the addition.
    """

    kernel: Any
    down: jax.Array
    up: jax.Array
    scale: float = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        return self.kernel.shape

    def astype(self, dtype: Any) -> "LowRank":
        """With all parts in a dtype, but an `Int8` kernel as it is."""
        return LowRank(
            cast_kernel(self.kernel, dtype),
            self.down.astype(dtype),
            self.up.astype(dtype),
            self.scale,
        )

    def merged(self) -> jax.Array:
        """The array that this stands for, added up in float32."""
        stack = self.down.ndim + self.up.ndim - 2 - len(self.shape)
        outer, rank = self.down.shape[:stack], self.down.shape[-1]
        down = self.down.astype(jnp.float32).reshape(*outer, -1, rank)
        up = self.up.astype(jnp.float32).reshape(*outer, rank, -1)
        addition = jnp.matmul(down, up, precision="highest").reshape(self.shape)
        return self.kernel.astype(jnp.float32) + self.scale * addition


def merge_low_rank(tree: Any) -> Any:
    """A tree with the arrays that its `LowRank`s stand for in their place."""
    is_low_rank = lambda x: isinstance(x, LowRank)  # noqa: E731
    return jax.tree.map(lambda x: x.merged() if is_low_rank(x) else x, tree, is_leaf=is_low_rank)


def cast_kernel(kernel: Any, dtype: Any) -> Any:
    """A kernel in a dtype; `Int8` stays as it is."""
    return kernel if isinstance(kernel, Int8) else kernel.astype(dtype)


@struct.dataclass
class OutputsFirst:
    """A kernel with its output dimensions first, `[*outputs, *inputs]`.

    XLA's CPU backend reads it about twice as fast in the product with a few rows.
    """

    kernel: Any
    """An array or `Int8`."""


def to_int8(x: jax.Array, axes: tuple[int, ...]) -> Int8:
    """Rounds to 8 bits, with one scale for all that lies along `axes`: the largest becomes 127."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return Int8(jnp.round(x / scale).astype(jnp.int8), scale)


def split_scale(kernel: Any, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """A kernel's numbers in a dtype, and what each output is still to be multiplied by.

    Every output has one scale, so that a product may be computed before it.

    Args:
        kernel: an array, which has no scale, or `Int8`.
        dtype: of the numbers and the scale.
    """
    if isinstance(kernel, Int8):
        return kernel.values.astype(dtype), kernel.scale.reshape(-1).astype(dtype)
    return kernel.astype(dtype), None


def quantize(params: Params, config: ModelConfig) -> Params:
    """The parameters with every matrix in int8, one scale an output (Dettmers et al. 2022).

    A quarter of the bytes of float32. Kernels of the blocks, token embedding and head are
    rounded; biases, gains and position embeddings stay as they are. Products are computed in the
    compute dtype. The result is for generation, scoring and evaluation, not for training.

    Args:
        params: as `init_params` makes them, on any mesh; each stays where it lies.
        config: the model.

    Returns:
        The same tree, with `Int8` in place of matrices: values, and a float32 scale for each
        output.
    """

    def convert(spec: Any, x: Any) -> Any:
        if isinstance(x, Int8):
            return x
        if isinstance(x, LowRank):
            x = x.merged()
        if spec.kind == "matrix":
            return _to_int8_jit(x, tuple(range(spec.stack, spec.stack + spec.fan_in)))
        return _to_int8_jit(x, (1,)) if spec.axes[0] == "vocab" else x

    return jax.tree.map(convert, param_specs(config), params, is_leaf=is_spec)


_to_int8_jit = jax.jit(to_int8, static_argnames="axes")


def join_qkv(attention: Params, config: ModelConfig) -> tuple[Any, jax.Array | None]:
    """One kernel for queries, keys and values, `[D, K, H / K + 2, C]`, and its bias.

    One wide product instead of three. Joined by key head, so that a split of the heads over a mesh
    stays where it is.

    Args:
        attention: the attention parameters of one block.
        config: the model.
    """
    K, C = config.kv_heads, config.head_width

    def join(*parts: jax.Array) -> jax.Array:
        # The dimensions before the heads: the inputs of a kernel, none of a bias.
        shaped = [part.reshape(*part.shape[:-2], K, -1, C) for part in parts]
        return jnp.concatenate(shaped, axis=-2)

    names = ("query", "key", "value")
    kernel = jax.tree.map(join, *(attention[name] for name in names))
    if "query_bias" not in attention:
        return kernel, None
    return kernel, join(*(attention[f"{name}_bias"] for name in names))


def unstack_blocks(params: Params, config: ModelConfig) -> Params:
    """The same parameters with the stacked blocks as a tuple of single ones.

    A loop over a tuple is about twice as fast on a CPU as a scan, which copies each block's weights
    out of the stack first.
    """
    if isinstance(params["blocks"], tuple):
        return params
    take = lambda layer: jax.tree.map(lambda w: _layer(w, layer), params["blocks"])  # noqa: E731
    return {**params, "blocks": tuple(take(layer) for layer in range(config.num_layers))}


@jax.jit
def _layer(stacked: jax.Array, layer: int | jax.Array) -> jax.Array:
    # One small program for all layers of a shape; one large program for all would compile for
    # seconds.
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def decoding_params(params: Params, config: ModelConfig) -> Params:
    """The parameters in the form that decoding is fastest with.

    Single blocks, kernels and tables in the compute dtype, queries, keys and values by one kernel,
    gate and up by another, and on a CPU outputs first. The functions that generate do this by
    themselves, at every call. Who calls them often with the same parameters may do it once and pass
    the result, which holds a copy of the blocks.

    Args:
        params: as `init_params` or `quantize` make them.
        config: the model.

    Returns:
        A tree that the functions that generate take as `params`.
    """
    blocks = params["blocks"]
    if isinstance(blocks, tuple) and "qkv" in blocks[0]["attention"]:
        return params
    if isinstance(blocks, tuple):
        blocks = tuple(_decoding_block(block, None, config) for block in blocks)
    else:
        layers = range(config.num_layers)
        blocks = tuple(_decoding_block(blocks, layer, config) for layer in layers)
    dtype = compute_dtype(config)
    embed = {
        name: cast_kernel(x, dtype) if name != "norm" else x for name, x in params["embed"].items()
    }
    head = {}
    if "head" in params:
        head = {"head": {"kernel": cast_kernel(params["head"]["kernel"], dtype)}}
    return {**params, "blocks": blocks, "embed": embed, **head}


@partial(jax.jit, static_argnames="config")
def _decoding_block(block: Params, layer: jax.Array | None, config: ModelConfig) -> Params:
    if layer is not None:
        block = jax.tree.map(
            lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), block
        )
    block = merge_low_rank(block)
    dtype = compute_dtype(config)
    kernels = ("query", "key", "value", "out", "up", "gate", "down")

    def cast(part: Params) -> Params:
        return {name: cast_kernel(x, dtype) if name in kernels else x for name, x in part.items()}

    attention, mlp = cast(block["attention"]), cast(block["mlp"])
    kernel, bias = join_qkv(attention, config)
    for name in ("query", "key", "value"):
        del attention[name]
        attention.pop(f"{name}_bias", None)
    attention |= {"qkv": outputs_first(kernel, 1), "out": outputs_first(attention["out"], 2)}
    if bias is not None:
        attention["qkv_bias"] = bias
    if config.num_experts is None:
        mlp = _decoding_mlp(mlp, config)
    elif "shared" in mlp:
        mlp["shared"] = _decoding_mlp(cast(mlp["shared"]), config)
    return {**block, "attention": attention, "mlp": mlp}


def _decoding_mlp(mlp: Params, config: ModelConfig) -> Params:
    mlp = dict(mlp)
    if config.gated_mlp:
        stack = lambda *parts: jnp.stack(parts, axis=-2)  # noqa: E731
        mlp["gate_up"] = jax.tree.map(stack, mlp.pop("gate"), mlp.pop("up"))
        if "up_bias" in mlp:
            mlp["gate_up_bias"] = stack(mlp.pop("gate_bias"), mlp.pop("up_bias"))
    for name in mlp.keys() & {"up", "gate_up", "down"}:
        mlp[name] = outputs_first(mlp[name], 1)
    return mlp


def outputs_first(kernel: Any, inputs: int) -> Any:
    """A kernel, array or `Int8`, whose first dimensions are its inputs, as `OutputsFirst`.

    As it is where the default device is no CPU.
    """
    if platform() != "cpu":
        return kernel

    def turn(x: jax.Array) -> jax.Array:
        return jnp.transpose(x, (*range(inputs, x.ndim), *range(inputs)))

    return OutputsFirst(jax.tree.map(turn, kernel))
