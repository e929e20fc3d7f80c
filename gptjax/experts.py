"""Mixture of experts: a router chooses, for each token, among feed-forward layers.

Token-choice routing (Shazeer et al. 2017) without a capacity: tokens are sorted by their experts
and go through grouped products, so that every choice is computed (Gale et al. 2022). Over a mesh
each device of an `expert` group gathers the group's tokens, computes what its own experts were
chosen for, and the group sums.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.activations import activate
from gptjax.config import ModelConfig
from gptjax.params import Params, param_specs
from gptjax.sharding import (
    axis_parts,
    constrain,
    gathered,
    on_each_device,
    scattered_sum,
    summed,
)


class Routing(NamedTuple):
    """Sums over the tokens of a batch, from which the router's losses are computed.

    Stacked over layers in front where they come from a whole model. Sums, so that parts of a batch
    may be added before their products are taken.
    """

    load_E: jax.Array
    """Choices of each expert."""
    probability_E: jax.Array
    """The router's probabilities."""
    squared_log_z: jax.Array
    """log²(Σ exp logits)."""
    tokens: jax.Array
    """How many tokens."""


def routing_losses(routing: Routing) -> tuple[jax.Array, jax.Array]:
    """The two losses of a router, means over layers.

    Args:
        routing: of all layers.

    Returns:
        The balance loss `E Σ f p` over experts, f being the share of choices and p the mean
        probability, 1 at best (Fedus et al. 2021, equations 4 to 6), and the z-loss, the mean of
        log²(Σ exp logits) (Zoph et al. 2022, equation 5).
    """
    E = routing.load_E.shape[-1]
    share = routing.load_E / jnp.sum(routing.load_E, axis=-1, keepdims=True)
    probability = routing.probability_E / routing.tokens[..., None]
    balance = E * jnp.sum(share * probability, axis=-1)
    return jnp.mean(balance), jnp.mean(routing.squared_log_z / routing.tokens)


def mixture(params: Params, x_BTD: jax.Array, config: ModelConfig) -> tuple[jax.Array, Routing]:
    """The chosen experts' outputs for every token, weighted and summed.

    Args:
        params: `router`, and the experts' kernels and biases, stacked.
        x_BTD: `[B, T, D]`.
        config: the model, with `num_experts`.

    Returns:
        `[B, T, D]` in the dtype of x, and what the router did.
    """
    gates_BTk, chosen_BTk, routing = route(params["router"], x_BTD, config)
    x_BTD = constrain(x_BTD, "batch", "sequence", "width")
    names = [name for name in params if name not in ("router", "shared")]
    weights = [params[name].astype(x_BTD.dtype) for name in names]
    mesh = jax.sharding.get_abstract_mesh()
    B, T, _ = x_BTD.shape
    if mesh.empty or mesh.size == 1 or B % axis_parts("batch") or T % axis_parts("sequence"):
        # Or a few prompts on many devices: the compiler then moves what it has to.
        out_BTD = _compute(
            x_BTD, gates_BTk, chosen_BTk, dict(zip(names, weights, strict=True)), config, 0
        )
        return out_BTD, routing

    specs = param_specs(config)["blocks"]["mlp"]
    # Of one block, where the declaration's first dimension counts them.
    weight_axes = [specs[name].axes[1:] for name in names]
    # A sequence that does not divide stays whole on a tensor group.
    scatter = T % axis_parts("residual") == 0

    def local(x_btD: jax.Array, gates: jax.Array, chosen: jax.Array, *weights: jax.Array):
        x_BtD, gates_Btk, chosen_Btk = (gathered(x, "expert", 0) for x in (x_btD, gates, chosen))
        experts = {
            name: gathered(weight, "fsdp", axes.index("embed")) if "embed" in axes else weight
            for name, axes, weight in zip(names, weight_axes, weights, strict=True)
        }
        first = jax.lax.axis_index("expert") * experts["up"].shape[0]
        if "down_bias" in experts:
            # Each device of a tensor group adds a part of the sum.
            once = jax.lax.axis_index("tensor") == 0
            experts["down_bias"] = jnp.where(once, experts["down_bias"], 0)
        out = _compute(x_BtD, gates_Btk, chosen_Btk, experts, config, first)
        out = scattered_sum(out, "expert", 0)
        return scattered_sum(out, "tensor", 1) if scatter else summed(out, "tensor")

    tokens = ("batch", "sequence", None)
    out_axes = ("batch", "residual" if scatter else "sequence", None)
    on_devices = on_each_device(local, [tokens] * 3 + weight_axes, out_axes)
    return on_devices(x_BTD, gates_BTk, chosen_BTk, *weights), routing


def route(
    kernel_DE: Any, x_BTD: jax.Array, config: ModelConfig
) -> tuple[jax.Array, jax.Array, Routing]:
    """The experts of every token: weights `[B, T, k]` float32 and numbers `[B, T, k]`.

    In float32, since a choice turns on small differences.
    """
    with jax.named_scope("router"):
        logits_BTE = jnp.einsum(
            "btd,de->bte", x_BTD.astype(jnp.float32), kernel_DE.astype(jnp.float32)
        )
        probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        gates_BTk, chosen_BTk = jax.lax.top_k(probs_BTE, config.experts_per_token)
        if config.normalize_gates:
            gates_BTk = gates_BTk / jnp.sum(gates_BTk, axis=-1, keepdims=True)
        E = probs_BTE.shape[-1]
        load_E = jnp.sum(jax.nn.one_hot(chosen_BTk, E, dtype=jnp.float32), axis=(0, 1, 2))
        routing = Routing(
            load_E=load_E,
            probability_E=jnp.sum(probs_BTE, axis=(0, 1)),
            squared_log_z=jnp.sum(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))),
            tokens=jnp.float32(x_BTD.shape[0] * x_BTD.shape[1]),
        )
    return gates_BTk, chosen_BTk, routing


def _compute(
    x_BTD: jax.Array,
    gates_BTk: jax.Array,
    chosen_BTk: jax.Array,
    experts: Params,
    config: ModelConfig,
    first: Any,
) -> jax.Array:
    """What the experts given, which are those from number `first` on, add to each token."""
    B, T, D = x_BTD.shape
    k = chosen_BTk.shape[-1]
    count = experts["up"].shape[0]
    x_ND = x_BTD.reshape(-1, D)
    expert_R = chosen_BTk.reshape(-1) - first
    here_R = (expert_R >= 0) & (expert_R < count)
    # Rows are a token's choices. Those of other experts come last and belong to no group.
    expert_R = jnp.where(here_R, expert_R, count)
    order_R = jnp.argsort(expert_R)
    sizes = jnp.bincount(expert_R, length=count).astype(jnp.int32)
    sorted_experts_R = jnp.minimum(expert_R[order_R], count - 1)
    # What grouped products leave in rows of no group is not defined, in their gradients neither.
    grouped_R1 = (jnp.arange(len(order_R)) < jnp.sum(sizes))[:, None]

    def linear(x_RI: jax.Array, name: str) -> jax.Array:
        x_RI = jnp.where(grouped_R1, x_RI, 0)
        out = jax.lax.ragged_dot(x_RI, experts[name], sizes)
        out = checkpoint_name(jnp.where(grouped_R1, out, 0), "product")
        bias = experts.get(f"{name}_bias")
        return out if bias is None else out + jnp.where(grouped_R1, bias[sorted_experts_R], 0)

    rows_RD = x_ND[order_R // k]
    h_RF = linear(rows_RD, "up")
    if "gate" in experts:
        h_RF = activate(linear(rows_RD, "gate"), config) * h_RF
    else:
        h_RF = activate(h_RF, config)
    out_RD = linear(h_RF, "down")
    out_RD = out_RD[jnp.argsort(order_R)].reshape(B, T, k, D)
    return jnp.einsum("btkd,btk->btd", out_RD, gates_BTk.astype(out_RD.dtype))
