"""One train step: a pure function from state to state, compiled once, its state donated."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax import sharding
from gptjax.adapters import (
    Trainable,
    join_params,
    split_params,
    trainable_shardings,
)
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.loss import Batch, LossOptions, Objective, loss_sums, mean_metrics, target_count
from gptjax.params import Params, flat, init_params, param_shardings

if TYPE_CHECKING:
    import optax

Metrics = dict[str, jax.Array]
TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]


@flax.struct.dataclass
class TrainState:
    """Everything that a run carries from step to step."""

    step: jax.Array
    """Updates made, int32."""
    params: Params
    """Float32 master parameters, of what is trained."""
    opt_state: Any
    """The optax transformation's state."""
    key: jax.Array
    """Random key of the run; what a step draws comes from it and the step's number."""
    ema_params: Params | None = None
    """Exponential moving average of the parameters, or None."""
    frozen: Params | None = None
    """The parameters that are not trained, in the dtypes they came in; None where all are."""


def init_state(
    config: ModelConfig,
    optimizer: "optax.GradientTransformation",
    key: jax.Array,
    mesh: Mesh | None = None,
    *,
    params: Params | None = None,
    ema: bool = False,
    trainable: Trainable | None = None,
) -> TrainState:
    """A new state, each array straight into its place on the mesh.

    Args:
        config: the model.
        optimizer: any optax transformation.
        key: random key: one half draws the parameters, the other is the run's.
        mesh: where the state lies; None is the default device.
        params: start from these (copied) instead of drawing them.
        ema: whether to keep an average of the parameters.
        trainable: what is trained, see `adapters`; None is everything. `optimizer` is then for
            that alone.

    Returns:
        The state, with step 0.
    """
    params_key, run_key = jax.random.split(key)
    if params is None:
        params = init_params(config, params_key, mesh)
    given, frozen = split_params(params, trainable, config, params_key, mesh)

    def init(params: Params, frozen: Params | None, key: jax.Array) -> TrainState:
        # Copies, since the state will be donated and no two of its buffers may be the same.
        copy = partial(jax.tree.map, lambda x: jnp.array(x, jnp.float32, copy=True))
        ema_params = copy(params) if ema else None
        return TrainState(
            step=jnp.int32(0),
            params=copy(params),
            opt_state=optimizer.init(params),
            key=key,
            ema_params=ema_params,
            frozen=jax.tree.map(lambda x: jnp.array(x, copy=True), frozen),
        )

    shardings = None
    if mesh is not None:
        abstract = jax.eval_shape(init, given, frozen, run_key)
        shardings = state_shardings(config, abstract, mesh, trainable)
        # They may come from other devices, which one program does not take.
        given = jax.device_put(given, shardings.params)
        frozen = jax.device_put(frozen, shardings.frozen)
    return jax.jit(init, out_shardings=shardings)(given, frozen, run_key)


def abstract_state(
    config: ModelConfig,
    optimizer: "optax.GradientTransformation",
    mesh: Mesh | None = None,
    *,
    ema: bool = False,
    trainable: Trainable | None = None,
) -> TrainState:
    """The state's shapes, dtypes and (with a mesh) shardings, without any arrays.

    What a checkpoint is restored into, but for its frozen parameters.

    Args:
        config: as in `init_state`.
        optimizer: as in `init_state`.
        mesh: as in `init_state`.
        ema: as in `init_state`.
        trainable: as in `init_state`.
    """
    init = partial(init_state, config, optimizer, ema=ema, trainable=trainable)
    state = jax.eval_shape(init, jax.random.key(0))
    if mesh is None:
        return state
    shardings = state_shardings(config, state, mesh, trainable)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, shardings
    )


def state_shardings(
    config: ModelConfig, state: TrainState, mesh: Mesh, trainable: Trainable | None = None
) -> TrainState:
    """Where each array of a state lies: everything shaped like a parameter lies as it does.

    Args:
        config: the model.
        state: of arrays, or of their shapes.
        mesh: where it shall lie.
        trainable: what is trained; None is everything.
    """
    places = sharding.like_params(
        state.replace(frozen=None),  # pyright: ignore[reportAttributeAccessIssue]
        state.params,
        trainable_shardings(config, trainable, mesh),
        sharding.replicated(mesh),
    )
    if state.frozen is None:
        return places
    every = flat(param_shardings(config, mesh))
    name = partial(jax.tree_util.keystr, simple=True, separator=".")

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        # What stands for an array lies as it would, and what has another shape, as scales, whole.
        found, whole = every[name(path)], sharding.replicated(mesh)
        return jax.tree.map(lambda x: found if x.shape == leaf.shape else whole, leaf)

    is_leaf = lambda x: not isinstance(x, dict)  # noqa: E731
    frozen = jax.tree_util.tree_map_with_path(place, state.frozen, is_leaf=is_leaf)
    return places.replace(frozen=frozen)


def make_train_step(
    config: ModelConfig,
    optimizer: "optax.GradientTransformation",
    mesh: Mesh | None = None,
    *,
    accumulate: int = 1,
    loss_options: LossOptions = LossOptions(),
    ema_decay: float | None = None,
    nonfinite: Literal["keep", "skip"] = "keep",
    trainable: Trainable | None = None,
    objective: Objective = loss_sums,
) -> TrainStep:
    """The compiled function `step(state, batch) -> (state, metrics)`.

    Args:
        config: the model.
        optimizer: any optax transformation; updates are added to float32 parameters.
        mesh: where the state and the batch lie; None is the default device.
        accumulate: microbatches that a batch is split into along B. Their gradients are summed
            before the update; the result equals the whole batch's, also where microbatches
            differ in their number of counted tokens; but for a router's balance loss and the
            scales of 8-bit floats, which are each microbatch's own.
        loss_options: see `LossOptions`.
        ema_decay: decay rate of `TrainState.ema_params`; None leaves them.
        nonfinite: "skip" leaves parameters and optimizer state as they were where the loss or the
            gradient is not finite (the step still counts); "keep" makes the update all the same.
        trainable: as for `init_state`. Only what is trained has a gradient.
        objective: what is minimized; `preferences.DPO` is another.

    Returns:
        The step. It donates the state: the one passed in is gone. Metrics are float32 scalars:
        `loss` (mean over counted targets, before the update), `tokens` (sum of weights),
        `grad_norm` (before clipping), `skipped` (0 or 1) and, of a mixture of experts, those of
        `loss_fn`.

    Raises:
        UserError: if the model's remat is "auto", or the parameters do not divide over the mesh;
            and at the first call, if the batch does not divide over it or into microbatches.
    """
    if config.remat == "auto":
        raise UserError(
            "remat is 'auto', which `fit` chooses by batch, mesh and optimizer; here give one of "
            "none, dots, full and offload, or config.replace(remat=gptjax.planning.choose_remat("
            "config, batch=..., mesh=...))"
        )

    # Dropout draws by a row's number in the batch, routers are balanced over a batch, 8-bit floats
    # scaled by it, and what another objective does to one is its own.
    of_batch = config.dropout or config.num_experts is not None or config.float8
    rows_apart = objective is loss_sums and not of_batch

    def gradients(state: TrainState, batch: Batch, key: jax.Array | None) -> tuple[Params, Metrics]:
        # Sums over a constant, and the count of tokens only at the end: devices then need not agree
        # on it in the middle, and a mean of microbatches' means would weight tokens unequally.
        size = batch["targets"].size
        given = (state.params, state.frozen)

        def sum_gradients(given: tuple[Params, Params | None], batch: Batch, key: Any):
            trained, frozen = given

            def per_place(params: Params) -> tuple[jax.Array, Metrics]:
                whole = join_params(params, frozen, trainable)
                total, sums = objective(whole, batch, config, options=loss_options, dropout_key=key)
                return total / size, sums

            return jax.grad(per_place, has_aux=True)(trained)

        def accumulated(given: tuple[Params, Params | None], batch: Batch):
            if accumulate == 1:
                return sum_gradients(given, batch, key)

            def microbatch(totals: tuple[Params, Metrics], inputs: tuple[Batch, jax.Array]):
                micro, index = inputs
                micro_key = None if key is None else jax.random.fold_in(key, index)
                return jax.tree.map(jnp.add, totals, sum_gradients(given, micro, micro_key)), None

            micros = split_batch(batch, accumulate)
            first = jax.tree.map(lambda x: x[0], micros)
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                jax.eval_shape(sum_gradients, given, first, key),
            )
            return jax.lax.scan(microbatch, zeros, (micros, jnp.arange(accumulate)))[0]

        if rows_apart and sharding.are_cpu_replicas():
            accumulated = sharding.on_replicas(accumulated)
        grads, sums = accumulated(given, batch)
        count = target_count(sums)
        grads = jax.tree.map(lambda grad: grad * (size / count), grads)
        return grads, mean_metrics(sums)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        import optax

        key = jax.random.fold_in(state.key, state.step) if config.dropout else None
        grads, metrics = gradients(state, batch, key)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay is not None and ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        new: Any = (params, opt_state, ema_params)
        skipped = jnp.bool_(False)
        if nonfinite == "skip":
            skipped = ~(jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm))
            old = (state.params, state.opt_state, state.ema_params)
            new = jax.tree.map(lambda before, after: jnp.where(skipped, before, after), old, new)
        params, opt_state, ema_params = new
        metrics |= {"grad_norm": grad_norm, "skipped": skipped.astype(jnp.float32)}
        return TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            key=state.key,
            ema_params=ema_params,
            frozen=state.frozen,
        ), metrics

    if mesh is None:
        return jax.jit(step, donate_argnums=0)

    place = abstract_state(config, optimizer, mesh, ema=ema_decay is not None, trainable=trainable)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, place)
    jitted = jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )

    return _OnMesh(jitted, mesh, accumulate)


@dataclass(frozen=True)
class _OnMesh:
    """A jitted function under the mesh that its constraints refer to."""

    jitted: Any
    mesh: Mesh
    accumulate: int

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self._under_mesh(self.jitted, state, batch)

    def trace(self, state: TrainState, batch: Batch) -> Any:
        """Traces for these shapes, as a jitted function's `trace` does."""
        return self._under_mesh(self.jitted.trace, state, batch)

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """Traces for these shapes, as a jitted function's `lower` does."""
        return self._under_mesh(self.jitted.lower, state, batch)

    def _under_mesh(self, function: Any, state: TrainState, batch: Batch) -> Any:
        rows, length = batch["tokens"].shape
        sharding.check_batch(rows, length, self.mesh, self.accumulate)
        with jax.set_mesh(self.mesh):
            return function(state, batch)


def split_batch(batch: Batch, parts: int) -> Batch:
    """Microbatches in front: `[B, T]` becomes `[parts, B / parts, T]`, as by `deal_rows`.

    Raises:
        UserError: if B does not divide by `parts`.
    """
    rows = batch["tokens"].shape[0]
    if rows % parts:
        legal = [n for n in range(1, rows + 1) if rows % n == 0]
        raise UserError(
            f"batch of {rows} rows does not divide into {parts} microbatches; "
            f"accumulate one of {legal}"
        )
    return jax.tree.map(partial(sharding.deal_rows, parts=parts), batch)
