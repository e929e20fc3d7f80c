"""The exact loss of a model over a whole data set."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax import sharding
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.loss import Batch, LossOptions, Objective, loss_sums
from gptjax.params import Params

EvalStep = Callable[[Params, Any], tuple[jax.Array, jax.Array]]


def make_eval_step(
    config: ModelConfig,
    mesh: Mesh | None = None,
    loss_options: LossOptions = LossOptions(),
    objective: Objective = loss_sums,
) -> EvalStep:
    """The compiled function `step(params, batch) -> (nll, targets)`, both sums over the batch.

    Args:
        config: the model, which multiplies in the compute dtype here, also with `float8`.
        mesh: where parameters and batches lie; None is the default device.
        loss_options: as in `loss_fn`.
        objective: whose sums are taken.
    """
    config = config.replace(float8=False)

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

    Sums of a batch are fetched while the device works at the next one, and added in float64.

    Args:
        params: the model's parameters.
        batches: as `gptjax.data.evaluation_batches` makes them, of one shape.
        eval_step: from `make_eval_step`.

    Raises:
        UserError: if no target counts.
    """
    nll = targets = 0.0
    # Never more than two programs at once: of more, the collectives of a CPU's devices may wait for
    # each other for ever.
    pending: list[tuple[jax.Array, jax.Array]] = []
    for batch in batches:
        pending.append(eval_step(params, batch))
        if len(pending) > 1:
            more, count = pending.pop(0)
            nll, targets = nll + float(more), targets + float(count)
    for more, count in pending:
        nll, targets = nll + float(more), targets + float(count)
    if targets == 0:
        raise UserError("nothing to evaluate: no batch, or no target with a weight")
    return nll / targets
