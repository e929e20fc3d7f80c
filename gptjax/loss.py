"""Next-token cross-entropy: exact, masked, weighted by token, without holding all logits."""

import math
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.devices import platform
from gptjax.experts import routing_losses
from gptjax.model import hidden_states, softcap, split_vocabulary, unembedding
from gptjax.params import Params
from gptjax.sharding import axis_parts, constrain

Batch = dict[str, jax.Array]
"""`tokens` and `targets` `[B, T]` int32; optional `weights` `[B, T]` float32 (which targets count
and how much), `segment_ids` and `positions` `[B, T]` int32 (documents packed into a row)."""

LOGITS_AT_ONCE = 2**26
"""Elements of the largest block of logits that a device holds: 256 MiB in float32."""

LOGITS_AT_ONCE_GPU = 2**28
"""As `LOGITS_AT_ONCE`, on a GPU. After each block the output matrix's gradient is read, added to
and written in float32: with GPT-2's vocabulary and width 300 MB, more than a block of 2**26."""

_WORTH_TURNING = 2**22
"""Elements of a block of logits on a CPU, from which on their gradient is not to be turned. Smaller
ones keep the derivatives that JAX knows, forward-mode ones among them."""

TPU_TILE = 256
"""The width of the widest TPU's matrix unit."""

_FULL_ROWS = 128
"""On GPUs and TPUs the output matrix is filled up to a multiple of so many rows: rows of logits
whose length is no multiple of 16 bytes keep a GPU's products from the fastest loads and stores."""


class Objective(Protocol):
    """What a train step minimizes, as sums over the targets of a batch: see `loss_sums`."""

    def __call__(
        self,
        params: Params,
        batch: Batch,
        config: ModelConfig,
        *,
        options: "LossOptions",
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The objective's sum, and the sums behind the metrics: `nll`, `tokens` and others.

        `nll` is the loss that is shown. All but `tokens` are divided by `targets`, where there is
        such a sum, else by `tokens`.
        """
        ...


class LossOptions(NamedTuple):
    """What the loss adds to cross-entropy, and how its gradient is had.

    Attributes:
        z_loss: weight of log²(Σ exp logits), which keeps logits from drifting (Chowdhery et al.
            2022, section 5).
        recompute: False takes the gradient of each block of logits while the block is there, in
            the forward pass, and stores it (one float32 array of the output matrix's size); True
            computes the block again in the backward pass.
        logits_at_once: elements of the largest block of logits that a device holds; None is
            `LOGITS_AT_ONCE`, on a GPU `LOGITS_AT_ONCE_GPU`.
        balance_loss: weight of the routers' balance loss in a mixture of experts, taken over the
            tokens of a batch (of a microbatch, where it is split). See `experts.routing_losses`.
        router_z_loss: weight of the routers' z-loss.
    """

    z_loss: float = 0.0
    recompute: bool = False
    logits_at_once: int | None = None
    balance_loss: float = 0.01
    router_z_loss: float = 0.001


def loss_fn(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    *,
    options: LossOptions = LossOptions(),
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean cross-entropy of a batch's targets, each weighted by `weights`.

    Args:
        params: the model's parameters.
        batch: see `Batch`. Negative targets (such as -100) have no weight, whatever `weights`
            says.
        config: the model.
        options: additions to the loss and how its gradient is computed.
        dropout_key: random key for training with dropout; None means none.

    Returns:
        The loss in nats per token, with additions, and metrics: `loss` without additions, `tokens`,
        the sum of weights, and for a mixture of experts `balance_loss` and `router_z_loss`,
        unweighted; all float32 scalars. Where nothing is counted all losses are 0.
    """
    objective, sums = loss_sums(params, batch, config, options=options, dropout_key=dropout_key)
    return objective / target_count(sums), mean_metrics(sums)


def mean_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics a target from the sums of an `Objective`."""
    counts = ("tokens", "targets")
    rest = {name: total / target_count(sums) for name, total in sums.items() if name not in counts}
    return {"loss": rest.pop("nll"), "tokens": sums["tokens"], **rest}


def target_count(sums: dict[str, jax.Array]) -> jax.Array:
    """What the sums of an `Objective` are divided by: 1 where nothing is counted."""
    count = sums.get("targets", sums["tokens"])
    return jnp.where(count > 0, count, 1.0)


def loss_sums(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    *,
    options: LossOptions = LossOptions(),
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `loss_fn`, but sums over tokens: the objective, and `nll`, `tokens` and the others.

    Sums are what accumulates exactly over microbatches with different numbers of tokens.

    Args:
        params: as in `loss_fn`.
        batch: as in `loss_fn`.
        config: as in `loss_fn`.
        options: as in `loss_fn`.
        dropout_key: as in `loss_fn`.
    """
    hidden = hidden_states(
        params,
        batch["tokens"],
        config,
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        dropout_key=dropout_key,
    )
    weights_BT = target_weights(batch)
    with jax.named_scope("loss"):
        objective, nll = cross_entropy(
            hidden.x_BTD,
            unembedding(params, config),
            jnp.maximum(batch["targets"], 0),
            weights_BT,
            config.logit_softcap,
            options,
        )
    tokens = jnp.sum(weights_BT)
    sums = {"nll": nll, "tokens": tokens}
    if hidden.routing is not None:
        balance, z = routing_losses(hidden.routing)
        objective += tokens * (options.balance_loss * balance + options.router_z_loss * z)
        sums |= {"balance_loss": tokens * balance, "router_z_loss": tokens * z}
    return objective, jax.tree.map(jax.lax.stop_gradient, sums)


def target_weights(batch: Batch) -> jax.Array:
    """How much each target counts: `[B, T]` float32."""
    real_BT = (batch["targets"] >= 0).astype(jnp.float32)
    return real_BT * batch["weights"] if "weights" in batch else real_BT


def cross_entropy(
    x_BTD: jax.Array,
    kernel_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    cap: float | None,
    options: LossOptions,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over all tokens: the objective, and the cross-entropy alone.

    Logits are computed in blocks of tokens and are gone after each, in both passes. The blocks cut
    the token dimension, so that each holds tokens of every device that the batch lies on.

    Args:
        x_BTD: hidden states, `[B, T, D]`.
        kernel_VD: the output matrix, `[V, D]`.
        targets_BT: `[B, T]` int, from 0 to V - 1.
        weights_BT: how much each counts, `[B, T]` float32.
        cap: of the logits, see `ModelConfig.logit_softcap`.
        options: additions, and how the gradient is had.
    """
    B, T, _ = x_BTD.shape
    V = kernel_VD.shape[0]
    blocks = _count_blocks(B, T, V, options)
    if blocks == 1:
        kernel_VD = _split(kernel_VD, x_BTD.dtype)
        return _block_sums(x_BTD, kernel_VD, V, targets_BT, weights_BT, cap, options.z_loss)

    cut = partial(_cut, blocks=blocks)
    by_block = _recomputed_sums if options.recompute else _stored_sums
    return by_block(cut(x_BTD), kernel_VD, cut(targets_BT), cut(weights_BT), cap, options.z_loss)


def token_nll(
    x_BTD: jax.Array,
    kernel_VD: jax.Array,
    targets_BT: jax.Array,
    cap: float | None,
    options: LossOptions,
) -> jax.Array:
    """The cross-entropy of each token, `[B, T]` float32, by blocks as in `cross_entropy`.

    Where there are several the backward pass computes their logits again.

    Args:
        x_BTD: hidden states, `[B, T, D]`.
        kernel_VD: the output matrix, `[V, D]`.
        targets_BT: `[B, T]` int, from 0 to V - 1.
        cap: of the logits, see `ModelConfig.logit_softcap`.
        options: how large a block may be.
    """
    B, T, _ = x_BTD.shape
    V = kernel_VD.shape[0]
    kernel_VD = _split(kernel_VD, x_BTD.dtype)
    blocks = _count_blocks(B, T, V, options)
    if blocks == 1:
        return _block_nll(x_BTD, kernel_VD, V, targets_BT, cap)[0]

    @jax.checkpoint
    def block_nll(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BtD, targets_Bt = block
        return _block_nll(x_BtD, kernel_VD, V, targets_Bt, cap)[0]

    nll_NBt = jax.lax.map(block_nll, (_cut(x_BTD, blocks), _cut(targets_BT, blocks)))
    return jnp.moveaxis(nll_NBt, 0, 2).reshape(B, -1)[:, :T]


def _count_blocks(B: int, T: int, V: int, options: LossOptions) -> int:
    """How many blocks of tokens the logits are computed in."""
    devices = math.prod(axis_parts(axis) for axis in ("batch", "sequence", "vocab_parts"))
    at_once = options.logits_at_once
    if at_once is None:
        at_once = LOGITS_AT_ONCE_GPU if platform() == "gpu" else LOGITS_AT_ONCE
    return min(T, math.ceil(B * T * V / (at_once * devices)))


def _block_length(T: int, blocks: int) -> int:
    """The tokens of a block, of at most so many."""
    parts = axis_parts("residual")
    length = math.ceil(T / blocks / parts) * parts
    if platform() == "tpu":
        # The output matrix's gradient sums over them, in tiles as wide as the matrix unit.
        whole = math.lcm(parts, TPU_TILE * axis_parts("sequence"))
        length = int(whole_tiles(T, length, whole))
    return length


def whole_tiles(T: float, length: float, tile: int) -> float:
    """A block's length, filled up to whole tiles.

    But as it is where that would be more than four times as long, or add more than a 20th to all T.
    """
    filled = math.ceil(length / tile) * tile
    pays = filled <= 4 * length and math.ceil(T / filled) * filled <= 1.05 * T
    return filled if pays else length


def _split(kernel_VD: jax.Array, dtype: Any) -> jax.Array:
    """The output matrix as the products take it: `split_vocabulary`, padded for GPUs and TPUs."""
    kernel_VD = kernel_VD.astype(dtype)
    if platform() != "cpu":
        # On a TPU these are the lanes of a register, of which each device's share fills all.
        rows = _FULL_ROWS * axis_parts("vocab_parts")
        kernel_VD = jnp.pad(kernel_VD, ((0, -kernel_VD.shape[0] % rows), (0, 0)))
    return split_vocabulary(kernel_VD)


def _cut(x: jax.Array, blocks: int) -> jax.Array:
    """`[B, T, ...]` as at most so many blocks of tokens, `[N, B, t, ...]`.

    Rows are filled up with zeros where the blocks do not divide T. Every n-th token makes a block,
    so that a sequence split over devices stays where it is.
    """
    B, T = x.shape[:2]
    length = _block_length(T, blocks)
    blocks = math.ceil(T / length)
    x = jnp.pad(x, ((0, 0), (0, blocks * length - T)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, length, blocks, *x.shape[2:]), 2, 0)


def _block_sums(
    x_BtD: jax.Array,
    kernel_VD: jax.Array,
    vocab_size: int,
    targets_Bt: jax.Array,
    weights_Bt: jax.Array,
    cap: float | None,
    z_loss: float,
) -> tuple[jax.Array, jax.Array]:
    """Of one block, with the kernel as `_split` gives it."""
    nll_Bt, log_z_Bt = _block_nll(x_BtD, kernel_VD, vocab_size, targets_Bt, cap)
    nll = jnp.sum(nll_Bt * weights_Bt)
    return nll + z_loss * jnp.sum(jnp.square(log_z_Bt) * weights_Bt), nll


def _block_nll(
    x_BtD: jax.Array,
    kernel_VD: jax.Array,
    vocab_size: int,
    targets_Bt: jax.Array,
    cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Each token's cross-entropy, and log Σ exp of its logits."""
    logits_BtV = softcap(_logits(x_BtD, kernel_VD), cap)
    logits_BtV = constrain(logits_BtV, "batch", "sequence", "vocab_parts")
    ids = jnp.arange(kernel_VD.shape[0])[None, None]
    if kernel_VD.shape[0] > vocab_size:
        logits_BtV = jnp.where(ids < vocab_size, logits_BtV, -jnp.inf)
    log_z_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
    # A comparison and a sum, where a gather's gradient would be a scatter.
    is_target_BtV = ids == targets_Bt[..., None]
    return log_z_Bt - jnp.sum(jnp.where(is_target_BtV, logits_BtV, 0), axis=-1), log_z_Bt


def _logits(x_BtD: jax.Array, kernel_VD: jax.Array) -> jax.Array:
    """The product in float32, whose own gradient is of the inputs' dtype.

    The gradient of float32 logits is float32, and two thirds of the loss's work would be products
    of that: at half the rate of a GPU's bfloat16, and over twice the bytes. On a CPU the matrix's
    gradient would be the product of the logits' gradient, turned, which costs more than to turn
    what comes out.
    """
    low_precision = x_BtD.dtype != jnp.float32
    elements = math.prod(x_BtD.shape[:2]) * kernel_VD.shape[0]
    if low_precision or (platform() == "cpu" and elements >= _WORTH_TURNING):
        return _logits_by_hand(x_BtD, kernel_VD)
    return _logits_product(x_BtD, kernel_VD)


def _logits_product(x_BtD: jax.Array, kernel_VD: jax.Array) -> jax.Array:
    return jnp.einsum("btd,vd->btv", x_BtD, kernel_VD, preferred_element_type=jnp.float32)


_logits_by_hand = jax.custom_vjp(_logits_product)


def _logits_forward(x_BtD: jax.Array, kernel_VD: jax.Array):
    return _logits_product(x_BtD, kernel_VD), (x_BtD, kernel_VD)


def _logits_backward(residuals: tuple[jax.Array, jax.Array], grad_BtV: jax.Array):
    x_BtD, kernel_VD = residuals
    grad_BtV = grad_BtV.astype(x_BtD.dtype)
    grad_x = jnp.einsum("btv,vd->btd", grad_BtV, kernel_VD)
    if platform() == "cpu":
        return grad_x, jnp.einsum("btd,btv->dv", x_BtD, grad_BtV).T
    return grad_x, jnp.einsum("btv,btd->vd", grad_BtV, x_BtD)


_logits_by_hand.defvjp(_logits_forward, _logits_backward)


def _recomputed_sums(
    x_NBtD: jax.Array, kernel_VD: jax.Array, targets: Any, weights: Any, cap: Any, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    V = kernel_VD.shape[0]
    kernel_VD = _split(kernel_VD, x_NBtD.dtype)

    @jax.checkpoint
    def block_sums(x_BtD: jax.Array, kernel_VD: jax.Array, targets: Any, weights: Any):
        return _block_sums(x_BtD, kernel_VD, V, targets, weights, cap, z_loss)

    def body(sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]):
        x_BtD, targets_Bt, weights_Bt = block
        objective, nll = block_sums(x_BtD, kernel_VD, targets_Bt, weights_Bt)
        return (sums[0] + objective, sums[1] + nll), None

    zeros = (jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(body, zeros, (x_NBtD, targets, weights))[0]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _stored_sums(
    x_NBtD: jax.Array, kernel_VD: jax.Array, targets: Any, weights: Any, cap: Any, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    # Without a gradient, as in evaluation, there is nothing to store.
    return _recomputed_sums(x_NBtD, kernel_VD, targets, weights, cap, z_loss)


def _stored_sums_forward(
    x_NBtD: jax.Array, kernel_VD: jax.Array, targets: Any, weights: Any, cap: Any, z_loss: float
):
    V = kernel_VD.shape[0]
    split_VD = _split(kernel_VD, x_NBtD.dtype)

    def body(carry: tuple[jax.Array, ...], block: tuple[jax.Array, ...]):
        objective_sum, nll_sum, grad_kernel = carry
        x_BtD, targets_Bt, weights_Bt = block
        (objective, nll), pull_back = jax.vjp(
            lambda x, kernel: _block_sums(x, kernel, V, targets_Bt, weights_Bt, cap, z_loss),
            x_BtD,
            split_VD,
        )
        grad_x, grad_block = pull_back((jnp.float32(1), jnp.float32(0)))
        grad_x = constrain(grad_x, "batch", "residual", "width")
        carry = (objective_sum + objective, nll_sum + nll, grad_kernel + grad_block)
        return carry, grad_x

    zeros = (jnp.float32(0), jnp.float32(0), jnp.zeros(split_VD.shape, jnp.float32))
    (objective, nll, grad_split), grad_x = jax.lax.scan(body, zeros, (x_NBtD, targets, weights))
    # The way back of `split_vocabulary`, in float32.
    grad_kernel = constrain(constrain(grad_split[:V], None, "columns"), "vocab", "table")
    return (objective, nll), (grad_x, grad_kernel.astype(kernel_VD.dtype))


def _stored_sums_backward(
    cap: Any, z_loss: float, gradients: tuple[jax.Array, jax.Array], cotangents: Any
):
    grad_x, grad_kernel = gradients
    # The cross-entropy alone is a metric; only the objective is differentiated.
    scale, _ = cotangents
    return (grad_x * scale.astype(grad_x.dtype), grad_kernel * scale, None, None)


_stored_sums.defvjp(_stored_sums_forward, _stored_sums_backward)
