"""The exact loss of a model over a whole data set."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax import sharding
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.loss import Batch, LossOptions, Objective, loss_sums, target_count
from gptjax.params import Params

EvalStep = Callable[[Params, Any], tuple[jax.Array, jax.Array]]


def make_eval_step(
    config: ModelConfig,
    mesh: Mesh | None = None,
    loss_options: LossOptions = LossOptions(),
    objective: Objective = loss_sums,
) -> EvalStep:
    """The compiled function `step(params, batch) -> (nll, targets)`, both sums over the batch."""

    def step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        _, sums = objective(params, batch, config, options=loss_options)
        return sums["nll"], sums.get("targets", sums["tokens"])

    jitted = jax.jit(step)
    if mesh is None:
        return jitted

    def step_on_mesh(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with jax.set_mesh(mesh):
            return jitted(params, sharding.place_batch(batch, mesh))

    return step_on_mesh


def evaluate_loss(
    params: Params, batches: Iterable[Mapping[str, Any]], eval_step: EvalStep
) -> float:
    """Mean cross-entropy over every counted target of all batches, in nats a token.

    Sums are kept on the device and added there, so that it never waits for the host.

    Args:
        params: the model's parameters.
        batches: as `gptjax.data.evaluation_batches` makes them, of one shape.
        eval_step: from `make_eval_step`.

    Raises:
        UserError: if no target counts.
    """
    nll, tokens = jnp.float32(0), jnp.float32(0)
    # Float32 sums of up to a few thousand batches of similar size keep six digits; compensated
    # (Kahan) summation keeps them for any number.
    nll_lost = jnp.float32(0)
    for batch in batches:
        more, count = eval_step(params, batch)
        nll, nll_lost = _add(nll, nll_lost, more)
        tokens = tokens + count
    if float(tokens) == 0:
        raise UserError("nothing to evaluate: no batch, or no target with a weight")
    return float(nll) / float(tokens)


@jax.jit
def _add(total: jax.Array, lost: jax.Array, more: jax.Array) -> tuple[jax.Array, jax.Array]:
    corrected = more - lost
    new = total + corrected
    # XLA would fold this difference of sums to zero without the barrier.
    return new, jax.lax.optimization_barrier(new - total) - corrected
