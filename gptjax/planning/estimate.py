"""Memory, traffic and time of a train step in closed form, from shapes alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from gptjax import sharding
from gptjax.config import ModelConfig
from gptjax.loss import LOGITS_AT_ONCE, LOGITS_AT_ONCE_GPU, TPU_TILE, whole_tiles
from gptjax.params import flops_per_token
from gptjax.planning.programs import Collective
from gptjax.planning.topology import Topology, abstract_mesh
from gptjax.training import TrainState, abstract_state

if TYPE_CHECKING:
    import optax

EXPECTED_MFU = {
    # MaxText's table of optimized models (maxtext.readthedocs.io, reference/models/tiering): dense
    # models on v6e and v5p from 38.55 % (Llama 3.1 405B) to 65.4 % (Llama 2 70B); PaLM on v4 46.2 %
    # (Chowdhery et al. 2022, table 3).
    "tpu": (0.38, 0.65),
    # Llama 3 405B on H100, 38 to 43 % (Grattafiori et al. 2024, table 4); Megatron-LM's models of
    # 22 to 1,008 billion parameters on A100, 41.5 to 56.3 % (Korthikanti et al. 2022, table 5).
    "gpu": (0.38, 0.56),
    # No figure for training at this scale is published: from a third of the assumed peak to most of
    # it, as dense products reach.
    "cpu": (0.33, 0.80),
}
"""Model FLOPs utilization that large dense models are trained with, by platform."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends along mesh axes in a step, at least.

    Attributes:
        axes: the mesh axes.
        sent: bytes.
        size: how many devices take part.
        local: how many of them are joined by fast links.
    """

    axes: tuple[str, ...]
    sent: float
    size: int
    local: int


@dataclass(frozen=True)
class Bounds:
    """Seconds that a step takes at least, by what limits it. None is what is not known.

    Attributes:
        compute: by the matrix rate of the chips.
        memory: by the bandwidth of their memory.
        network: by what collectives send over the links.
    """

    compute: float
    memory: float | None
    network: float | None

    @property
    def step(self) -> float:
        """The largest of them: the rest can at best be done meanwhile."""
        return max(self.compute, self.memory or 0.0, self.network or 0.0)


def held_bytes(tree: Any) -> int:
    """What one device holds of a tree of shapes with shardings, in bytes. Exact."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )


def _itemsize(dtype: Any) -> int:
    # A typed random key is two 32-bit words, which its dtype does not tell.
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """How a train step lies on a mesh: what the closed forms are computed from.

    Attributes:
        config: the model.
        axes: mesh axis -> size.
        batch: sequences a step.
        accumulate: microbatches.
        state: the train state's shapes and shardings.
        platform: "tpu", "gpu" or "cpu".
    """

    config: ModelConfig
    axes: dict[str, int]
    batch: int
    accumulate: int
    state: TrainState
    platform: str

    def tokens(self, axis: str = "sequence") -> float:
        """Tokens of a microbatch on one device, where the sequence is split as `axis` says."""
        parts = self.parts("batch") * self.parts(axis) * self.accumulate
        return self.batch * self.config.context_length / parts

    @property
    def layers(self) -> float:
        """Blocks on one device."""
        return self.config.num_layers / self.parts("layers")

    @property
    def width(self) -> int:
        """Bytes of a number in matrix work."""
        dtype = self.config.compute_dtype
        return 4 if dtype == "float32" or (dtype == "auto" and self.platform == "cpu") else 2

    def parts(self, axis: str) -> int:
        """Over how many devices a logical axis is split."""
        return sharding.axis_parts(axis, abstract_mesh(self.axes))


def lay_out(
    config: ModelConfig,
    topology: Topology,
    axes: dict[str, int],
    batch: int,
    optimizer: "optax.GradientTransformation",
    accumulate: int = 1,
) -> Layout:
    """The layout of a train step on a topology.

    Args:
        config: the model.
        topology: the chips.
        axes: the size of each mesh axis.
        batch: sequences a step.
        optimizer: any optax transformation.
        accumulate: microbatches that a batch is split into.

    Raises:
        UserError: if the batch or a dimension of the model does not divide over its mesh axes.
    """
    mesh: Any = abstract_mesh(axes)
    sharding.check_batch(batch, config.context_length, mesh, accumulate)
    state = abstract_state(config, optimizer, mesh)
    return Layout(config, axes, batch, accumulate, state, topology.platform)


def estimate_memory(layout: Layout) -> dict[str, int]:
    """Bytes that one device holds at the peak of a step, by what for.

    Returns:
        "parameters" (float32 masters) and "optimizer" (its state and the step's counters) are
        exact. "weights" are the blocks' copies in the compute dtype, "gradients" those of all
        parameters, "block inputs" what the forward pass keeps for the backward, "block" what the
        backward pass of one block works with, "logits" the block of logits with the output matrix;
        of the last two, which are not there together, the smaller is 0. They are estimates, since
        the compiler decides what lives at once.
    """
    config, c = layout.config, layout.width
    params = layout.state.params
    held = held_bytes(params)
    blocks = held_bytes(params["blocks"])
    kept, worked = _activation_bytes(layout)
    V, D = config.vocab_size / layout.parts("vocab_parts"), config.embed_dim
    rows = _rows_at_once(layout)

    # A block's weights are gathered while the one before is at work; its gradient is whole until
    # it is scattered.
    block = worked + 3 * _gathered_elements(layout) / layout.layers * c
    # Float32 logits and their gradient; the output matrix and its gradient, whole over the width.
    logits = rows * V * 4 * 2 + V * D * (4 + c)
    gradients = blocks * c / 4 + (held - blocks) + V * D * 4
    if layout.accumulate > 1:
        gradients += held
    return {
        "parameters": held,
        "optimizer": held_bytes(layout.state) - held,
        "weights": 0 if c == 4 else blocks // 2,
        "gradients": round(gradients),
        "block inputs": round(kept),
        "block": round(block) if block >= logits else 0,
        "logits": round(logits) if logits > block else 0,
    }


def _rows_at_once(layout: Layout) -> float:
    """Tokens of one device whose logits are there at once, as the loss cuts them."""
    tokens, T = layout.tokens(), layout.config.context_length / layout.parts("sequence")
    at_once = LOGITS_AT_ONCE_GPU if layout.platform == "gpu" else LOGITS_AT_ONCE
    rows = min(tokens, at_once / layout.config.vocab_size)
    length = rows / tokens * T
    if layout.platform == "tpu":
        length = whole_tiles(T, length, TPU_TILE)
    return tokens * length / T


def _gathered_elements(layout: Layout) -> float:
    """Elements of one device's blocks' weights, whole over fsdp."""
    return held_bytes(layout.state.params["blocks"]) / 4 * layout.parts("embed")


def _activation_bytes(layout: Layout) -> tuple[float, float]:
    """What the forward pass keeps for the backward, and what one block's backward works with."""
    config, c = layout.config, layout.width
    heads = config.num_heads * config.head_width / layout.parts("heads")
    keys = 2 * config.kv_heads * config.head_width / layout.parts("kv_heads")
    hidden = (3 if config.gated_mlp else 2) * config.mlp_width / layout.parts("mlp")
    if config.num_experts is not None:
        # Each device of an expert group holds the rows of all, for it may be chosen for all.
        routed = config.experts_per_token * layout.axes["expert"]
        hidden *= routed + config.shared_experts
    # Probabilities, where no kernel computes attention block by block.
    scores = 0.0
    plain = layout.platform == "cpu" or config.dropout > 0 or (layout.platform == "gpu" and c == 4)
    if plain:
        scores = config.num_heads / layout.parts("heads") * config.context_length
    tokens = layout.tokens()
    stream = layout.tokens("residual") * config.embed_dim
    products = 2 * stream + tokens * (heads + keys + hidden / 2)
    everything = 4 * stream + products + tokens * (heads + hidden + scores)
    # Where a kernel computes attention, its output is kept among the products.
    output = 0.0 if plain else tokens * heads
    kept = {"none": everything, "dots": stream + products + output, "offload": 0.0}
    saved = layout.layers * kept.get(config.remat, stream) * c
    # The inputs of two products are gathered over tensor, and gradients double the rest; scores
    # have a float32 form and a gradient.
    gathered = 2 * tokens * config.embed_dim if layout.parts("residual") > 1 else 0.0
    return saved, (2 * everything + gathered + 2 * tokens * scores) * c


def estimate_traffic(layout: Layout, linked: int) -> list[Traffic]:
    """What a device sends at least in a step, by ring algorithms.

    Weights are gathered over fsdp in the forward and the backward pass and their gradients
    scattered, for every microbatch; gradients are summed over the other axes that split the batch;
    activations are summed over tensor twice a block and pass, keys and values go round context, and
    an expert group gathers its tokens and scatters their sums.

    Args:
        layout: of the step.
        linked: devices, one after another in the mesh, that fast links join.
    """
    config, c, axes = layout.config, layout.width, layout.axes
    steps = layout.accumulate
    passes = 2 if config.remat == "none" else 3
    weights = _gathered_elements(layout) * c
    gradients = held_bytes(layout.state.params) * c / 4
    residual = layout.tokens() * config.embed_dim * c
    keys = layout.tokens() * 2 * config.kv_heads * config.head_width / layout.parts("kv_heads") * c
    gathered = layout.tokens() * config.embed_dim * axes["expert"] * c
    sent = {
        "fsdp": 3 * weights * steps,
        "data": 2 * gradients,
        "tensor": 2 * 2 * passes * layout.layers * residual * steps,
        "context": 2 * gradients + passes * layout.layers * keys * axes["context"] * steps,
        "expert": 2 * passes * layout.layers * gathered * steps,
    }
    traffic = []
    for axis, whole in sent.items():
        size = axes[axis]
        if size > 1:
            local = _local_members(axes, axis, linked)
            traffic.append(Traffic((axis,), whole * (size - 1) / size, size, local))
    return traffic


def _local_members(axes: Mapping[str, int], axis: str, linked: int) -> int:
    """How many of an axis' devices are among the first `linked` ones of the mesh."""
    names = list(axes)
    stride = math.prod(axes[name] for name in names[names.index(axis) + 1 :])
    return min(axes[axis], max(1, linked // stride))


def network_seconds(traffic: list[Traffic] | list[Collective], topology: Topology) -> float | None:
    """How long a step's traffic takes at least; None where the links' rate is not known.

    Over the fast links goes everything; over the slow ones, where the devices of a collective are
    on several slices or hosts, each device's part of what its slice or host sends.
    """
    chip = topology.chip
    fast = slow = 0.0
    for part in traffic:
        fast += part.sent if part.local > 1 else 0.0
        slow += part.sent / part.local if part.local < part.size else 0.0
    seconds = 0.0
    for sent, bandwidth in ((fast, chip.link_bandwidth), (slow, chip.network_bandwidth)):
        if sent and bandwidth is None:
            return None
        if bandwidth is not None:
            seconds = max(seconds, chip.devices * sent / bandwidth)
    return seconds


def memory_seconds(layout: Layout, topology: Topology) -> float | None:
    """How long a step's traffic to and from memory takes at least; None where it is not known.

    The state is read and written once; every pass over a microbatch reads the weights of all
    blocks, and what the forward pass keeps is written and read.
    """
    chip = topology.chip
    if chip.memory_bandwidth is None:
        return None
    kept, _ = _activation_bytes(layout)
    passes = (2 if layout.config.remat == "none" else 3) * layout.accumulate
    moved = 2 * held_bytes(layout.state)
    moved += passes * _gathered_elements(layout) * layout.width
    moved += 2 * layout.accumulate * kept
    return moved * chip.devices / chip.memory_bandwidth


def hardware_flops(layout: Layout) -> float:
    """What all devices compute in a step, in closed form.

    Full rematerialization repeats the forward pass of the blocks but for the last product of each,
    whose result nothing in the backward pass asks for.
    """
    config = layout.config
    flops = flops_per_token(config)
    if config.remat in ("full", "offload"):
        experts = 1
        if config.num_experts is not None:
            experts = config.experts_per_token + config.shared_experts
        last = config.num_layers * config.mlp_width * experts + config.vocab_size
        flops += flops / 3 - 2 * last * config.embed_dim
    return flops * layout.batch * config.context_length
