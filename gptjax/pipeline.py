"""Blocks in stages: each group of devices holds some, and microbatches pass from one to the next.

All stages run at once, as one stage mapped over a dimension that lies split over the mesh's `stage`
axis; moving that dimension on by one is what passes activations to the next (Xu et al. 2021,
section 3.3). In time it is GPipe (Huang et al. 2019): with S stages and M microbatches, a share of
(S - 1) / (M + S - 1) is spent filling and emptying.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.sharding import axis_parts, constrain, deal_rows


def microbatches(config: ModelConfig, rows: int, stages: int) -> int:
    """How many parts a batch passes through the stages in: a divisor of each device's rows.

    Raises:
        UserError: if the configuration asks for another number.
    """
    share = max(rows // axis_parts("batch"), 1)
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    asked = config.pipeline_microbatches
    if asked is None:
        return max(n for n in divisors if n <= 4 * stages)
    if asked not in divisors:
        raise UserError(
            f"pipeline_microbatches is {asked}, but each device has {share} rows of the batch; "
            f"choose one of {divisors}"
        )
    return asked


def pipelined(
    run_stage: Callable[[Any, Any, Any], tuple[jax.Array, Any]],
    layers: Any,
    x_BTD: jax.Array,
    shared: Any,
    config: ModelConfig,
) -> tuple[jax.Array, Any]:
    """Runs a batch through stages of blocks.

    Args:
        run_stage: from some layers, their input and its share of `shared` to the output and a tree
            of sums over tokens, stacked by layer.
        layers: a tree of arrays stacked over all layers.
        x_BTD: the input of the first, `[B, T, D]`.
        shared: a tree of arrays with the batch's rows in front (or one for all).
        config: the model.

    Returns:
        `[B, T, D]`, and the sums over the whole batch.
    """
    S = axis_parts("layers")
    M = microbatches(config, x_BTD.shape[0], S)

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] == 1:
            return jnp.broadcast_to(x[None], (M, *x.shape))
        return deal_rows(x, M)

    x_MbTD, shared = split(x_BTD), jax.tree.map(split, shared)
    layers = jax.tree.map(lambda w: w.reshape(S, -1, *w.shape[1:]), layers)
    run_stages = jax.vmap(run_stage, spmd_axis_name="stage")

    def tick(carry: tuple[jax.Array, Any], time: jax.Array):
        x_SbTD, sums = carry
        x_SbTD = jnp.roll(x_SbTD, 1, axis=0).at[0].set(x_MbTD[jnp.minimum(time, M - 1)])
        x_SbTD = constrain(x_SbTD, "layers", "batch", "residual", "width")
        # Stage s has microbatch time - s, or, while filling and emptying, something to throw away.
        micro_S = time - jnp.arange(S)
        real_S = (micro_S >= 0) & (micro_S < M)
        mine = jax.tree.map(lambda x: x[jnp.clip(micro_S, 0, M - 1)], shared)
        x_SbTD, new = run_stages(layers, x_SbTD, mine)
        add = lambda old, x: old + jnp.where(real_S.reshape(S, *[1] * (x.ndim - 1)), x, 0)  # noqa: E731
        return (x_SbTD, jax.tree.map(add, sums, new)), x_SbTD[-1]

    start = jnp.zeros((S, *x_MbTD.shape[1:]), x_BTD.dtype)
    first = jax.tree.map(lambda x: x[jnp.zeros(S, jnp.int32)], shared)
    _, shapes = jax.eval_shape(run_stages, layers, start, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (_, sums), outputs = jax.lax.scan(tick, (start, zeros), jnp.arange(M + S - 1))
    x_BTD = outputs[S - 1 :].swapaxes(0, 1).reshape(x_BTD.shape)
    return x_BTD, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sums)
